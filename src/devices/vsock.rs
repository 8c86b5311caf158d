//! virtio-vsock (virtio 1.2, section 5.10): the guest's AF_VSOCK streams, carried over Unix sockets in user space.
//!
//! A client of the host's connects to `uds_path` and says `CONNECT PORT`; what the guest connects to is who listens at
//! `uds_path` with an underscore and the port behind it: Firecracker's convention. One socket and one stream are a
//! [`connection`]; who may send how much is [`credit`]'s business. What the guest says is taken for an attack: packets that
//! make no sense are answered with RST or not at all, and everything that it could pile up is bounded. Runs in the main
//! loop (rule D1.3), and no call waits.

mod connection;
mod counters;
mod credit;
mod guest;
mod host;
mod packet;
mod table;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use log::error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use crate::error::Result;
use crate::event::{Cx, Event, Interest, Key};
use crate::memory::GuestRam;
use crate::sys::socket::PrivateListener;
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict};
use connection::{State, due};
use packet::{NO_RECEIVE, NO_SEND, Ports, STREAM};
use table::Table;

pub use counters::VsockCounters;
pub use table::MAX_CONNECTIONS;

/// VIRTIO_VSOCK_F_STREAM (section 5.10.3).
const F_STREAM: u64 = 1;
const RX: usize = 0;
const TX: usize = 1;
/// Packets to the guest, packets from it, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Answers to packets that belong to no connection. Who has so many of them waiting is not heard until it takes some.
const MAX_RSTS: usize = 256;
/// The longest line that a client may send: that of Firecracker, whose buffer has 32 bytes.
const MAX_LINE_BYTES: usize = 31;
/// Clients that are taken in before the others of the loop have their turn.
const ACCEPTS_PER_CALL: usize = 16;

const SECOND_NS: u64 = 1_000_000_000;
/// How long a client may take to say its line: a person may be typing.
const GREETING_NS: u64 = 60 * SECOND_NS;
/// How long the guest may take to answer whether it takes a connection.
const ASKED_NS: u64 = 10 * SECOND_NS;
/// How long, and how often, a listener on the host is tried that has no room.
const DIALLING_NS: u64 = 2 * SECOND_NS;
const REDIAL_NS: u64 = 10_000_000;
/// How long the guest may take to end a connection that the host has closed.
const CLOSING_NS: u64 = 10 * SECOND_NS;
/// How long a reader may take for the rest of what a guest has sent that has left.
const DRAINING_NS: u64 = 30 * SECOND_NS;
/// How long nobody is accepted after one could not be, for want of descriptors for example.
const REST_NS: u64 = SECOND_NS;

const LISTENER: u32 = DEVICE_TAG;
const REST: u32 = DEVICE_TAG + 1;
const DEADLINE: u32 = DEVICE_TAG + 2;
const AGAIN: u32 = DEVICE_TAG + 3;
/// The watches of connections are called this and above.
const CONNECTIONS: u32 = DEVICE_TAG + 0x100;

/// What the device waits for besides its connections.
#[derive(Clone, Copy)]
struct Watches {
    listener: Key,
    rest: Key,
    deadline: Key,
    again: Key,
}

/// The device.
pub struct Vsock {
    id: String,
    cid: u32,
    path: PathBuf,
    ram: Arc<GuestRam>,
    listener: PrivateListener,
    watches: Option<Watches>,
    table: Table,
    /// Those that may have something for the guest, each once, in the order of their turns.
    work: VecDeque<usize>,
    /// Answers for no connection: ports and type.
    rsts: VecDeque<(Ports, u16)>,
    /// Those whose watch is to be made, or told of something else.
    touched: Vec<usize>,
    /// A driver is there.
    live: bool,
    /// A buffer of the guest's waits for a packet; a packet of the guest's waits for room for its answer.
    rx_waits: bool,
    tx_waits: bool,
    /// The queues are to be served again, and have not been since.
    asked_again: bool,
    /// When the deadline's timer goes.
    armed_ns: u64,
    counters: Arc<VsockCounters>,
    log: FaultLog,
}

impl Vsock {
    /// A device called `id` for the guest with that context id, whose clients connect through `listener`.
    pub fn new(id: &str, cid: u32, listener: PrivateListener, ram: Arc<GuestRam>) -> Self {
        Vsock {
            id: id.to_owned(),
            cid,
            path: listener.path().to_path_buf(),
            ram,
            listener,
            watches: None,
            table: Table::new(CONNECTIONS),
            work: VecDeque::new(),
            rsts: VecDeque::new(),
            touched: Vec::new(),
            live: false,
            rx_waits: false,
            tx_waits: false,
            asked_again: false,
            armed_ns: u64::MAX,
            counters: Arc::default(),
            log: FaultLog::default(),
        }
    }

    /// What it has done, for whoever asks.
    pub fn counters(&self) -> Arc<VsockCounters> {
        self.counters.clone()
    }

    /// Has a connection's turn come when it has something for the guest.
    fn look_at(&mut self, number: usize) {
        if let Some(connection) = self.table.get_mut(number) {
            if !connection.queued && connection.has_something() {
                connection.queued = true;
                self.work.push_back(number);
            }
            self.touched.push(number);
        }
    }

    fn close(&mut self, number: usize) {
        if self.table.remove(number).is_some() {
            self.work.retain(|&queued| queued != number);
            self.counters.set_open(self.table.len());
        }
    }

    /// Ends a connection from our side; the guest is told, if it has heard of it.
    fn abort(&mut self, number: usize) {
        if let Some(connection) = self.table.get(number) {
            let unheard = connection.state == State::Asked && connection.due & due::REQUEST != 0;
            if !unheard && !matches!(connection.state, State::Greeting | State::Draining) {
                self.rsts.push_back((connection.ports, STREAM));
            }
        }
        self.close(number);
    }

    /// Ends what has taken too long.
    fn expire(&mut self, now_ns: u64) {
        for number in self.table.numbers() {
            let Some(connection) = self.table.get(number).filter(|connection| connection.deadline_ns <= now_ns) else {
                continue;
            };
            match connection.state {
                State::Dialling => self.redial(number, now_ns),
                _ => self.abort(number),
            }
        }
        // The timer has gone; the next deadline is found among all.
        self.armed_ns = u64::MAX;
        self.touched.extend(self.table.numbers());
    }

    /// Watches what was touched as it is to be watched now.
    fn watch(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        for key in self.table.take_gone() {
            cx.unwatch(key);
        }
        let now_ns = cx.now_ns();
        let mut next_ns = self.armed_ns;
        let mut touched = std::mem::take(&mut self.touched);
        for number in touched.drain(..) {
            let Some(connection) = self.table.get_mut(number) else { continue };
            let said = connection.told_shut == NO_RECEIVE | NO_SEND && connection.state == State::Open;
            if said && connection.deadline_ns == u64::MAX {
                connection.deadline_ns = now_ns.saturating_add(CLOSING_NS);
            }
            next_ns = next_ns.min(connection.deadline_ns);
            let interest = connection.interest();
            match (connection.watch, &connection.socket) {
                (Some(watch), _) if connection.hung => {
                    cx.unwatch(watch);
                    connection.watch = None;
                }
                (Some(watch), _) => cx.set_interest(watch, interest)?,
                (None, Some(socket)) if !connection.hung => match cx.watch(socket, interest, connection.tag) {
                    Ok(watch) => connection.watch = Some(watch),
                    Err(e) => {
                        self.log.warn(now_ns, &self.id, &e);
                        self.abort(number);
                    }
                },
                _ => {}
            }
        }
        // The same memory again.
        self.touched = touched;
        let Some(watches) = self.watches else { return Ok(()) };
        if next_ns < self.armed_ns {
            self.armed_ns = next_ns;
            cx.arm(watches.deadline, next_ns)?;
        }
        let rx = self.rx_waits && !(self.work.is_empty() && self.rsts.is_empty());
        let tx = self.tx_waits && self.rsts.len() <= MAX_RSTS / 2;
        if (rx || tx) && !std::mem::replace(&mut self.asked_again, true) {
            cx.arm(watches.again, now_ns)?;
        }
        Ok(())
    }
}

impl Device for Vsock {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Section 5.10.4.
    fn write_config(&self, page: &Page) {
        page.set_config(0, &u64::from(self.cid).to_le_bytes());
    }

    fn begin(&mut self, _features: u64, _page: &Page, _now_ns: u64) {
        self.live = true;
    }

    /// All connections end; clients that have not said a port, and bytes of a guest that had left, stay.
    fn reset(&mut self) {
        self.live = false;
        for number in self.table.numbers() {
            let state = self.table.get(number).map(|connection| connection.state);
            if !matches!(state, Some(State::Greeting | State::Draining)) {
                self.close(number);
            }
        }
        self.work.clear();
        self.rsts.clear();
        (self.rx_waits, self.tx_waits, self.asked_again) = (false, false, false);
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.watches = Some(Watches {
            listener: cx.watch(&self.listener, Interest::READ, LISTENER)?,
            rest: cx.timer(REST)?,
            deadline: cx.timer(DEADLINE)?,
            again: cx.timer(AGAIN)?,
        });
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        let now_ns = cx.now_ns();
        let done = match (event.tag, self.watches) {
            (LISTENER, _) => self.accept(cx),
            (REST, Some(watches)) => cx.set_interest(watches.listener, Interest::READ),
            (DEADLINE, _) => {
                self.expire(now_ns);
                Ok(())
            }
            // What all sockets of a turn had to say has been heard, and has its turns in the next.
            (AGAIN, _) => return true,
            (tag, _) => {
                if let Some(number) = self.table.called(tag) {
                    self.hear_socket(number, event, now_ns);
                }
                Ok(())
            }
        };
        if let Err(e) = done {
            error!("{}: {e}", self.id);
        }
        false
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        self.asked_again = false;
        match queue {
            RX => self.speak(chain, now_ns),
            TX => self.hear(chain, now_ns),
            // Events tell of migration, of which there is none: the buffers are kept.
            _ => Verdict::Pending,
        }
    }

    fn reap(&mut self, cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {
        if let Err(e) = self.watch(cx) {
            error!("{}: {e}", self.id);
        }
    }

    /// Packets are dealt with on the spot. Buffers for events keep nobody from a pause or a reset.
    fn in_flight(&self) -> usize {
        0
    }
}

#[cfg(test)]
#[path = "vsock_test.rs"]
mod tests;
