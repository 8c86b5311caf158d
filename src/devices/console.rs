//! virtio-console (virtio 1.2, section 5.3): one port, whose outside end is a [`Chardev`].
//!
//! The guest's output is copied out of its chains as the chardev has room; a chain for which there is none waits in the
//! ring, and only for a client that reads. Its empty buffers wait in the ring until a client writes. Both are taken by
//! the batch, which is bounded in bytes too. The size of the terminal goes into the configuration space. More ports
//! (MULTIPORT) and writing without a queue (EMERG_WRITE) are not offered. Runs in the main loop.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::chardev::{Chardev, ChardevState, OUTPUT_BYTES, Room};
use crate::error::Result;
use crate::event::{Cx, Done, Event, Receiver, Sender, channel};
use crate::memory::GuestRam;
use crate::qos::{Direction, Wait};
use crate::sys::socket::PrivateListener;
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict, gather};

/// The configuration says how large the terminal is (section 5.3.3).
const SIZE: u64 = 1 << 0;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Bytes copied before the other handlers of the loop have their turn (G10): a tenth of a millisecond.
const BYTES_PER_TURN: usize = 256 << 10;
/// Bytes copied at once.
const PIECE_BYTES: usize = 4096;

const ORDERS: u32 = DEVICE_TAG;
const CHARDEV: u32 = DEVICE_TAG + 1;

/// What Control wants of the console.
pub enum Order {
    /// The terminal has so many columns and rows.
    Resize {
        /// Characters of a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Clients come here from now on, or nowhere. The slip comes back when that is so.
    Listen(Option<PrivateListener>, Done<Result<()>>),
}

/// The console.
pub struct Console {
    id: String,
    ram: Arc<GuestRam>,
    chardev: Chardev,
    /// Columns and rows; unwritten if the guest has not been told.
    size: [u16; 2],
    size_is_new: bool,
    /// How far the chain has been taken that waits for room, in bytes of its buffers.
    taken_bytes: u64,
    /// What is left of [`BYTES_PER_TURN`].
    budget: usize,
    /// A driver has the device.
    open: Arc<AtomicBool>,
    orders: (Sender<Order>, Receiver<Order>),
    log: FaultLog,
}

impl Console {
    /// A console in `ram` whose clients come to `listener`. Nobody knows how large its terminal is.
    pub fn new(id: &str, ram: Arc<GuestRam>, listener: PrivateListener) -> Self {
        Console {
            id: id.to_owned(),
            ram,
            chardev: Chardev::new(id, CHARDEV, Some(listener)),
            size: [0; 2],
            size_is_new: false,
            taken_bytes: 0,
            budget: BYTES_PER_TURN,
            open: Arc::default(),
            orders: channel(),
            log: FaultLog::default(),
        }
    }

    /// The way to tell it what is wanted.
    pub fn orders(&self) -> Sender<Order> {
        self.orders.0.clone()
    }

    /// What is known of its outside end.
    pub fn state(&self) -> Arc<ChardevState> {
        self.chardev.state()
    }

    /// Whether the guest's driver has it.
    pub fn open(&self) -> Arc<AtomicBool> {
        self.open.clone()
    }

    /// Some of the guest's output, as far as there is room for it.
    fn transmit(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
        let total: u64 = chain.readable().iter().map(|buffer| u64::from(buffer.len)).sum();
        let mut piece = [0; PIECE_BYTES];
        while self.taken_bytes < total {
            if self.budget == 0 {
                return later(now_ns);
            }
            let left = total - self.taken_bytes;
            let room = match self.chardev.room(now_ns) {
                Room::Wait(until_ns) => return later(until_ns),
                Room::Bytes(room) => room,
                Room::Lossy => {
                    // Of a long chain only the end would be left.
                    let skipped = left.saturating_sub(OUTPUT_BYTES as u64);
                    self.chardev.lose(skipped);
                    self.taken_bytes += skipped;
                    OUTPUT_BYTES
                }
            };
            let wanted = (total - self.taken_bytes).min(room.min(PIECE_BYTES).min(self.budget) as u64) as usize;
            let have = gather(&self.ram, chain.readable(), self.taken_bytes, &mut piece[..wanted]);
            self.chardev.put(&piece[..have]);
            self.taken_bytes += have as u64;
            self.budget -= have;
            if have < wanted {
                self.log.warn(now_ns, &self.id, &"output outside guest memory");
                break;
            }
        }
        self.taken_bytes = 0;
        Verdict::Used(0)
    }

    /// What a client has written, into an empty buffer of the guest's.
    fn receive(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
        let input = self.chardev.input();
        if input.is_empty() {
            return Verdict::Later(Direction::Read, Wait::UNTIL_TOLD);
        }
        let mut written = 0;
        for buffer in chain.writable() {
            let wanted = (buffer.len as usize).min(input.len());
            if wanted == 0 {
                continue;
            }
            if !scatter(&self.ram, buffer.address, wanted, input) {
                self.log.warn(now_ns, &self.id, &"a buffer for input outside guest memory");
                break;
            }
            written += wanted;
        }
        Verdict::Used(written as u32)
    }
}

/// Moves the first `len` bytes of `input` to guest memory; false, and nothing is moved, if it is none.
fn scatter(ram: &GuestRam, address: GuestAddress, len: usize, input: &mut VecDeque<u8>) -> bool {
    let Ok(slice) = GuestMemoryBackend::get_slice(ram, address, len) else { return false };
    let (first, second) = input.as_slices();
    let first = &first[..len.min(first.len())];
    slice.copy_from(first);
    if let Ok(rest) = slice.offset(first.len()) {
        rest.copy_from(&second[..len - first.len()]);
    }
    input.drain(..len);
    true
}

/// What is left of the chain has to wait until then, and what comes behind it too.
fn later(until_ns: u64) -> Verdict {
    Verdict::Later(Direction::Write, Wait { until_ns, other_may_go: false })
}

impl Device for Console {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn write_config(&self, _page: &Page) {
        // Nobody has said how large the terminal is.
    }

    fn begin(&mut self, _features: u64, _page: &Page, _now_ns: u64) {
        self.open.store(true, Relaxed);
    }

    /// What is on its way between a client and the guest is the next driver's.
    fn reset(&mut self) {
        self.taken_bytes = 0;
        self.open.store(false, Relaxed);
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.orders.1, ORDERS);
        self.chardev.attach(cx)
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        if event.tag != ORDERS {
            return self.chardev.ready(event, cx);
        }
        while let Some(order) = self.orders.1.receive() {
            match order {
                Order::Resize { columns, rows } => (self.size, self.size_is_new) = ([columns, rows], true),
                Order::Listen(listener, done) => done.end(self.chardev.replace(listener, cx)),
            }
        }
        // A client that the guest waited for may be gone.
        true
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        match queue {
            RECEIVE => self.receive(chain, now_ns),
            TRANSMIT => self.transmit(chain, now_ns),
            _ => Verdict::Used(0),
        }
    }

    fn reap(&mut self, cx: &mut Cx<'_>, completions: &mut Completions<'_>) {
        self.budget = BYTES_PER_TURN;
        self.chardev.settle(cx);
        if std::mem::take(&mut self.size_is_new) {
            let [[a, b], [c, d]] = self.size.map(u16::to_le_bytes);
            completions.set_config(0, &[a, b, c, d]);
        }
    }

    /// All work is done within a batch.
    fn in_flight(&self) -> usize {
        0
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
