//! Many requests in flight on one disk: a slot each, whose chain of header, data and status is written once, so that a
//! request costs a sector, a head and little else.

use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::blk::{Disk, S_NOT_WRITTEN, T_IN, T_OUT};
use crate::virtio::ring::{Desc, INDIRECT, NEXT, WRITE};

/// Descriptors of a slot: header, data, status.
const CHAIN: u16 = 3;
/// Bytes of a slot's scratch: header at 0, status at 16, the indirect table at 32.
const SCRATCH: u64 = 128;

/// What a slot is doing.
#[derive(Clone, Copy)]
struct Slot {
    in_flight: bool,
    kind: u32,
    /// Where the flags of the data descriptor lie in the pool's memory.
    scratch: Dma,
    data_desc: Dma,
}

/// Requests of one size on one disk.
pub struct Pool {
    pub disk: Disk,
    depth: u16,
    size: u64,
    indirect: bool,
    scratch: Dma,
    data: Dma,
    slots: &'static mut [Slot],
}

impl Pool {
    /// `depth` slots of `size` bytes each; with `indirect` each chain is a table of its own.
    pub fn new(disk: Disk, depth: u64, size: u64, indirect: bool) -> Outcome<Pool> {
        let entries = u64::from(disk.ring.size());
        let most = if indirect { entries } else { entries / u64::from(CHAIN) };
        if depth == 0 || depth > most {
            fail!("disk {}: depth={depth} is outside 1 to {most} with a queue of {entries}", disk.number);
        }
        let scratch = memory::take(SCRATCH * depth);
        let data = memory::take(size * depth);
        let idle = Slot { in_flight: false, kind: T_IN, scratch, data_desc: scratch };
        let slots = memory::table(depth as usize, idle);
        let mut pool = Pool { disk, depth: depth as u16, size, indirect, scratch, data, slots };
        pool.write_chains();
        Ok(pool)
    }

    /// Writes the chains of all slots, none of which is in flight; needed again when the ring has been renewed.
    pub fn write_chains(&mut self) {
        let ring = self.disk.ring.table();
        for slot in 0..self.depth {
            let scratch = self.scratch.piece(SCRATCH * u64::from(slot), SCRATCH);
            let (table, first) = if self.indirect { (scratch.piece(32, 48), 0) } else { (ring, CHAIN * slot) };
            let data =
                Desc { address: self.data(slot).at(0), len: self.size as u32, flags: NEXT | WRITE, next: first + 2 };
            Desc { address: scratch.at(0), len: 16, flags: NEXT, next: first + 1 }.write(&table, first);
            data.write(&table, first + 1);
            Desc { address: scratch.at(16), len: 1, flags: WRITE, next: 0 }.write(&table, first + 2);
            if self.indirect {
                Desc { address: table.at(0), len: 48, flags: INDIRECT, next: 0 }.write(&ring, slot);
            }
            let data_desc = table.piece(16 * u64::from(first + 1), 16);
            self.slots[usize::from(slot)] = Slot { in_flight: false, kind: T_IN, scratch, data_desc };
        }
    }

    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// The data of a slot.
    #[inline]
    pub fn data(&self, slot: u16) -> Dma {
        self.data.piece(self.size * u64::from(slot), self.size)
    }

    /// The data of all slots.
    pub fn all_data(&self) -> Dma {
        self.data
    }

    /// Offers the request of an idle slot, not yet published.
    #[inline]
    pub fn offer(&mut self, slot: u16, kind: u32, sector: u64) {
        let at = &mut self.slots[usize::from(slot)];
        at.in_flight = true;
        if at.kind != kind {
            at.kind = kind;
            at.scratch.write32(0, kind);
            at.data_desc.write16(12, if kind == T_OUT { NEXT } else { NEXT | WRITE });
        }
        at.scratch.write64(8, sector);
        at.scratch.write8(16, S_NOT_WRITTEN);
        self.disk.ring.offer(if self.indirect { slot } else { CHAIN * slot });
    }

    /// Takes one completion that `used_waiting` has counted: its slot and status byte. Anything that is not a request
    /// in flight fails.
    #[inline]
    pub fn take(&mut self) -> Outcome<(u16, u8)> {
        let head = self.disk.ring.take_used().head;
        let step = if self.indirect { 1 } else { u32::from(CHAIN) };
        let slot = head / step;
        let number = self.disk.number;
        if !head.is_multiple_of(step) || slot >= u32::from(self.depth) {
            fail!("disk {number}: completion of head {head}, which was never sent");
        }
        let at = &mut self.slots[slot as usize];
        if !at.in_flight {
            fail!("disk {number}: second completion of head {head}");
        }
        at.in_flight = false;
        Ok((slot as u16, at.scratch.read8(16)))
    }
}
