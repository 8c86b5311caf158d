//! How long after its deadline a timer's handler is called, in a loop that sleeps until then.
//!
//! Ours is a timer of the loop. mio and polling have a timeout of their wait instead; mio's counts milliseconds, so it
//! is also measured with a timerfd that it watches, which is the way to sub-millisecond timers there and the only way
//! in event-manager. Those timerfds are edge-triggered and never read, which is as fast as it goes.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use loopvisor::error::Result;
use loopvisor::event::{Cx, Event, EventLoop, Flow, Handler, Key, Wait};
use loopvisor::sys::timerfd::TimerFd;

use crate::stats::{monotonic_ns, percentile, table};

const ROUNDS: usize = 7;
const CONTESTANTS: [&str; 5] =
    ["loopvisor", "mio, timeout", "mio, timerfd", "polling, timeout", "event-manager, timerfd"];

/// Arms a timer for a deadline, waits, and returns when its handler was called.
trait Sleep {
    fn until(&mut self, deadline_ns: u64) -> u64;
}

struct Alarm {
    timer: Option<Key>,
    deadline_ns: Arc<AtomicU64>,
    called_ns: Arc<AtomicU64>,
    bell: vmm_sys_util::eventfd::EventFd,
}

impl Handler for Alarm {
    fn name(&self) -> &str {
        "bench"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.own(Box::new(self.bell.try_clone().expect("descriptors")), 0)?;
        self.timer = Some(cx.timer(1)?);
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        if event.tag == 0 {
            let timer = self.timer.expect("attached");
            cx.arm(timer, self.deadline_ns.load(Relaxed))?;
        } else {
            self.called_ns.store(monotonic_ns(), Relaxed);
        }
        Ok(Flow::Done)
    }
}

struct Ours {
    event_loop: EventLoop,
    bell: vmm_sys_util::eventfd::EventFd,
    deadline_ns: Arc<AtomicU64>,
    called_ns: Arc<AtomicU64>,
}

impl Sleep for Ours {
    fn until(&mut self, deadline_ns: u64) -> u64 {
        self.called_ns.store(0, Relaxed);
        self.deadline_ns.store(deadline_ns, Relaxed);
        self.bell.write(1).expect("ring");
        while self.called_ns.load(Relaxed) == 0 {
            self.event_loop.turn(Wait::Block).expect("turn");
        }
        self.called_ns.load(Relaxed)
    }
}

/// A wait with a timeout.
struct Timeout<W>(W);

impl<W: FnMut(Duration)> Sleep for Timeout<W> {
    fn until(&mut self, deadline_ns: u64) -> u64 {
        loop {
            let now_ns = monotonic_ns();
            if now_ns >= deadline_ns {
                return now_ns;
            }
            (self.0)(Duration::from_nanos(deadline_ns - now_ns));
        }
    }
}

/// A wait for a timerfd.
struct Watched<W> {
    timer: TimerFd,
    wait: W,
}

impl<W: FnMut() -> u64> Sleep for Watched<W> {
    fn until(&mut self, deadline_ns: u64) -> u64 {
        self.timer.arm(deadline_ns).expect("arm");
        (self.wait)()
    }
}

struct Subscriber(RawFd, Arc<AtomicU64>);

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.1.store(monotonic_ns(), Relaxed);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new_raw(self.0, EventSet::IN | EventSet::EDGE_TRIGGERED)).expect("add");
    }
}

fn contestant(which: usize) -> Box<dyn Sleep> {
    match which {
        0 => {
            let bell = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
            let (deadline_ns, called_ns) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
            let mut event_loop = EventLoop::new().expect("loop");
            let alarm = Alarm {
                timer: None,
                deadline_ns: deadline_ns.clone(),
                called_ns: called_ns.clone(),
                bell: bell.try_clone().expect("descriptors"),
            };
            event_loop.add(Box::new(alarm)).expect("add");
            Box::new(Ours { event_loop, bell, deadline_ns, called_ns })
        }
        1 => {
            let mut poll = mio::Poll::new().expect("poll");
            let mut events = mio::Events::with_capacity(256);
            Box::new(Timeout(move |timeout| poll.poll(&mut events, Some(timeout)).expect("poll")))
        }
        2 => {
            let (mut poll, timer) = (mio::Poll::new().expect("poll"), TimerFd::new().expect("timerfd"));
            let mut events = mio::Events::with_capacity(256);
            let fd = timer.as_raw_fd();
            let mut source = mio::unix::SourceFd(&fd);
            poll.registry().register(&mut source, mio::Token(0), mio::Interest::READABLE).expect("register");
            let wait = move || {
                poll.poll(&mut events, None).expect("poll");
                assert!(!events.is_empty(), "the timer");
                monotonic_ns()
            };
            Box::new(Watched { timer, wait })
        }
        3 => {
            let (poller, mut events) = (polling::Poller::new().expect("poller"), polling::Events::new());
            Box::new(Timeout(move |timeout| {
                events.clear();
                poller.wait(&mut events, Some(timeout)).expect("wait");
            }))
        }
        _ => {
            let timer = TimerFd::new().expect("timerfd");
            let called_ns = Arc::new(AtomicU64::new(0));
            let mut manager = EventManager::new().expect("manager");
            manager.add_subscriber(Subscriber(timer.as_raw_fd(), called_ns.clone()));
            let wait = move || {
                manager.run().expect("run");
                called_ns.load(Relaxed)
            };
            Box::new(Watched { timer, wait })
        }
    }
}

/// Prints lateness in microseconds.
pub fn report() {
    let mut rows = Vec::new();
    for (wait_ns, name, samples) in [(200_000, "200 us", 600), (1_000_000, "1 ms", 200)] {
        let mut contestants: Vec<_> = (0..CONTESTANTS.len()).map(contestant).collect();
        let mut cells = vec![[const { Vec::new() }; 2]; CONTESTANTS.len()];
        for _ in 0..ROUNDS {
            for (contestant, cells) in contestants.iter_mut().zip(&mut cells) {
                let mut late: Vec<f64> = (0..samples)
                    .map(|_| {
                        let deadline_ns = monotonic_ns() + wait_ns;
                        (contestant.until(deadline_ns) - deadline_ns) as f64 / 1000.0
                    })
                    .collect();
                cells[0].push(percentile(&mut late, 50));
                cells[1].push(percentile(&mut late, 99));
            }
        }
        for (figure, what) in ["p50", "p99"].iter().enumerate() {
            let cells = cells.iter_mut().map(|cells| percentile(&mut cells[figure], 50)).collect();
            rows.push((format!("{name}, {what}"), cells));
        }
    }
    println!("Lateness of a timer, microseconds:\n");
    table("", &CONTESTANTS, &rows);
}
