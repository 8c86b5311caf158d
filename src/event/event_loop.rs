//! The loop itself: one epoll set, a versioned table of handlers, a versioned table of watches.
//!
//! A turn waits (or not), takes in what other threads posted, puts what became ready into a rotating list, due timers
//! first, and goes through that list once. A handler is taken out of its slot while it runs, so it may add, remove and
//! finish freely. Nothing here allocates once the tables have grown to size, and no lock is taken but the inbox's, when
//! something was posted (G23). What a handler may do meanwhile is in `cx`. Everything here belongs to the thread that
//! runs the loop.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use log::{error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::counters::Counters;
use super::cx::Cx;
use super::handler::{Flow, Handler};
use super::inbox::{Command, Inbox, Remote};
use super::slots::{Key, Slots};
use super::timers::Timers;
use super::watch::{Event, HANG_UP, Interest, Kind, Watch};
use crate::error::{Context, Error, Result};
use crate::sys::clock;

/// How many ready descriptors one wait may bring (G9).
pub const BATCH: usize = 256;
/// Calls in a row for one stream without progress after which it is masked (G7).
const IDLE_CALLS: u32 = 64;
/// After how many handler calls a loop that does not sleep looks at the clock: that costs as much as a short call.
const STRETCH: usize = 16;
/// A wait that was over sooner than this was no sleep: what it waited for was there.
const NO_SLEEP_NS: u64 = 2_000;
/// The epoll data of the inbox's bell and of the timerfd: slot numbers that no table reaches.
const BELL: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

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
    /// A test's hand. It ends no sleep, so the test turns the loop with [`Wait::Poll`].
    Stepped(Arc<AtomicU64>),
}

/// Where a handler lives; empty while it runs.
type Place = Option<Box<dyn Handler>>;

type Report = Box<dyn FnMut(&str, &Error) + Send>;

/// One loop. Made on any thread, run on one.
pub struct EventLoop {
    pub(super) epoll: Epoll,
    pub(super) inbox: Arc<Inbox>,
    clock: Clock,
    /// The time of this turn, once anybody has asked for it.
    now_ns: Cell<Option<u64>>,
    /// When the present stretch of handler calls began, and how many they are so far.
    stretch_ns: u64,
    stretch: usize,
    /// The last wait brought something without a sleep.
    busy: bool,
    handlers: Slots<Place>,
    pub(super) watches: Slots<Watch>,
    pub(super) timers: Timers,
    ready: VecDeque<Key>,
    events: Box<[EpollEvent]>,
    commands: Vec<Command>,
    counters: Counters,
    report: Report,
}

impl EventLoop {
    /// A loop on CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// EMFILE and the like from epoll_create1(2), eventfd(2), timerfd_create(2), epoll_ctl(2).
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
        let timers = Timers::new().context(|| "event loop: make a timer")?;
        for (fd, data) in [(inbox.bell().as_raw_fd(), BELL), (timers.fd(), TIMER)] {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
            epoll.ctl(ControlOperation::Add, fd, event).context(|| "event loop: watch its own descriptors")?;
        }
        Ok(EventLoop {
            epoll,
            inbox,
            clock,
            now_ns: Cell::new(None),
            stretch_ns: 0,
            stretch: 0,
            busy: false,
            handlers: Slots::new(),
            watches: Slots::new(),
            timers,
            ready: VecDeque::new(),
            events: vec![EpollEvent::default(); BATCH].into_boxed_slice(),
            commands: Vec::new(),
            counters: Counters::default(),
            report: Box::new(|name, error| error!("{name}: {error}")),
        })
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
        let me = self.handlers.insert(None);
        let mut handler = handler;
        let attached = handler.attach(&mut Cx { event_loop: self, me });
        if attached.is_err() {
            self.remove(me);
        }
        // It may have finished itself while it was being attached.
        if let Some(place) = self.handlers.get_mut(me) {
            *place = Some(handler);
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

    /// Turns until stopped. A stop that came before ends it at once.
    ///
    /// # Errors
    /// Only what epoll_wait(2) itself refuses, which no handler can cause.
    pub fn run(&mut self) -> Result<()> {
        while !self.inbox.stopped() {
            self.turn(Wait::Block)?;
        }
        self.inbox.clear_stop();
        Ok(())
    }

    /// One turn: wait, take in posts, call what is ready, each once. Returns the number of handler calls. A stopped
    /// loop neither sleeps nor calls anybody.
    ///
    /// # Errors
    /// As [`EventLoop::run`].
    pub fn turn(&mut self, wait: Wait) -> Result<usize> {
        self.inbox.enter();
        self.counters.turns += 1;
        self.wait(wait)?;
        self.take_posts();
        self.fire_due();
        if wait == Wait::Poll {
            // What the caller does between turns is nobody's call.
            self.begin_stretch(self.now_ns());
        }
        let calls = self.dispatch();
        if wait == Wait::Poll {
            self.end_stretch();
        }
        Ok(calls)
    }

    pub(super) fn clock_ns(&self) -> u64 {
        match &self.clock {
            Clock::Monotonic => clock::monotonic_ns(),
            Clock::Stepped(now) => now.load(Relaxed),
        }
    }

    /// The time of this turn: read when it is first asked for, and the same until the turn ends.
    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns.get().unwrap_or_else(|| {
            let now_ns = self.clock_ns();
            self.now_ns.set(Some(now_ns));
            now_ns
        })
    }

    /// While the loop is busy it looks before it sleeps: a turn then costs neither the handshake nor a look at the
    /// clock. A loop that has slept goes to sleep at once the next time, and saves itself the look.
    fn wait(&mut self, wait: Wait) -> Result<()> {
        self.now_ns.set(None);
        let idle = wait == Wait::Block && self.ready.is_empty();
        let mut fetched = 0;
        let mut asleep = idle && !self.busy && self.fall_asleep()?;
        if !asleep {
            fetched = self.poll(0)?;
            self.busy = fetched > 0;
            asleep = idle && fetched == 0 && self.fall_asleep()?;
        }
        if asleep {
            let polled = self.poll(-1);
            self.inbox.awake();
            fetched = polled?;
            let now_ns = self.now_ns();
            let slept_ns = now_ns.saturating_sub(self.stretch_ns);
            self.counters.asleep_ns += slept_ns;
            self.inbox.board.publish_awake(self.counters.asleep_ns);
            self.busy = slept_ns < NO_SLEEP_NS;
            self.begin_stretch(now_ns);
            if fetched > 0 {
                self.count_wake(self.events[0].data());
            }
        }
        for i in 0..fetched {
            let event = self.events[i];
            match event.data() {
                BELL => {}
                TIMER => self.timers.fired(),
                data => self.mark_ready(Key::from_bits(data), event.event_set()),
            }
        }
        Ok(())
    }

    fn poll(&mut self, timeout_ms: i32) -> Result<usize> {
        match self.epoll.wait(timeout_ms, &mut self.events) {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(0),
            fetched => fetched.context(|| "event loop: epoll_wait"),
        }
    }

    /// False if there is something to do first. Otherwise the sleep counts from `stretch_ns`.
    fn fall_asleep(&mut self) -> Result<bool> {
        self.end_stretch();
        if self.timers.is_due(self.stretch_ns) {
            return Ok(false);
        }
        if let Clock::Monotonic = self.clock {
            self.timers.before_sleep().context(|| "event loop: set the timer")?;
        }
        let asleep = self.inbox.sleep();
        if asleep {
            self.inbox.board.publish_sleep(self.stretch_ns, self.counters.asleep_ns);
        }
        Ok(asleep)
    }

    fn count_wake(&mut self, data: u64) {
        let kind = self.watches.get(Key::from_bits(data)).map(|watch| &watch.kind);
        let count = match (data, kind) {
            (BELL, _) => &mut self.counters.wakes_post,
            (TIMER, _) => &mut self.counters.wakes_timer,
            (_, Some(Kind::Stream(_))) => &mut self.counters.wakes_stream,
            _ => &mut self.counters.wakes_signal,
        };
        *count += 1;
    }

    pub(super) fn mark_ready(&mut self, key: Key, ready: EventSet) {
        let Some(watch) = self.watches.get_mut(key) else {
            self.counters.stale += 1;
            return;
        };
        watch.pending |= ready;
        if !watch.queued {
            watch.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Due timers go to the head of the list, the earliest foremost (G12, G14).
    fn fire_due(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        for timer in self.timers.take_due(self.now_ns()) {
            let Some(watch) = self.watches.get_mut(timer) else { continue };
            watch.pending = EventSet::IN;
            if !watch.queued {
                watch.queued = true;
                self.ready.push_front(timer);
            }
        }
    }

    fn take_posts(&mut self) {
        if !self.inbox.is_posted() {
            return;
        }
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
        for _ in 0..self.ready.len() {
            if self.inbox.urgent() {
                if self.inbox.stopped() {
                    break;
                }
                self.take_posts();
            }
            let Some(key) = self.ready.pop_front() else { break };
            if self.call(key) {
                calls += 1;
                self.counters.events += 1;
                self.stretch += 1;
                if self.stretch == STRETCH {
                    self.end_stretch();
                }
            }
        }
        calls
    }

    fn begin_stretch(&mut self, now_ns: u64) {
        self.stretch_ns = now_ns;
        self.stretch = 0;
    }

    /// Looks at the clock, measures the handler calls since the last time, and shows the counters to other threads.
    fn end_stretch(&mut self) {
        let now_ns = self.clock_ns();
        if self.stretch > 0 {
            let stretch_ns = now_ns.saturating_sub(self.stretch_ns);
            self.counters.longest_handler_ns = self.counters.longest_handler_ns.max(stretch_ns);
        }
        self.begin_stretch(now_ns);
        self.inbox.board.publish(&self.counters);
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
        let idle_calls = std::mem::take(&mut watch.idle_calls);
        let Some(mut handler) = self.handlers.get_mut(me).and_then(Option::take) else { return false };
        let flow = handler.ready(Event { tag, ready }, &mut Cx { event_loop: self, me });
        match flow {
            Ok(flow) => {
                // Its place is gone if it finished; then it is dropped here, its watches already are.
                if let Some(place) = self.handlers.get_mut(me) {
                    *place = Some(handler);
                    if flow != Flow::Done || ready.intersects(HANG_UP) {
                        self.settle(key, ready, flow, idle_calls);
                    }
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
    fn settle(&mut self, key: Key, ready: EventSet, flow: Flow, idle_calls: u32) {
        // Gone by the handler's own wish.
        let Some(watch) = self.watches.get_mut(key) else { return };
        let stream = matches!(watch.kind, Kind::Stream(_));
        if flow == Flow::More {
            watch.pending |= ready & (watch.interest.events() | HANG_UP);
            if !watch.pending.is_empty() && !watch.queued {
                watch.queued = true;
                self.ready.push_back(key);
            }
        } else if stream && ready.intersects(HANG_UP) && !watch.dead {
            // Epoll would report it for ever, whatever the interest (G6).
            watch.dead = true;
            let fd = watch.fd();
            self.forget(fd);
        } else if stream && flow == Flow::Idle {
            watch.idle_calls = idle_calls + 1;
            if watch.idle_calls >= IDLE_CALLS {
                self.mask_stuck(key);
            }
        }
    }

    fn mask_stuck(&mut self, key: Key) {
        self.counters.stuck += 1;
        if let Some(watch) = self.watches.get_mut(key) {
            watch.idle_calls = 0;
            let (owner, tag) = (watch.owner, watch.tag);
            if let Some(Some(handler)) = self.handlers.get(owner) {
                warn!("{}: watch {tag} is ready and makes no progress: masked", handler.name());
            }
        }
        if let Err(e) = self.set_interest(key, Interest::NONE) {
            warn!("event loop: mask a watch: {e}");
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.inbox.close();
    }
}
