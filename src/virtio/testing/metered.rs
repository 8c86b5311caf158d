//! A device that finishes each chain on the spot, as soon as its bucket lets it: what a disk in memory does.
//!
//! A chain that the device may write is a read, any other a write, of as many bytes as its first buffer has.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Result;
use crate::event::{Cx, Event};
use crate::qos::{Bucket, Direction, Limits, Request};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, Held, Page, Verdict};

#[derive(Default)]
struct State {
    bucket: Bucket,
    /// Queue, direction and time of what went, in order.
    went: Vec<(usize, Direction, u64)>,
    asked: u64,
    held: Held,
}

/// The device.
pub struct Metered {
    state: Arc<Mutex<State>>,
    bell: EventFd,
    queue_sizes: Vec<u16>,
}

/// The test's hand on it.
pub struct Hand {
    state: Arc<Mutex<State>>,
    bell: EventFd,
}

impl Metered {
    pub fn new(queue_sizes: &[u16], limits: &Limits) -> (Metered, Hand) {
        let state = Arc::new(Mutex::new(State { bucket: Bucket::new(limits), ..State::default() }));
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let hand = Hand { state: state.clone(), bell: bell.try_clone().unwrap() };
        (Metered { state, bell, queue_sizes: queue_sizes.to_vec() }, hand)
    }
}

impl Hand {
    /// Queue, direction and time of what went, in order.
    pub fn went(&self) -> Vec<(usize, Direction, u64)> {
        self.state.lock().unwrap().went.clone()
    }

    /// How often the device was asked.
    pub fn asked(&self) -> u64 {
        self.state.lock().unwrap().asked
    }

    /// What waiting has cost: chains that waited, and the longest wait.
    pub fn held(&self) -> (u64, u64) {
        let held = self.state.lock().unwrap().held;
        (held.chains, held.longest_ns)
    }

    /// Other limits from now on.
    pub fn set(&self, now_ns: u64, limits: &Limits) {
        self.state.lock().unwrap().bucket.set(now_ns, limits);
        self.bell.write(1).unwrap();
    }
}

impl Device for Metered {
    fn id(&self) -> &str {
        "metered"
    }

    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn write_config(&self, _page: &Page) {}

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.own(Box::new(self.bell.try_clone().unwrap()), DEVICE_TAG)?;
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        true
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let (direction, buffer) = match chain.writable().first() {
            Some(buffer) => (Direction::Read, buffer),
            None => (Direction::Write, &chain.readable()[0]),
        };
        let mut state = self.state.lock().unwrap();
        state.asked += 1;
        match state.bucket.ask(now_ns, &Request::new(direction, buffer.len.into())) {
            Ok(()) => {
                state.went.push((queue, direction, now_ns));
                Verdict::Used(0)
            }
            Err(wait) => Verdict::Later(direction, wait),
        }
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {}

    fn held(&mut self, held: Held) {
        let sum = &mut self.state.lock().unwrap().held;
        sum.chains += held.chains;
        sum.total_ns += held.total_ns;
        sum.longest_ns = sum.longest_ns.max(held.longest_ns);
    }

    fn in_flight(&self) -> usize {
        0
    }
}
