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
mod packet;
mod table;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{error, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use crate::error::Result;
use crate::event::{Cx, Event, Interest, Key};
use crate::memory::GuestRam;
use crate::qos::{Direction, Wait};
use crate::sys::socket::{self, PrivateListener};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict, gather, scatter};
use connection::{Connection, State, Taken, due};
use counters::add;
use packet::{HEADER_BYTES, HOST_CID, Header, NO_RECEIVE, NO_SEND, Ports, STREAM, op};
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
/// The longest line that a client may say is `CONNECT 4294967295`.
const MAX_LINE_BYTES: usize = 18;
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

    /// One packet of the guest's.
    fn hear(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
        self.tx_waits = self.rsts.len() >= MAX_RSTS;
        if self.tx_waits {
            return Verdict::Later(Direction::Write, Wait::UNTIL_TOLD);
        }
        let mut bytes = [0; HEADER_BYTES];
        if gather(&self.ram, chain.readable(), 0, &mut bytes) < HEADER_BYTES {
            self.log.warn(now_ns, &self.id, &"a packet without a header");
            return Verdict::Used(0);
        }
        let header = Header::read(&bytes);
        let ports = header.ports();
        if header.src_cid != u64::from(self.cid) || header.dst_cid != HOST_CID {
            self.log.warn(now_ns, &self.id, &"a packet from or to somebody else");
        } else if header.kind != STREAM {
            if header.op != op::RST {
                self.rsts.push_back((ports, header.kind));
            }
        } else {
            match (self.table.find(ports), header.op) {
                (None, op::RST) => {}
                (None, op::REQUEST) => self.dial(&header, now_ns),
                (None, _) => self.rsts.push_back((ports, STREAM)),
                (Some(number), op::RST) => self.close(number),
                (Some(number), _) => {
                    if !self.hear_of(number, &header, chain, now_ns) {
                        self.abort(number);
                    }
                    self.look_at(number);
                }
            }
        }
        Verdict::Used(0)
    }

    /// One packet of a connection. False if it ends the connection by what it says.
    fn hear_of(&mut self, number: usize, header: &Header, chain: &Chain, now_ns: u64) -> bool {
        let Some(connection) = self.table.get_mut(number) else { return true };
        connection.credit.hear(header);
        if connection.credit.room() > 0 {
            connection.starved = false;
        }
        match (header.op, connection.state) {
            (op::RESPONSE, State::Asked) if connection.due & due::REQUEST == 0 => {
                (connection.state, connection.deadline_ns) = (State::Open, u64::MAX);
                add(&self.counters.opened, 1);
                match connection.welcome() {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                    // Who has left may have said something before.
                    Err(_) => connection.host_is_deaf(),
                    Ok(()) => {}
                }
                true
            }
            (op::RW, State::Open) if connection.guest_shut & NO_SEND == 0 => {
                let all: u64 = chain.readable().iter().map(|buffer| u64::from(buffer.len)).sum();
                let whole = all - HEADER_BYTES as u64 >= header.len.into();
                if !whole || !connection.credit.receive(header.len) {
                    self.log.warn(now_ns, &self.id, &"more data than a packet has, or than there was credit for");
                    return false;
                }
                add(&self.counters.from_guest, header.len.into());
                let taken = connection.take(&self.ram, chain.readable(), header.len);
                if connection.credit.is_worth_telling() {
                    connection.due |= due::CREDIT_UPDATE;
                }
                taken == Taken::All
            }
            (op::SHUTDOWN, State::Open) => {
                connection.shut(header.flags);
                if connection.guest_shut == NO_RECEIVE | NO_SEND {
                    self.part(number, now_ns);
                }
                true
            }
            (op::CREDIT_UPDATE, State::Open | State::Asked) => true,
            (op::CREDIT_REQUEST, State::Open) => {
                connection.due |= due::CREDIT_UPDATE;
                true
            }
            // Among them a second request for a connection that is there, and data behind the end.
            _ => false,
        }
    }

    /// The guest is done with a connection: it is answered at once, and what it sent goes on to its reader.
    fn part(&mut self, number: usize, now_ns: u64) {
        let Some(connection) = self.table.get_mut(number) else { return };
        if !connection.is_holding() {
            self.abort(number);
            return;
        }
        self.rsts.push_back((connection.ports, STREAM));
        connection.state = State::Draining;
        connection.deadline_ns = now_ns.saturating_add(DRAINING_NS);
        self.table.forget_ports(number);
    }

    /// The guest wants a connection: whoever listens at its port's path is asked.
    fn dial(&mut self, header: &Header, now_ns: u64) {
        let ports = header.ports();
        if !self.table.has_room() {
            self.log.warn(now_ns, &self.id, &format!("{MAX_CONNECTIONS} connections are open; another was refused"));
            self.refuse(ports);
            return;
        }
        let mut connection = Connection::new(ports, State::Dialling, None, now_ns.saturating_add(REDIAL_NS));
        connection.give_up_ns = now_ns.saturating_add(DIALLING_NS);
        connection.credit.hear(header);
        let number = self.table.add(connection);
        self.counters.set_open(self.table.len());
        self.redial(number, now_ns);
    }

    /// Tries to reach the listener of a connection.
    fn redial(&mut self, number: usize, now_ns: u64) {
        let Some(connection) = self.table.get_mut(number) else { return };
        match socket::connect(&port_path(&self.path, connection.ports.host)) {
            Ok(socket) => {
                connection.socket = Some(socket);
                (connection.state, connection.deadline_ns) = (State::Open, u64::MAX);
                connection.due |= due::RESPONSE;
                add(&self.counters.opened, 1);
                self.look_at(number);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock && now_ns < connection.give_up_ns => {
                connection.deadline_ns = now_ns.saturating_add(REDIAL_NS);
                self.touched.push(number);
            }
            Err(e) => {
                if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) {
                    self.log.warn(now_ns, &self.id, &format!("connect to {}: {e}", connection.ports.host));
                }
                add(&self.counters.refused, 1);
                self.abort(number);
            }
        }
    }

    fn refuse(&mut self, ports: Ports) {
        add(&self.counters.refused, 1);
        self.rsts.push_back((ports, STREAM));
    }

    /// Fills one buffer of the guest's with the next packet.
    fn speak(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
        self.rx_waits = false;
        let all: u64 = chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum();
        let Some(room) = all.checked_sub(HEADER_BYTES as u64) else {
            self.log.warn(now_ns, &self.id, &"a buffer with no room for a header");
            return Verdict::Used(0);
        };
        let Some(header) = self.next_packet(chain, room) else {
            self.rx_waits = true;
            return Verdict::Later(Direction::Read, Wait::UNTIL_TOLD);
        };
        if !scatter(&self.ram, chain.writable(), 0, &header.bytes()) {
            self.log.warn(now_ns, &self.id, &"a buffer outside guest memory");
            return Verdict::Used(0);
        }
        add(&self.counters.to_guest, header.len.into());
        Verdict::Used(HEADER_BYTES as u32 + header.len)
    }

    /// The next packet for the guest, its data already in place.
    fn next_packet(&mut self, chain: &Chain, room: u64) -> Option<Header> {
        if let Some((ports, kind)) = self.rsts.pop_front() {
            return Some(Header::to_guest(self.cid, ports, kind, op::RST));
        }
        while let Some(number) = self.work.pop_front() {
            let Some(connection) = self.table.get_mut(number) else { continue };
            connection.queued = false;
            let packet = connection.next(self.cid, &self.ram, chain.writable(), room);
            // Behind all others, if it has more.
            self.look_at(number);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Takes in clients of the host's.
    fn accept(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        for _ in 0..ACCEPTS_PER_CALL {
            match self.listener.accept() {
                Ok(stream) => self.greet(stream, cx.now_ns()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    warn!("{}: accept a client: {e}", self.id);
                    if let Some(watches) = self.watches {
                        cx.set_interest(watches.listener, Interest::NONE)?;
                        cx.arm(watches.rest, cx.now_ns().saturating_add(REST_NS))?;
                    }
                    break;
                }
            }
        }
        Ok(())
    }

    fn greet(&mut self, stream: UnixStream, now_ns: u64) {
        if let Some(oldest) = self.table.greeter_too_many() {
            self.close(oldest);
        }
        if !self.table.has_room() {
            self.log.warn(now_ns, &self.id, &format!("{MAX_CONNECTIONS} connections are open; a client was let go"));
            add(&self.counters.refused, 1);
            return;
        }
        let nobody = Ports { host: 0, guest: 0 };
        let deadline_ns = now_ns.saturating_add(GREETING_NS);
        let number = self.table.add(Connection::new(nobody, State::Greeting, Some(stream), deadline_ns));
        self.counters.set_open(self.table.len());
        self.touched.push(number);
    }

    /// A client says its line, or a part of it. What is behind the line is the guest's and stays in the socket.
    fn read_line(&mut self, number: usize, now_ns: u64) {
        let Some(connection) = self.table.get_mut(number) else { return };
        loop {
            let mut byte = [0];
            match connection.socket.as_ref().map(|mut socket| socket.read(&mut byte)) {
                Some(Ok(1)) if byte == *b"\n" => break,
                Some(Ok(1)) if connection.line.len() < MAX_LINE_BYTES => connection.line.extend(byte),
                Some(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Some(Err(e)) if e.kind() == ErrorKind::WouldBlock => return,
                _ => return self.close(number),
            }
        }
        let line = std::mem::take(&mut connection.line);
        let port = wanted_port(&line);
        match port.filter(|_| self.live) {
            Some(port) => {
                connection.state = State::Asked;
                connection.deadline_ns = now_ns.saturating_add(ASKED_NS);
                connection.due |= due::REQUEST;
                self.table.name(number, port);
                self.look_at(number);
            }
            None => {
                if port.is_none() {
                    self.log.warn(now_ns, &self.id, &"a client that did not say CONNECT PORT was let go");
                }
                add(&self.counters.refused, 1);
                self.close(number);
            }
        }
    }

    /// A socket has something, has room, or has lost its other end.
    fn hear_socket(&mut self, number: usize, event: Event, now_ns: u64) {
        let Some(connection) = self.table.get_mut(number) else { return };
        if connection.state == State::Greeting {
            self.read_line(number, now_ns);
            // What it has said behind its line is delivered even so.
            if event.is_hang_up()
                && let Some(connection) = self.table.get_mut(number)
            {
                connection.hang_up();
            }
            return;
        }
        if event.is_writable() && connection.is_holding() {
            connection.flush();
            if connection.credit.is_worth_telling() {
                connection.due |= due::CREDIT_UPDATE;
            }
        }
        if event.is_hang_up() {
            connection.hang_up();
        } else if event.is_readable() {
            // Twice told and not read: the guest has no buffer, or the machine stands.
            connection.masked = connection.readable;
            connection.readable = true;
        }
        match connection.state {
            State::Draining if !connection.is_holding() => self.close(number),
            _ => self.look_at(number),
        }
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

/// Where who listens to a port of the host's is to be found.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// The port of `CONNECT PORT`.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
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
