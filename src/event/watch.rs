//! What a loop waits for: signals it owns, timers it owns, streams it was shown, channels.
//!
//! A *signal* (eventfd, ioeventfd) is registered edge-triggered and never read: every ring is an edge of its own
//! whatever the counter says, so the `read` that a level-triggered eventfd costs per event is saved. A *timer* is a
//! deadline in the loop's list. A *stream* (socket, terminal, tap) is level-triggered with a maskable interest, so a
//! budgeted handler never has to read to EAGAIN. A *channel* has no descriptor: its sender names it to the loop's inbox.
//! Loop thread only.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::EventSet;

use super::slots::Key;

/// What a handler wants to hear of a stream. A hang-up is told whatever the interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(EventSet);

impl Interest {
    /// Nothing: the watch is masked.
    pub const NONE: Interest = Interest(EventSet::empty());
    /// There is something to read.
    pub const READ: Interest = Interest(EventSet::IN);
    /// There is room to write.
    pub const WRITE: Interest = Interest(EventSet::OUT);
    /// Either.
    pub const BOTH: Interest = Interest(EventSet::IN.union(EventSet::OUT));
    /// Exceptional conditions (EPOLLPRI), such as a pressure trigger of the kernel.
    pub const PRIORITY: Interest = Interest(EventSet::PRIORITY);

    pub(super) fn events(self) -> EventSet {
        self.0
    }
}

/// Why a handler was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What the handler called the watch when it made it.
    pub tag: u32,
    pub(super) ready: EventSet,
}

impl Event {
    /// There is something to read, or the end of it. True for every signal, timer and channel.
    pub fn is_readable(self) -> bool {
        self.ready.intersects(EventSet::IN | EventSet::PRIORITY | HANG_UP)
    }

    /// There is room to write, or nobody left to read it.
    pub fn is_writable(self) -> bool {
        self.ready.intersects(EventSet::OUT | HANG_UP)
    }

    /// The other end is gone. Told once: read what is left, for the loop lets go of the descriptor afterwards (G6).
    pub fn is_hang_up(self) -> bool {
        self.ready.intersects(HANG_UP)
    }
}

/// The two conditions that epoll reports whatever was asked for.
pub(super) const HANG_UP: EventSet = EventSet::HANG_UP.union(EventSet::ERROR);

/// A descriptor that rings and is never read: an eventfd, or an ioeventfd that KVM must be told of while it lives.
pub type Signal = Box<dyn AsRawFd + Send>;

pub(super) enum Kind {
    Signal(Signal),
    Timer,
    /// A duplicate of the handler's descriptor: one that the handler closed early can still be taken out of epoll.
    Stream(OwnedFd),
    Channel,
}

pub(super) struct Watch {
    pub owner: Key,
    pub tag: u32,
    pub kind: Kind,
    pub interest: Interest,
    /// What has been seen and not yet told. An entry in the ready list whose watch has nothing pending is skipped.
    pub pending: EventSet,
    /// There is an entry in the ready list.
    pub queued: bool,
    /// Taken out of epoll after a hang-up.
    pub dead: bool,
    /// Turns in a row in which the handler was called and had nothing to do (G7).
    pub idle_calls: u32,
}

impl Watch {
    pub fn new(owner: Key, tag: u32, kind: Kind, interest: Interest) -> Self {
        let pending = EventSet::empty();
        Watch { owner, tag, kind, interest, pending, queued: false, dead: false, idle_calls: 0 }
    }

    /// The descriptor that stands for it in epoll.
    pub fn fd(&self) -> Option<RawFd> {
        match &self.kind {
            Kind::Signal(fd) => Some(fd.as_raw_fd()),
            Kind::Stream(fd) => Some(fd.as_raw_fd()),
            Kind::Timer | Kind::Channel => None,
        }
    }

    pub fn epoll_events(&self) -> EventSet {
        match self.kind {
            Kind::Stream(_) => self.interest.events(),
            _ => self.interest.events() | EventSet::EDGE_TRIGGERED,
        }
    }
}
