//! The driver's side of one split virtqueue (virtio 1.2, section 2.7), free to break every rule.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One descriptor as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    /// One that the device reads.
    pub fn readable(addr: u64, len: u32) -> Desc {
        Desc { addr, len, flags: 0, next: 0 }
    }

    /// One that the device writes.
    pub fn writable(addr: u64, len: u32) -> Desc {
        Desc { addr, len, flags: WRITE, next: 0 }
    }

    /// The same with more flags and a next.
    pub fn and(self, flags: u16, next: u16) -> Desc {
        Desc { flags: self.flags | flags, next, ..self }
    }

    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One queue.
pub struct Vring {
    ram: Arc<GuestRam>,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    event_idx: bool,
    /// The available index that the driver has published.
    pub next_available: u16,
    /// The available index at the last decision on a kick.
    decided: u16,
    /// How far the driver has read the used ring.
    pub seen_used: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
}

impl Vring {
    /// A queue whose parts lie from `base` on; its memory becomes zeros.
    pub fn new(ram: Arc<GuestRam>, base: u64, size: u16, event_idx: bool) -> Vring {
        let _ = ram.write_slice(&vec![0; 0x1_0000], GuestAddress(base));
        Vring {
            ram,
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
            event_idx,
            next_available: 0,
            decided: 0,
            seen_used: 0,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
        }
    }

    fn load(&self, address: u64) -> u16 {
        self.ram.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.ram.store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Writes into the queue's memory, as the device does.
    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Writes a descriptor into a table.
    pub fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        self.ram.write_slice(&desc.bytes(), GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Writes a descriptor of the queue's own table.
    pub fn put(&self, index: u16, desc: Desc) {
        self.write_desc(self.descriptors, index, desc);
    }

    /// Puts a head into the available ring, whatever it is, and publishes it.
    pub fn offer(&mut self, head: u16) {
        self.store(self.available + 4 + 2 * u64::from(self.next_available % self.size), head);
        self.next_available = self.next_available.wrapping_add(1);
        self.publish(self.next_available);
    }

    /// Writes the available index.
    pub fn publish(&self, index: u16) {
        self.store(self.available + 2, index);
    }

    /// Makes a chain of free descriptors available; its head.
    pub fn add(&mut self, descs: &[Desc]) -> u16 {
        let indices: Vec<u16> = descs.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, desc) in descs.iter().enumerate() {
            let desc = match indices.get(i + 1) {
                Some(&next) => desc.and(NEXT, next),
                None => *desc,
            };
            self.put(indices[i], desc);
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer(head);
        head
    }

    /// Makes a chain available whose descriptors lie in a table at `table`; its head.
    pub fn add_indirect(&mut self, table: u64, descs: &[Desc]) -> u16 {
        for (i, desc) in (0..).zip(descs) {
            let last = usize::from(i) + 1 == descs.len();
            self.write_desc(table, i, if last { *desc } else { desc.and(NEXT, i + 1) });
        }
        self.add(&[Desc { addr: table, len: 16 * descs.len() as u32, flags: INDIRECT, next: 0 }])
    }

    /// Goes on from another index, with nothing available and nothing unseen.
    pub fn start_at(&mut self, index: u16) {
        (self.next_available, self.decided, self.seen_used) = (index, index, index);
        self.publish(index);
        self.store(self.used + 2, index);
    }

    /// How many descriptors are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Whether the device wants a kick for what was published since the last call (sections 2.7.10, 2.7.7.2).
    pub fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_available, std::mem::replace(&mut self.decided, self.next_available));
        if self.event_idx {
            let event = self.load(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(self.used) & 1 == 0
        }
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// What has come back since the last call, as head and length; its descriptors are free again.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let mut taken = Vec::new();
        while self.seen_used != self.used_index() {
            let entry = self.used + 4 + 8 * u64::from(self.seen_used % self.size);
            let head: u32 = self.ram.read_obj(GuestAddress(entry)).unwrap();
            let len = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
            let head = u16::try_from(head).unwrap();
            self.free.extend(self.chains.remove(&head).unwrap_or_default());
            taken.push((head, len));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        taken
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.store(self.available + 4 + 2 * u64::from(self.size), index);
    }

    /// The flags of the available ring: 1 asks for no interrupts.
    pub fn set_flags(&self, flags: u16) {
        self.store(self.available, flags);
    }
}
