//! The event loop: a hand-written poller on epoll.
//!
//! A loop owns every eventfd, ioeventfd and timerfd it waits on and calls a [`Handler`] with a tag when one rings. Its
//! contract is the list G1 to G24 in `docs/event-loop.md`, each with the test that holds it. Not an async runtime, and
//! not a thread pool: one loop, one thread, no handler ever waits.
//!
//! The main thread runs one loop and each iothread runs one ([`thread`]). Other threads talk to a loop through a
//! [`Remote`] or a [`Sender`] and never touch what it owns.
//!
//! A handler asks for what it wants to hear of when it is attached, and is told by its own tags:
//!
//! ```
//! use loopvisor::error::Result;
//! use loopvisor::event::{Cx, Event, EventLoop, Flow, Handler, Key};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! const KICK: u32 = 0;
//! const DEADLINE: u32 = 1;
//!
//! /// Waits a millisecond after it is kicked, then ends the loop.
//! struct Patient {
//!     kick: Option<EventFd>,
//!     deadline: Option<Key>,
//! }
//!
//! impl Handler for Patient {
//!     fn name(&self) -> &str {
//!         "patient"
//!     }
//!
//!     fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
//!         if let Some(kick) = self.kick.take() {
//!             cx.own(Box::new(kick), KICK)?;
//!         }
//!         self.deadline = Some(cx.timer(DEADLINE)?);
//!         Ok(())
//!     }
//!
//!     fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
//!         match (event.tag, self.deadline) {
//!             (KICK, Some(deadline)) => cx.arm(deadline, cx.now_ns() + 1_000_000)?,
//!             _ => cx.stop(),
//!         }
//!         Ok(Flow::Done)
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! let kick = EventFd::new(libc::EFD_NONBLOCK)?;
//! let mut event_loop = EventLoop::new()?;
//! event_loop.add(Box::new(Patient { kick: Some(kick.try_clone()?), deadline: None }))?;
//! kick.write(1)?;
//! event_loop.run()?;
//! # Ok(())
//! # }
//! ```

mod channel;
mod counters;
mod cx;
mod done;
mod event_loop;
mod handler;
mod inbox;
mod slots;
pub mod thread;
mod timers;
mod watch;

pub use channel::{Receiver, Sender, channel};
pub use counters::Counters;
pub use cx::Cx;
pub use done::{Done, Lost, Waiter};
pub use event_loop::{BATCH, EventLoop, Wait};
pub use handler::{Flow, Handler};
pub use inbox::Remote;
pub use slots::Key;
pub use watch::{Event, Interest, Signal};

#[cfg(test)]
mod tests;
