//! A virtio-vsock device (virtio 1.2, 5.10): packets in and out, one at a time. What they mean is for who uses it.

use crate::clock::Patience;
use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::mmio::{CONFIG, Device, F_EVENT_IDX, F_VERSION_1};
use crate::virtio::ring::{Desc, NEXT, Ring, WRITE};
use crate::words::Words;

pub const DEVICE_ID: u32 = 19;
pub const HEADER: u64 = 44;
/// Data in a packet that we have room for, or send.
pub const DATA: u64 = 4096;
const BUFFER: u64 = 8192;
const SLOTS: u16 = 64;

pub const STREAM: u16 = 1;
pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub fn read(from: &Dma) -> Header {
        Header {
            src_cid: from.read64(0),
            dst_cid: from.read64(8),
            src_port: from.read32(16),
            dst_port: from.read32(20),
            len: from.read32(24),
            kind: from.read16(28),
            op: from.read16(30),
            flags: from.read32(32),
            buf_alloc: from.read32(36),
            fwd_cnt: from.read32(40),
        }
    }

    pub fn write(&self, to: &Dma) {
        to.write64(0, self.src_cid);
        to.write64(8, self.dst_cid);
        to.write32(16, self.src_port);
        to.write32(20, self.dst_port);
        to.write32(24, self.len);
        to.write16(28, self.kind);
        to.write16(30, self.op);
        to.write32(32, self.flags);
        to.write32(36, self.buf_alloc);
        to.write32(40, self.fwd_cnt);
    }
}

pub struct Vsock {
    pub device: Device,
    pub cid: u64,
    pub rx: Ring,
    pub tx: Ring,
    buffers: [Dma; 2],
    idle: [u16; SLOTS as usize],
    idle_count: usize,
}

impl Vsock {
    pub fn start(words: Words) -> Outcome<Vsock> {
        let Some(device) = Device::all(words).find(|device| device.id == DEVICE_ID) else { fail!("no vsock") };
        let rings = [0, 1].map(|queue| Ring::new((device.queue_max(queue) as u16).min(2 * SLOTS), false));
        let [rx, tx] = rings;
        if rx.size() < 2 * SLOTS || tx.size() < 2 * SLOTS {
            fail!("vsock: queues of {} and {}", rx.size(), tx.size());
        }
        let buffers = [0, 1].map(|_| memory::take(u64::from(SLOTS) * BUFFER));
        let mut vsock = Vsock { device, cid: 0, rx, tx, buffers, idle: [0; SLOTS as usize], idle_count: 0 };
        vsock.bring_up()?;
        Ok(vsock)
    }

    /// Resets the device, and all of its streams with it, and begins anew.
    pub fn restart(&mut self) -> Outcome {
        self.device.reset()?;
        self.bring_up()
    }

    fn bring_up(&mut self) -> Outcome {
        self.device.negotiate(self.device.offered() & F_VERSION_1 & !F_EVENT_IDX)?;
        self.rx = self.rx.renew();
        self.tx = self.tx.renew();
        self.device.set_queue(0, &self.rx);
        self.device.set_queue(1, &self.tx);
        self.device.go();
        let word = |offset| u64::from(self.device.registers.read32(CONFIG + offset));
        self.cid = word(0) | word(4) << 32;
        self.tx.ask_interrupt(false);
        self.rx.ask_interrupt(false);
        self.idle_count = SLOTS.into();
        for slot in 0..SLOTS {
            self.idle[usize::from(slot)] = 2 * slot;
            // The header by itself, cut in two for every other buffer.
            let cut = if slot % 2 == 0 { HEADER } else { 20 };
            self.put(0, 2 * slot, cut, HEADER + DATA, WRITE);
            self.rx.offer(2 * slot);
        }
        self.give_rx();
        Ok(())
    }

    /// A chain of two pieces, of which the first has `cut` bytes, at descriptor `head`.
    fn put(&self, queue: usize, head: u16, cut: u64, all: u64, flags: u16) {
        let ring = [&self.rx, &self.tx][queue];
        let at = self.buffers[queue].at(u64::from(head / 2) * BUFFER);
        let first = cut.min(all);
        let more = first < all;
        let next = if more { NEXT } else { 0 };
        Desc { address: at, len: first as u32, flags: flags | next, next: head + 1 }.write(&ring.table(), head);
        if more {
            let rest = Desc { address: at + first, len: (all - first) as u32, flags, next: 0 };
            rest.write(&ring.table(), head + 1);
        }
    }

    pub fn buffer(&self, queue: usize, head: u16) -> Dma {
        self.buffers[queue].piece(u64::from(head / 2) * BUFFER, BUFFER)
    }

    fn give_rx(&mut self) {
        if self.rx.publish() {
            self.device.notify(0);
        }
    }

    /// The next packet, if there is one: its buffer's head, and its header. To be given back with `done`.
    pub fn receive(&mut self) -> Outcome<Option<(u16, Header)>> {
        if self.rx.used_waiting() == 0 {
            return Ok(None);
        }
        let used = self.rx.take_used();
        let header = Header::read(&self.buffer(0, used.head as u16));
        if u64::from(used.len) != HEADER + u64::from(header.len) {
            fail!("vsock: a packet of {} bytes with {} of data", used.len, header.len);
        }
        if header.src_cid != 2 || header.dst_cid != self.cid {
            fail!("vsock: a packet from {} to {}", header.src_cid, header.dst_cid);
        }
        Ok(Some((used.head as u16, header)))
    }

    pub fn done(&mut self, head: u16) {
        self.rx.offer(head);
        self.give_rx();
    }

    /// A free buffer to send, waiting for one.
    pub fn idle(&mut self) -> Outcome<u16> {
        let mut patience = Patience::new(10_000_000_000);
        loop {
            while self.tx.used_waiting() > 0 {
                self.idle[self.idle_count] = self.tx.take_used().head as u16;
                self.idle_count += 1;
            }
            if self.idle_count > 0 {
                self.idle_count -= 1;
                return Ok(self.idle[self.idle_count]);
            }
            if patience.is_over() {
                fail!("vsock: packets are not taken");
            }
        }
    }

    /// Whether a buffer to send is free now.
    pub fn can_send(&mut self) -> bool {
        self.idle_count > 0 || self.tx.used_waiting() > 0
    }

    /// Sends what is in the buffer `head`: a header, whose pieces are cut at `cut`, and so many bytes of data.
    pub fn send(&mut self, head: u16, header: &Header, cut: u64, bytes: u64) {
        header.write(&self.buffer(1, head));
        self.put(1, head, cut, bytes, 0);
        self.tx.offer(head);
        if self.tx.publish() {
            self.device.notify(1);
        }
    }
}
