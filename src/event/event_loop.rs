//! The loop itself: one epoll set, a versioned table of handlers, a versioned table of watches.
//!
//! A turn waits (or not), takes in what other threads posted, puts what became ready into a rotating list, due timers
//! first, and goes through that list once. A handler is taken out of its slot while it runs, so it may add, remove and
//! finish freely. Nothing here allocates once the tables have grown to size, and no lock is taken but the inbox's, when
//! it rang (G23). Everything but [`super::Remote`] belongs to the thread that runs the loop.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use log::{error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::channel::Receiver;
use super::counters::Counters;
use super::inbox::{Command, Inbox, Remote};
use super::slots::{Key, Slots};
use super::watch::{Deadline, Event, HANG_UP, Interest, Kind, Signal, Watch};
use crate::error::{Context, Error, Result};
use crate::sys::clock;
use crate::sys::timerfd::TimerFd;

/// How many ready descriptors one wait may bring (G9).
pub const BATCH: usize = 256;
/// Calls in a row for one stream without progress after which it is masked (G7).
const IDLE_CALLS: u32 = 64;
/// The epoll data of the inbox's bell: a slot number that no table reaches.
const BELL: u64 = u64::MAX;

/// What a handler has to say at the end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It did what there was to do.
    Done,
    /// Its budget is used up: call again after the others have had their turn (G10).
    More,
    /// It could do nothing. A stream that goes on waking it for nothing is masked (G7).
    Idle,
}

/// Something that lives in a loop and is called when what it watches becomes ready.
pub trait Handler: Send {
    /// What messages and `query-iothreads` call it.
    fn name(&self) -> &str;

    /// Called once, by the loop's thread, when the handler has its place: it sets up its watches here.
    ///
    /// # Errors
    /// Whatever keeps it from working; the handler is dropped and the error goes to whoever added it.
    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()>;

    /// Called when a watch is ready, and again while it returns [`Flow::More`]. Must not block, and does a bounded
    /// amount of work. A call without a cause is allowed: look, find nothing, return [`Flow::Idle`].
    ///
    /// # Errors
    /// Trouble that ends this handler and no other: it is dropped and the failure reported under its name (G22).
    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow>;
}

/// Whether a turn may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Sleep until something is ready.
    Block,
    /// Only look.
    Poll,
}

/// Where a loop's time comes from.
enum Clock {
    Monotonic,
    /// A test's hand. Timers fire by this clock alone; their timerfds stay disarmed.
    Stepped(Arc<AtomicU64>),
}

struct Place {
    name: Arc<str>,
    /// None while the handler runs.
    handler: Option<Box<dyn Handler>>,
}

type Report = Box<dyn FnMut(&str, &Error) + Send>;

/// One loop. Made on any thread, run on one.
pub struct EventLoop {
    epoll: Epoll,
    inbox: Arc<Inbox>,
    clock: Clock,
    now_ns: u64,
    handlers: Slots<Place>,
    watches: Slots<Watch>,
    ready: VecDeque<Key>,
    due: Vec<(Deadline, Key)>,
    events: Box<[EpollEvent]>,
    commands: Vec<Command>,
    counters: Counters,
    /// The order number of the next timer to be armed.
    order: u64,
    report: Report,
}

impl EventLoop {
    /// A loop on CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// EMFILE and the like from epoll_create1(2), eventfd(2), epoll_ctl(2).
    pub fn new() -> Result<Self> {
        Self::with_clock(Clock::Monotonic)
    }

    /// A loop whose time is the given number of nanoseconds, stepped by hand (invariant I8).
    ///
    /// # Errors
    /// As [`EventLoop::new`].
    pub fn stepped(clock: Arc<AtomicU64>) -> Result<Self> {
        Self::with_clock(Clock::Stepped(clock))
    }

    fn with_clock(clock: Clock) -> Result<Self> {
        let epoll = Epoll::new().context(|| "event loop: make an epoll set")?;
        let inbox = Inbox::new()?;
        let bell = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, BELL);
        epoll
            .ctl(ControlOperation::Add, inbox.bell().as_raw_fd(), bell)
            .context(|| "event loop: watch its own bell")?;
        let mut event_loop = EventLoop {
            epoll,
            inbox,
            clock,
            now_ns: 0,
            handlers: Slots::new(),
            watches: Slots::new(),
            ready: VecDeque::new(),
            due: Vec::new(),
            events: vec![EpollEvent::default(); BATCH].into_boxed_slice(),
            commands: Vec::new(),
            counters: Counters::default(),
            order: 0,
            report: Box::new(|name, error| error!("{name}: {error}")),
        };
        event_loop.now_ns = event_loop.clock_ns();
        Ok(event_loop)
    }

    /// Has the failure of a handler told to `report` instead of logged (G22).
    pub fn on_failure(&mut self, report: impl FnMut(&str, &Error) + Send + 'static) {
        self.report = Box::new(report);
    }

    /// A handle for other threads.
    pub fn remote(&self) -> Remote {
        Remote { inbox: self.inbox.clone() }
    }

    /// What the loop has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Adds a handler.
    ///
    /// # Errors
    /// Whatever its `attach` said; it is dropped then.
    pub fn add(&mut self, handler: Box<dyn Handler>) -> Result<Key> {
        let name: Arc<str> = handler.name().into();
        let me = self.handlers.insert(Place { name, handler: None });
        let mut handler = handler;
        let attached = handler.attach(&mut Cx { event_loop: self, me });
        if attached.is_err() {
            self.remove(me);
        }
        // It may have finished itself while it was being attached.
        if let Some(place) = self.handlers.get_mut(me) {
            place.handler = Some(handler);
        }
        attached.map(|()| me)
    }

    /// Drops a handler and all it watches; false if it was not there.
    pub fn remove(&mut self, handler: Key) -> bool {
        let Some(place) = self.handlers.remove(handler) else { return false };
        let watches: Vec<Key> =
            self.watches.iter().filter(|(_, watch)| watch.owner == handler).map(|(key, _)| key).collect();
        for watch in watches {
            self.unwatch(watch);
        }
        // Last: the handler's own descriptors close after epoll has let go of them.
        drop(place);
        true
    }

    /// Turns until stopped.
    ///
    /// # Errors
    /// Only what epoll_wait(2) itself refuses, which no handler can cause.
    pub fn run(&mut self) -> Result<()> {
        self.inbox.enter();
        while !self.inbox.stopped() {
            self.turn(Wait::Block)?;
        }
        self.inbox.set_stop(false);
        Ok(())
    }

    /// One turn: wait, take in posts, call what is ready, each once. Returns the number of handler calls.
    ///
    /// # Errors
    /// As [`EventLoop::run`].
    pub fn turn(&mut self, wait: Wait) -> Result<usize> {
        self.inbox.enter();
        self.counters.turns += 1;
        self.wait(wait)?;
        self.take_posts();
        self.collect_due();
        let calls = self.dispatch();
        self.inbox.board.publish(&self.counters, 0);
        Ok(calls)
    }

    fn clock_ns(&self) -> u64 {
        match &self.clock {
            Clock::Monotonic => clock::monotonic_ns(),
            Clock::Stepped(now) => now.load(Relaxed),
        }
    }

    fn wait(&mut self, wait: Wait) -> Result<()> {
        let block = wait == Wait::Block && self.ready.is_empty() && self.inbox.sleep();
        if block {
            self.now_ns = self.clock_ns();
            self.inbox.board.publish(&self.counters, self.now_ns);
        }
        let fetched = self.epoll.wait(if block { -1 } else { 0 }, &mut self.events);
        self.inbox.awake();
        let before_ns = self.now_ns;
        self.now_ns = self.clock_ns();
        let fetched = match fetched {
            Ok(fetched) => fetched,
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => 0,
            Err(e) => return Err(e).context(|| "event loop: epoll_wait"),
        };
        if block {
            self.counters.asleep_ns += self.now_ns.saturating_sub(before_ns);
            if fetched > 0 {
                self.count_wake(self.events[0].data());
            }
        }
        for i in 0..fetched {
            let event = self.events[i];
            if event.data() != BELL {
                self.mark_ready(Key::from_bits(event.data()), event.event_set());
            }
        }
        Ok(())
    }

    fn count_wake(&mut self, data: u64) {
        let kind = self.watches.get(Key::from_bits(data)).map(|watch| &watch.kind);
        let count = match kind {
            _ if data == BELL => &mut self.counters.wakes_post,
            Some(Kind::Timer { .. }) => &mut self.counters.wakes_timer,
            Some(Kind::Stream(_)) => &mut self.counters.wakes_stream,
            _ => &mut self.counters.wakes_signal,
        };
        *count += 1;
    }

    fn mark_ready(&mut self, key: Key, ready: EventSet) {
        let Some(watch) = self.watches.get_mut(key) else {
            self.counters.stale += 1;
            return;
        };
        if let Kind::Timer { armed, .. } = &watch.kind {
            // Armed anew or cancelled since it fired, or not there yet: the timer has nothing to say (G12, G13).
            match armed {
                Some(deadline) if deadline.at_ns <= self.now_ns => self.due.push((*deadline, key)),
                _ => {}
            }
            return;
        }
        watch.pending |= ready;
        if !watch.queued {
            watch.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Due timers go to the head of the list, the earliest foremost (G12, G14).
    fn collect_due(&mut self) {
        if let Clock::Stepped(_) = self.clock {
            let now_ns = self.now_ns;
            self.due.extend(self.watches.iter().filter_map(|(key, watch)| match watch.kind {
                Kind::Timer { armed: Some(deadline), .. } if deadline.at_ns <= now_ns => Some((deadline, key)),
                _ => None,
            }));
        }
        self.due.sort_unstable_by_key(|(deadline, _)| *deadline);
        while let Some((_, key)) = self.due.pop() {
            self.fire(key);
        }
    }

    fn fire(&mut self, key: Key) {
        let Some(watch) = self.watches.get_mut(key) else { return };
        let Kind::Timer { armed, .. } = &mut watch.kind else { return };
        *armed = None;
        watch.pending = EventSet::IN;
        if !watch.queued {
            watch.queued = true;
            self.ready.push_front(key);
        }
    }

    fn take_posts(&mut self) {
        let mut commands = std::mem::take(&mut self.commands);
        self.inbox.take(&mut commands);
        for command in commands.drain(..) {
            match command {
                Command::Adopt(handler, done) => done.end(self.add(handler)),
                Command::Remove(handler, done) => done.end(self.remove(handler)),
                Command::Ready(watch) => self.mark_ready(watch, EventSet::IN),
            }
        }
        self.commands = commands;
    }

    /// Goes through the ready list once: what becomes ready meanwhile waits for the next turn.
    fn dispatch(&mut self) -> usize {
        let mut calls = 0;
        let mut begin_ns = self.now_ns;
        for _ in 0..self.ready.len() {
            if self.inbox.take_urgent() {
                if self.inbox.stopped() {
                    break;
                }
                self.take_posts();
            }
            let Some(key) = self.ready.pop_front() else { break };
            if self.call(key) {
                calls += 1;
                let end_ns = self.clock_ns();
                self.counters.longest_handler_ns =
                    self.counters.longest_handler_ns.max(end_ns.saturating_sub(begin_ns));
                begin_ns = end_ns;
            }
        }
        self.counters.events += calls as u64;
        calls
    }

    /// Tells one watch's handler; false if there was nothing to tell or nobody to tell it to.
    fn call(&mut self, key: Key) -> bool {
        let Some(watch) = self.watches.get_mut(key) else {
            self.counters.stale += 1;
            return false;
        };
        watch.queued = false;
        let ready = std::mem::replace(&mut watch.pending, EventSet::empty());
        if ready.is_empty() {
            return false;
        }
        let (me, tag) = (watch.owner, watch.tag);
        let Some(mut handler) = self.handlers.get_mut(me).and_then(|place| place.handler.take()) else { return false };
        let flow = handler.ready(Event { tag, ready }, &mut Cx { event_loop: self, me });
        match flow {
            Ok(flow) => {
                // Its place is gone if it finished; then it is dropped here, its watches already are.
                if let Some(place) = self.handlers.get_mut(me) {
                    place.handler = Some(handler);
                    self.settle(key, ready, flow);
                }
            }
            Err(error) => {
                self.counters.failed += 1;
                self.remove(me);
                (self.report)(handler.name(), &error);
            }
        }
        true
    }

    /// What a call's outcome means for the watch that caused it.
    fn settle(&mut self, key: Key, ready: EventSet, flow: Flow) {
        // Gone, or masked, by the handler's own wish.
        let Some(watch) = self.watches.get_mut(key) else { return };
        let stream = matches!(watch.kind, Kind::Stream(_));
        if flow == Flow::More {
            watch.idle_calls = 0;
            watch.pending |= ready & (watch.interest.events() | HANG_UP);
            if !watch.pending.is_empty() && !watch.queued {
                watch.queued = true;
                self.ready.push_back(key);
            }
            return;
        }
        if stream && ready.intersects(HANG_UP) && !watch.dead {
            // Epoll would report it for ever, whatever the interest (G6).
            watch.dead = true;
            let fd = watch.fd();
            self.forget(fd);
            return;
        }
        watch.idle_calls = if flow == Flow::Idle && stream { watch.idle_calls + 1 } else { 0 };
        if watch.idle_calls >= IDLE_CALLS {
            watch.idle_calls = 0;
            let (owner, tag) = (watch.owner, watch.tag);
            self.counters.stuck += 1;
            if let Some(place) = self.handlers.get(owner) {
                warn!("{}: watch {tag} is ready and makes no progress: masked", place.name);
            }
            if let Err(e) = self.set_interest(key, Interest::NONE) {
                warn!("event loop: mask a watch: {e}");
            }
        }
    }

    fn forget(&self, fd: Option<i32>) {
        if let Some(fd) = fd {
            // The descriptor is ours and registered: there is nothing to be done about a refusal.
            if let Err(e) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
                warn!("event loop: take descriptor {fd} out of epoll: {e}");
            }
        }
    }

    fn watch(&mut self, watch: Watch) -> Result<Key> {
        let key = self.watches.next_key();
        if let Some(fd) = watch.fd() {
            let event = EpollEvent::new(watch.epoll_events(), key.to_bits());
            self.epoll
                .ctl(ControlOperation::Add, fd, event)
                .context(|| format!("event loop: watch descriptor {fd}"))?;
        }
        Ok(self.watches.insert(watch))
    }

    fn unwatch(&mut self, key: Key) {
        let Some(watch) = self.watches.remove(key) else { return };
        if !watch.dead {
            // Before the descriptor closes: a duplicate elsewhere would keep it in the set.
            self.forget(watch.fd());
        }
    }

    fn set_interest(&mut self, key: Key, interest: Interest) -> Result<()> {
        let Some(watch) = self.watches.get_mut(key) else { return Ok(()) };
        if watch.interest == interest {
            return Ok(());
        }
        watch.interest = interest;
        watch.pending &= interest.events() | HANG_UP;
        match watch.fd() {
            Some(fd) if !watch.dead => {
                let event = EpollEvent::new(watch.epoll_events(), key.to_bits());
                self.epoll
                    .ctl(ControlOperation::Modify, fd, event)
                    .context(|| format!("event loop: change what descriptor {fd} is watched for"))
            }
            _ => Ok(()),
        }
    }
}

/// What a handler may do to its loop while it is being called.
pub struct Cx<'a> {
    event_loop: &'a mut EventLoop,
    me: Key,
}

impl Cx<'_> {
    /// The time of this turn, in nanoseconds of CLOCK_MONOTONIC: read once, after the wait.
    pub fn now_ns(&self) -> u64 {
        self.event_loop.now_ns
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

    /// A timer of the handler's own (a timerfd), not armed.
    ///
    /// # Errors
    /// EMFILE and the like from timerfd_create(2), and as [`Cx::own`].
    pub fn timer(&mut self, tag: u32) -> Result<Key> {
        let fd = TimerFd::new().context(|| "event loop: make a timer")?;
        self.event_loop.watch(Watch::new(self.me, tag, Kind::Timer { fd, armed: None }, Interest::READ))
    }

    /// Arms a timer, or arms it anew: it fires once, not before `deadline_ns`, and within one turn after (G12). A
    /// deadline that has passed fires next turn (G15).
    ///
    /// # Errors
    /// None that a timer of this loop can cause.
    pub fn arm(&mut self, timer: Key, deadline_ns: u64) -> Result<()> {
        let event_loop = &mut *self.event_loop;
        let Some(watch) = event_loop.watches.get_mut(timer) else { return Ok(()) };
        let Kind::Timer { fd, armed } = &mut watch.kind else { return Ok(()) };
        watch.pending = EventSet::empty();
        *armed = Some(Deadline { at_ns: deadline_ns, order: event_loop.order });
        event_loop.order += 1;
        match event_loop.clock {
            Clock::Monotonic => fd.arm(deadline_ns).context(|| "event loop: arm a timer"),
            Clock::Stepped(_) => Ok(()),
        }
    }

    /// Disarms a timer, even one that has fired and has not been told (G13).
    ///
    /// # Errors
    /// None that a timer of this loop can cause.
    pub fn cancel(&mut self, timer: Key) -> Result<()> {
        let event_loop = &mut *self.event_loop;
        let Some(watch) = event_loop.watches.get_mut(timer) else { return Ok(()) };
        let Kind::Timer { fd, armed } = &mut watch.kind else { return Ok(()) };
        watch.pending = EventSet::empty();
        if armed.take().is_some() && matches!(event_loop.clock, Clock::Monotonic) {
            return fd.disarm().context(|| "event loop: disarm a timer");
        }
        Ok(())
    }

    /// Changes what a watch is told of. [`Interest::NONE`] masks it at no further cost; a signal that is unmasked is
    /// told once if it has ever rung.
    ///
    /// # Errors
    /// None that a watch of this loop can cause.
    pub fn set_interest(&mut self, watch: Key, interest: Interest) -> Result<()> {
        self.event_loop.set_interest(watch, interest)
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
        self.event_loop.inbox.set_stop(true);
    }
}
