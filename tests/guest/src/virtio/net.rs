//! A virtio NIC (virtio 1.2, 5.1): bringing it up, receiving into buffers that are put together, sending whole frames.

use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::mmio::{CONFIG, Device, F_EVENT_IDX, F_VERSION_1};
use crate::virtio::ring::{Desc, NEXT, Ring, WRITE};
use crate::words::Words;

pub const DEVICE_ID: u32 = 1;

pub const F_CSUM: u64 = 1 << 0;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_MTU: u64 = 1 << 3;
pub const F_MAC: u64 = 1 << 5;
pub const F_GUEST_TSO4: u64 = 1 << 7;
pub const F_HOST_TSO4: u64 = 1 << 11;
pub const F_MRG_RXBUF: u64 = 1 << 15;
pub const F_STATUS: u64 = 1 << 16;

/// Everything these drivers know how to use.
pub const KNOWN: u64 = F_VERSION_1
    | F_EVENT_IDX
    | F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_HOST_TSO4
    | F_MRG_RXBUF
    | F_STATUS;

/// Bytes of the header before each frame.
pub const HEADER: u64 = 12;
/// The longest frame with its header.
pub const MOST: u64 = 65_600;
/// Frames that may be on their way out.
const SLOTS: u64 = 64;

const RX: u32 = 0;
const TX: u32 = 1;

/// A NIC brought up with one pair of queues.
pub struct Nic {
    pub device: Device,
    pub features: u64,
    pub mac: [u8; 6],
    pub rx: Ring,
    pub tx: Ring,
    buffers: Dma,
    buffer: u64,
    slots: Dma,
    /// Slots that are free, and how many of them.
    free: &'static mut [u16],
    frees: usize,
    offered: u16,
    pub kicks: u64,
}

/// A frame that was received: its bytes without the header, put together in the NIC's scratch.
pub struct Frame {
    pub data: Dma,
    pub len: u64,
    pub buffers: u16,
}

impl Nic {
    /// Brings NIC number `number` up with what it offers of `wanted`, and `count` buffers of `buffer` bytes to receive in.
    pub fn start(words: Words, number: usize, wanted: u64, buffer: u64, count: u64) -> Outcome<Nic> {
        let Some(device) = Device::all(words).filter(|device| device.id == DEVICE_ID).nth(number) else {
            fail!("there is no NIC {number}");
        };
        let features = device.offered() & wanted & KNOWN;
        device.negotiate(features)?;
        let size = device.queue_max(RX).min(4096) as u16;
        let event_idx = features & F_EVENT_IDX != 0;
        let (rx, tx) = (Ring::new(size, event_idx), Ring::new(size, event_idx));
        device.set_queue(RX, &rx);
        device.set_queue(TX, &tx);
        let mut mac = [0; 6];
        for (at, byte) in (0..).zip(&mut mac) {
            *byte = device.registers.read::<u8>(CONFIG + at);
        }
        let free = memory::table(SLOTS as usize, 0);
        (0..).zip(free.iter_mut()).for_each(|(slot, free)| *free = slot);
        let count = count.min(size.into());
        let mut nic = Nic {
            device,
            features,
            mac,
            rx,
            tx,
            buffers: memory::take(buffer * count),
            buffer,
            slots: memory::take(MOST * SLOTS),
            free,
            frees: SLOTS as usize,
            offered: count as u16,
            kicks: 0,
        };
        for head in 0..count as u16 {
            let desc = Desc { address: nic.of(head).at(0), len: buffer as u32, flags: WRITE, next: 0 };
            desc.write(&nic.rx.table(), head);
            nic.rx.offer(head);
        }
        nic.rx.ask_interrupt(false);
        nic.tx.ask_interrupt(false);
        device.go();
        nic.refill();
        Ok(nic)
    }

    /// The buffer of a head.
    fn of(&self, head: u16) -> Dma {
        self.buffers.piece(self.buffer * u64::from(head), self.buffer)
    }

    /// Whether the link is up, as the device says.
    pub fn link(&self) -> bool {
        self.device.registers.read::<u16>(CONFIG + 6) & 1 != 0
    }

    /// The MTU, as the device says.
    pub fn mtu(&self) -> u16 {
        self.device.registers.read::<u16>(CONFIG + 10)
    }

    /// Publishes the buffers that were offered again.
    #[inline]
    pub fn refill(&mut self) {
        if self.rx.publish() {
            self.device.notify(RX);
            self.kicks += 1;
        }
    }

    /// Takes the next frame into `into`, and offers its buffers again; none if nothing has come.
    #[inline]
    pub fn receive(&mut self, into: &Dma) -> Outcome<Option<Frame>> {
        let waiting = self.rx.used_waiting();
        if waiting == 0 {
            return Ok(None);
        }
        let first = self.rx.take_used();
        let data = self.checked(first.head)?;
        let len = u64::from(first.len);
        if len <= HEADER || len > self.buffer {
            fail!("a frame whose first buffer has {len} bytes");
        }
        let buffers = data.read16(10);
        if buffers == 0 || buffers > waiting {
            fail!("a frame of {buffers} buffers, and {waiting} have come");
        }
        into.copy(0, &data, HEADER, len - HEADER);
        let mut have = len - HEADER;
        self.rx.offer(first.head as u16);
        for _ in 1..buffers {
            let next = self.rx.take_used();
            let data = self.checked(next.head)?;
            into.copy(have, &data, 0, next.len.into());
            have += u64::from(next.len);
            self.rx.offer(next.head as u16);
        }
        Ok(Some(Frame { data: *into, len: have, buffers }))
    }

    /// Takes the next frame and looks at none of it but its length; none if nothing has come.
    #[inline]
    pub fn drop_one(&mut self) -> Outcome<Option<u64>> {
        let waiting = self.rx.used_waiting();
        if waiting == 0 {
            return Ok(None);
        }
        let first = self.rx.take_used();
        let buffers = self.checked(first.head)?.read16(10);
        let mut len = u64::from(first.len) - HEADER;
        self.rx.offer(first.head as u16);
        if buffers == 0 || buffers > waiting {
            fail!("a frame of {buffers} buffers, and {waiting} have come");
        }
        for _ in 1..buffers {
            let next = self.rx.take_used();
            len += u64::from(next.len);
            self.rx.offer(next.head as u16);
        }
        Ok(Some(len))
    }

    fn checked(&self, head: u32) -> Outcome<Dma> {
        if head >= u32::from(self.offered) {
            fail!("head {head} came back and was never sent");
        }
        Ok(self.of(head as u16))
    }

    /// Takes back what has been sent.
    #[inline]
    pub fn collect(&mut self) -> Outcome {
        for _ in 0..self.tx.used_waiting() {
            let head = self.tx.take_used().head;
            if self.frees >= SLOTS as usize || u64::from(head) >= SLOTS {
                fail!("head {head} came back and was never sent");
            }
            self.free[self.frees] = head as u16;
            self.frees += 1;
        }
        Ok(())
    }

    /// Frames on their way out.
    pub fn under_way(&self) -> usize {
        SLOTS as usize - self.frees
    }

    /// A place for a frame with its header, which is zeroed; none if all are under way.
    #[inline]
    pub fn slot(&mut self) -> Option<(u16, Dma)> {
        self.frees = self.frees.checked_sub(1)?;
        let slot = self.free[self.frees];
        let place = self.slots.piece(MOST * u64::from(slot), MOST);
        place.write64(0, 0);
        place.write32(8, 0);
        Some((slot, place))
    }

    /// Offers the frame in `slot`, of `len` bytes without the header, not yet published.
    #[inline]
    pub fn offer(&mut self, slot: u16, len: u64) {
        let place = self.slots.at(MOST * u64::from(slot));
        let desc = Desc { address: place, len: (HEADER + len) as u32, flags: 0, next: 0 };
        desc.write(&self.tx.table(), slot);
        self.tx.offer(slot);
    }

    /// Offers a frame as header and data apart, which a device must take too.
    pub fn offer_in_two(&mut self, slot: u16, len: u64) {
        let place = self.slots.at(MOST * u64::from(slot));
        let second = SLOTS as u16 + slot;
        let table = self.tx.table();
        Desc { address: place, len: HEADER as u32, flags: NEXT, next: second }.write(&table, slot);
        Desc { address: place + HEADER, len: len as u32, flags: 0, next: 0 }.write(&table, second);
        self.tx.offer(slot);
    }

    /// Publishes what was offered.
    #[inline]
    pub fn push(&mut self) {
        if self.tx.publish() {
            self.device.notify(TX);
            self.kicks += 1;
        }
    }
}
