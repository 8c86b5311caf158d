//! The host's side: who connects to `uds_path`, whom the guest connects to, and what their sockets tell. Main loop.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use log::warn;

use super::connection::{Connection, State, due};
use super::counters::add;
use super::packet::{Header, Ports};
use super::{
    ACCEPTS_PER_CALL, ASKED_NS, DIALLING_NS, GREETING_NS, MAX_CONNECTIONS, MAX_LINE_BYTES, REDIAL_NS, REST_NS, Vsock,
};
use crate::error::Result;
use crate::event::{Cx, Event, Interest};
use crate::sys::socket;

impl Vsock {
    /// The guest wants a connection: whoever listens at its port's path is asked.
    pub(super) fn dial(&mut self, header: &Header, now_ns: u64) {
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
    pub(super) fn redial(&mut self, number: usize, now_ns: u64) {
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

    /// Takes in clients of the host's.
    pub(super) fn accept(&mut self, cx: &mut Cx<'_>) -> Result<()> {
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

    pub(super) fn greet(&mut self, stream: UnixStream, now_ns: u64) {
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
    pub(super) fn read_line(&mut self, number: usize, now_ns: u64) {
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
    pub(super) fn hear_socket(&mut self, number: usize, event: Event, now_ns: u64) {
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
}
/// Where who listens to a port of the host's is to be found.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// The port of `CONNECT PORT`, as Firecracker reads it: in any case, with any white space between the words and around them.
/// Further words are ignored.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    words.next().filter(|word| word.eq_ignore_ascii_case("CONNECT"))?;
    words.next()?.parse().ok()
}
