//! The event loop: a hand-written poller on epoll.
//!
//! A loop owns every eventfd, ioeventfd and timerfd it waits on and calls a [`Handler`] with a tag when one rings. Its
//! contract is the list G1 to G24 in `docs/event-loop.md`, each with the test that holds it. Not an async runtime, and
//! not a thread pool: one loop, one thread, no handler ever waits.
//!
//! The main thread runs one loop and each iothread runs one ([`thread`]). Other threads talk to a loop through a
//! [`Remote`] or a [`Sender`] and never touch what it owns.

mod channel;
mod counters;
mod cx;
mod done;
mod event_loop;
mod inbox;
mod slots;
pub mod thread;
mod timers;
mod watch;

pub use channel::{Receiver, Sender, channel};
pub use counters::Counters;
pub use cx::Cx;
pub use done::{Done, Lost, Waiter};
pub use event_loop::{BATCH, EventLoop, Flow, Handler, Wait};
pub use inbox::Remote;
pub use slots::Key;
pub use watch::{Event, Interest, Signal};

#[cfg(test)]
mod tests;
