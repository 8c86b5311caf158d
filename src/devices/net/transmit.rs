//! `Transmit`: chains of the guest's as packets to a tap (virtio 1.2, section 5.1.6.2).
//!
//! A chain is a header and a packet, written as they lie in guest memory with one call. What the kernel finds wrong with
//! it is the guest's fault: dropped, counted, told at a limited rate. The NIC's thread.

use std::sync::Arc;

use super::counters::{HeldSince, Way};
use super::receive::MAX_PACKET_BYTES;
use crate::devices::counters::add;
use crate::memory::GuestRam;
use crate::qos::{Bucket, Direction, Request, Wait};
use crate::sys::pieces::Pieces;
use crate::sys::tap::{HEADER_BYTES, Tap};
use crate::virtio::Chain;

/// The shortest packet that the kernel takes: an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// What became of a chain.
pub enum Sent {
    /// It is finished, and the packet is on its way.
    Done,
    /// It is finished and was no packet, for this reason.
    Bad(&'static str),
    /// It is finished, and the packet is lost, for this reason.
    Lost(&'static str),
    /// The limit does not let it go yet.
    Limited(Wait),
    /// The tap has no room.
    Full,
    /// It is finished, and the packet is lost: the tap's interface is down.
    Down,
    /// The tap is gone.
    Gone,
}

/// The sending half of a pair of queues.
pub struct Transmit {
    pieces: Pieces,
    /// The head of a chain that the limit has let go, and that the tap had no room for.
    allowed: Option<u16>,
    held: HeldSince,
}

impl Transmit {
    pub fn new(ram: Arc<GuestRam>) -> Self {
        Transmit { pieces: Pieces::new(ram, 0), allowed: None, held: HeldSince::default() }
    }

    /// A new driver.
    pub fn begin(&mut self) {
        self.allowed = None;
        self.held = HeldSince::default();
    }

    /// Sends one chain.
    pub fn send(&mut self, chain: &Chain, tap: &Tap, bucket: &mut Bucket, count: &Way, now_ns: u64) -> Sent {
        self.pieces.clear();
        let mut len = 0usize;
        let few = chain.readable().len() <= self.pieces.room();
        let inside = few
            && chain.readable().iter().filter(|buffer| buffer.len > 0).all(|buffer| {
                len = len.saturating_add(buffer.len as usize);
                self.pieces.push(buffer.address, buffer.len)
            });
        // One like any other for the limit: a guest is not to spin for free.
        let good = inside && (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET_BYTES).contains(&len);
        let bytes = if good { (len - HEADER_BYTES) as u64 } else { 0 };
        if self.allowed.take() != Some(chain.head())
            && let Err(wait) = bucket.ask(now_ns, &Request::new(Direction::Write, bytes))
        {
            self.held.begin(count, now_ns);
            return Sent::Limited(wait);
        }
        self.held.end(count, now_ns);
        if !good {
            add(&count.errors, 1);
            return Sent::Bad(match (few, inside) {
                (false, _) => "a packet of too many pieces",
                (_, false) => "a packet outside guest memory",
                _ => "a packet that is too short or too long",
            });
        }
        let Err(error) = tap.write(&self.pieces) else {
            add(&count.packets, 1);
            add(&count.bytes, bytes);
            return Sent::Done;
        };
        match error.raw_os_error() {
            Some(libc::EAGAIN) => {
                self.allowed = Some(chain.head());
                Sent::Full
            }
            Some(libc::EBADFD | libc::EBADF) => Sent::Gone,
            Some(libc::EIO) => {
                add(&count.dropped, 1);
                Sent::Down
            }
            Some(libc::EINVAL | libc::EFAULT | libc::EMSGSIZE) => {
                add(&count.errors, 1);
                Sent::Bad("a packet with a header that makes no sense")
            }
            _ => {
                add(&count.dropped, 1);
                Sent::Lost("the host has no memory for a packet")
            }
        }
    }
}
