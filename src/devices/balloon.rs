//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest can do without goes back to the host.
//!
//! The operator's target goes into the configuration space; the driver gives pages away (inflate) or takes them back
//! (deflate), and reports pages that are free anyway. What is in the balloon is counted page by page here and not taken
//! from the guest's word, so a guest that lies about its pages harms only itself. Pages are collected over a whole batch
//! and given back in few calls; a batch is bounded, so that gigabytes do not hold the loop. When the operator hears of a
//! change, how often the guest is asked for statistics, and what the target should be is Control's business. Runs in the
//! main loop (rule D1.3).

mod counters;
mod pages;

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestAddress;

use crate::error::Result;
use crate::event::{Cx, Event, Receiver, Sender, channel};
use crate::memory::{Discard, GuestRam, PAGE_BYTES};
use crate::qos::{Direction, Wait};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict, gather};
use pages::Pages;

pub use counters::BalloonCounters;

/// Feature bits (section 5.5.3).
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const PAGE_REPORTING: u64 = 1 << 5;

/// Where the words of the configuration space lie (section 5.5.4).
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const POISON_VAL: usize = 12;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Inflate and deflate, then those of statistics and reporting. Linux numbers the queues that it uses from 0 on without
/// a gap; the specification counts the one for hints, which is not offered here, and comes to 4 for reporting.
const QUEUE_SIZES: [u16; 5] = [256, 256, 64, 64, 64];

/// Pages that are worked on before the other handlers of the loop have their turn (G10), if they are neighbours. Giving them
/// back is a fraction of a millisecond.
const PAGES_PER_TURN: usize = 1024;
/// Pages that are worked on if they are not: each costs as much as many neighbours, most of it for interrupting the vCPUs
/// that run. Which it will be is known from the last batch.
const RANGES_PER_TURN: usize = 64;
/// A statistic: a tag of 16 bits and a value of 64, packed (section 5.5.6.4).
const STATISTIC_BYTES: usize = 10;
/// Statistics that are read of one buffer. Linux knows 16.
const MAX_STATISTICS: usize = 256;
const ORDERS: u32 = DEVICE_TAG;

/// What Control wants of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The guest is to give away so many pages of 4 KiB.
    SetTarget(u32),
    /// The guest is to send its statistics.
    AskStatistics,
}

/// What the balloon has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BalloonNews {
    /// [`BalloonCounters`] have changed. Not said again before [`BalloonCounters::take_news`].
    Changed,
    /// The statistics that were asked for: tags with values, in the guest's order.
    Statistics(Vec<(u16, u64)>),
}

/// Where it says it.
pub type NewsReport = Box<dyn FnMut(BalloonNews) + Send>;

/// The balloon.
pub struct Balloon {
    ram: Arc<GuestRam>,
    features: u64,
    /// What the present driver agreed on, and what its free pages hold.
    agreed: u64,
    poison: u32,
    /// Pages that the guest is to give away; unwritten if it has not been told.
    target: u32,
    target_is_new: bool,
    pages: Pages,
    /// How far the chain is worked on that each queue holds back, in bytes of its buffers.
    done_bytes: [u64; QUEUE_SIZES.len()],
    /// Pages of a turn, and what is left of them in this one.
    pace: usize,
    budget: usize,
    /// What is to be given back at the end of the batch: first page and number of pages.
    batch: Vec<(u64, u64)>,
    discard: Discard,
    /// Chains that end with the batch: queue and head.
    finished: Vec<(usize, u16)>,
    statistics: Statistics,
    counters: Arc<BalloonCounters>,
    report: NewsReport,
    orders: (Sender<Order>, Receiver<Order>),
    log: FaultLog,
}

/// The buffer that the driver has left here, to be given back when it is to write new statistics into it.
#[derive(Default)]
struct Statistics {
    held: Option<(usize, u16)>,
    /// The next buffer is an answer.
    wanted: bool,
}

impl Balloon {
    /// A balloon in `ram`, empty. `report` is called in the loop's thread, at a rate that Control sets.
    pub fn new(ram: Arc<GuestRam>, deflate_on_oom: bool, free_page_reporting: bool, report: NewsReport) -> Self {
        let oom = if deflate_on_oom { DEFLATE_ON_OOM } else { 0 };
        let reporting = if free_page_reporting { PAGE_REPORTING | PAGE_POISON } else { 0 };
        Balloon {
            pages: Pages::new(&ram),
            discard: Discard::new(ram.clone()),
            ram,
            features: STATS_VQ | oom | reporting,
            agreed: 0,
            poison: 0,
            target: 0,
            target_is_new: false,
            done_bytes: [0; QUEUE_SIZES.len()],
            pace: PAGES_PER_TURN,
            budget: PAGES_PER_TURN,
            batch: Vec::with_capacity(PAGES_PER_TURN),
            finished: Vec::new(),
            statistics: Statistics::default(),
            counters: Arc::default(),
            report,
            orders: channel(),
            log: FaultLog::default(),
        }
    }

    /// The way to tell it what is wanted.
    pub fn orders(&self) -> Sender<Order> {
        self.orders.0.clone()
    }

    /// What is in it, for whoever asks.
    pub fn counters(&self) -> Arc<BalloonCounters> {
        self.counters.clone()
    }

    fn has(&self, feature: u64) -> bool {
        self.agreed & feature != 0
    }

    /// Some of the page numbers of a chain of the inflate or the deflate queue (section 5.5.6.1).
    fn take_frames(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let total: u64 = chain.readable().iter().map(|buffer| u64::from(buffer.len)).sum();
        if total / 4 > self.pages.total() {
            self.log.warn(now_ns, ID, &"a list of more pages than there are");
            return Verdict::Used(0);
        }
        let mut bytes = [0; 4 * PAGES_PER_TURN];
        let wanted = 4 * self.budget.min(((total - self.done_bytes[queue]) / 4) as usize);
        let have = gather(&self.ram, chain.readable(), self.done_bytes[queue], &mut bytes[..wanted]);
        let mut outside = have < wanted;
        for frame in bytes[..have].as_chunks().0 {
            let frame = u64::from(u32::from_le_bytes(*frame));
            let changed = if queue == INFLATE { self.pages.insert(frame) } else { self.pages.remove(frame) };
            outside |= changed.is_none();
            if changed == Some(true) && queue == INFLATE {
                self.batch.push((frame, 1));
            }
        }
        if outside {
            self.log.warn(now_ns, ID, &"a page, or a list of pages, outside guest memory");
        }
        self.budget -= have / 4;
        self.done_bytes[queue] += have as u64;
        if have == wanted && total - self.done_bytes[queue] >= 4 {
            return later(now_ns);
        }
        self.finish(queue, chain)
    }

    /// Some of the free pages that a chain of the reporting queue names by its buffers (section 5.5.6.7).
    fn take_reported(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let mut before = 0;
        for buffer in chain.writable() {
            let len = u64::from(buffer.len);
            let done = self.done_bytes[queue].saturating_sub(before).min(len);
            before += len;
            // Only whole pages that are in memory as a whole.
            let first = buffer.address.0.saturating_add(done).div_ceil(PAGE_BYTES);
            let end = buffer.address.0.saturating_add(len) / PAGE_BYTES;
            let count = end.saturating_sub(first);
            if done == len || count == 0 {
                continue;
            }
            if !self.pages.contain(first, count) {
                self.log.warn(now_ns, ID, &"a report of pages outside guest memory");
                continue;
            }
            let now = count.min(self.budget as u64);
            // A page that is to be found as the guest left it stays (section 5.5.6.7.2).
            if self.poison == 0 && now > 0 {
                self.batch.push((first, now));
                self.counters.add_reported(now * PAGE_BYTES);
            }
            self.budget -= now as usize;
            if now < count {
                self.done_bytes[queue] = before - len + (first + now) * PAGE_BYTES - buffer.address.0;
                return later(now_ns);
            }
        }
        self.finish(queue, chain)
    }

    /// A chain that has been worked on to its end comes back when its pages are gone.
    fn finish(&mut self, queue: usize, chain: &Chain) -> Verdict {
        self.done_bytes[queue] = 0;
        self.finished.push((queue, chain.head()));
        Verdict::Pending
    }

    /// A buffer of statistics: read if one was wanted, and kept until the next is.
    fn take_statistics(&mut self, queue: usize, chain: &Chain) -> Verdict {
        if std::mem::take(&mut self.statistics.wanted) {
            let mut bytes = [0; STATISTIC_BYTES * MAX_STATISTICS];
            let have = gather(&self.ram, chain.readable(), 0, &mut bytes);
            let values = bytes[..have]
                .as_chunks::<STATISTIC_BYTES>()
                .0
                .iter()
                .map(|&[a, b, value @ ..]| (u16::from_le_bytes([a, b]), u64::from_le_bytes(value)));
            (self.report)(BalloonNews::Statistics(values.collect()));
        }
        // There should be one buffer only (section 5.5.6.3.1); of several the last is kept.
        self.finished.extend(self.statistics.held.replace((queue, chain.head())));
        Verdict::Pending
    }

    /// Gives back the batch, neighbours together.
    fn discard_batch(&mut self, now_ns: u64) {
        if self.batch.is_empty() {
            return;
        }
        self.batch.sort_unstable();
        let mut ranges = 0;
        let mut runs = self.batch.drain(..).peekable();
        while let Some((first, count)) = runs.next() {
            let mut end = first + count;
            while let Some((next, count)) = runs.next_if(|&(next, _)| next <= end) {
                end = end.max(next + count);
            }
            let len = (end - first) * PAGE_BYTES;
            ranges += 1;
            // What is in the batch has been found to be memory.
            let _ = self.discard.add(GuestAddress(first * PAGE_BYTES), len as usize);
        }
        if ranges > RANGES_PER_TURN {
            self.pace = (self.pace * RANGES_PER_TURN / ranges).max(RANGES_PER_TURN);
        } else if 2 * ranges <= RANGES_PER_TURN {
            self.pace = (2 * self.pace).min(PAGES_PER_TURN);
        }
        match self.discard.give_back() {
            Ok(bytes) => self.counters.add_reclaimed(bytes),
            Err(e) => self.log.warn(now_ns, ID, &format!("give memory back to the host: {e}")),
        }
    }

    /// Publishes how much is in the balloon, and says so once.
    fn publish(&mut self) {
        if self.counters.set_pages(self.pages.len()) {
            (self.report)(BalloonNews::Changed);
        }
    }
}

/// What the balloon is called in messages: there is one (rule D3.5).
const ID: &str = "balloon";

/// The rest of the chain has to wait for the loop's next turn, and what comes behind it too.
fn later(now_ns: u64) -> Verdict {
    Verdict::Later(Direction::Write, Wait { until_ns: now_ns, other_may_go: false })
}

impl Device for Balloon {
    fn id(&self) -> &str {
        ID
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn write_config(&self, _page: &Page) {
        // Nothing is wanted, nothing is given.
    }

    fn driver_writes(&self) -> &'static [std::ops::Range<usize>] {
        &[ACTUAL..ACTUAL + 4, POISON_VAL..POISON_VAL + 4]
    }

    fn begin(&mut self, features: u64, page: &Page, now_ns: u64) {
        self.agreed = features;
        let mut poison = [0; 4];
        page.config(POISON_VAL, &mut poison);
        self.poison = if self.has(PAGE_POISON) { u32::from_le_bytes(poison) } else { 0 };
        self.statistics.wanted = true;
        self.counters.moved_ns.store(now_ns, Relaxed);
        self.counters.driver.store(true, SeqCst);
    }

    /// The pages are the guest's again; the target stays.
    fn reset(&mut self) {
        self.counters.driver.store(false, SeqCst);
        self.agreed = 0;
        self.pages.clear();
        self.done_bytes = [0; QUEUE_SIZES.len()];
        self.statistics = Statistics::default();
        self.publish();
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.orders.1, ORDERS);
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        while let Some(order) = self.orders.1.receive() {
            match order {
                Order::SetTarget(pages) => (self.target, self.target_is_new) = (pages, true),
                Order::AskStatistics => {
                    self.statistics.wanted = true;
                    self.finished.extend(self.statistics.held.take());
                }
            }
        }
        false
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        match queue {
            INFLATE | DEFLATE => self.take_frames(queue, chain, now_ns),
            2 if self.has(STATS_VQ) => self.take_statistics(queue, chain),
            _ if self.has(PAGE_REPORTING) => self.take_reported(queue, chain, now_ns),
            _ => Verdict::Used(0),
        }
    }

    fn reap(&mut self, cx: &mut Cx<'_>, completions: &mut Completions<'_>) {
        let now_ns = cx.clock_ns();
        self.discard_batch(now_ns);
        self.budget = self.pace;
        for (queue, head) in self.finished.drain(..) {
            completions.give_back(queue, head, 0);
        }
        if std::mem::take(&mut self.target_is_new) {
            completions.set_config(NUM_PAGES, &self.target.to_le_bytes());
        }
        if self.counters.pages.load(Relaxed) != self.pages.len() {
            self.counters.moved_ns.store(now_ns, Relaxed);
            self.publish();
        }
    }

    /// All work is done within a batch. The buffer for statistics is the driver's to wait for and keeps nobody from a
    /// pause or a reset.
    fn in_flight(&self) -> usize {
        0
    }
}

#[cfg(test)]
#[path = "balloon_test.rs"]
mod tests;
