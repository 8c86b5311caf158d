//! The loop itself: one epoll set, a versioned table of handlers, a versioned table of watches.
//!
//! A turn waits (or not), takes in what other threads posted, puts what became ready into a rotating list, due timers
//! first, and goes through that list once. A handler is taken out of its slot while it runs, so it may add, remove and
//! finish freely. Nothing here allocates once the tables have grown to size, and no lock is taken but the inbox's, when
//! something was posted (G23). What a handler may do meanwhile is in `cx`. Everything here belongs to the thread that
//! runs the loop.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use log::{error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::counters::Counters;
use super::cx::Cx;
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
/// After how many handler calls in a row the loop looks at the clock: that costs as much as a short call.
const STRETCH: usize = 8;
/// The epoll data of the inbox's bell and of the timerfd: slot numbers that no table reaches.
const BELL: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

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
    /// A test's hand. It ends no sleep, so the test turns the loop with [`Wait::Poll`].
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
    pub(super) epoll: Epoll,
    pub(super) inbox: Arc<Inbox>,
    clock: Clock,
    /// The time of this turn: after the wait.
    pub(super) now_ns: u64,
    /// When the clock was last looked at: after the wait, or after a handler.
    looked_ns: u64,
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
        let mut event_loop = EventLoop {
            epoll,
            inbox,
            clock,
            now_ns: 0,
            looked_ns: 0,
            handlers: Slots::new(),
            watches: Slots::new(),
            timers,
            ready: VecDeque::new(),
            events: vec![EpollEvent::default(); BATCH].into_boxed_slice(),
            commands: Vec::new(),
            counters: Counters::default(),
            report: Box::new(|name, error| error!("{name}: {error}")),
        };
        event_loop.now_ns = event_loop.clock_ns();
        event_loop.looked_ns = event_loop.now_ns;
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
        let calls = self.dispatch();
        self.inbox.board.publish(&self.counters);
        Ok(calls)
    }

    pub(super) fn clock_ns(&self) -> u64 {
        match &self.clock {
            Clock::Monotonic => clock::monotonic_ns(),
            Clock::Stepped(now) => now.load(Relaxed),
        }
    }

    fn wait(&mut self, wait: Wait) -> Result<()> {
        let asleep = wait == Wait::Block && self.fall_asleep()?;
        let fetched = self.epoll.wait(if asleep { -1 } else { 0 }, &mut self.events);
        let began_ns = self.looked_ns;
        self.now_ns = self.clock_ns();
        self.looked_ns = self.now_ns;
        if asleep {
            self.inbox.awake();
            self.counters.asleep_ns += self.now_ns.saturating_sub(began_ns);
        }
        let fetched = match fetched {
            Ok(fetched) => fetched,
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => 0,
            Err(e) => return Err(e).context(|| "event loop: epoll_wait"),
        };
        if asleep && fetched > 0 {
            self.count_wake(self.events[0].data());
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

    /// False if there is something to do first.
    fn fall_asleep(&mut self) -> Result<bool> {
        if !self.ready.is_empty() || self.timers.is_due(self.looked_ns) {
            return Ok(false);
        }
        if let Clock::Monotonic = self.clock {
            self.timers.before_sleep().context(|| "event loop: set the timer")?;
        }
        let asleep = self.inbox.sleep();
        if asleep {
            self.inbox.board.publish_sleep(self.looked_ns, self.counters.asleep_ns);
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
        for timer in self.timers.take_due(self.now_ns) {
            let Some(watch) = self.watches.get_mut(timer) else { continue };
            watch.kind = Kind::Timer(None);
            watch.pending = EventSet::IN;
            if !watch.queued {
                watch.queued = true;
                self.ready.push_front(timer);
            }
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
                if calls % STRETCH == 0 {
                    self.look();
                }
            }
        }
        if calls % STRETCH != 0 {
            self.look();
        }
        self.counters.events += calls as u64;
        calls
    }

    /// Measures the handler calls since the clock was last looked at.
    fn look(&mut self) {
        let now_ns = self.clock_ns();
        let stretch_ns = now_ns.saturating_sub(self.looked_ns);
        self.counters.longest_handler_ns = self.counters.longest_handler_ns.max(stretch_ns);
        self.looked_ns = now_ns;
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
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.inbox.close();
    }
}
