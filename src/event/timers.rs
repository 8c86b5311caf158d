//! The loop's timers: a sorted list of deadlines, and one timerfd that ends the loop's sleep.
//!
//! Arming and cancelling are steps in memory. The timerfd is set only when the loop goes to sleep, and only when the
//! earliest deadline is earlier than what it is set to: a busy loop sees its timers by the clock it reads anyway, and a
//! deadline that moves away costs one wake too many instead of a system call each time it moves. A loop has a few
//! timers, a device one or two, so a sorted list beats a heap. Loop thread only.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::slots::Key;
use crate::sys::timerfd::TimerFd;

/// When a timer fires; equal times fire in the order in which they were armed (G14).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Deadline {
    at_ns: u64,
    order: u64,
}

pub(super) struct Timers {
    /// The latest first, so that the earliest are cut off at the end.
    armed: Vec<(Deadline, Key)>,
    /// The order number of the next timer to be armed.
    order: u64,
    fd: TimerFd,
    /// What the timerfd is set to; none if it is not set, or has fired.
    set_ns: Option<u64>,
}

impl Timers {
    pub fn new() -> io::Result<Self> {
        Ok(Timers { armed: Vec::new(), order: 0, fd: TimerFd::new()?, set_ns: None })
    }

    /// The descriptor that is to end the loop's sleep; edge-triggered and never read, like a signal.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Arms a timer; if it is armed, anew.
    pub fn arm(&mut self, timer: Key, at_ns: u64) {
        self.cancel(timer);
        let deadline = Deadline { at_ns, order: self.order };
        self.order += 1;
        let place = self.armed.partition_point(|(other, _)| *other > deadline);
        self.armed.insert(place, (deadline, timer));
    }

    pub fn cancel(&mut self, timer: Key) {
        if let Some(place) = self.armed.iter().position(|(_, other)| *other == timer) {
            self.armed.remove(place);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.armed.is_empty()
    }

    pub fn is_due(&self, now_ns: u64) -> bool {
        self.armed.last().is_some_and(|(deadline, _)| deadline.at_ns <= now_ns)
    }

    /// Takes out the timers that are due, the latest first (G12, G14).
    pub fn take_due(&mut self, now_ns: u64) -> impl Iterator<Item = Key> {
        let first = self.armed.partition_point(|(deadline, _)| deadline.at_ns > now_ns);
        if self.set_ns.is_some_and(|set_ns| set_ns <= now_ns) {
            self.set_ns = None;
        }
        self.armed.drain(first..).map(|(_, timer)| timer)
    }

    /// The timerfd has fired. Should the clock say that it fired too early, the next sleep sets it again.
    pub fn fired(&mut self) {
        self.set_ns = None;
    }

    /// Sees to it that a sleep that begins now ends at the earliest deadline.
    ///
    /// # Errors
    /// None that a valid descriptor can cause.
    pub fn before_sleep(&mut self) -> io::Result<()> {
        let Some((Deadline { at_ns, .. }, _)) = self.armed.last().copied() else { return Ok(()) };
        if self.set_ns.is_none_or(|set_ns| at_ns < set_ns) {
            self.fd.arm(at_ns)?;
            self.set_ns = Some(at_ns);
        }
        Ok(())
    }
}
