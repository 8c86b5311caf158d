//! One request: what is left of it, its next system call, and what the answer to that call means.
//!
//! Short transfers go on where they stopped, interruptions are repeated, and what a file system cannot do is done in
//! another way or left out. It is *not* concerned with who makes the call. Belongs to one disk and its thread.

#![allow(unsafe_code)] // Guest memory is copied to and from bounce buffers.

use std::io;

use vm_memory::GuestMemoryBackend;

use super::bounce::{BOUNCE_BYTES, Bounces, ZERO_BYTES};
use super::engine::{Call, Work};
use super::{GuestRam, IN_PLACE_BYTES, Op, Segment};
use crate::sys::io::{IoVec, PUNCH_HOLE};

/// How often an interrupted call is repeated before the guest is told.
const MAX_RETRIES: u8 = 16;
/// A request keeps room for this many ranges when it is done; more is given back.
const KEPT_IOVECS: usize = 256;

/// What is to be done; [`Op`] without the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    #[default]
    Read,
    Write,
    Flush,
    Discard,
    Zero {
        unmap: bool,
    },
    /// `Zero` where the file system has no call for it: zeros are written.
    WriteZeros,
}

/// Which way a request takes to the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Route {
    /// The guest's memory, the file as opened.
    #[default]
    Plain,
    /// `O_DIRECT` through a bounce buffer, because the guest's memory is not aligned.
    Bounce,
    /// Through the page cache, because offset or length is not aligned; alone, because the cache works on whole pages.
    Alone,
}

/// What comes after a call's answer.
pub(super) enum Step {
    /// Another call.
    Again,
    /// The request's result.
    Done(io::Result<()>),
}

/// One request, or a free slot.
#[derive(Default)]
pub(super) struct Request {
    pub(super) token: u32,
    pub(super) kind: Kind,
    pub(super) route: Route,
    /// Where the rest begins, and how many bytes it has.
    pub(super) offset: u64,
    pub(super) left: u64,
    /// The bounce buffer, from start to end.
    pub(super) bounce: Option<usize>,
    /// The guest's memory; `iov[next..]` is the rest.
    pub(super) iov: Vec<IoVec>,
    next: usize,
    /// The range handed to the kernel when it is not the guest's: it must stay where it is during the call.
    own: Option<IoVec>,
    retries: u8,
}

impl Request {
    /// Makes a free slot into the request that `op` describes. `EFAULT`: a segment is not guest memory.
    pub(super) fn fill(&mut self, op: Op<'_>, token: u32, ram: &GuestRam) -> io::Result<()> {
        self.token = token;
        (self.kind, self.offset, self.left) = match op {
            Op::Read { offset, segments } => (Kind::Read, offset, self.translate(segments, ram)?),
            Op::Write { offset, segments } => (Kind::Write, offset, self.translate(segments, ram)?),
            Op::Flush => (Kind::Flush, 0, 0),
            Op::Discard { offset, len } => (Kind::Discard, offset, len),
            Op::WriteZeroes { offset, len, unmap } => (Kind::Zero { unmap }, offset, len),
        };
        Ok(())
    }

    fn translate(&mut self, segments: &[Segment], ram: &GuestRam) -> io::Result<u64> {
        let mut total = 0;
        for segment in segments {
            // One lookup: the regions of guest memory do not touch, so a segment that leaves one leaves them all.
            let slice = GuestMemoryBackend::get_slice(ram, segment.addr, segment.len as usize);
            self.iov.push(IoVec::new(&slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?));
            total += u64::from(segment.len);
        }
        Ok(total)
    }

    /// Makes it a free slot again.
    pub(super) fn clear(&mut self) {
        let mut iov = std::mem::take(&mut self.iov);
        iov.clear();
        if iov.capacity() > KEPT_IOVECS {
            iov = Vec::new();
        }
        *self = Request { iov, ..Request::default() };
    }

    /// The next system call. The request must stay where it is until that is answered.
    pub(super) fn call(&mut self, bounces: &Bounces) -> Call {
        let (offset, len) = (self.offset, self.left);
        let work = match self.kind {
            Kind::Read | Kind::Write if self.route == Route::Bounce => {
                let piece = usize::try_from(len).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
                self.own = self.bounce.and_then(|bounce| bounces.slice(bounce, piece)).map(|s| IoVec::new(&s));
                if self.kind == Kind::Write {
                    self.copy(bounces, piece);
                }
                self.transfer(self.own.as_slice())
            }
            Kind::Read | Kind::Write => self.transfer(self.iov.get(self.next..).unwrap_or_default()),
            Kind::WriteZeros => {
                self.own = bounces.zeros(usize::try_from(len).unwrap_or(ZERO_BYTES));
                self.transfer(self.own.as_slice())
            }
            Kind::Flush => Work::Sync,
            Kind::Discard => Work::Discard { offset, len },
            Kind::Zero { unmap: true } => Work::Allocate { mode: PUNCH_HOLE, offset, len },
            Kind::Zero { unmap: false } => {
                Work::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len }
            }
        };
        // A call that transfers no data is always made on `DiskFile::file`.
        let cached = self.route == Route::Alone && matches!(work, Work::Read { .. } | Work::Write { .. });
        Call { work, cached, long: len > IN_PLACE_BYTES }
    }

    fn transfer(&self, iov: &[IoVec]) -> Work {
        let (iov, count, offset) = (iov.as_ptr(), iov.len(), self.offset);
        match self.kind {
            Kind::Read => Work::Read { iov, count, offset },
            _ => Work::Write { iov, count, offset },
        }
    }

    /// What the answer to the call means: a count of bytes for reads and writes, nothing for the rest.
    pub(super) fn settle(&mut self, result: io::Result<usize>, bounces: &Bounces) -> Step {
        let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
        if matches!(errno, Some(libc::EINTR | libc::EAGAIN)) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Step::Again;
        }
        let cannot = matches!(errno, Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV));
        match (self.kind, result) {
            (Kind::Discard, _) if cannot => Step::Done(Ok(())),
            (Kind::Zero { .. }, _) if cannot => {
                self.kind = Kind::WriteZeros;
                Step::Again
            }
            (_, Err(error)) => Step::Done(Err(error)),
            (Kind::Flush | Kind::Discard | Kind::Zero { .. }, Ok(_)) => Step::Done(Ok(())),
            // The capacity is inside the file, so the file has become shorter under us.
            (_, Ok(0)) => Step::Done(Err(io::Error::from_raw_os_error(libc::EIO))),
            (_, Ok(count)) => {
                self.advance(count, bounces);
                if self.left == 0 { Step::Done(Ok(())) } else { Step::Again }
            }
        }
    }

    fn advance(&mut self, count: usize, bounces: &Bounces) {
        if self.route == Route::Bounce && self.kind == Kind::Read {
            self.copy(bounces, count);
        }
        self.retries = 0;
        self.offset += count as u64;
        self.left = self.left.saturating_sub(count as u64);
        let mut count = count;
        while let Some(iov) = self.iov.get_mut(self.next)
            && count > 0
        {
            let step = count.min(iov.len());
            iov.advance(step);
            count -= step;
            self.next += usize::from(iov.is_empty());
        }
    }

    /// Copies the next `len` bytes between guest memory and the bounce buffer, the way that the request goes.
    fn copy(&self, bounces: &Bounces, len: usize) {
        let Some(mut bounce) = self.bounce.and_then(|bounce| bounces.slice(bounce, len)) else { return };
        for iov in self.iov.get(self.next..).unwrap_or_default() {
            if bounce.is_empty() {
                return;
            }
            // SAFETY: the disk keeps the guest memory that the ranges were made from.
            let guest = unsafe { iov.slice() };
            match self.kind {
                Kind::Read => bounce.copy_to_volatile_slice(guest),
                _ => guest.copy_to_volatile_slice(bounce),
            }
            let Ok(rest) = bounce.offset(guest.len().min(bounce.len())) else { return };
            bounce = rest;
        }
    }
}
