//! Whether a file takes bytes now, asked without waiting.

#![allow(unsafe_code)] // poll(2) has no safe wrapper in the standard library.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether a write to `fd` would go ahead, or fail, without waiting.
pub fn is_writable(fd: BorrowedFd) -> bool {
    let mut asked = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd is passed and one is what the count says; a timeout of zero never waits.
    unsafe { libc::poll(&raw mut asked, 1, 0) == 1 }
}
