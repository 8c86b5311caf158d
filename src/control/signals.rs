//! What the host's users send to the process: SIGTERM, SIGINT and SIGHUP end the machine in good order, SIGUSR1 writes
//! to the log where everything stands.
//!
//! A handler of the main loop. The signals are blocked in every thread (`sys::signalfd`).

use super::run::Message;
use crate::error::{Context, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Sender};
use crate::qmp::event::ShutdownCause;
use crate::sys::signalfd::SignalFd;

/// The signals that are read here.
const SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1];

/// The process's signals.
pub struct Signals {
    fd: SignalFd,
    control: Sender<Message>,
}

impl Signals {
    /// Blocks the signals and directs them to `control`. Comes before any thread is started.
    ///
    /// # Errors
    /// EMFILE and the like from signalfd(2).
    pub fn new(control: Sender<Message>) -> Result<Self> {
        let fd = SignalFd::new(&SIGNALS).context(|| "read signals")?;
        Ok(Signals { fd, control })
    }
}

impl Handler for Signals {
    fn name(&self) -> &str {
        "signals"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.watch(&self.fd, Interest::READ, 0)?;
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> Result<Flow> {
        let Some(signal) = self.fd.read() else { return Ok(Flow::Idle) };
        let message = if signal == libc::SIGUSR1 { Message::Dump } else { Message::End(ShutdownCause::HostSignal) };
        // Control lives as long as the loop.
        let _ = self.control.send(message);
        Ok(Flow::Done)
    }
}
