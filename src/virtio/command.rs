//! What front and Control say to a worker.
//!
//! Commands are rare: a driver's set-up and reset, an operator's pause. They travel through the worker's channel in
//! order; what must be answered carries its reply slip. Sent from any thread, received on the worker's.

use super::ring::Ring;
use crate::event::{Done, Sender, Signal};

/// A message to a worker whose device takes requests of type `R`.
pub enum Command<R> {
    /// The driver has set DRIVER_OK on a checked configuration.
    Activate(Activation),
    /// The driver has written 0 to the status: stop, drain, forget. The vCPU waits (invariant I2).
    Reset(Done<()>),
    /// The driver has written configuration bytes.
    ConfigWritten,
    /// Serve nothing more and end the slip when nothing is in flight. The vCPUs are parked.
    Pause(Done<()>),
    /// Go on, looking at every ring first: kicks may have been told while paused (G20).
    Resume,
    /// Something of the device's own.
    Device(R),
}

/// A live configuration: the agreed features, the rings (none for a queue that the driver left out) and the kicks,
/// each with the number of its queue.
pub struct Activation {
    /// Feature bits that driver and device agreed on.
    pub features: u64,
    /// One entry a queue.
    pub rings: Vec<Option<Ring>>,
    /// The ioeventfds, for the loop to own.
    pub kicks: Vec<(u32, Signal)>,
}

/// What Control can ask of a device of any kind.
pub trait Quiesce: Send {
    /// Posts [`Command::Pause`].
    fn pause(&self, done: Done<()>);
    /// Posts [`Command::Resume`].
    fn resume(&self);
}

impl<R: Send> Quiesce for Sender<Command<R>> {
    fn pause(&self, done: Done<()>) {
        // A worker that is gone drops the slip, which answers Lost: it has nothing in flight either.
        let _ = self.send(Command::Pause(done));
    }

    fn resume(&self) {
        let _ = self.send(Command::Resume);
    }
}
