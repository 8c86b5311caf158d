//! The file behind a virtio disk: reads, writes, flushes and holes that never make an event loop wait.
//!
//! It is *not* the virtio device: it knows neither rings nor sectors nor QMP. A [`Disk`] is made by the main thread and
//! then lives in one device worker; the thread that submits first is the only one to use it from then on.
//! `docs/disk.md` says why each kind of request goes the way it goes.

mod bounce;
mod engine;
mod file;
mod request;
mod ring;
mod threads;

#[cfg(test)]
mod block_device_test;
#[cfg(test)]
mod disk_test;
#[cfg(test)]
mod fault_test;
#[cfg(test)]
mod fuse_test;
#[cfg(test)]
mod testing;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::spec::{Access, Aio, DriveSpec};
use crate::error::{Context, Error, Result};
use crate::memory::GuestRam;
use crate::sys::io::Wait;
use bounce::Bounces;
use engine::{Call, Engine};
use file::DiskFile;
pub use file::Topology;
use request::{Kind, Request, Route, Step};

/// The most requests a disk has in flight; a device's queue must not be longer.
pub const MAX_IN_FLIGHT: usize = 256;

/// What is read or written in place, on the loop's own thread, is at most this long: above it, copying from the page
/// cache would hold up the loop's other devices.
const IN_PLACE_BYTES: u64 = 256 << 10;

/// How often one [`Disk::poll`] goes round before it lets the loop serve others.
const MAX_ROUNDS: usize = 4;

/// One piece of guest memory: what a descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its guest-physical address.
    pub addr: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

/// A request to a disk; offsets and lengths are in bytes, inside the disk's capacity.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Fill the segments from `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to, in this order.
        segments: &'a [Segment],
    },
    /// Write the segments from `offset` on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from, in this order.
        segments: &'a [Segment],
    },
    /// Make every write that completed before this call durable (`fdatasync`). Writes still in flight are not covered.
    Flush,
    /// The range is not needed any more. A hint: a file system that cannot do it does nothing.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// What became of a request at once.
#[derive(Debug)]
pub enum Submitted {
    /// It is finished, and [`Disk::poll`] will not mention it.
    Done(io::Result<()>),
    /// [`Disk::poll`] will name its token, once.
    Queued,
}

/// The file behind one disk, and everything that is in flight on it.
pub struct Disk {
    id: String,
    aio: Aio,
    access: Access,
    file: Arc<DiskFile>,
    bell: Arc<EventFd>,
    /// Made by the first request that has to wait: most disks in memory never need one.
    engine: Option<Box<dyn Engine>>,
    flight: Flight,
}

/// A hand on a disk's file. It keeps the file open, so it goes no later than the disk.
#[derive(Clone)]
pub struct Backing {
    file: Arc<DiskFile>,
    access: Access,
}

impl Backing {
    /// Makes the disk `bytes` long; a block device must have become so before. Its new size in bytes, which holds for
    /// requests from here on. It may wait for as long as the file does.
    ///
    /// # Errors
    /// The disk is read-only, would become smaller, or the file cannot become so large.
    pub fn grow(&self, bytes: u64) -> Result<u64> {
        if self.access == Access::ReadOnly {
            return Err(Error::usage("the drive is read-only, and so is the length of its file"));
        }
        self.file.grow(bytes)
    }
}

/// The requests, and the memory that the kernel uses for them.
struct Flight {
    ram: Arc<GuestRam>,
    /// By our own number, never by one of the guest's. Room for all from the start: the kernel holds addresses inside a
    /// request, so none may move.
    slots: Vec<Request>,
    free: Vec<u32>,
    bounces: Bounces,
    /// What may not start yet, oldest first: see [`Flight::may_start`].
    waiting: VecDeque<u32>,
    /// How many requests the engine has.
    running: usize,
    /// Whether one of them must run alone.
    alone: bool,
}

impl Disk {
    /// Opens and locks the drive's file.
    ///
    /// # Errors
    ///
    /// The file is missing, neither a regular file nor a block device, smaller than a sector, locked by somebody else,
    /// or cannot be opened with `direct=on`; or `aio=io_uring` and the kernel refuses it.
    pub fn open(spec: &DriveSpec, ram: Arc<GuestRam>) -> Result<Disk> {
        let context = || format!("drive \"{}\"", spec.id);
        let file = DiskFile::open(spec).context(context)?;
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context(context)?;
        if spec.aio == Aio::IoUring {
            let told = || format!("drive \"{}\": the kernel refuses io_uring: leave out aio=io_uring", spec.id);
            ring::probe(&bell).context(told)?;
        }
        let flight = Flight {
            ram,
            slots: Vec::with_capacity(MAX_IN_FLIGHT),
            free: Vec::new(),
            bounces: Bounces::new(file.is_direct()).context(context)?,
            waiting: VecDeque::new(),
            running: 0,
            alone: false,
        };
        Ok(Disk {
            id: spec.id.clone(),
            aio: spec.aio,
            access: spec.access,
            file: Arc::new(file),
            bell: Arc::new(bell),
            engine: None,
            flight,
        })
    }

    /// The capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.file.capacity() / 512
    }

    /// A hand on the file for those who may wait for it.
    pub fn backing(&self) -> Backing {
        Backing { file: Arc::clone(&self.file), access: self.access }
    }

    /// Makes durable what was written. It may wait for as long as the file does, so never on a loop's thread, and only when
    /// nothing is in flight. Afterwards the disk may go to another thread.
    ///
    /// # Errors
    /// What fdatasync(2) says.
    pub fn sync(&mut self) -> io::Result<()> {
        // A ring is for the thread that made it.
        self.engine = None;
        if self.access == Access::ReadOnly { Ok(()) } else { self.file.sync() }
    }

    /// Whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// The sizes to tell the guest. A request that is not a multiple of the physical block may take longer.
    pub fn topology(&self) -> Topology {
        self.file.topology()
    }

    /// Rings when [`poll`](Self::poll) should be called. To be watched edge-triggered; nobody reads it.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// How many requests are queued or under way.
    pub fn in_flight(&self) -> usize {
        self.flight.slots.len() - self.flight.free.len()
    }

    /// Starts a request, or finishes it when that takes no waiting. Never blocks.
    ///
    /// `token` comes back from [`poll`](Self::poll), and means nothing here. A queued request reaches the kernel with
    /// the next `poll`. Its memory is the kernel's until it is done, whatever the guest does meanwhile. Errors carry an
    /// errno: `EFAULT` is a segment outside guest memory, `EINVAL` a range outside the disk, `EROFS` a change to a
    /// read-only disk, `EBUSY` more than [`MAX_IN_FLIGHT`] requests, `EIO` a file that ended early, others the file's.
    pub fn submit(&mut self, op: Op<'_>, token: u32) -> Submitted {
        let Some(id) = self.flight.take() else {
            return Submitted::Done(Err(io::Error::from_raw_os_error(libc::EBUSY)));
        };
        match self.start(id, op, token) {
            Some(result) => {
                self.flight.release(id);
                Submitted::Done(result)
            }
            None => Submitted::Queued,
        }
    }

    /// Fills the request; `Some` if it is done already.
    fn start(&mut self, id: u32, op: Op<'_>, token: u32) -> Option<io::Result<()>> {
        let flight = &mut self.flight;
        let request = &mut flight.slots[id as usize];
        if let Err(error) = request.fill(op, token, &flight.ram) {
            return Some(Err(error));
        }
        if request.offset.checked_add(request.left).is_none_or(|end| end > self.file.capacity()) {
            return Some(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let changes = !matches!(request.kind, Kind::Read | Kind::Flush);
        if changes && self.access == Access::ReadOnly {
            return Some(Err(io::Error::from_raw_os_error(libc::EROFS)));
        }
        let empty = match request.kind {
            Kind::Flush => self.file.in_memory || self.access == Access::ReadOnly,
            _ => request.left == 0,
        };
        if empty {
            return Some(Ok(()));
        }
        request.route = self.file.route(request);
        if let Some(result) = self.in_place(id) {
            return Some(result);
        }
        self.flight.waiting.push_back(id);
        self.start_waiting();
        None
    }

    /// Reads or writes at once if that cannot wait for a disk; `None` if it could, or if there is more to do.
    fn in_place(&mut self, id: u32) -> Option<io::Result<()>> {
        let request = &mut self.flight.slots[id as usize];
        let wait = match request.kind {
            Kind::Read | Kind::Write if self.file.in_memory => Wait::Allowed,
            Kind::Read if self.file.prompt && !self.file.is_direct() => Wait::Refused,
            _ => return None,
        };
        if request.left > IN_PLACE_BYTES {
            return None;
        }
        let result = request.call(&self.flight.bounces).run(&self.file, wait);
        match request.settle(result, &self.flight.bounces) {
            Step::Again => None,
            Step::Done(result) => Some(result),
        }
    }

    /// Hands to the kernel what was submitted, and reports what is finished.
    ///
    /// To be called at the end of each batch of submissions and whenever [`bell`](Self::bell) rings. Calls `done` with
    /// each finished request's token, in any order. One call does a bounded amount of work; the bell rings for the rest.
    pub fn poll(&mut self, mut done: impl FnMut(u32, io::Result<()>)) {
        for _ in 0..MAX_ROUNDS {
            let Some(engine) = self.engine.as_mut() else { return };
            engine.push();
            for _ in 0..MAX_IN_FLIGHT {
                let Some((id, result)) = self.engine.as_mut().and_then(|engine| engine.next()) else { break };
                self.finish(id, result, &mut done);
            }
            self.start_waiting();
            if self.engine.as_mut().is_none_or(|engine| engine.rest()) {
                return;
            }
        }
        self.ring_bell();
    }

    fn ring_bell(&self) {
        if let Err(error) = self.bell.write(1) {
            log::error!("drive \"{}\": its eventfd: {error}", self.id);
        }
    }

    /// Takes one answer from the engine: the request goes on, or is done.
    fn finish(&mut self, id: u32, result: io::Result<usize>, done: &mut impl FnMut(u32, io::Result<()>)) {
        let request = &mut self.flight.slots[id as usize];
        match request.settle(result, &self.flight.bounces) {
            Step::Again => {
                let call = request.call(&self.flight.bounces);
                if let Some(engine) = self.engine.as_mut() {
                    engine.queue(id, call);
                }
            }
            Step::Done(result) => {
                let token = request.token;
                self.flight.end(id);
                done(token, result);
            }
        }
    }

    /// Gives the engine what may run now, in the order of submission.
    fn start_waiting(&mut self) {
        while let Some(&id) = self.flight.waiting.front()
            && self.flight.may_start(id)
        {
            self.flight.waiting.pop_front();
            let call = self.flight.begin(id);
            let engine = self.engine.get_or_insert_with(|| engine::new(&self.id, self.aio, &self.file, &self.bell));
            engine.queue(id, call);
        }
    }
}

impl Flight {
    /// A free slot, or a new one.
    fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        if self.slots.len() == MAX_IN_FLIGHT {
            return None;
        }
        self.slots.push(Request::default());
        u32::try_from(self.slots.len() - 1).ok()
    }

    fn release(&mut self, id: u32) {
        self.slots[id as usize].clear();
        self.free.push(id);
    }

    /// A request that must run alone waits for all before it; all after it wait for it. A bounce buffer may be waited
    /// for as well. Otherwise requests do not wait for each other.
    fn may_start(&self, id: u32) -> bool {
        match self.slots[id as usize].route {
            Route::Plain => !self.alone,
            Route::Bounce => !self.alone && self.bounces.has_free(),
            Route::Alone => self.running == 0,
        }
    }

    fn begin(&mut self, id: u32) -> Call {
        let request = &mut self.slots[id as usize];
        match request.route {
            Route::Plain => (),
            Route::Bounce => request.bounce = self.bounces.take(),
            Route::Alone => self.alone = true,
        }
        self.running += 1;
        request.call(&self.bounces)
    }

    fn end(&mut self, id: u32) {
        let request = &mut self.slots[id as usize];
        if let Some(bounce) = request.bounce.take() {
            self.bounces.give_back(bounce);
        }
        if request.route == Route::Alone {
            self.alone = false;
        }
        self.running -= 1;
        self.release(id);
    }
}

impl Drop for Disk {
    /// Does not wait. What is still in flight is cancelled where the kernel can do that, and what it uses, guest memory
    /// included, is leaked: the kernel may go on for as long as the file stalls, and even `close` would wait for that.
    fn drop(&mut self) {
        self.engine = None;
        let flight = &mut self.flight;
        if flight.running == 0 {
            // A thread that is just ending may still have the file open.
            self.file.unlock();
        } else {
            log::warn!("drive \"{}\": closed with {} requests in flight", self.id, flight.running);
            let (slots, bounces) = (std::mem::take(&mut flight.slots), std::mem::take(&mut flight.bounces));
            std::mem::forget((Arc::clone(&self.file), Arc::clone(&flight.ram), slots, bounces));
        }
    }
}
