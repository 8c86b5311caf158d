//! One QMP client: its socket, and the conversation on it.
//!
//! A handler of the main loop, which finishes itself when the client is gone. The protocol is `qmp::session`'s; this
//! moves bytes, passes commands to Control and brings its answers back; only the client's descriptors are its own. What a client does or does not do harms only
//! itself: one request at a time is served, and one read's worth of input a turn. It never waits.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::Value;

use super::descriptors::Descriptors;
use super::listener::MAX_CLIENTS;
use super::run::Message;
use crate::error::{Error, Result};
use crate::event::{Cx, Done, Event, Flow, Handler, Interest, Key, Receiver, Sender, channel};
use crate::qmp;
use crate::qmp::command::Command;
use crate::qmp::event::Timestamp;
use crate::qmp::schema::Empty;
use crate::sys::rights;

const STREAM: u32 = 0;
const MAIL: u32 = 1;
/// Bytes read at once.
const READ_BYTES: usize = 8192;

/// What Control tells a session.
pub enum ToSession {
    /// The answer to its command.
    Answer(Result<Value>),
    /// An event, and when it happened.
    Event(qmp::event::Event, Timestamp),
    /// Disconnect the client, to make room for another.
    Leave,
}

/// One of the places that a listener has for clients: taken for as long as the session holds it.
pub(super) struct Seat {
    /// When the client last sent something, or connected; [`NEGOTIATED`] once it has negotiated.
    silent_since_ns: AtomicU64,
    address: Sender<ToSession>,
}

/// In place of a time: the client keeps its seat.
const NEGOTIATED: u64 = u64::MAX;

impl Seat {
    /// Since when the client has been silent, if it has not negotiated.
    pub fn waits_since(&self) -> Option<u64> {
        Some(self.silent_since_ns.load(Relaxed)).filter(|&since| since != NEGOTIATED)
    }

    /// Has the session disconnect its client.
    pub fn leave(&self) {
        // A session that has ended needs no message.
        let _ = self.address.send(ToSession::Leave);
    }
}

/// The error for a client beyond the limit.
fn no_room() -> Error {
    Error::usage(format!(
        "{MAX_CLIENTS} clients are connected to this socket, and a client that has not sent qmp_capabilities makes room for others; \
         close a connection"
    ))
}

/// Sends the error to a client for which there is no room, and disconnects it.
pub(super) fn refuse(mut stream: UnixStream) {
    let mut protocol = qmp::session::Session::refused(&no_room());
    // A new socket has room for one line. A client that has disconnected needs none.
    if let Ok(count) = stream.write(protocol.output()) {
        protocol.sent(count);
    }
}

/// One client.
pub(super) struct Session {
    stream: UnixStream,
    protocol: qmp::session::Session,
    control: Sender<Message>,
    mail: Receiver<ToSession>,
    address: Sender<ToSession>,
    descriptors: Descriptors,
    watch: Option<Key>,
    /// The client will send nothing more.
    ended: bool,
    /// The loop watches the socket no more: both sides are closed, and what is left is read to its end.
    hung_up: bool,
    seat: Arc<Seat>,
    /// Its client is to be disconnected, unless it has negotiated by now.
    leaves: bool,
}

impl Session {
    /// A session on a connected, non-blocking socket, and its seat.
    pub fn new(stream: UnixStream, control: Sender<Message>, now_ns: u64) -> (Self, Arc<Seat>) {
        let (address, mail) = channel();
        let seat = Arc::new(Seat { silent_since_ns: AtomicU64::new(now_ns), address: address.clone() });
        let session = Session {
            stream,
            protocol: qmp::session::Session::new(),
            control,
            mail,
            address,
            descriptors: Descriptors::default(),
            watch: None,
            ended: false,
            hung_up: false,
            seat: seat.clone(),
            leaves: false,
        };
        (session, seat)
    }

    /// Reads once, if the protocol wants input. False when the connection is broken.
    fn read(&mut self) -> bool {
        if self.ended || !self.protocol.wants_input() {
            return true;
        }
        let mut bytes = [0; READ_BYTES];
        match rights::receive(&self.stream, &mut bytes) {
            Ok((0, _)) => self.ended = true,
            Ok((count, fds)) => {
                self.descriptors.arrive(fds);
                self.protocol.receive(&bytes[..count]);
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return false,
        }
        true
    }

    /// Passes on what was read, up to a command whose answer is to come.
    fn serve(&mut self) {
        while let Some(command) = self.protocol.next_command() {
            match &command {
                Command::Getfd(asked) => {
                    self.protocol.answer(self.descriptors.name(&asked.fdname).map(|()| Empty {}));
                    continue;
                }
                Command::Closefd(asked) => {
                    self.protocol.answer(self.descriptors.close(&asked.fdname).map(|()| Empty {}));
                    continue;
                }
                _ => {}
            }
            let fd = match &command {
                Command::NetdevAdd(asked) => match self.descriptors.asked_for(asked) {
                    Ok(fd) => fd,
                    Err(error) => {
                        self.protocol.answer::<Empty>(Err(error));
                        continue;
                    }
                },
                _ => None,
            };
            let address = self.address.clone();
            let done = Done::posted(move |answer: std::result::Result<Result<Value>, _>| {
                // Lost: Control is gone, and the program with it.
                if let Ok(answer) = answer {
                    let _ = address.send(ToSession::Answer(answer));
                }
            });
            let message = match fd {
                Some(fd) => Message::CommandWith(command, fd, done),
                None => Message::Command(command, done),
            };
            let _ = self.control.send(message);
        }
    }

    /// Writes what the socket takes. False when the connection is broken.
    fn write(&mut self) -> bool {
        while !self.protocol.output().is_empty() {
            match self.stream.write(self.protocol.output()) {
                Ok(count) => self.protocol.sent(count),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// One round of reading, serving and writing. False when the session is over.
    fn round(&mut self) -> bool {
        if !self.read() {
            return false;
        }
        self.serve();
        if !self.write() {
            return false;
        }
        // What was sent may have made room for a request that waited.
        self.serve();
        !(self.ended && self.protocol.is_idle())
    }
}

impl Handler for Session {
    fn name(&self) -> &str {
        "QMP session"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.watch = Some(cx.watch(&self.stream, Interest::READ, STREAM)?);
        cx.listen(&self.mail, MAIL);
        // Control lives as long as the loop.
        let _ = self.control.send(Message::Joined(self.address.clone()));
        self.write();
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        self.hung_up |= event.tag == STREAM && event.is_hang_up();
        while let Some(message) = self.mail.receive() {
            match message {
                ToSession::Answer(answer) => self.protocol.answer(answer),
                ToSession::Event(event, at) => self.protocol.tell(&event, at),
                ToSession::Leave => self.leaves = true,
            }
        }
        if self.leaves && !self.protocol.is_negotiated() {
            self.protocol.refuse(&no_room());
            self.write();
            cx.finish();
            return Ok(Flow::Done);
        }
        let silent = event.tag != STREAM;
        if !self.round() {
            cx.finish();
            return Ok(Flow::Done);
        }
        if self.protocol.is_negotiated() {
            self.seat.silent_since_ns.store(NEGOTIATED, Relaxed);
        } else if !silent {
            self.seat.silent_since_ns.store(cx.now_ns(), Relaxed);
        }
        if self.hung_up {
            // Nobody reads any more. What was sent before is served to its end, a read a turn.
            let waiting = self.ended || !self.protocol.wants_input();
            return Ok(if waiting { Flow::Done } else { Flow::More });
        }
        let interest = match (!self.ended && self.protocol.wants_input(), !self.protocol.output().is_empty()) {
            (true, true) => Interest::BOTH,
            (true, false) => Interest::READ,
            (false, true) => Interest::WRITE,
            (false, false) => Interest::NONE,
        };
        if let Some(watch) = self.watch {
            cx.set_interest(watch, interest)?;
        }
        Ok(Flow::Done)
    }
}
