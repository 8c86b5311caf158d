//! How long a message from another thread takes to reach a handler, and what sending it costs.
//!
//! The messages carry the time at which they were sent. The receiver either sleeps in its wait (the sender leaves it
//! time to), or is busy and only looks, which is how a loop with work in hand behaves. Ours goes through a channel of
//! the loop, the neighbours' through std's, and mio's `Waker`, polling's `notify`, an eventfd for event-manager.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::mpsc;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use loopvisor::error::Result;
use loopvisor::event::{Cx, Event, EventLoop, Flow, Handler, Receiver, Wait, channel};
use vmm_sys_util::eventfd::EventFd;

use crate::stats::{monotonic_ns, percentile, table};

const ROUNDS: usize = 5;
const MESSAGES: usize = 4_000;
const CONTESTANTS: [&str; 4] = ["loopvisor", "mio", "polling", "event-manager"];

/// The end of the receiving loop.
const END: u64 = 0;

#[derive(Clone, Copy, PartialEq)]
enum Receiving {
    Asleep,
    Awake,
}

/// Takes a message in: its age goes to `ages`, and the sender may send the next.
struct Taken {
    ages: mpsc::Sender<u64>,
    seen: Arc<AtomicU64>,
    ended: bool,
}

impl Taken {
    fn take(&mut self, sent_ns: u64) {
        let now_ns = monotonic_ns();
        if sent_ns == END {
            self.ended = true;
        } else {
            let _ = self.ages.send(now_ns - sent_ns);
        }
        self.seen.fetch_add(1, Release);
    }
}

struct Ours(Receiver<u64>, Taken, Arc<AtomicU64>);

impl Handler for Ours {
    fn name(&self) -> &str {
        "bench"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.0, 0);
        Ok(())
    }

    fn ready(&mut self, _: Event, _: &mut Cx<'_>) -> Result<Flow> {
        while let Some(sent_ns) = self.0.receive() {
            self.1.take(sent_ns);
        }
        if self.1.ended {
            self.2.store(1, Release);
        }
        Ok(Flow::Done)
    }
}

struct Subscriber(EventFd, mpsc::Receiver<u64>, Taken, Arc<AtomicU64>);

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let _ = self.0.read();
        while let Ok(sent_ns) = self.1.try_recv() {
            self.2.take(sent_ns);
        }
        if self.2.ended {
            self.3.store(1, Release);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("add");
    }
}

type Send = Box<dyn FnMut(u64)>;

/// Starts the receiving thread of a contestant; returns how to send to it.
fn start(which: usize, mut taken: Taken, receiving: Receiving) -> (std::thread::JoinHandle<()>, Send) {
    let asleep = receiving == Receiving::Asleep;
    let timeout = if asleep { None } else { Some(Duration::ZERO) };
    let (posts, inbox) = mpsc::channel();
    match which {
        0 => {
            let (sender, receiver) = channel();
            let mut event_loop = EventLoop::new().expect("loop");
            let ended = Arc::new(AtomicU64::new(0));
            event_loop.add(Box::new(Ours(receiver, taken, ended.clone()))).expect("add");
            let thread = std::thread::spawn(move || {
                let wait = if asleep { Wait::Block } else { Wait::Poll };
                while ended.load(Acquire) == 0 {
                    event_loop.turn(wait).expect("turn");
                }
            });
            (thread, Box::new(move |sent_ns| sender.send(sent_ns).expect("send")))
        }
        1 => {
            let mut poll = mio::Poll::new().expect("poll");
            let waker = mio::Waker::new(poll.registry(), mio::Token(0)).expect("waker");
            let thread = std::thread::spawn(move || {
                let mut events = mio::Events::with_capacity(256);
                while !taken.ended {
                    poll.poll(&mut events, timeout).expect("poll");
                    for _ in &events {
                        while let Ok(sent_ns) = inbox.try_recv() {
                            taken.take(sent_ns);
                        }
                    }
                }
            });
            let send = move |sent_ns| {
                posts.send(sent_ns).expect("send");
                waker.wake().expect("wake");
            };
            (thread, Box::new(send))
        }
        2 => {
            let poller = Arc::new(polling::Poller::new().expect("poller"));
            let notify = poller.clone();
            let thread = std::thread::spawn(move || {
                let mut events = polling::Events::new();
                while !taken.ended {
                    events.clear();
                    poller.wait(&mut events, timeout).expect("wait");
                    while let Ok(sent_ns) = inbox.try_recv() {
                        taken.take(sent_ns);
                    }
                }
            });
            let send = move |sent_ns| {
                posts.send(sent_ns).expect("send");
                notify.notify().expect("notify");
            };
            (thread, Box::new(send))
        }
        _ => {
            let bell = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
            let ring = bell.try_clone().expect("descriptors");
            let thread = std::thread::spawn(move || {
                let ended = Arc::new(AtomicU64::new(0));
                let mut manager = EventManager::new().expect("manager");
                manager.add_subscriber(Subscriber(bell, inbox, taken, ended.clone()));
                while ended.load(Acquire) == 0 {
                    manager.run_with_timeout(if asleep { -1 } else { 0 }).expect("run");
                }
            });
            let send = move |sent_ns| {
                posts.send(sent_ns).expect("send");
                ring.write(1).expect("ring");
            };
            (thread, Box::new(send))
        }
    }
}

/// Ages of the messages, and what each send cost, in nanoseconds.
fn measure(which: usize, receiving: Receiving) -> (Vec<f64>, Vec<f64>) {
    let (ages, all_ages) = mpsc::channel();
    let seen = Arc::new(AtomicU64::new(0));
    let (thread, mut send) = start(which, Taken { ages, seen: seen.clone(), ended: false }, receiving);
    // Long enough to fall asleep in; and for an awake one, long enough to be in the middle of anything.
    let pause_ns = if receiving == Receiving::Asleep { 60_000 } else { 3_000 };
    let mut costs = Vec::with_capacity(MESSAGES);
    for message in 0..MESSAGES as u64 {
        let begin_ns = monotonic_ns();
        while monotonic_ns() - begin_ns < pause_ns || seen.load(Acquire) < message {
            std::hint::spin_loop();
        }
        let sent_ns = monotonic_ns();
        send(sent_ns);
        costs.push((monotonic_ns() - sent_ns) as f64);
    }
    send(END);
    thread.join().expect("the receiver ends");
    (all_ages.iter().map(|age| age as f64).collect(), costs)
}

/// Prints latency and cost of posts.
pub fn report() {
    let mut rows = Vec::new();
    for (receiving, name) in [(Receiving::Asleep, "sleeping"), (Receiving::Awake, "awake")] {
        let mut cells = vec![[const { Vec::new() }; 3]; CONTESTANTS.len()];
        for _ in 0..ROUNDS {
            for (which, cells) in cells.iter_mut().enumerate() {
                let (mut ages, mut costs) = measure(which, receiving);
                cells[0].push(percentile(&mut ages, 50));
                cells[1].push(percentile(&mut ages, 99));
                cells[2].push(percentile(&mut costs, 50));
            }
        }
        for (figure, what) in
            ["to the handler, p50", "to the handler, p99", "cost to the sender, p50"].iter().enumerate()
        {
            let cells = cells.iter_mut().map(|cells| percentile(&mut cells[figure], 50)).collect();
            rows.push((format!("{name} receiver: {what}"), cells));
        }
    }
    println!("A message from another thread, nanoseconds:\n");
    table("", &CONTESTANTS, &rows);
}
