//! What the two ways of doing system calls without waiting for them have in common.
//!
//! An [`Engine`] knows nothing of requests: it makes calls and brings back the answers. `ring` and `threads` are the two
//! there are. An engine belongs to one disk and is used by that disk's thread only.

#![allow(unsafe_code)] // A call carries the addresses of memory that its request keeps.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::file::DiskFile;
use super::{ring::Ring, threads::Threads};
use crate::config::spec::Aio;
use crate::sys::io::{self as sys_io, IoVec, Wait};

/// One system call on the disk's file.
///
/// Whoever makes one keeps the ranges in place and their memory mapped until the call is answered: `Disk` does, by
/// never moving a request, by holding guest memory, and by leaking both rather than dropping them too early.
#[derive(Clone, Copy)]
pub(super) struct Call {
    pub(super) work: Work,
    /// A read or write on the file description that goes through the page cache, if the disk has two.
    pub(super) cached: bool,
    /// So long that even copying it should not happen on the loop's thread.
    pub(super) long: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Work {
    Read { iov: *const IoVec, count: usize, offset: u64 },
    Write { iov: *const IoVec, count: usize, offset: u64 },
    Sync,
    Discard { offset: u64, len: u64 },
    Allocate { mode: i32, offset: u64, len: u64 },
}

// SAFETY: the addresses stay good on any thread until the call is answered, by the rule above.
unsafe impl Send for Call {}

impl Call {
    /// Makes the call on this thread.
    pub(super) fn run(&self, file: &DiskFile, wait: Wait) -> io::Result<usize> {
        let fd = file.get(self.cached).as_fd();
        match self.work {
            // SAFETY: by the rule above, the ranges are in place and their memory is mapped.
            Work::Read { iov, count, offset } => unsafe {
                sys_io::read_at(fd, std::slice::from_raw_parts(iov, count), offset, wait)
            },
            // SAFETY: as above.
            Work::Write { iov, count, offset } => unsafe {
                sys_io::write_at(fd, std::slice::from_raw_parts(iov, count), offset)
            },
            Work::Sync => file.sync().map(|()| 0),
            Work::Discard { offset, len } => file.discard(offset, len).map(|()| 0),
            Work::Allocate { mode, offset, len } => sys_io::fallocate(fd, mode, offset, len).map(|()| 0),
        }
    }
}

/// Makes system calls somewhere else, and rings the disk's bell when answers are there.
pub(super) trait Engine: Send {
    /// Takes a call; `id` comes back with the answer. There is at most one call for an id at a time, and never more of
    /// them than `MAX_IN_FLIGHT`.
    fn queue(&mut self, id: u32, call: Call);
    /// Hands over all that was queued, in one system call if it takes one. May leave the bell silent until `rest`.
    fn push(&mut self);
    /// The next answer, if there is one.
    fn next(&mut self) -> Option<(u32, io::Result<usize>)>;
    /// Arms the bell for the next answer. False: something is to be pushed or answered now, and may not ring.
    fn rest(&mut self) -> bool;
}

/// The engine that the drive asks for; the first choice is `io_uring`.
pub(super) fn new(id: &str, aio: Aio, file: &Arc<DiskFile>, bell: &Arc<EventFd>) -> Box<dyn Engine> {
    if aio != Aio::Threads {
        match Ring::new(id, file, bell) {
            Ok(ring) => return Box::new(ring),
            Err(error) => log::info!("drive \"{id}\": no io_uring here ({error}), using threads"),
        }
    }
    Box::new(Threads::new(id, file, bell))
}
