//! The guarantees of `docs/event-loop.md`, each test under its number (T1 to T20, P1 to P4), on real descriptors.
//!
//! A test makes a loop, adds a [`Probe`], acts, turns the loop by hand and looks at what was called. Time is stepped by
//! hand wherever it matters. No test sleeps and none compares a duration with an expectation.

mod channel;
mod failure;
mod fairness;
mod handshake;
mod model;
mod removal;
mod stream;
mod threads;
mod timers;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::error::Result;

type Attach = Box<dyn FnMut(&mut Cx<'_>) -> Result<()> + Send>;
type Ready = Box<dyn FnMut(Event, &mut Cx<'_>) -> Result<Flow> + Send>;

/// A handler of two closures.
struct Probe {
    name: String,
    attach: Attach,
    ready: Ready,
}

impl Handler for Probe {
    fn name(&self) -> &str {
        &self.name
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        (self.attach)(cx)
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        (self.ready)(event, cx)
    }
}

fn probe(
    attach: impl FnMut(&mut Cx<'_>) -> Result<()> + Send + 'static,
    ready: impl FnMut(Event, &mut Cx<'_>) -> Result<Flow> + Send + 'static,
) -> Box<dyn Handler> {
    Box::new(Probe { name: "probe".into(), attach: Box::new(attach), ready: Box::new(ready) })
}

/// What was called, in order; written by handlers and read by the test.
#[derive(Clone)]
struct Log<T>(Arc<Mutex<Vec<T>>>);

impl<T> Log<T> {
    fn new() -> Self {
        Log(Arc::new(Mutex::new(Vec::new())))
    }

    fn push(&self, entry: T) {
        self.0.lock().unwrap().push(entry);
    }

    fn take(&self) -> Vec<T> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

/// A duplicate with the number `number`, which must be free. Numbers from 1010 on belong to the tests that name them:
/// all tests of this process together stay below, and the limit of most shells is 1024.
#[allow(unsafe_code)]
fn duplicate_as(fd: &impl AsRawFd, number: RawFd) -> OwnedFd {
    // SAFETY: F_DUPFD_CLOEXEC takes two numbers and makes a new descriptor, which is checked and then owned here.
    let new = unsafe {
        let new = libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number);
        assert!(new >= 0, "no descriptor");
        OwnedFd::from_raw_fd(new)
    };
    assert_eq!(new.as_raw_fd(), number, "the number is taken");
    new
}

/// A clock and a loop that lives by it, at time 1000.
fn stepped() -> (Arc<AtomicU64>, EventLoop) {
    let clock = Arc::new(AtomicU64::new(1000));
    let event_loop = EventLoop::stepped(clock.clone()).unwrap();
    (clock, event_loop)
}

/// A handler that owns a new eventfd and says `tag` whenever it rings; and the eventfd, to ring it.
fn add_bell(event_loop: &mut EventLoop, tag: u32, log: &Log<u32>) -> (Arc<EventFd>, Key) {
    let bell = Arc::new(eventfd());
    let (mine, log) = (bell.clone(), log.clone());
    let handler = probe(
        move |cx| cx.own(Box::new(mine.clone()), tag).map(drop),
        move |event, _| {
            log.push(event.tag);
            Ok(Flow::Done)
        },
    );
    (bell, event_loop.add(handler).unwrap())
}

/// A handler that does nothing, for a test that drives a loop through its `Cx`.
fn bystander() -> Box<dyn Handler> {
    probe(|_| Ok(()), |_, _| Ok(Flow::Idle))
}
