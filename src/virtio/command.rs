//! What front and Control say to a worker.
//!
//! Commands are rare: a driver's set-up and reset, an operator's pause. They travel through the worker's channel in
//! order; what must be answered carries its reply slip. Sent from any thread, received on the worker's.

use super::device::Device;
use super::ring::Ring;
use crate::error::Error;
use crate::event::{Done, Signal};

/// A message to a worker.
pub enum Command {
    /// The driver has set DRIVER_OK on a checked configuration.
    Activate(Activation),
    /// The driver has written 0 to the status: stop, drain, forget. The vCPU waits (invariant I2).
    Reset(Done<()>),
    /// Serve nothing more and end the slip when nothing is in flight. The vCPUs are parked.
    Pause(Done<()>),
    /// Go on, looking at every ring first: kicks may have been told while paused (G20).
    Resume,
    /// Put another device in the place of the one that is there, as soon as nothing is in flight in it: hot-plug.
    Exchange(Box<dyn Device>, Done<Exchanged>),
    /// The driver has read the configuration of that generation, which the page was told to watch.
    ConfigRead(u32),
    /// Write down the state of device and rings, for whoever looks for a guest that hangs.
    Dump(Done<String>),
}

/// What an exchange leaves over: the device that was there; or the one that was to come, with the reason why it could not
/// be set up, and then nothing has changed.
pub type Exchanged = Result<Box<dyn Device>, (Box<dyn Device>, Error)>;

/// A live configuration: the rings (none for a queue that the driver left out) and the kicks, each with the number of
/// its queue.
pub struct Activation {
    /// The feature bits that both sides agreed on.
    pub features: u64,
    /// One entry a queue.
    pub rings: Vec<Option<Ring>>,
    /// The ioeventfds, for the loop to own.
    pub kicks: Vec<(u32, Signal)>,
}
