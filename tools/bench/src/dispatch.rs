//! What it costs to learn that an eventfd has rung and to call its handler.
//!
//! Everybody blocks in his wait, as a loop does, with something ready. The neighbours' handlers are called directly,
//! ours through `dyn Handler`, since that is what each API makes possible. "reads" means that the handler reads the
//! eventfd, as its crate's documentation asks for; "edge" that it is registered edge-triggered and never read, as ours
//! are.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use loopvisor::error::Result;
use loopvisor::event::{Cx, Event, EventLoop, Flow, Handler, Wait};
use vmm_sys_util::eventfd::EventFd;

use crate::stats::{clock_cost_ns, monotonic_ns, percentile, table};

const ROUNDS: usize = 15;
const CONTESTANTS: [&str; 7] = [
    "loopvisor",
    "mio, reads",
    "mio, edge",
    "polling, reads",
    "polling, edge",
    "event-manager, reads",
    "event-manager, edge",
];

/// Something that waits once and calls the handlers of what is ready.
pub trait Turn {
    fn turn(&mut self);
}

/// What every handler does: count, and read if it must.
pub struct Rung {
    bell: EventFd,
    count: Arc<AtomicU64>,
    reads: bool,
}

impl Rung {
    fn ready(&mut self) {
        if self.reads {
            let _ = self.bell.read();
        }
        // One thread only: a plain addition, which all of them pay alike.
        self.count.store(self.count.load(Relaxed) + 1, Relaxed);
    }
}

impl Handler for Rung {
    fn name(&self) -> &str {
        "bench"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.own(Box::new(self.bell.try_clone().expect("descriptors")), 0).map(drop)
    }

    fn ready(&mut self, _: Event, _: &mut Cx<'_>) -> Result<Flow> {
        self.ready();
        Ok(Flow::Done)
    }
}

struct Ours(EventLoop);

impl Turn for Ours {
    fn turn(&mut self) {
        self.0.turn(Wait::Block).expect("turn");
    }
}

struct Mio {
    poll: mio::Poll,
    events: mio::Events,
    rung: Vec<Rung>,
}

impl Turn for Mio {
    fn turn(&mut self) {
        self.poll.poll(&mut self.events, None).expect("poll");
        for event in &self.events {
            self.rung[event.token().0].ready();
        }
    }
}

struct Polling {
    poller: polling::Poller,
    events: polling::Events,
    rung: Vec<Rung>,
}

impl Turn for Polling {
    fn turn(&mut self) {
        self.events.clear();
        self.poller.wait(&mut self.events, None).expect("wait");
        for event in self.events.iter() {
            self.rung[event.key].ready();
        }
    }
}

impl MutEventSubscriber for Rung {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.ready();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edge = if self.reads { EventSet::empty() } else { EventSet::EDGE_TRIGGERED };
        ops.add(Events::new(&self.bell, EventSet::IN | edge)).expect("add");
    }
}

struct Manager(EventManager<Rung>);

impl Turn for Manager {
    fn turn(&mut self) {
        self.0.run().expect("run");
    }
}

struct Contestant {
    bells: Vec<EventFd>,
    count: Arc<AtomicU64>,
    turns: Box<dyn Turn>,
}

fn contestant(which: usize, registered: usize) -> Contestant {
    let count = Arc::new(AtomicU64::new(0));
    let bells: Vec<EventFd> = (0..registered).map(|_| EventFd::new(libc::EFD_NONBLOCK).expect("eventfd")).collect();
    let reads = which % 2 == 1;
    let rung: Vec<Rung> = bells
        .iter()
        .map(|bell| Rung { bell: bell.try_clone().expect("descriptors"), count: count.clone(), reads })
        .collect();
    let turns: Box<dyn Turn> = match which {
        0 => {
            let mut event_loop = EventLoop::new().expect("loop");
            for rung in rung {
                event_loop.add(Box::new(rung)).expect("add");
            }
            Box::new(Ours(event_loop))
        }
        1 | 2 => {
            let poll = mio::Poll::new().expect("poll");
            for (token, rung) in rung.iter().enumerate() {
                let fd = rung.bell.as_raw_fd();
                let mut source = mio::unix::SourceFd(&fd);
                poll.registry().register(&mut source, mio::Token(token), mio::Interest::READABLE).expect("register");
            }
            Box::new(Mio { poll, events: mio::Events::with_capacity(1024), rung })
        }
        3 | 4 => {
            let poller = polling::Poller::new().expect("poller");
            let mode = if reads { polling::PollMode::Level } else { polling::PollMode::Edge };
            for (key, rung) in rung.iter().enumerate() {
                let event = polling::Event::readable(key);
                // SAFETY: the eventfd lives in `rung`, beside the poller, and is dropped after it.
                unsafe { poller.add_with_mode(rung.bell.as_raw_fd(), event, mode) }.expect("add");
            }
            let capacity = std::num::NonZeroUsize::new(1024).expect("not zero");
            Box::new(Polling { poller, events: polling::Events::with_capacity(capacity), rung })
        }
        _ => {
            let mut manager = EventManager::new_with_capacity(1024).expect("manager");
            for rung in rung {
                manager.add_subscriber(rung);
            }
            Box::new(Manager(manager))
        }
    };
    Contestant { bells, count, turns }
}

impl Contestant {
    /// Nanoseconds per ready eventfd, when `ready` of those registered ring before each round of turns.
    fn measure(&mut self, ready: usize, clock_ns: f64) -> f64 {
        let rounds = 40_000 / (ready + 9);
        let mut samples = Vec::with_capacity(rounds);
        for round in 0..rounds {
            for i in 0..ready {
                let which = if ready == 1 { round * 7 % self.bells.len() } else { i };
                self.bells[which].write(1).expect("ring");
            }
            let goal = self.count.load(Relaxed) + ready as u64;
            let begin_ns = monotonic_ns();
            while self.count.load(Relaxed) < goal {
                self.turns.turn();
            }
            samples.push((monotonic_ns() - begin_ns) as f64 - clock_ns);
        }
        percentile(&mut samples, 50) / ready as f64
    }
}

/// Prints nanoseconds per ready eventfd.
pub fn report() {
    let clock_ns = clock_cost_ns();
    let cases = [(1, 1), (10, 10), (1000, 1000), (10, 1), (1000, 1)];
    let mut rows = Vec::new();
    for (registered, ready) in cases {
        let mut contestants: Vec<Contestant> =
            (0..CONTESTANTS.len()).map(|which| contestant(which, registered)).collect();
        let mut medians = vec![Vec::new(); contestants.len()];
        for round in 0..=ROUNDS {
            for (contestant, medians) in contestants.iter_mut().zip(&mut medians) {
                let median = contestant.measure(ready, clock_ns);
                // The first round warms caches and branch predictors.
                if round > 0 {
                    medians.push(median);
                }
            }
        }
        let cells = medians.iter_mut().map(|medians| percentile(medians, 50)).collect();
        rows.push((format!("{registered} registered, {ready} ready"), cells));
    }
    println!("Dispatch, nanoseconds per ready eventfd:\n");
    table("", &CONTESTANTS, &rows);
}
