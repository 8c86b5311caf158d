//! The control plane: everything that an operator, the guest's power button or a failing part has to say meets in
//! [`Control`], on the main loop.
//!
//! `session` and `listener` carry QMP over Unix sockets; `console` carries the terminal; `signals` what the host sends
//! to the process. None of them does any device's work.

mod answers;
mod chardev;
mod console;
mod descriptors;
mod dump;
mod listener;
mod memory;
mod net;
mod plug;
mod pressure;
mod reset;
mod run;
mod session;
mod signals;
mod state;
mod throttle;
mod vsock;

pub use console::Console;
pub use listener::Listener;
pub use memory::Memory;
pub use run::{Control, End, Message};
pub use session::ToSession;
pub use signals::Signals;
