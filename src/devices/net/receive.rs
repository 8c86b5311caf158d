//! `Receive`: packets from a tap into the guest's buffers (virtio 1.2, section 5.1.6.3 and 5.1.6.4).
//!
//! A packet is read straight into the guest's memory: into as many of its chains as the packets of late have needed, and
//! what is longer than those goes to an overflow of ours and is copied from there. One packet at most is held back, because
//! of the limit or for want of chains; all others stay with the kernel, whose queue is bounded. Chains wait here in the order
//! in which they came; how many is bounded by what a packet can need. The NIC's thread.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::counters::{HeldSince, Way};
use crate::devices::counters::add;
use crate::memory::GuestRam;
use crate::qos::{Bucket, Direction, Request};
use crate::sys::pieces::Pieces;
use crate::sys::tap::{HEADER_BYTES, Tap};
use crate::virtio::Chain;

/// The longest packet with its header: 64 KiB in one piece, an Ethernet header and a VLAN tag.
pub const MAX_PACKET_BYTES: usize = 65562 + 4;
/// Packets that are read before the other handlers of the loop have their turn (G10).
const BUDGET: usize = 64;
/// So few pieces of memory are left to take in that no further chain is waited for. A chain of Linux's has one.
const FEW_PIECES: usize = 256;
/// Where `num_buffers` stands in the header.
const NUM_BUFFERS: u64 = 10;

/// A chain of the guest's that waits for a packet.
struct Waiting {
    head: u16,
    pieces: usize,
    bytes: usize,
    /// Where the two bytes of `num_buffers` go if a packet begins in it.
    num_buffers: [GuestAddress; 2],
}

/// A packet that has been read and is not the guest's yet.
#[derive(Clone, Copy)]
struct Packet {
    /// Bytes with the header.
    len: usize,
    /// Chains that have all their bytes.
    chains: usize,
    /// Bytes of the packet that are in them.
    placed: usize,
    /// Bytes of the packet that were read into chains; the others are in the overflow.
    direct: usize,
    /// The limit has let it go.
    allowed: bool,
}

/// Why no more packets are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// There are none.
    Empty,
    /// There are no chains, or too few for the packet that waits.
    Chains,
    /// Until then: the limit says so, or others have their turn.
    Until(u64),
    /// The tap is gone, or what else the host says.
    Gone,
}

/// The receiving half of a pair of queues.
pub struct Receive {
    ram: Arc<GuestRam>,
    waiting: VecDeque<Waiting>,
    pieces: Pieces,
    /// Bytes of all chains that wait.
    room: usize,
    /// Bytes that a packet may be expected to have.
    want: usize,
    packet: Option<Packet>,
    held: HeldSince,
    /// What the driver can put together.
    mergeable: bool,
    queue_size: usize,
    /// Chains that are finished: head and length.
    pub finished: Vec<(u16, u32)>,
}

impl Receive {
    pub fn new(ram: Arc<GuestRam>, queue_size: u16) -> Self {
        Receive {
            pieces: Pieces::new(ram.clone(), MAX_PACKET_BYTES),
            ram,
            waiting: VecDeque::new(),
            room: 0,
            want: HEADER_BYTES,
            packet: None,
            held: HeldSince::default(),
            mergeable: false,
            queue_size: queue_size.into(),
            finished: Vec::new(),
        }
    }

    /// A new driver: nothing of the old one's is left.
    pub fn begin(&mut self, mergeable: bool) {
        self.waiting.clear();
        self.pieces.clear();
        self.finished.clear();
        self.room = 0;
        self.want = HEADER_BYTES;
        self.packet = None;
        self.held = HeldSince::default();
        self.mergeable = mergeable;
    }

    /// The tap is gone, and with it the packet that was held back; the chains wait for the next.
    pub fn forget_packet(&mut self) {
        self.packet = None;
        self.held = HeldSince::default();
    }

    /// Whether a packet may be read now, with as many chains as it is likely to need.
    pub fn is_ready(&self) -> bool {
        match self.packet {
            Some(packet) => packet.chains < self.waiting.len() || packet.placed == packet.len,
            None => {
                let enough = !self.mergeable || self.room >= self.want || self.pieces.room() < FEW_PIECES;
                enough && !self.waiting.is_empty()
            }
        }
    }

    /// Takes in a chain. False for one that no packet fits in: its memory is none, or it is shorter than a header.
    pub fn add(&mut self, chain: &Chain) -> bool {
        let before = self.pieces.len();
        let mut bytes = 0usize;
        let mut num_buffers = [GuestAddress(0); 2];
        let mut good = chain.writable().len() <= self.pieces.room();
        for buffer in chain.writable().iter().filter(|buffer| buffer.len > 0) {
            good = good && self.pieces.push(buffer.address, buffer.len);
            if !good {
                break;
            }
            for (at, place) in (NUM_BUFFERS..).zip(&mut num_buffers) {
                if let Some(offset) = at.checked_sub(bytes as u64).filter(|&offset| offset < buffer.len.into()) {
                    *place = GuestAddress(buffer.address.0 + offset);
                }
            }
            bytes += buffer.len as usize;
        }
        if !good || bytes < HEADER_BYTES {
            self.pieces.truncate(before);
            return false;
        }
        self.waiting.push_back(Waiting { head: chain.head(), pieces: self.pieces.len() - before, bytes, num_buffers });
        self.room += bytes;
        true
    }

    /// Reads packets and finishes chains, until there is a reason to stop.
    pub fn pump(&mut self, tap: &Tap, bucket: &mut Bucket, count: &Way, now_ns: u64, all: bool) -> Stop {
        let mut left = BUDGET;
        loop {
            if self.packet.is_none() {
                if self.waiting.is_empty() || !all && !self.is_ready() {
                    return Stop::Chains;
                }
                if left == 0 {
                    return Stop::Until(now_ns);
                }
                left -= 1;
                match self.read(tap, count) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Stop::Empty,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return Stop::Gone,
                }
            }
            let Some(mut packet) = self.packet else { continue };
            if !packet.allowed {
                let bytes = (packet.len - HEADER_BYTES) as u64;
                if let Err(wait) = bucket.ask(now_ns, &Request::new(Direction::Read, bytes)) {
                    self.held.begin(count, now_ns);
                    return Stop::Until(wait.until_ns);
                }
                self.held.end(count, now_ns);
                packet.allowed = true;
            }
            let whole = self.place(&mut packet);
            self.packet = Some(packet);
            if !whole {
                if packet.chains < self.queue_size && self.pieces.room() >= FEW_PIECES {
                    return Stop::Chains;
                }
                // The whole queue has no room for it, or is in crumbs: nothing that the driver could add would help.
                self.packet = None;
                add(&count.dropped, 1);
                continue;
            }
            self.finish(packet, count);
        }
    }

    /// Reads one packet into the first chains.
    fn read(&mut self, tap: &Tap, count: &Way) -> io::Result<()> {
        let (mut chains, mut pieces, mut bytes) = (0, 0, 0);
        for chain in &self.waiting {
            chains += 1;
            pieces += chain.pieces;
            bytes += chain.bytes;
            if !self.mergeable || bytes >= self.want {
                break;
            }
        }
        let len = tap.read(&mut self.pieces, pieces)?;
        if len <= HEADER_BYTES {
            // A tap has no such packets.
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Grows at once and shrinks slowly: a chain too many costs less than a copy.
        self.want = if len > self.want { len } else { self.want - (self.want - len) / 16 };
        if len > bytes && !self.mergeable {
            // What the driver has asked for does not fit what it gives (section 5.1.6.3.1).
            add(&count.dropped, 1);
            return Ok(());
        }
        let mut packet = Packet { len, chains: 0, placed: 0, direct: len.min(bytes), allowed: false };
        for chain in self.waiting.iter().take(chains) {
            if packet.placed == packet.direct {
                break;
            }
            packet.placed += chain.bytes.min(packet.direct - packet.placed);
            packet.chains += 1;
        }
        self.packet = Some(packet);
        Ok(())
    }

    /// Copies what is in the overflow to further chains. Whether all of the packet is in its chains.
    fn place(&mut self, packet: &mut Packet) -> bool {
        while packet.placed < packet.len {
            let Some(chain) = self.waiting.get(packet.chains) else { return false };
            let before: usize = self.waiting.iter().take(packet.chains).map(|chain| chain.pieces).sum();
            let len = chain.bytes.min(packet.len - packet.placed);
            self.pieces.copy_overflow(packet.placed - packet.direct, len, before);
            packet.placed += len;
            packet.chains += 1;
        }
        true
    }

    /// Has a packet's chains given back.
    fn finish(&mut self, packet: Packet, count: &Way) {
        let num_buffers = (packet.chains as u16).to_le_bytes();
        let mut left = packet.len;
        let mut pieces = 0;
        for place in 0..packet.chains {
            let Some(chain) = self.waiting.pop_front() else { break };
            if place == 0 {
                for (address, byte) in chain.num_buffers.into_iter().zip(num_buffers) {
                    // It was found to be memory when the chain came.
                    let _ = self.ram.write_obj(byte, address);
                }
            }
            let len = chain.bytes.min(left);
            left -= len;
            pieces += chain.pieces;
            self.room -= chain.bytes;
            self.finished.push((chain.head, len as u32));
        }
        self.pieces.remove_first(pieces);
        self.packet = None;
        add(&count.packets, 1);
        add(&count.bytes, (packet.len - HEADER_BYTES) as u64);
    }
}
