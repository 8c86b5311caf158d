//! What a handler may do to its loop while it is being called: watch, arm, add, remove, finish, stop.
//!
//! Nothing here calls a handler but [`Cx::add`], which attaches the new one at once. Not for other threads: they have a
//! [`Remote`]. Loop thread only.

use std::os::fd::AsFd;

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::channel::Receiver;
use super::event_loop::EventLoop;
use super::handler::Handler;
use super::inbox::Remote;
use super::slots::Key;
use super::watch::{HANG_UP, Interest, Kind, Signal, Watch};
use crate::error::{Context, Result};

/// What a handler may do to its loop while it is being called.
pub struct Cx<'a> {
    pub(super) event_loop: &'a mut EventLoop,
    pub(super) me: Key,
}

impl Cx<'_> {
    /// The time of this turn, in nanoseconds of CLOCK_MONOTONIC: read once, after the wait, when first asked for.
    pub fn now_ns(&self) -> u64 {
        self.event_loop.now_ns()
    }

    /// The time at this moment: for a handler that measures what it just did.
    pub fn clock_ns(&self) -> u64 {
        self.event_loop.clock_ns()
    }

    /// The key of the handler that is being called.
    pub fn me(&self) -> Key {
        self.me
    }

    /// A handle on this loop for other threads.
    pub fn remote(&self) -> Remote {
        self.event_loop.remote()
    }

    /// Owns an eventfd or ioeventfd: every ring from now on is told, several at once as one, and nobody reads it. One
    /// that has rung before is told at once.
    ///
    /// # Errors
    /// What epoll_ctl(2) says: ENOSPC, ENOMEM, EPERM for a file that cannot be polled.
    pub fn own(&mut self, signal: Signal, tag: u32) -> Result<Key> {
        let watch = Watch::new(self.me, tag, Kind::Signal(signal), Interest::READ);
        self.event_loop.watch(watch)
    }

    /// Watches a stream that the handler keeps. The loop keeps a duplicate of the descriptor until
    /// [`Cx::unwatch`] or the handler's end.
    ///
    /// # Errors
    /// As [`Cx::own`], and EMFILE.
    pub fn watch(&mut self, stream: &impl AsFd, interest: Interest, tag: u32) -> Result<Key> {
        let fd = stream.as_fd().try_clone_to_owned().context(|| "event loop: duplicate a descriptor")?;
        self.event_loop.watch(Watch::new(self.me, tag, Kind::Stream(fd), interest))
    }

    /// Listens to a channel. What is waiting in it already is told this turn or the next.
    pub fn listen<T: Send>(&mut self, receiver: &Receiver<T>, tag: u32) -> Key {
        let key = self.event_loop.watches.insert(Watch::new(self.me, tag, Kind::Channel, Interest::READ));
        if receiver.listen(self.event_loop.inbox.clone(), key) {
            self.event_loop.mark_ready(key, EventSet::IN);
        }
        key
    }

    /// A timer of the handler's own, not armed. It needs no descriptor.
    ///
    /// # Errors
    /// None today.
    pub fn timer(&mut self, tag: u32) -> Result<Key> {
        self.event_loop.watch(Watch::new(self.me, tag, Kind::Timer, Interest::READ))
    }

    /// Arms a timer, or arms it anew: it fires once, not before `deadline_ns`, and within one turn after (G12). A
    /// deadline that has passed fires next turn (G15).
    ///
    /// # Errors
    /// None that a timer of this loop can cause.
    pub fn arm(&mut self, timer: Key, deadline_ns: u64) -> Result<()> {
        if let Some(watch) = self.event_loop.watches.get_mut(timer)
            && let Kind::Timer = watch.kind
        {
            // It may have fired and not been told: the old deadline has nothing to say any more.
            watch.pending = EventSet::empty();
            self.event_loop.timers.arm(timer, deadline_ns);
        }
        Ok(())
    }

    /// Disarms a timer, even one that has fired and has not been told (G13).
    ///
    /// # Errors
    /// None that a timer of this loop can cause.
    pub fn cancel(&mut self, timer: Key) -> Result<()> {
        if let Some(watch) = self.event_loop.watches.get_mut(timer)
            && let Kind::Timer = watch.kind
        {
            watch.pending = EventSet::empty();
            self.event_loop.timers.cancel(timer);
        }
        Ok(())
    }

    /// Changes what a signal or a stream is told of. [`Interest::NONE`] masks it at no further cost; a signal that is
    /// unmasked is told once if it has ever rung. Timers are cancelled and channels left unread instead: for them this
    /// does nothing.
    ///
    /// # Errors
    /// None that a watch of this loop can cause.
    pub fn set_interest(&mut self, watch: Key, interest: Interest) -> Result<()> {
        self.event_loop.set_interest(watch, interest)
    }

    /// The watches of this handler whose tags are `from` or above.
    pub fn watches(&self, from: u32) -> Vec<Key> {
        let mine = |watch: &Watch| watch.owner == self.me && watch.tag >= from;
        self.event_loop.watches.iter().filter(|(_, watch)| mine(watch)).map(|(key, _)| key).collect()
    }

    /// Ends a watch; an owned signal or timer is closed.
    pub fn unwatch(&mut self, watch: Key) {
        self.event_loop.unwatch(watch);
    }

    /// Adds another handler to this loop.
    ///
    /// # Errors
    /// Whatever its `attach` said; it is dropped then.
    pub fn add(&mut self, handler: Box<dyn Handler>) -> Result<Key> {
        self.event_loop.add(handler)
    }

    /// Drops a handler of this loop: another at once, the caller itself when its call returns. False if it was not
    /// there.
    pub fn remove(&mut self, handler: Key) -> bool {
        self.event_loop.remove(handler)
    }

    /// Ends this handler: it is dropped when its call returns.
    pub fn finish(&mut self) {
        self.event_loop.remove(self.me);
    }

    /// Ends the loop's `run` when this call returns.
    pub fn stop(&mut self) {
        self.event_loop.inbox.stop();
    }
}

/// What stands behind it: the watches, and their places in epoll.
impl EventLoop {
    pub(super) fn forget(&self, fd: Option<i32>) {
        if let Some(fd) = fd {
            // The descriptor is ours and registered: there is nothing to be done about a refusal.
            if let Err(e) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
                warn!("event loop: take descriptor {fd} out of epoll: {e}");
            }
        }
    }

    pub(super) fn watch(&mut self, watch: Watch) -> Result<Key> {
        let key = self.watches.next_key();
        if let Some(fd) = watch.fd() {
            let event = EpollEvent::new(watch.epoll_events(), key.to_bits());
            self.epoll
                .ctl(ControlOperation::Add, fd, event)
                .context(|| format!("event loop: watch descriptor {fd}"))?;
        }
        Ok(self.watches.insert(watch))
    }

    pub(super) fn unwatch(&mut self, key: Key) {
        let Some(watch) = self.watches.remove(key) else { return };
        if let Kind::Timer = watch.kind {
            self.timers.cancel(key);
        }
        if !watch.dead {
            // Before the descriptor closes: a duplicate elsewhere would keep it in the set.
            self.forget(watch.fd());
        }
    }

    pub(super) fn set_interest(&mut self, key: Key, interest: Interest) -> Result<()> {
        let Some(watch) = self.watches.get_mut(key) else { return Ok(()) };
        let Some(fd) = watch.fd() else { return Ok(()) };
        if watch.interest == interest {
            return Ok(());
        }
        watch.interest = interest;
        watch.pending &= interest.events() | HANG_UP;
        if watch.dead {
            return Ok(());
        }
        let event = EpollEvent::new(watch.epoll_events(), key.to_bits());
        self.epoll
            .ctl(ControlOperation::Modify, fd, event)
            .context(|| format!("event loop: change what descriptor {fd} is watched for"))
    }
}
