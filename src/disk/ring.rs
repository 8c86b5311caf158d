//! The engine of choice: io_uring, one small ring for each disk that has to wait.
//!
//! The ring is made by the thread that uses it (`IORING_SETUP_SINGLE_ISSUER`), and answers are put into it only when
//! that thread enters the kernel (`IORING_SETUP_DEFER_TASKRUN`): an answer rings the bell instead of interrupting
//! the loop. It is *not* used for what the page cache can answer at once: docs/disk.md has the figures.

#![allow(unsafe_code)] // Pushing an entry hands addresses to the kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::MAX_IN_FLIGHT;
use super::engine::{Call, Engine, Work};
use super::file::DiskFile;
use super::threads::Threads;
use crate::config::spec::MAX_VIRTIO_DEVICES;
use crate::sys::io::{IoVec, MAX_IOVECS, PUNCH_HOLE};

/// The most workers of io_uring for one loop: one for each request that all its disks can have in flight. The kernel starts them
/// when they are needed, and ends those that have been idle for seconds.
const MAX_WORKERS: u32 = (MAX_IN_FLIGHT * MAX_VIRTIO_DEVICES) as u32;

/// One disk's ring. Dropping it waits for nothing: the kernel cancels what it can and lets the rest run out.
pub(super) struct Ring {
    ring: IoUring,
    id: String,
    /// Not registered with the ring: the kernel takes rings apart at leisure, and would keep the drive's lock meanwhile.
    file: Arc<DiskFile>,
    /// For the calls that io_uring cannot make: discards of a block device. Made when the first one is queued.
    threads: Option<Threads>,
    bell: Arc<EventFd>,
    complained: bool,
}

/// Whether the kernel lets us have a ring and use it.
pub(super) fn probe(bell: &EventFd) -> io::Result<()> {
    build(1, bell).map(drop)
}

/// A ring that signals this bell. It makes each of the three system calls once, because a seccomp filter may refuse any one of
/// them. Requests in a ring that cannot submit them would never complete.
fn build(entries: u32, bell: &EventFd) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    let ring = match builder.build(entries) {
        // Linux before 6.1 does not know these flags.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
        other => other,
    };
    let ring = ring.map_err(|error| refused("io_uring_setup", &error))?;
    // Not `register_eventfd_async`: it stays silent for what an interrupt completes, which is all of direct I/O.
    ring.submitter().register_eventfd(bell.as_raw_fd()).map_err(|error| refused("io_uring_register", &error))?;
    ring.submit().map_err(|error| refused("io_uring_enter", &error))?;
    Ok(ring)
}

fn refused(call: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{call}: {error}"))
}

impl Ring {
    /// A ring with room for every request, so that it is never full.
    pub(super) fn new(id: &str, file: &Arc<DiskFile>, bell: &Arc<EventFd>) -> io::Result<Ring> {
        let ring = build(MAX_IN_FLIGHT as u32, bell)?;
        // The workers belong to the thread and not to the ring. With the kernel's default of four per processor, the requests of
        // one stalled disk would leave none for the other disks of the loop. Linux before 5.15 cannot set this limit.
        let _ = ring.submitter().register_iowq_max_workers(&mut [MAX_WORKERS, 0]);
        let (id, file, bell) = (id.to_owned(), Arc::clone(file), Arc::clone(bell));
        Ok(Ring { ring, id, file, threads: None, bell, complained: false })
    }

    /// Whether an enter would do something.
    fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Hands to the kernel what waits in the submission queue, and lets it put down answers.
    fn enter(&mut self) {
        if let Err(error) = self.ring.submit()
            && error.raw_os_error() != Some(libc::EINTR)
            && !self.complained
        {
            // Short of memory: `rest` says that there is work, and the disk tries again with the loop's next turn.
            self.complained = true;
            log::warn!("drive \"{}\": io_uring_enter: {error}; trying again", self.id);
        }
    }
}

fn entry(call: Call, file: &DiskFile) -> squeue::Entry {
    let fd = types::Fd(file.get(call.cached).as_raw_fd());
    let ranges = |count: usize| count.min(MAX_IOVECS) as u32;
    let entry = match call.work {
        Work::Read { iov, count, offset } => {
            opcode::Readv::new(fd, IoVec::as_raw(iov), ranges(count)).offset(offset).build()
        }
        Work::Write { iov, count, offset } => {
            opcode::Writev::new(fd, IoVec::as_raw(iov), ranges(count)).offset(offset).build()
        }
        Work::Discard { offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(PUNCH_HOLE).build(),
        Work::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Work::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build(),
    };
    // The kernel tries a call on this thread first, and goes on elsewhere if it would wait: unless the file system does
    // not know how to say so (`prompt`), or there is a lot to copy, which direct I/O does not do. A read that the page cache
    // cannot answer starts a read-ahead, which waits for room in the device's queue.
    let through_cache = call.cached || !file.is_direct();
    let reads = matches!(call.work, Work::Read { .. });
    let elsewhere = !file.prompt || through_cache && (reads || call.long);
    if elsewhere { entry.flags(squeue::Flags::ASYNC) } else { entry }
}

impl Engine for Ring {
    fn queue(&mut self, id: u32, call: Call) {
        if matches!(call.work, Work::Discard { .. }) && self.file.is_block_device {
            let make = || Threads::new(&self.id, &self.file, &self.bell);
            return self.threads.get_or_insert_with(make).queue(id, call);
        }
        let entry = entry(call, &self.file).user_data(u64::from(id));
        // SAFETY: by the rule of `Call`, the addresses stay good until the answer.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            log::error!("drive \"{}\": more requests than the ring has room for", self.id);
        }
        // A disk that waits for the end of our batch is idle meanwhile, which costs far more than a system call. What
        // goes through the page cache is mostly copying, and goes out together.
        if self.file.is_direct() {
            self.enter();
        }
    }

    fn push(&mut self) {
        // What is answered while we are in the kernel is seen right behind, so the bell need not ring for it.
        self.ring.completion().disable_eventfd();
        if self.has_work() {
            self.enter();
        }
        if let Some(threads) = &mut self.threads {
            threads.push();
        }
    }

    fn next(&mut self) -> Option<(u32, io::Result<usize>)> {
        if let Some(answer) = self.threads.as_mut().and_then(Threads::next) {
            return Some(answer);
        }
        let entry = self.ring.completion().next()?;
        let result = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some((entry.user_data() as u32, result))
    }

    fn rest(&mut self) -> bool {
        // A locked instruction, so the kernel either sees the bell armed or we see what it has put down.
        self.ring.completion().enable_eventfd();
        !self.has_work() && self.ring.completion().is_empty() && self.threads.as_mut().is_none_or(Threads::rest)
    }
}
