//! `Connection`: one Unix socket and one of the guest's streams, and the bytes between them.
//!
//! Bytes of the guest's go straight into the socket, and into a buffer only when its reader is slow; the buffer is bounded by
//! the credit that the guest was given. Bytes of the host's go from the socket straight into the guest's buffer, as many as
//! it has room for. Which packets there are to send, and in which order connections have their turn, is the device's
//! business. Main loop.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::credit::Credit;
use super::packet::{HEADER_BYTES, Header, NO_RECEIVE, NO_SEND, Ports, STREAM, op};
use crate::event::{Interest, Key};
use crate::memory::GuestRam;
use crate::sys::stream;
use crate::virtio::{Buffer, gather, pieces};

/// Packets that are to go to the guest, as bits of [`Connection::due`].
pub mod due {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const CREDIT_UPDATE: u8 = 4;
    pub const CREDIT_REQUEST: u8 = 8;
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A client of the host's is to say which port it wants.
    Greeting,
    /// The guest wants a port whose listener has no room for it at the moment.
    Dialling,
    /// The guest has been asked, or is to be, and has not answered.
    Asked,
    /// Both sides are there.
    Open,
    /// The guest has left; what it sent is still on its way to the socket.
    Draining,
}

/// One connection.
pub struct Connection {
    pub ports: Ports,
    pub state: State,
    pub socket: Option<UnixStream>,
    pub watch: Option<Key>,
    /// What its watch is called.
    pub tag: u32,
    /// When the patience with the present state ends, and with repeated attempts; at the end of time if it does not.
    pub deadline_ns: u64,
    pub give_up_ns: u64,
    pub credit: Credit,
    /// What a client has said so far.
    pub line: Vec<u8>,
    /// Packets for the guest.
    pub due: u8,
    /// It is in the device's list of those that have something for the guest.
    pub queued: bool,
    /// The socket has something, as far as we know.
    pub readable: bool,
    /// ... and is not to tell us again before it was read.
    pub masked: bool,
    /// The guest has been asked for credit and has given none since.
    pub starved: bool,
    /// What the guest has said it will not do any more, and what it has been told of the host: flags of SHUTDOWN.
    pub guest_shut: u32,
    pub host_shut: u32,
    pub told_shut: u32,
    /// The loop has let go of the socket: its other end is closed.
    pub hung: bool,
    /// Bytes of the guest's that the socket has not taken.
    out: VecDeque<u8>,
}

/// What became of bytes of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// They are in the socket, in the buffer, or of no interest to anybody any more.
    All,
    /// They are not where the header says.
    Malformed,
}

impl Connection {
    pub fn new(ports: Ports, state: State, socket: Option<UnixStream>, deadline_ns: u64) -> Self {
        Connection {
            ports,
            state,
            socket,
            watch: None,
            tag: 0,
            deadline_ns,
            give_up_ns: u64::MAX,
            credit: Credit::default(),
            line: Vec::new(),
            due: 0,
            queued: false,
            readable: false,
            masked: false,
            starved: false,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            hung: false,
            out: VecDeque::new(),
        }
    }

    /// What its socket is to tell of.
    pub fn interest(&self) -> Interest {
        let reads = match self.state {
            State::Greeting => true,
            State::Open => !self.masked && self.wants_bytes(),
            _ => false,
        };
        match (reads, self.out.is_empty()) {
            (true, true) => Interest::READ,
            (true, false) => Interest::BOTH,
            (false, true) => Interest::NONE,
            (false, false) => Interest::WRITE,
        }
    }

    /// Whether bytes of the host's are still for somebody.
    fn wants_bytes(&self) -> bool {
        self.host_shut & NO_SEND == 0 && self.guest_shut & NO_RECEIVE == 0
    }

    /// Whether there may be a packet for the guest.
    pub fn has_something(&self) -> bool {
        match self.state {
            State::Asked => self.due & due::REQUEST != 0,
            State::Open => {
                self.due != 0
                    || self.host_shut & !self.told_shut != 0
                    || self.readable && self.wants_bytes() && (self.credit.room() > 0 || !self.starved)
            }
            _ => false,
        }
    }

    /// Whether bytes of the guest's are waiting for the socket.
    pub fn is_holding(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next packet for the guest, whose data go into `buffers` behind the header, and are at most `room` bytes.
    pub fn next(&mut self, cid: u32, ram: &GuestRam, buffers: &[Buffer], room: u64) -> Option<Header> {
        for (bit, op) in [(due::REQUEST, op::REQUEST), (due::RESPONSE, op::RESPONSE)] {
            if self.due & bit != 0 {
                self.due &= !bit;
                return Some(self.packet(cid, op));
            }
        }
        if let Some(len) = self.read(ram, buffers, room) {
            // It tells of our room too.
            self.due &= !due::CREDIT_UPDATE;
            return Some(Header { len, ..self.packet(cid, op::RW) });
        }
        for (bit, op) in [(due::CREDIT_UPDATE, op::CREDIT_UPDATE), (due::CREDIT_REQUEST, op::CREDIT_REQUEST)] {
            if self.due & bit != 0 {
                self.due &= !bit;
                return Some(self.packet(cid, op));
            }
        }
        if self.host_shut & !self.told_shut != 0 {
            self.told_shut = self.host_shut;
            return Some(Header { flags: self.told_shut, ..self.packet(cid, op::SHUTDOWN) });
        }
        None
    }

    fn packet(&mut self, cid: u32, op: u16) -> Header {
        let mut header = Header::to_guest(cid, self.ports, STREAM, op);
        self.credit.tell(&mut header);
        header
    }

    /// Reads from the socket into the guest's buffers. None if there was nothing, or the end.
    fn read(&mut self, ram: &GuestRam, buffers: &[Buffer], room: u64) -> Option<u32> {
        if self.state != State::Open || !self.readable || !self.wants_bytes() {
            return None;
        }
        let credit = self.credit.room();
        if credit == 0 {
            // It goes on when the guest says that it has room.
            if !self.starved {
                self.starved = true;
                self.due |= due::CREDIT_REQUEST;
            }
            self.masked = true;
            return None;
        }
        let into = pieces(ram, buffers, HEADER_BYTES as u64, room.min(credit.into()));
        if into.bytes() == 0 {
            return None;
        }
        let asked = into.bytes();
        match self.socket.as_ref().map(|socket| stream::read(socket.as_fd(), &into)) {
            Some(Ok(bytes)) if bytes > 0 => {
                if bytes < asked && !self.hung {
                    // That was all; if not, the socket tells.
                    (self.readable, self.masked) = (false, false);
                }
                let bytes = bytes as u32;
                self.credit.send(bytes);
                return Some(bytes);
            }
            Some(Err(e)) if e.kind() == ErrorKind::WouldBlock && !self.hung => {
                (self.readable, self.masked) = (false, false);
            }
            // The end; one that is no end but a failure is none the less the end.
            _ => {
                self.readable = false;
                self.host_shut |= NO_SEND;
            }
        }
        None
    }

    /// Takes `len` bytes of the guest's, which lie in `buffers` behind the header, and for which there was credit.
    pub fn take(&mut self, ram: &GuestRam, buffers: &[Buffer], len: u32) -> Taken {
        let mut skip = HEADER_BYTES as u64;
        let end = skip + u64::from(len);
        while skip < end && self.out.is_empty() {
            if self.host_shut & NO_RECEIVE != 0 {
                self.credit.forward((end - skip) as u32);
                return Taken::All;
            }
            let from = pieces(ram, buffers, skip, end - skip);
            if from.bytes() == 0 {
                return Taken::Malformed;
            }
            match self.socket.as_ref().map(|socket| stream::write(socket.as_fd(), &from)) {
                Some(Ok(bytes)) => {
                    self.credit.forward(bytes as u32);
                    skip += bytes as u64;
                    if bytes < from.bytes() {
                        break;
                    }
                }
                Some(Err(e)) if e.kind() == ErrorKind::WouldBlock => break,
                _ => self.host_is_deaf(),
            }
        }
        self.keep(ram, buffers, skip, (end - skip) as usize)
    }

    /// Puts what the socket did not take behind what it has not taken before.
    fn keep(&mut self, ram: &GuestRam, buffers: &[Buffer], skip: u64, len: usize) -> Taken {
        if len == 0 {
            return Taken::All;
        }
        let before = self.out.len();
        self.out.resize(before + len, 0);
        // One of the two is empty, or `before` lies in the first.
        let (first, second) = self.out.as_mut_slices();
        let have = if before < first.len() {
            let have = gather(ram, buffers, skip, &mut first[before..]);
            have + gather(ram, buffers, skip + (first.len() - before) as u64, second)
        } else {
            gather(ram, buffers, skip, &mut second[before - first.len()..])
        };
        if have == len { Taken::All } else { Taken::Malformed }
    }

    /// Passes on what is in the buffer, as far as the socket takes it.
    pub fn flush(&mut self) {
        while !self.out.is_empty() {
            let (first, second) = self.out.as_slices();
            let both = [IoSlice::new(first), IoSlice::new(second)];
            let written = match &mut self.socket {
                Some(socket) => socket.write_vectored(&both),
                None => Err(ErrorKind::NotConnected.into()),
            };
            match written {
                Ok(bytes) if bytes > 0 => {
                    self.out.drain(..bytes);
                    self.credit.forward(bytes as u32);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                _ => self.host_is_deaf(),
            }
        }
        // Its memory is for who needs it.
        self.out = VecDeque::new();
        self.end_writing();
    }

    /// Nobody reads what the guest sends: it is told, and what it sends from now on goes nowhere.
    pub fn host_is_deaf(&mut self) {
        self.host_shut |= NO_RECEIVE;
        self.out = VecDeque::new();
        self.credit.forward(self.credit.held());
    }

    /// The other end of the socket is closed: what it has sent is still to be read.
    pub fn hang_up(&mut self) {
        self.hung = true;
        self.readable = true;
        self.host_is_deaf();
    }

    /// Takes in what the guest will not do any more.
    pub fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_shut & NO_RECEIVE != 0
            && let Some(socket) = &self.socket
        {
            // Its writer learns it. That it has gone meanwhile is no matter.
            let _ = socket.shutdown(Shutdown::Read);
        }
        self.end_writing();
    }

    /// The guest sends no more and all it sent is in the socket: its reader finds the end.
    fn end_writing(&mut self) {
        if self.guest_shut & NO_SEND != 0
            && self.out.is_empty()
            && let Some(socket) = &self.socket
        {
            // As in `shut`.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// Says to a client that it is connected, and as which port.
    pub fn welcome(&mut self) -> io::Result<()> {
        let line = format!("OK {}\n", self.ports.host);
        match &mut self.socket {
            // Nothing has been written to it before, so there is room.
            Some(socket) => socket.write_all(line.as_bytes()),
            None => Err(ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Connection {
    /// The other end learns it now, and not when the loop lets go of its duplicate of the socket.
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // As in `shut`.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
