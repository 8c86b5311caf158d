//! A QMP socket: where clients connect.
//!
//! Whose the socket's file is, is [`PrivateListener`]'s business. A handler of the main loop.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use log::warn;

use super::run::Message;
use super::session::Session;
use crate::error::{Context, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Key, Sender};
use crate::sys::socket::PrivateListener;

/// Clients of one socket at a time. More are let go at once: each costs descriptors and up to half a megabyte.
const MAX_CLIENTS: usize = 32;
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
    tickets: Arc<()>,
}

impl Listener {
    /// Makes the socket.
    ///
    /// # Errors
    /// The path is taken by a live socket or by something else, or its folder does not let us.
    pub fn bind(path: &Path, control: Sender<Message>) -> Result<Self> {
        let name = format!("QMP socket {}", path.display());
        let listener = PrivateListener::bind(path).context(|| "QMP socket")?;
        Ok(Listener { name, listener, watches: None, control, tickets: Arc::new(()) })
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
        if Arc::strong_count(&self.tickets) > MAX_CLIENTS {
            warn!("{}: {MAX_CLIENTS} clients are connected; another was let go", self.name);
            return Ok(Flow::Done);
        }
        let added = cx.add(Box::new(Session::new(stream, self.control.clone(), self.tickets.clone())));
        if let Err(e) = added {
            // The client is let go; the next may have more luck.
            warn!("{}: {e}", self.name);
            return self.rest(cx);
        }
        Ok(Flow::Done)
    }
}
