//! virtio-blk (virtio 1.2, section 5.2): chains to disk operations, their results to status bytes.
//!
//! The file behind it, asynchronous I/O and alignment are `disk`'s business; rings and interrupts the worker's. A
//! chain that is well formed as a chain and not as a request is answered with VIRTIO_BLK_S_IOERR, or given back empty
//! where it has no place for a status. Runs in the loop of the drive's iothread, or main's.

mod counters;
mod throttle;
mod vacant;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::counters::add;
use crate::disk::{Disk, Op, Segment, Submitted, Topology};
use crate::error::{Context, Result};
use crate::event::{Cx, Done, Event, Receiver, Sender, channel};
use crate::memory::GuestRam;
use crate::virtio::{Buffer, Chain, Completions, DEVICE_TAG, Device, FaultLog, Held, Page, Verdict, gather};
use throttle::{MALFORMED, cost};

pub use counters::{BlockCounters, Kind};
pub use throttle::{SetLimits, Throttle};
pub use vacant::Vacant;

/// Descriptors of the one queue: the original's number, and enough for any driver's depth.
pub const QUEUE_SIZE: u16 = 256;
/// Data segments in one request: a full queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The device's unit of addresses, whatever the block size (section 5.2.4).
const SECTOR: u64 = 512;
const HEADER_BYTES: usize = 16;
/// What the driver reads as the serial number (section 5.2.6).
const ID_BYTES: usize = 20;
/// Sectors in one discard or write-zeroes: 2 GiB, so that one request does not hold a disk for minutes.
const UNMAP_SECTORS: u32 = 1 << 22;
/// Where the capacity stands in the configuration, in sectors (section 5.2.4).
const CAPACITY: usize = 0;
/// The tags of what the drive waits for itself: its disk, and its operator.
const BELL: u32 = DEVICE_TAG;
const ORDERS: u32 = DEVICE_TAG + 1;

/// An operation the host refused, for the event BLOCK_IO_ERROR.
#[derive(Debug)]
pub struct IoFailure {
    /// What was asked.
    pub kind: Kind,
    /// Why it was not done.
    pub error: io::Error,
}

/// Where failures are told.
pub type FailureReport = Box<dyn FnMut(IoFailure) + Send>;

/// One drive.
pub struct Block {
    id: String,
    serial: [u8; ID_BYTES],
    disk: Disk,
    segments: Vec<Segment>,
    table: Table,
    throttle: Throttle,
    orders: (Sender<Order>, Receiver<Order>),
    /// The slips of those who wait until the guest has been told of its new size.
    grown: Vec<Done<()>>,
}

/// What an operator wants of a drive in use.
pub enum Order {
    /// Other limits.
    Limit(SetLimits),
    /// Another serial number; its first 20 bytes are used.
    Identify(String),
    /// Its file has become longer: the slip is ended when the guest has been told.
    Grow(Done<()>),
}

/// The requests that the disk has, by our own token and never by a number of the guest's, and how they end.
struct Table {
    ram: Arc<GuestRam>,
    /// As many as the guest has had in flight at once.
    requests: Vec<Request>,
    free: Vec<u32>,
    counters: Arc<BlockCounters>,
    log: FaultLog,
    report: FailureReport,
}

#[derive(Clone, Copy)]
struct Request {
    queue: u16,
    head: u16,
    kind: Kind,
    bytes: u32,
    begin_ns: u64,
    status: GuestAddress,
}

/// A chain read as a request: the header, and where its status goes.
struct Header {
    kind: u32,
    sector: u64,
    status: GuestAddress,
}

/// A request that does not go to the disk.
enum Aside {
    /// Answered with this status byte, behind so many bytes of data.
    Answer(u32, u32),
    /// One that the guest built wrongly: of which kind, and the status byte.
    Invalid(Kind, u32),
}

/// What the disk is to do, of which kind it is counted, and its length in bytes.
type Work<'a> = (Op<'a>, Kind, u32);

impl Block {
    /// A drive called `id` with the given serial number (cut at 20 bytes) on an opened disk. `report` is called at a
    /// limited rate: a guest can read a bad sector as often as it likes.
    pub fn new(
        id: &str,
        serial: &str,
        disk: Disk,
        throttle: Throttle,
        ram: Arc<GuestRam>,
        report: FailureReport,
    ) -> Self {
        Block {
            id: id.to_string(),
            serial: padded(serial),
            disk,
            segments: Vec::new(),
            table: Table {
                ram,
                requests: Vec::new(),
                free: Vec::new(),
                counters: Arc::default(),
                log: FaultLog::default(),
                report,
            },
            throttle,
            orders: channel(),
            grown: Vec::new(),
        }
    }

    /// The way to change it while it is in use.
    pub fn orders(&self) -> Sender<Order> {
        self.orders.0.clone()
    }

    /// Carries out the orders. True if throttled chains may be tried again.
    fn take_orders(&mut self, cx: &Cx<'_>) -> bool {
        let mut changed = false;
        while let Some(order) = self.orders.1.receive() {
            match order {
                Order::Limit(SetLimits { limits, done }) => {
                    self.throttle.set(cx.now_ns(), &limits);
                    done.end(());
                    changed = true;
                }
                Order::Identify(serial) => self.serial = padded(&serial),
                Order::Grow(done) => self.grown.push(done),
            }
        }
        changed
    }

    /// The drive's counts, for whoever asks.
    pub fn counters(&self) -> Arc<BlockCounters> {
        self.table.counters.clone()
    }
}

/// Translates one chain. What it borrows apart from the segments is free again when it is done.
struct Translation<'s, 'd> {
    segments: &'s mut Vec<Segment>,
    table: &'d Table,
    serial: &'d [u8],
    capacity: u64,
}

impl<'s> Translation<'s, '_> {
    /// Translates a request for the disk, or finds that it is none for it.
    fn translate(mut self, header: &Header, chain: &Chain) -> std::result::Result<Work<'s>, Aside> {
        let invalid = |kind| Aside::Invalid(kind, VIRTIO_BLK_S_IOERR);
        match header.kind {
            VIRTIO_BLK_T_IN => {
                let (offset, bytes) = self.place(header.sector, chain.writable(), 0, 1).ok_or(invalid(Kind::Read))?;
                Ok((Op::Read { offset, segments: self.segments }, Kind::Read, bytes))
            }
            VIRTIO_BLK_T_OUT => {
                let (offset, bytes) =
                    self.place(header.sector, chain.readable(), HEADER_BYTES, 0).ok_or(invalid(Kind::Write))?;
                Ok((Op::Write { offset, segments: self.segments }, Kind::Write, bytes))
            }
            VIRTIO_BLK_T_FLUSH => Ok((Op::Flush, Kind::Flush, 0)),
            VIRTIO_BLK_T_GET_ID => {
                self.collect(chain.writable(), 0, 1).ok_or(invalid(Kind::Read))?;
                let mut left = self.serial;
                for segment in self.segments.iter() {
                    let (now, later) = left.split_at(left.len().min(segment.len as usize));
                    self.table.ram.write_slice(now, segment.addr).map_err(|_| invalid(Kind::Read))?;
                    left = later;
                }
                Err(Aside::Answer(VIRTIO_BLK_S_OK, (ID_BYTES - left.len()) as u32))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.translate_unmap(header.kind, chain.readable()),
            _ => Err(Aside::Answer(VIRTIO_BLK_S_UNSUPP, 0)),
        }
    }

    /// A discard or write-zeroes of one range, which is as many as `max_discard_seg` allows (section 5.2.6).
    fn translate_unmap(&self, kind: u32, buffers: &[Buffer]) -> std::result::Result<Work<'s>, Aside> {
        let invalid = |status| Aside::Invalid(Kind::Unmap, status);
        let mut range = [0; HEADER_BYTES + 1];
        if gather(&self.table.ram, buffers, HEADER_BYTES as u64, &mut range) != HEADER_BYTES {
            return Err(invalid(VIRTIO_BLK_S_IOERR));
        }
        let [sector, rest] = [word64(&range, 0), word64(&range, 8)];
        let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        // Section 5.2.6.2: unknown flags, and unmap in a discard, are answered as unsupported.
        if flags & !(if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP }) != 0 {
            return Err(invalid(VIRTIO_BLK_S_UNSUPP));
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.offset(sector, len).filter(|_| sectors <= UNMAP_SECTORS);
        let offset = offset.ok_or(invalid(VIRTIO_BLK_S_IOERR))?;
        let op = if discard {
            Op::Discard { offset, len }
        } else {
            Op::WriteZeroes { offset, len, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 }
        };
        Ok((op, Kind::Unmap, len.min(u32::MAX.into()) as u32))
    }

    /// Collects the data of a read or write in `self.segments`. Its offset and length in bytes, if they are whole
    /// sectors on the disk.
    fn place(&mut self, sector: u64, buffers: &[Buffer], skip: usize, cut: u32) -> Option<(u64, u32)> {
        let bytes = self.collect(buffers, skip, cut)?;
        Some((self.offset(sector, bytes.into())?, bytes))
    }

    /// Collects `buffers` in `self.segments`, without their first `skip` and last `cut` bytes. The number of bytes,
    /// if it fits 32 bits.
    fn collect(&mut self, buffers: &[Buffer], skip: usize, cut: u32) -> Option<u32> {
        self.segments.clear();
        let mut skip = skip as u32;
        let mut total = 0u32;
        for (i, buffer) in buffers.iter().enumerate() {
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            let cut = if i + 1 == buffers.len() { cut } else { 0 };
            let len = (buffer.len - skipped).checked_sub(cut)?;
            if len > 0 {
                let addr = GuestAddress(buffer.address.0.checked_add(skipped.into())?);
                self.segments.push(Segment { addr, len });
                total = total.checked_add(len)?;
            }
        }
        Some(total)
    }

    /// The byte offset of `sector`, if `bytes` from there on are whole sectors of the disk.
    fn offset(&self, sector: u64, bytes: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(bytes)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.capacity).then_some(offset)
    }
}

impl Header {
    /// Reads the chain's header. None where there is none, or no place for a status.
    fn read(ram: &GuestRam, chain: &Chain) -> Option<Header> {
        let last = chain.writable().last()?;
        let status = last.address.0.checked_add(u64::from(last.len.checked_sub(1)?))?;
        let mut header = [0; HEADER_BYTES];
        let whole = gather(ram, chain.readable(), 0, &mut header) == HEADER_BYTES;
        whole.then(|| Header {
            kind: word64(&header, 0) as u32,
            sector: word64(&header, 8),
            status: GuestAddress(status),
        })
    }

    /// Writes a status byte behind `data` bytes of data. The used length; zero where the status lies nowhere.
    fn answer(&self, ram: &GuestRam, value: u32, data: u32) -> u32 {
        answer(ram, self.status, value, data)
    }
}

/// As [`Header::answer`], when the header is long gone.
fn answer(ram: &GuestRam, status: GuestAddress, value: u32, data: u32) -> u32 {
    match GuestMemoryBackend::get_slice(ram, status, 1) {
        Ok(slice) => {
            slice.copy_from(&[value as u8]);
            data.saturating_add(1)
        }
        Err(_) => 0,
    }
}

impl Table {
    /// A place for one more request; none if there are as many as a queue has heads.
    fn take(&mut self, request: Request) -> Option<u32> {
        if let Some(token) = self.free.pop() {
            self.requests[token as usize] = request;
            return Some(token);
        }
        let token = self.requests.len();
        if token == usize::from(QUEUE_SIZE) {
            return None;
        }
        self.requests.push(request);
        Some(token as u32)
    }

    fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Writes the status and counts. Returns the head's queue, the head, and the bytes written into the chain.
    fn finish(&mut self, token: u32, result: io::Result<()>, end_ns: u64) -> (u16, u16, u32) {
        let request = self.requests[token as usize];
        self.free.push(token);
        let counts = &self.counters.kinds[request.kind as usize];
        let len = match result {
            Ok(()) => {
                add(&counts.operations, 1);
                add(&counts.bytes, request.bytes.into());
                add(&counts.time_ns, end_ns.saturating_sub(request.begin_ns));
                let read = if request.kind == Kind::Read { request.bytes } else { 0 };
                answer(&self.ram, request.status, VIRTIO_BLK_S_OK, read)
            }
            Err(error) => {
                // A segment outside guest memory, a change to a read-only disk: the guest's doing.
                if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EROFS)) {
                    add(&counts.invalid, 1);
                } else {
                    add(&counts.failed, 1);
                    if self.log.allows(end_ns) {
                        (self.report)(IoFailure { kind: request.kind, error });
                    }
                }
                answer(&self.ram, request.status, VIRTIO_BLK_S_IOERR, 0)
            }
        };
        (request.queue, request.head, len)
    }
}

/// What a disk offers its driver.
fn features(read_only: bool) -> u64 {
    let features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
    let features = features | 1 << VIRTIO_BLK_F_TOPOLOGY;
    if read_only {
        features | 1 << VIRTIO_BLK_F_RO
    } else {
        features | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }
}

/// Section 5.2.4: a disk of this many sectors of 512 bytes.
fn write_config(page: &Page, sectors: u64, topology: &Topology) {
    let block = topology.logical_block;
    let blocks = |bytes: u32| bytes / block;
    page.set_config(CAPACITY, &sectors.to_le_bytes());
    page.set_config(12, &SEG_MAX.to_le_bytes());
    page.set_config(20, &block.to_le_bytes());
    // The topology: both block sizes are powers of two, and the physical one is not smaller than the logical one.
    page.set_config(24, &[blocks(topology.physical_block).trailing_zeros() as u8]);
    page.set_config(26, &u16::try_from(blocks(topology.minimum_io)).unwrap_or(0).to_le_bytes());
    page.set_config(28, &blocks(topology.optimal_io).to_le_bytes());
    page.set_config(34, &1u16.to_le_bytes());
    page.set_config(36, &UNMAP_SECTORS.to_le_bytes());
    page.set_config(40, &1u32.to_le_bytes());
    page.set_config(44, &(topology.physical_block / SECTOR as u32).to_le_bytes());
    page.set_config(48, &UNMAP_SECTORS.to_le_bytes());
    page.set_config(52, &1u32.to_le_bytes());
    page.set_config(56, &[1]);
}

/// A serial number as the driver reads it: cut at 20 bytes, or followed by zeros (section 5.2.6.1).
fn padded(serial: &str) -> [u8; ID_BYTES] {
    let mut padded = [0; ID_BYTES];
    for (to, from) in padded.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    padded
}

/// Announces one sector before the real size, which is this many sectors: Linux sends udev no event for a size that changes from
/// or to zero. False where the two are the same.
fn write_interim_config(page: &Page, sectors: u64) -> bool {
    page.set_config(CAPACITY, &1u64.to_le_bytes());
    sectors != 1
}

/// The little-endian 64-bit word at `at`, which the caller knows to be there.
fn word64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

impl Device for Block {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        features(self.disk.is_read_only())
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn write_config(&self, page: &Page) {
        write_config(page, self.disk.sectors(), &self.disk.topology());
    }

    fn write_interim_config(&self, page: &Page) -> bool {
        write_interim_config(page, self.disk.sectors())
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        let bell = self.disk.bell().try_clone().context(|| format!("drive \"{}\"", self.id))?;
        cx.own(Box::new(bell), BELL)?;
        cx.listen(&self.orders.1, ORDERS);
        // Orders sent before the plug are in effect for the first request.
        self.take_orders(cx);
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        event.tag == ORDERS && self.take_orders(cx)
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let Some(header) = Header::read(&self.table.ram, chain) else {
            if let Err(wait) = self.throttle.ask(now_ns, &MALFORMED) {
                return Verdict::Later(MALFORMED.direction, wait);
            }
            self.table.log.warn(now_ns, &self.id, &"a request without a header, or without a place for its status");
            return Verdict::Used(0);
        };
        let Block { disk, table, segments, serial, throttle, .. } = self;
        let translation = Translation { segments, table, serial, capacity: disk.sectors() * SECTOR };
        let translated = translation.translate(&header, chain);
        if let Some(asked) = cost(&translated)
            && let Err(wait) = throttle.ask(now_ns, &asked)
        {
            return Verdict::Later(asked.direction, wait);
        }
        match translated {
            Ok((op, kind, bytes)) => {
                let (queue, head, status) = (queue as u16, chain.head(), header.status);
                let request = Request { queue, head, kind, bytes, begin_ns: now_ns, status };
                let Some(token) = table.take(request) else { return Verdict::Used(0) };
                match disk.submit(op, token) {
                    Submitted::Queued => Verdict::Pending,
                    Submitted::Done(result) => Verdict::Used(table.finish(token, result, now_ns).2),
                }
            }
            Err(Aside::Answer(status, data)) => Verdict::Used(header.answer(&table.ram, status, data)),
            Err(Aside::Invalid(kind, status)) => {
                add(&table.counters.kinds[kind as usize].invalid, 1);
                Verdict::Used(header.answer(&table.ram, status, 0))
            }
        }
    }

    fn reap(&mut self, cx: &mut Cx<'_>, completions: &mut Completions<'_>) {
        let now_ns = cx.clock_ns();
        let table = &mut self.table;
        self.disk.poll(|token, result| {
            let (queue, head, len) = table.finish(token, result, now_ns);
            completions.give_back(queue.into(), head, len);
        });
        table.counters.in_flight.store(table.in_flight() as u64, Relaxed);
        table.counters.note(now_ns);
        if !self.grown.is_empty() {
            completions.set_config(CAPACITY, &self.disk.sectors().to_le_bytes());
            self.grown.drain(..).for_each(|done| done.end(()));
        }
    }

    fn held(&mut self, held: Held) {
        self.table.counters.held.add(held);
    }

    fn in_flight(&self) -> usize {
        self.table.in_flight()
    }

    fn flush(&mut self) -> Result<()> {
        self.disk.sync().context(|| format!("drive \"{}\": make its last writes durable", self.id))
    }
}

#[cfg(test)]
#[path = "block_test.rs"]
mod tests;
