//! Vectored reads and writes of files that have no position (sockets, character devices), on memory that others may write
//! at the same time. None of them waits.
//!
//! It is not for disks: `io` has those. Any thread may call anything.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::io::IoVec;

/// The most ranges of memory that one call moves.
pub const MAX_RANGES: usize = 64;

/// Ranges of memory that one call is to fill or to send, in their order.
pub struct Ranges<'m> {
    ranges: [libc::iovec; MAX_RANGES],
    count: usize,
    bytes: usize,
    memory: PhantomData<VolatileSlice<'m>>,
}

impl Default for Ranges<'_> {
    fn default() -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Ranges { ranges: [none; MAX_RANGES], count: 0, bytes: 0, memory: PhantomData }
    }
}

impl<'m> Ranges<'m> {
    /// Adds a range. False, and nothing is added, if there are [`MAX_RANGES`].
    pub fn push(&mut self, slice: &VolatileSlice<'m>) -> bool {
        let Some(range) = self.ranges.get_mut(self.count) else { return false };
        let (iov_base, iov_len) = IoVec::new(slice).parts();
        *range = libc::iovec { iov_base, iov_len };
        self.count += 1;
        self.bytes += iov_len;
        true
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Reads a file that was opened with `O_NONBLOCK`. The number of bytes, 0 at its end.
///
/// # Errors
/// What readv(2) says; `WouldBlock` if there is nothing yet.
pub fn read(fd: BorrowedFd<'_>, into: &Ranges<'_>) -> io::Result<usize> {
    retry(|| {
        // SAFETY: the first `count` ranges are memory that lives as long as `into`, and to which nobody has a reference.
        unsafe { libc::readv(fd.as_raw_fd(), into.ranges.as_ptr(), into.count as libc::c_int) }
    })
}

/// Writes to a socket that does not block. The number of bytes, which may be less than all.
///
/// # Errors
/// What writev(2) says; `WouldBlock` if there is no room, `BrokenPipe` if nobody reads any more.
pub fn write(fd: BorrowedFd<'_>, from: &Ranges<'_>) -> io::Result<usize> {
    retry(|| {
        // SAFETY: as in `read`; the kernel only reads them.
        unsafe { libc::writev(fd.as_raw_fd(), from.ranges.as_ptr(), from.count as libc::c_int) }
    })
}

/// Calls until no signal comes between.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
