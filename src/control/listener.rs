//! A QMP socket: where clients connect.
//!
//! Whose the socket's file is, is [`PrivateListener`]'s business. A handler of the main loop.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Weak};

use log::warn;

use super::run::Message;
use super::session::{self, Seat, Session};
use crate::error::{Context, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Key, Sender};
use crate::sys::socket::PrivateListener;
use crate::virtio::FaultLog;

/// Clients of one socket at a time: each costs descriptors and up to half a megabyte.
pub(super) const MAX_CLIENTS: usize = 32;
/// How long nobody is accepted after one could not be, for want of descriptors for example.
const REST_NS: u64 = 1_000_000_000;
const SOCKET: u32 = 0;
const REST: u32 = 1;

/// One listening socket.
pub struct Listener {
    name: String,
    listener: PrivateListener,
    /// The watch on the socket, and the timer that ends a rest.
    watches: Option<(Key, Key)>,
    control: Sender<Message>,
    /// Of the clients that are connected, and of some that have disconnected.
    seats: Vec<Weak<Seat>>,
    /// Limits the lines about refused clients.
    log: FaultLog,
}

impl Listener {
    /// Makes the socket.
    ///
    /// # Errors
    /// The path is taken by a live socket or by something else, or its folder does not let us.
    pub fn bind(path: &Path, control: Sender<Message>) -> Result<Self> {
        let name = format!("QMP socket {}", path.display());
        let listener = PrivateListener::bind(path).context(|| "QMP socket")?;
        Ok(Listener { name, listener, watches: None, control, seats: Vec::new(), log: FaultLog::default() })
    }

    /// Makes room for one more client, if necessary by disconnecting one that has not negotiated: the one that has been silent for
    /// the longest. False if all have negotiated.
    fn make_room(&mut self) -> bool {
        self.seats.retain(|seat| seat.strong_count() > 0);
        if self.seats.len() < MAX_CLIENTS {
            return true;
        }
        let seats = self.seats.iter().enumerate().filter_map(|(place, seat)| Some((place, seat.upgrade()?)));
        let waiting = seats.filter_map(|(place, seat)| Some((seat.waits_since()?, place, seat)));
        let Some((_, place, seat)) = waiting.min_by_key(|(since, _, _)| *since) else { return false };
        seat.leave();
        self.seats.swap_remove(place);
        true
    }

    /// Leaves the socket alone for a while: another try at once would be in vain, and a flood of the log.
    fn rest(&self, cx: &mut Cx<'_>) -> Result<Flow> {
        if let Some((socket, rest)) = self.watches {
            cx.set_interest(socket, Interest::NONE)?;
            cx.arm(rest, cx.now_ns() + REST_NS)?;
        }
        Ok(Flow::Done)
    }
}

impl Handler for Listener {
    fn name(&self) -> &str {
        &self.name
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.watches = Some((cx.watch(&self.listener, Interest::READ, SOCKET)?, cx.timer(REST)?));
        Ok(())
    }

    /// Takes one client a call; while more are waiting the socket stays ready.
    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        if event.tag == REST {
            if let Some((socket, _)) = self.watches {
                cx.set_interest(socket, Interest::READ)?;
            }
            return Ok(Flow::Done);
        }
        let stream = match self.listener.accept() {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(Flow::Idle);
            }
            Err(e) => {
                warn!("{}: accept a client: {e}", self.name);
                return self.rest(cx);
            }
        };
        if !self.make_room() {
            self.log.warn(
                cx.now_ns(),
                &self.name,
                &format!("{MAX_CLIENTS} clients are connected; another was refused"),
            );
            session::refuse(stream);
            return Ok(Flow::Done);
        }
        let (session, seat) = Session::new(stream, self.control.clone(), cx.now_ns());
        self.seats.push(Arc::downgrade(&seat));
        if let Err(e) = cx.add(Box::new(session)) {
            // The client is let go; the next may have more luck.
            warn!("{}: {e}", self.name);
            return self.rest(cx);
        }
        Ok(Flow::Done)
    }
}
