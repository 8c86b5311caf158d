//! Whether a file takes bytes now, asked without waiting; and reading a file that has none yet.

#![allow(unsafe_code)] // poll(2) has no safe wrapper in the standard library.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// How long a reader waits before it reports that, in milliseconds.
const PATIENCE_MS: i32 = 1000;

/// Whether a write to `fd` would go ahead, or fail, without waiting.
pub fn is_writable(fd: BorrowedFd) -> bool {
    is_ready(fd, libc::POLLOUT, 0)
}

/// Whether one of the events is there within that number of milliseconds; -1 waits without a limit.
fn is_ready(fd: BorrowedFd, events: i16, timeout_ms: i32) -> bool {
    let mut asked = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd is passed and one is what the count says.
    unsafe { libc::poll(&raw mut asked, 1, timeout_ms) == 1 }
}

/// Reads a file that was opened with `O_NONBLOCK` as if it were blocking, and reports when it has waited for a second.
pub struct Patient<'a, F: FnOnce()> {
    file: &'a File,
    tell: Option<F>,
}

impl<'a, F: FnOnce()> Patient<'a, F> {
    /// A reader of `file` that calls `tell` once, when it has waited for a second.
    pub fn new(file: &'a File, tell: F) -> Self {
        Patient { file, tell: Some(tell) }
    }
}

impl<F: FnOnce()> Read for Patient<'_, F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            // A FIFO that no process has opened for writing reads as if it were at its end.
            let patience = if self.tell.is_some() { PATIENCE_MS } else { -1 };
            if is_ready(self.file.as_fd(), libc::POLLIN, patience) {
                match self.file.read(bytes) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    result => return result,
                }
            } else if let Some(tell) = self.tell.take() {
                tell();
            }
        }
    }
}
