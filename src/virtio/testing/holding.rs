//! A device that keeps every chain in flight until the test lets it go: what a disk does whose file stalls.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Result;
use crate::event::{Cx, Event};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, Page, Verdict};

#[derive(Default)]
struct State {
    held: Vec<(usize, u16)>,
    finished: Vec<(usize, u16)>,
    /// Every chain that was ever handed over, in order.
    taken: Vec<(usize, u16)>,
}

/// The device.
pub struct Holding {
    state: Arc<Mutex<State>>,
    bell: EventFd,
    queue_sizes: Vec<u16>,
}

/// The test's hand on it.
pub struct Held {
    state: Arc<Mutex<State>>,
    bell: EventFd,
}

impl Holding {
    pub fn new(queue_sizes: &[u16]) -> (Holding, Held) {
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let held = Held { state: Arc::default(), bell: bell.try_clone().unwrap() };
        (Holding { state: held.state.clone(), bell, queue_sizes: queue_sizes.to_vec() }, held)
    }
}

impl Held {
    /// Queues and heads of the chains that it has.
    pub fn held(&self) -> Vec<(usize, u16)> {
        self.state.lock().unwrap().held.clone()
    }

    /// Queues and heads of all chains that it ever had.
    pub fn taken(&self) -> Vec<(usize, u16)> {
        self.state.lock().unwrap().taken.clone()
    }

    /// Finishes the `n`th of the chains that it has.
    pub fn finish(&self, n: usize) {
        let mut state = self.state.lock().unwrap();
        let chain = state.held.remove(n);
        state.finished.push(chain);
        self.bell.write(1).unwrap();
    }

    /// Finishes all of them.
    pub fn finish_all(&self) {
        for _ in 0..self.held().len() {
            self.finish(0);
        }
    }

    /// Has a chain given back that it was never handed.
    pub fn make_up(&self, queue: usize, head: u16) {
        self.state.lock().unwrap().finished.push((queue, head));
        self.bell.write(1).unwrap();
    }
}

impl Device for Holding {
    fn id(&self) -> &str {
        "holding"
    }

    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        1 << 5 | 1 << 40
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn write_config(&self, page: &Page) {
        page.set_config(0, &std::array::from_fn::<u8, 256, _>(|i| i as u8));
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.own(Box::new(self.bell.try_clone().unwrap()), DEVICE_TAG)?;
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        false
    }

    fn process(&mut self, queue: usize, chain: &Chain, _now_ns: u64) -> Verdict {
        let mut state = self.state.lock().unwrap();
        state.taken.push((queue, chain.head()));
        // A chain without a place to write to is finished on the spot.
        if chain.writable().is_empty() {
            return Verdict::Used(0);
        }
        state.held.push((queue, chain.head()));
        Verdict::Pending
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, completions: &mut Completions<'_>) {
        let mut state = self.state.lock().unwrap();
        for (queue, head) in state.finished.drain(..) {
            completions.give_back(queue, head, 1);
        }
    }

    fn in_flight(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.held.len() + state.finished.len()
    }
}
