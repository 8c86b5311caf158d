//! A virtio block device (virtio 1.2, 5.2): bringing it up, and requests one at a time in any layout.

use crate::clock::Patience;
use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::mmio::{CONFIG, CONFIG_GENERATION, Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::virtio::ring::{Desc, INDIRECT, NEXT, Ring, Used, WRITE};
use crate::words::Words;

pub const DEVICE_ID: u32 = 2;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Everything these drivers know how to use.
pub const KNOWN: u64 = F_VERSION_1
    | F_EVENT_IDX
    | F_INDIRECT_DESC
    | F_SIZE_MAX
    | F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_DISCARD
    | F_WRITE_ZEROES;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;
/// What we put where the device puts the status.
pub const S_NOT_WRITTEN: u8 = 0xee;

pub const SECTOR: u64 = 512;

/// How long a request may take, in time the processor ran.
pub const REQUEST_NS: u64 = 10_000_000_000;

/// Whether the descriptors of a request lie in the queue or in a table of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Direct,
    Indirect,
}

/// A disk brought up with one queue.
pub struct Disk {
    pub device: Device,
    /// Its number among the disks.
    pub number: u64,
    pub features: u64,
    pub capacity_sectors: u64,
    pub ring: Ring,
    /// Request header at 0, status byte at 16; an indirect table at 4096.
    pub scratch: Dma,
}

/// The disks the word `disk=` asks for: a number, or all that are no empty slots.
pub fn chosen(words: Words) -> impl Iterator<Item = (u64, Device)> {
    let wanted = words.get("disk").filter(|&disk| disk != "all").map(|_| words.number("disk", 0));
    let is_there = |device: &Device| [0, 4].iter().any(|offset| device.registers.read32(CONFIG + offset) != 0);
    disks(words).filter(move |(number, device)| wanted.map_or_else(|| is_there(device), |wanted| wanted == *number))
}

/// All disks with their numbers, in the order of the command line.
pub fn disks(words: Words) -> impl Iterator<Item = (u64, Device)> {
    (0..).zip(Device::all(words).filter(|device| device.id == DEVICE_ID))
}

impl Disk {
    /// Brings the disk up with all it offers that is in `wanted`, and a queue of at most `queue` entries.
    pub fn start(number: u64, device: Device, wanted: u64, queue: u32) -> Outcome<Disk> {
        let features = device.offered() & wanted & KNOWN;
        let max = device.queue_max(0);
        if max == 0 {
            fail!("disk {number} has no queue");
        }
        let size = 1 << max.min(queue).ilog2();
        let ring = Ring::new(size as u16, features & F_EVENT_IDX != 0);
        let mut disk = Disk { device, number, features, capacity_sectors: 0, ring, scratch: memory::take(8192) };
        disk.bring_up()?;
        Ok(disk)
    }

    /// Resets the disk and starts it again with the same features on the same, cleared, queue memory.
    pub fn restart(&mut self) -> Outcome {
        self.device.reset()?;
        self.ring = self.ring.renew();
        self.bring_up()
    }

    /// Brings the disk, which has been reset, up again on another queue; returns the old one.
    pub fn start_on(&mut self, ring: Ring) -> Outcome<Ring> {
        let old = core::mem::replace(&mut self.ring, ring);
        self.bring_up()?;
        Ok(old)
    }

    fn bring_up(&mut self) -> Outcome {
        self.device.negotiate(self.features)?;
        self.capacity_sectors = self.capacity();
        self.device.set_queue(0, &self.ring);
        self.device.go();
        Ok(())
    }

    /// The capacity as it is now, read until the generation stays the same (virtio 1.2, 2.5.2).
    pub fn capacity(&self) -> u64 {
        let registers = self.device.registers;
        let mut generation = registers.read32(CONFIG_GENERATION);
        loop {
            let sectors = u64::from(self.config32(0)) | u64::from(self.config32(4)) << 32;
            let now = registers.read32(CONFIG_GENERATION);
            if now == generation {
                return sectors;
            }
            generation = now;
        }
    }

    /// A word of the configuration space (virtio 1.2, 5.2.4).
    pub fn config32(&self, offset: u64) -> u32 {
        self.device.registers.read32(CONFIG + offset)
    }

    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Writes the request header.
    pub fn header(&self, kind: u32, sector: u64) {
        self.scratch.write32(0, kind);
        self.scratch.write32(4, 0);
        self.scratch.write64(8, sector);
        self.scratch.write8(16, S_NOT_WRITTEN);
    }

    pub fn status_byte(&self) -> u8 {
        self.scratch.read8(16)
    }

    /// The descriptor of the request header.
    pub fn header_desc(&self) -> Desc {
        Desc { address: self.scratch.at(0), len: 16, flags: 0, next: 0 }
    }

    /// The descriptor of the status byte.
    pub fn status_desc(&self) -> Desc {
        Desc { address: self.scratch.at(16), len: 1, flags: WRITE, next: 0 }
    }

    /// Puts a chain at descriptor 0 and offers it, not yet published. NEXT flags and links are added here.
    pub fn offer(&mut self, chain: &[Desc], layout: Layout) {
        let table = match layout {
            Layout::Direct => self.ring.table(),
            Layout::Indirect => self.scratch.piece(4096, 4096),
        };
        for (index, desc) in (0u16..).zip(chain) {
            let last = usize::from(index) + 1 == chain.len();
            let flags = if last { desc.flags } else { desc.flags | NEXT };
            Desc { flags, next: index + 1, ..*desc }.write(&table, index);
        }
        if layout == Layout::Indirect {
            let len = 16 * chain.len() as u32;
            Desc { address: table.at(0), len, flags: INDIRECT, next: 0 }.write(&self.ring.table(), 0);
        }
        self.ring.offer(0);
    }

    /// Publishes what is offered, and notifies the device if it wants that.
    pub fn kick(&mut self) {
        if self.ring.publish() {
            self.device.notify(0);
        }
    }

    /// Waits for one used element, at most `ns`.
    pub fn wait(&mut self, ns: u64) -> Option<Used> {
        let mut patience = Patience::new(ns);
        while self.ring.used_waiting() == 0 {
            if patience.is_over() {
                return None;
            }
            core::hint::spin_loop();
        }
        Some(self.ring.take_used())
    }

    /// One well-formed request from begin to end: its status byte and the used length.
    pub fn run(&mut self, kind: u32, sector: u64, data: &[Dma], layout: Layout) -> Outcome<(u8, u32)> {
        let mut chain = [self.header_desc(); 40];
        let flags = if matches!(kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        for (desc, piece) in chain[1..].iter_mut().zip(data) {
            *desc = Desc { address: piece.at(0), len: piece.len() as u32, flags, next: 0 };
        }
        chain[data.len() + 1] = self.status_desc();
        self.header(kind, sector);
        self.offer(&chain[..data.len() + 2], layout);
        self.kick();
        let Some(used) = self.wait(REQUEST_NS) else {
            fail!("disk {}: request of type {kind} at sector {sector} does not complete", self.number);
        };
        if used.head != 0 {
            fail!("disk {}: head {} came back, 0 was sent", self.number, used.head);
        }
        Ok((self.status_byte(), used.len))
    }

    /// A request of which nothing but success will do.
    pub fn must(&mut self, kind: u32, sector: u64, data: &[Dma], layout: Layout) -> Outcome {
        match self.run(kind, sector, data, layout)? {
            (S_OK, _) => Ok(()),
            (status, _) => fail!("disk {}: type {kind} at sector {sector}: status {status}", self.number),
        }
    }
}
