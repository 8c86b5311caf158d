//! One client's conversation: bytes in, commands out; answers and events in, bytes out.
//!
//! It holds what the protocol demands: the greeting first, negotiation before anything else, one request at a time and
//! answers in the order of the requests. It does no I/O: whoever owns the socket reads while [`Session::wants_input`]
//! says so and writes what [`Session::output`] holds.
//!
//! What it keeps is bounded, whatever the client does: one request of at most
//! [`MESSAGE_MAX_BYTES`](crate::qmp::scanner::MESSAGE_MAX_BYTES), the rest of one read, and of unread output
//! [`OUTPUT_MAX_BYTES`] and one answer. A client that does not read gets no further request served above
//! [`OUTPUT_MARK_BYTES`], and no event above [`OUTPUT_MAX_BYTES`]; the events it missed are counted, and
//! `EVENTS_LOST` tells it once it has read the rest.

use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::qmp::command::{self, Asked, COMMANDS, Capabilities, Command, Protocol};
use crate::qmp::event::{EVENTS, Event, EventsLost, Timestamp};
use crate::qmp::introspect::schema;
use crate::qmp::reply::{CommandInfo, EventInfo, version};
use crate::qmp::request::{Call, Request};
use crate::qmp::response;
use crate::qmp::scanner::Scanner;
use crate::qmp::schema::Empty;

/// Unread output above which no further request is taken, in bytes.
pub const OUTPUT_MARK_BYTES: usize = 64 << 10;
/// Unread output above which no event is added, in bytes.
pub const OUTPUT_MAX_BYTES: usize = 256 << 10;
/// What an idle session keeps allocated for each direction at most, in bytes.
const IDLE_BYTES: usize = 4096;

/// The request whose answer is awaited.
#[derive(Debug)]
struct Pending {
    id: Option<Value>,
}

/// The events that a client missed, and when it missed the last.
#[derive(Debug)]
struct Lost {
    count: u64,
    at: Timestamp,
}

/// One client's conversation.
#[derive(Debug)]
pub struct Session {
    scanner: Scanner,
    /// Bytes received and, from `taken` on, not yet scanned.
    input: Vec<u8>,
    taken: usize,
    negotiated: bool,
    pending: Option<Pending>,
    /// Bytes to send, from `sent` on.
    output: Vec<u8>,
    sent: usize,
    lost: Option<Lost>,
}

impl Default for Session {
    fn default() -> Self {
        Session::new()
    }
}

impl Session {
    /// A conversation at its beginning: the greeting waits to be sent.
    pub fn new() -> Self {
        let mut output = Vec::new();
        response::greeting(&mut output);
        Session {
            scanner: Scanner::default(),
            input: Vec::new(),
            taken: 0,
            negotiated: false,
            pending: None,
            output,
            sent: 0,
            lost: None,
        }
    }

    /// A session that only sends an error.
    pub fn refused(error: &Error) -> Self {
        let mut session = Session::new();
        session.output.clear();
        session.refuse(error);
        session
    }

    /// Appends the reason why the session ends to the output.
    pub fn refuse(&mut self, error: &Error) {
        response::failure(&mut self.output, None, error);
    }

    /// Whether the client has ended the negotiation.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether to read from the client: everything it sent is served, and it reads what it is sent.
    pub fn wants_input(&self) -> bool {
        self.input.is_empty() && self.may_serve()
    }

    /// Whether nothing is left to serve, to answer or to send. A client that has shut down its sending side is let go
    /// then.
    pub fn is_idle(&self) -> bool {
        self.input.is_empty() && self.pending.is_none() && self.output().is_empty()
    }

    /// Takes bytes from the client. They are kept until [`Session::next_command`] has gone through them, so this is
    /// called with one read's worth, and only while [`Session::wants_input`].
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Goes on through the input up to the next command for the machine; it must then be given to
    /// [`Session::answer`]. Everything else is answered here. To be called after `receive`, `answer` and `sent`,
    /// until it returns `None`.
    pub fn next_command(&mut self) -> Option<Command> {
        while self.may_serve() {
            let mut rest = &self.input[self.taken..];
            let request = self.scanner.next(&mut rest).map(|message| match message {
                Ok(message) => Request::parse(message),
                Err(error) => Request { id: None, call: Err(error) },
            });
            self.taken = self.input.len() - rest.len();
            if self.taken == self.input.len() {
                self.input.clear();
                self.input.shrink_to(IDLE_BYTES);
                self.taken = 0;
            }
            let request = request?;
            self.pending = Some(Pending { id: request.id });
            match request.call.and_then(|call| self.admit(call)) {
                Ok(Asked::Command(command)) => return Some(command),
                Ok(Asked::Protocol(protocol)) => self.serve(protocol),
                Err(error) => self.answer::<Empty>(Err(error)),
            }
        }
        None
    }

    /// Answers the command that [`Session::next_command`] returned last. Without one this does nothing.
    pub fn answer<T: Serialize>(&mut self, result: Result<T>) {
        let Some(Pending { id }) = self.pending.take() else { return };
        match result {
            Ok(value) => response::success(&mut self.output, id.as_ref(), &value),
            Err(error) => response::failure(&mut self.output, id.as_ref(), &error),
        }
    }

    /// Sends an event, unless the client is still negotiating or does not read.
    pub fn tell(&mut self, event: &Event, at: Timestamp) {
        if !self.negotiated {
            return;
        }
        if self.lost.is_some() || self.output().len() > OUTPUT_MAX_BYTES {
            let count = self.lost.as_ref().map_or(0, |lost| lost.count) + 1;
            self.lost = Some(Lost { count, at });
        } else {
            response::event(&mut self.output, event, at);
        }
    }

    /// What is to be written to the client.
    pub fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// Says that the first `count` bytes of [`Session::output`] are written.
    pub fn sent(&mut self, count: usize) {
        self.sent = (self.sent + count).min(self.output.len());
        if self.sent == self.output.len() {
            self.sent = 0;
            self.output.clear();
            self.output.shrink_to(IDLE_BYTES);
            if let Some(Lost { count, at }) = self.lost.take() {
                response::event(&mut self.output, &Event::EventsLost(EventsLost { count }), at);
            }
        } else if self.sent > self.output.len() / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    fn may_serve(&self) -> bool {
        self.pending.is_none() && self.output().len() <= OUTPUT_MARK_BYTES
    }

    /// Holds the order of negotiation, then reads the call.
    fn admit(&self, call: Call) -> Result<Asked> {
        let refusal = match (self.negotiated, call.name == "qmp_capabilities") {
            (false, false) => "Expecting capabilities negotiation with 'qmp_capabilities'",
            (true, true) => "Capabilities negotiation is already complete, command ignored",
            _ => return command::parse(call),
        };
        Err(Error::new(Kind::NoCommand, refusal))
    }

    fn serve(&mut self, protocol: Protocol) {
        match protocol {
            Protocol::Negotiate(capabilities) => {
                let result = refuse_all(&capabilities);
                self.negotiated = result.is_ok();
                self.answer(result);
            }
            Protocol::QueryVersion => self.answer(Ok(version())),
            Protocol::QueryCommands => {
                let info = |name: &str| CommandInfo { name: name.to_owned() };
                self.answer(Ok(COMMANDS.iter().map(|entry| info(entry.name)).collect::<Vec<_>>()));
            }
            Protocol::QueryEvents => {
                let info = |name: &str| EventInfo { name: name.to_owned() };
                self.answer(Ok(EVENTS.iter().map(|(name, _)| info(name)).collect::<Vec<_>>()));
            }
            Protocol::QuerySchema => self.answer(Ok(schema())),
        }
    }
}

/// No capability is offered, so a client can enable none.
fn refuse_all(capabilities: &Capabilities) -> Result<Empty> {
    match capabilities.enable.as_deref() {
        None | Some([]) => Ok(Empty {}),
        Some(_) => Err(Error::usage("QMP capability 'oob' is not available; leave 'enable' out")),
    }
}

#[cfg(test)]
#[path = "session_test.rs"]
mod tests;
