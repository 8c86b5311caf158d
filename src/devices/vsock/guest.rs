//! What the guest says, packet by packet, and what it is told. All of it is taken for an attack. Main loop.

use super::connection::{State, Taken, due};
use super::counters::add;
use super::packet::{HEADER_BYTES, HOST_CID, Header, NO_RECEIVE, NO_SEND, Ports, STREAM, op};
use super::{DRAINING_NS, MAX_RSTS, Vsock};
use crate::qos::{Direction, Wait};
use crate::virtio::{Chain, Verdict, gather, scatter};

use std::io::ErrorKind;

impl Vsock {
    /// One packet of the guest's.
    pub(super) fn hear(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
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
    pub(super) fn hear_of(&mut self, number: usize, header: &Header, chain: &Chain, now_ns: u64) -> bool {
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
    pub(super) fn part(&mut self, number: usize, now_ns: u64) {
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

    pub(super) fn refuse(&mut self, ports: Ports) {
        add(&self.counters.refused, 1);
        self.rsts.push_back((ports, STREAM));
    }

    /// Fills one buffer of the guest's with the next packet.
    pub(super) fn speak(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
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
    pub(super) fn next_packet(&mut self, chain: &Chain, room: u64) -> Option<Header> {
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
}
