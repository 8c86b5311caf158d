//! virtio-blk (virtio 1.2, section 5.2): chains to disk operations, their results to status bytes.
//!
//! The file behind it, asynchronous I/O and alignment are `disk`'s business; rings and interrupts the worker's. A
//! chain that is well formed as a chain and not as a request is answered with VIRTIO_BLK_S_IOERR, or given back empty
//! where it has no place for a status. Runs in the loop of the drive's iothread, or main's.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::disk::{Disk, Op, Segment, Submitted};
use crate::error::Result;
use crate::event::Cx;
use crate::memory::GuestRam;
use crate::virtio::{Buffer, Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict};

/// Descriptors of the one queue: the original's number, and enough for any driver's depth.
const QUEUE_SIZE: u16 = 256;
/// Data segments in one request: a full queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The device's unit of addresses, whatever the block size (section 5.2.4).
const SECTOR: u64 = 512;
const HEADER_BYTES: usize = 16;
/// What the driver reads as the serial number (section 5.2.6).
const ID_BYTES: usize = 20;
/// Sectors in one discard or write-zeroes: 2 GiB, so that one request does not hold a disk for minutes.
const DISCARD_SECTORS: u32 = 1 << 22;

/// What has been done since the drive was opened: written by the drive's thread alone, read by any (`query-blockstats`).
/// The words of one reading may be a request apart.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Each kind's counts, indexed by [`Kind`].
    pub kinds: [KindCounters; 4],
    /// One past the highest byte written.
    pub highest_write: AtomicU64,
    /// Requests taken from the guest and not given back.
    pub in_flight: AtomicU64,
}

/// Counts of one kind of request.
#[derive(Debug, Default)]
pub struct KindCounters {
    /// Finished with VIRTIO_BLK_S_OK.
    pub operations: AtomicU64,
    /// Bytes of those.
    pub bytes: AtomicU64,
    /// Finished with an error of the host's.
    pub failed: AtomicU64,
    /// Refused because the guest asked for what cannot be.
    pub invalid: AtomicU64,
    /// From the turn that took the request to its end, in nanoseconds, summed over those that succeeded.
    pub time_ns: AtomicU64,
}

/// Adds to a counter that only this thread writes: no locked instruction.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// Kinds of request that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN
    Read,
    /// VIRTIO_BLK_T_OUT
    Write,
    /// VIRTIO_BLK_T_FLUSH
    Flush,
    /// VIRTIO_BLK_T_DISCARD and VIRTIO_BLK_T_WRITE_ZEROES
    Unmap,
}

/// An operation the host refused, for the event BLOCK_IO_ERROR.
#[derive(Debug)]
pub struct IoFailure {
    /// What was asked.
    pub kind: Kind,
    /// Why it was not done.
    pub error: io::Error,
}

/// One request that the disk is working on, or has just finished.
#[derive(Clone, Copy)]
struct Request {
    queue: u16,
    head: u16,
    kind: Kind,
    bytes: u32,
    status: GuestAddress,
}

/// Where failures are told; at a limited rate, for a guest can read a bad sector as often as it likes.
pub type FailureReport = Box<dyn FnMut(IoFailure) + Send>;

/// One drive.
pub struct Block {
    id: String,
    serial: [u8; ID_BYTES],
    disk: Disk,
    ram: Arc<GuestRam>,
    /// Indexed by our own token, never by a number of the guest's.
    requests: Vec<Request>,
    free: Vec<u32>,
    segments: Vec<Segment>,
    counters: Arc<BlockCounters>,
    log: FaultLog,
    report: FailureReport,
}

/// Why a request is not handed to the disk.
enum Refusal {
    /// Answered with this status byte.
    Status(u32),
    /// Done without the disk, having written so many bytes.
    Answered(u32),
}

/// A chain read as a request: the header, and what lies between it and the status byte.
struct Parts<'a> {
    kind: u32,
    sector: u64,
    /// The readable buffers, and how many bytes of them the header took.
    output: &'a [Buffer],
    /// The writable buffers, the last one byte shorter than it is.
    input: &'a [Buffer],
    status: GuestAddress,
}

impl Block {
    /// A drive called `id` with the given serial number (cut at 20 bytes) on an opened disk.
    pub fn new(id: &str, serial: &str, disk: Disk, ram: Arc<GuestRam>, report: FailureReport) -> Self {
        let mut padded = [0; ID_BYTES];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let none = Request { queue: 0, head: 0, kind: Kind::Read, bytes: 0, status: GuestAddress(0) };
        Block {
            id: id.to_string(),
            serial: padded,
            disk,
            ram,
            requests: vec![none; usize::from(QUEUE_SIZE)],
            free: (0..u32::from(QUEUE_SIZE)).rev().collect(),
            segments: Vec::with_capacity(SEG_MAX as usize),
            counters: Arc::default(),
            log: FaultLog::default(),
            report,
        }
    }

    /// The drive's counts, for whoever asks.
    pub fn counters(&self) -> Arc<BlockCounters> {
        self.counters.clone()
    }

    /// Reads the chain as a request. None where there is no header or no place for a status.
    fn parts<'a>(&self, chain: &'a Chain) -> Option<Parts<'a>> {
        let mut header = [0u8; HEADER_BYTES];
        let mut have = 0;
        for buffer in chain.readable() {
            let take = (HEADER_BYTES - have).min(buffer.len as usize);
            self.ram.read_slice(&mut header[have..have + take], buffer.address).ok()?;
            have += take;
            if have == HEADER_BYTES {
                break;
            }
        }
        let last = chain.writable().last()?;
        let status = last.address.0.checked_add(u64::from(last.len.checked_sub(1)?))?;
        if have < HEADER_BYTES {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Some(Parts {
            kind: word(0),
            sector: u64::from(word(12)) << 32 | u64::from(word(8)),
            output: chain.readable(),
            input: chain.writable(),
            status: GuestAddress(status),
        })
    }

    /// Collects `buffers` in `self.segments`, without their first `skip` and last `cut` bytes. The number of bytes,
    /// or none where a buffer is not in guest memory or all of them exceed 4 GiB.
    fn collect(&mut self, buffers: &[Buffer], skip: usize, cut: u32) -> Option<u32> {
        self.segments.clear();
        let mut skip = skip as u32;
        let mut total = 0u32;
        for (i, buffer) in buffers.iter().enumerate() {
            let cut = if i + 1 == buffers.len() { cut } else { 0 };
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            let len = (buffer.len - skipped).checked_sub(cut)?;
            if len == 0 {
                continue;
            }
            let address = GuestAddress(buffer.address.0.checked_add(u64::from(skipped))?);
            let slice = self.ram.get_slice(address, len as usize).ok()?;
            self.segments.push(Segment::new(&slice));
            total = total.checked_add(len)?;
        }
        Some(total)
    }

    /// The byte offset of `sectors` from `sector` on, if they lie on the disk.
    fn offset(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_mul(SECTOR)?.checked_add(bytes)?;
        (bytes % SECTOR == 0 && end <= self.disk.sectors() * SECTOR).then_some(sector * SECTOR)
    }

    /// Hands a request to the disk. The data of a read or write stand in `self.segments`.
    fn start(&mut self, parts: &Parts<'_>, queue: usize, head: u16) -> std::result::Result<Verdict, Refusal> {
        const IOERR: Refusal = Refusal::Status(VIRTIO_BLK_S_IOERR);
        let unmap_length;
        let (kind, bytes, op) = match parts.kind {
            VIRTIO_BLK_T_IN => {
                let bytes = self.collect(parts.input, 0, 1).ok_or(IOERR)?;
                let offset = self.offset(parts.sector, bytes.into()).ok_or(IOERR)?;
                (Kind::Read, bytes, Op::Read { offset, segments: &self.segments })
            }
            VIRTIO_BLK_T_OUT if self.disk.read_only() => return Err(IOERR),
            VIRTIO_BLK_T_OUT => {
                let bytes = self.collect(parts.output, HEADER_BYTES, 0).ok_or(IOERR)?;
                let offset = self.offset(parts.sector, bytes.into()).ok_or(IOERR)?;
                (Kind::Write, bytes, Op::Write { offset, segments: &self.segments })
            }
            VIRTIO_BLK_T_FLUSH => (Kind::Flush, 0, Op::Flush),
            VIRTIO_BLK_T_GET_ID => {
                let mut left = &self.serial[..];
                let room = self.collect(parts.input, 0, 1).ok_or(IOERR)?;
                for (i, buffer) in parts.input.iter().enumerate() {
                    let len = buffer.len - u32::from(i + 1 == parts.input.len());
                    let (now, later) = left.split_at(left.len().min(len as usize));
                    self.ram.write_slice(now, buffer.address).map_err(|_| IOERR)?;
                    left = later;
                }
                return Err(Refusal::Answered(room.min(ID_BYTES as u32)));
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.disk.read_only() => return Err(IOERR),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let (sector, sectors, flags) = self.range(parts.output).ok_or(IOERR)?;
                unmap_length = u64::from(sectors) * SECTOR;
                let offset = self.offset(sector, unmap_length).ok_or(IOERR)?;
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                // Section 5.2.6.2: unknown flags, and unmap in a discard, are not supported.
                let known = if parts.kind == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
                if flags & !known != 0 {
                    return Err(Refusal::Status(VIRTIO_BLK_S_UNSUPP));
                }
                let op = if parts.kind == VIRTIO_BLK_T_DISCARD {
                    Op::Discard { offset, len: unmap_length }
                } else {
                    Op::WriteZeroes { offset, len: unmap_length, unmap }
                };
                (Kind::Unmap, sectors.saturating_mul(SECTOR as u32), op)
            }
            _ => return Err(Refusal::Status(VIRTIO_BLK_S_UNSUPP)),
        };
        // There are as many requests as heads, so there is always a free one; a guest cannot make it otherwise.
        let token = self.free.pop().ok_or(IOERR)?;
        self.requests[token as usize] = Request { queue: queue as u16, head, kind, bytes, status: parts.status };
        match self.disk.submit(op, token) {
            Submitted::Queued => Ok(Verdict::Pending),
            Submitted::Done(result) => Ok(Verdict::Used(self.finish(token, result))),
        }
    }

    /// The one range of a discard or write-zeroes: first sector, number of sectors, flags.
    fn range(&mut self, output: &[Buffer]) -> Option<(u64, u32, u32)> {
        // Exactly one: more than `max_discard_seg` said is the driver's mistake.
        if self.collect(output, HEADER_BYTES, 0)? != HEADER_BYTES as u32 {
            return None;
        }
        let mut range = [0u8; HEADER_BYTES];
        let mut have = 0;
        for segment in &self.segments {
            have += segment.copy_to(&mut range[have..]);
        }
        let (sector, rest) = range.split_first_chunk::<8>()?;
        let (sectors, flags) = rest.split_first_chunk::<4>()?;
        let sectors = u32::from_le_bytes(*sectors);
        (sectors <= DISCARD_SECTORS).then_some(())?;
        Some((u64::from_le_bytes(*sector), sectors, u32::from_le_bytes(*flags.first_chunk()?)))
    }

    /// Writes the status and counts. Returns the number of bytes written into the chain.
    fn finish(&mut self, token: u32, result: io::Result<()>) -> u32 {
        self.free.push(token);
        let request = self.requests[token as usize];
        let counts = &self.counters.kinds[request.kind as usize];
        match result {
            Ok(()) => {
                add(&counts.operations, 1);
                add(&counts.bytes, request.bytes.into());
                let read = if request.kind == Kind::Read { request.bytes } else { 0 };
                self.answer(request.status, VIRTIO_BLK_S_OK, read)
            }
            Err(error) => {
                add(&counts.failed, 1);
                (self.report)(IoFailure { kind: request.kind, error });
                self.answer(request.status, VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    /// Writes a status byte behind `data` bytes of data. The used length, zero where the status lies nowhere.
    fn answer(&self, status: GuestAddress, value: u32, data: u32) -> u32 {
        match self.ram.write_obj(value as u8, status) {
            Ok(()) => data.saturating_add(1),
            Err(_) => 0,
        }
    }
}

impl Device for Block {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// Section 5.2.4.
    fn write_config(&self, page: &Page) {
        let block = self.disk.block_size();
        page.set_config(0, &self.disk.sectors().to_le_bytes());
        page.set_config(12, &SEG_MAX.to_le_bytes());
        page.set_config(20, &block.to_le_bytes());
        page.set_config(34, &1u16.to_le_bytes());
        page.set_config(36, &DISCARD_SECTORS.to_le_bytes());
        page.set_config(40, &1u32.to_le_bytes());
        page.set_config(44, &(block / SECTOR as u32).to_le_bytes());
        page.set_config(48, &DISCARD_SECTORS.to_le_bytes());
        page.set_config(52, &1u32.to_le_bytes());
        page.set_config(56, &[1]);
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        let completions = self.disk.start()?;
        cx.own(completions, DEVICE_TAG)?;
        Ok(())
    }

    fn activate(&mut self, _features: u64) {}

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let Some(parts) = self.parts(chain) else {
            add(&self.counters.invalid, 1);
            self.log.warn(now_ns, &self.id, &"a request without a header or without a place for its status");
            return Verdict::Used(0);
        };
        match self.start(&parts, queue, chain.head()) {
            Ok(verdict) => verdict,
            Err(Refusal::Answered(data)) => Verdict::Used(self.answer(parts.status, VIRTIO_BLK_S_OK, data)),
            Err(Refusal::Status(status)) => {
                add(&self.counters.invalid, 1);
                Verdict::Used(self.answer(parts.status, status, 0))
            }
        }
    }

    fn submit(&mut self) {
        self.disk.push();
    }

    fn reap(&mut self, completions: &mut Completions<'_>, _now_ns: u64) {
        while let Some((token, result)) = self.disk.reap() {
            let request = self.requests[token as usize];
            let len = self.finish(token, result);
            completions.give_back(request.queue.into(), request.head, len);
        }
    }

    fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    fn config_written(&mut self, _page: &Page) {}
}
