//! One split virtqueue (virtio 1.2, 2.7), driver side. It keeps no list of free descriptors: who uses it knows which
//! descriptors are whose.

use crate::cpu;
use crate::memory::{self, Dma};
use core::sync::atomic::{Ordering, compiler_fence};

pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor (virtio 1.2, 2.7.5).
#[derive(Clone, Copy)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    /// Writes descriptor `index` of a table.
    pub fn write(self, table: &Dma, index: u16) {
        let at = 16 * u64::from(index);
        table.write64(at, self.address);
        table.write32(at + 8, self.len);
        table.write16(at + 12, self.flags);
        table.write16(at + 14, self.next);
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub head: u32,
    pub len: u32,
}

/// One queue: where it lies, and how far the driver has come.
pub struct Ring {
    size: u16,
    memory: Dma,
    event_idx: bool,
    interrupts: bool,
    /// Where the next head goes, and up to where the device has been told.
    next: u16,
    published: u16,
    /// Up to where the used ring has been taken.
    taken: u16,
}

impl Ring {
    /// A new queue of `size` entries, a power of two, in memory of its own.
    pub fn new(size: u16, event_idx: bool) -> Ring {
        let memory = memory::take(Self::used_at(size) + 6 + 8 * u64::from(size));
        Ring { size, memory, event_idx, interrupts: true, next: 0, published: 0, taken: 0 }
    }

    /// The same memory as a fresh queue, all zero.
    pub fn renew(&self) -> Ring {
        self.memory.fill(0);
        Ring { memory: self.memory, next: 0, published: 0, taken: 0, ..*self }
    }

    /// The driver area follows the table of descriptors; the device area follows it on a page of its own.
    fn driver_at(size: u16) -> u64 {
        16 * u64::from(size)
    }

    fn used_at(size: u16) -> u64 {
        (Self::driver_at(size) + 6 + 2 * u64::from(size)).next_multiple_of(4096)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn desc(&self) -> u64 {
        self.memory.at(0)
    }

    pub fn driver(&self) -> u64 {
        self.memory.at(Self::driver_at(self.size))
    }

    pub fn device(&self) -> u64 {
        self.used_area().at(0)
    }

    /// The part of the queue the device writes.
    pub fn used_area(&self) -> Dma {
        self.memory.piece(Self::used_at(self.size), self.memory.len() - Self::used_at(self.size))
    }

    /// The table of descriptors.
    pub fn table(&self) -> Dma {
        self.memory.piece(0, Self::driver_at(self.size))
    }

    /// Puts a head into the available ring, not yet published.
    #[inline]
    pub fn offer(&mut self, head: u16) {
        let at = 4 + 2 * u64::from(self.next & (self.size - 1));
        self.memory.write16(Self::driver_at(self.size) + at, head);
        self.next = self.next.wrapping_add(1);
    }

    /// Publishes what has been offered; true when the device wants to be notified (virtio 1.2, 2.7.10 and 2.7.13).
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.next == self.published {
            return false;
        }
        let old = self.published;
        self.publish_index(self.next);
        self.published = self.next;
        // The device publishes its wish and then looks for work; we publish work and then look at its wish.
        cpu::full_fence();
        let used = Self::used_at(self.size);
        if self.event_idx {
            let event = self.memory.read16(used + 4 + 8 * u64::from(self.size));
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
        } else {
            self.memory.read16(used) & 1 == 0
        }
    }

    /// Stores an available index, whatever it is.
    #[inline]
    pub fn publish_index(&self, index: u16) {
        // x86 keeps the order of stores; the compiler is to keep it too.
        compiler_fence(Ordering::Release);
        self.memory.write16(Self::driver_at(self.size) + 2, index);
    }

    /// How many used elements are waiting.
    #[inline]
    pub fn used_waiting(&self) -> u16 {
        let index = self.memory.read16(Self::used_at(self.size) + 2);
        compiler_fence(Ordering::Acquire);
        index.wrapping_sub(self.taken)
    }

    /// Takes a used element that `used_waiting` has counted.
    #[inline]
    pub fn take_used(&mut self) -> Used {
        let at = Self::used_at(self.size) + 4 + 8 * u64::from(self.taken & (self.size - 1));
        self.taken = self.taken.wrapping_add(1);
        Used { head: self.memory.read32(at), len: self.memory.read32(at + 4) }
    }

    /// Asks for an interrupt at the next used element, or for none at all.
    #[inline]
    pub fn ask_interrupt(&mut self, wanted: bool) {
        let driver = Self::driver_at(self.size);
        if self.event_idx {
            // Without interrupts the event lies half the index space ahead.
            let event = if wanted { self.taken } else { self.taken.wrapping_add(0x8000) };
            self.memory.write16(driver + 4 + 2 * u64::from(self.size), event);
        } else if wanted != self.interrupts {
            self.memory.write16(driver, u16::from(!wanted));
        }
        self.interrupts = wanted;
    }
}
