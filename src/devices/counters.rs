//! Counters that a device's own thread writes and anybody reads, without locked instructions. Any thread reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::virtio::Held;

/// Adds to a counter that only this thread writes: no locked instruction.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.store(counter.load(Relaxed) + n, Relaxed);
    }
}

/// The sum of all [`Held`] of a device, or of one of its directions.
#[derive(Debug, Default)]
pub struct HeldCounters {
    /// Requests that had to wait for the limit.
    pub operations: AtomicU64,
    /// How long the first in the row was held back, summed, in nanoseconds.
    pub total_ns: AtomicU64,
    /// The longest of these, in nanoseconds.
    pub longest_ns: AtomicU64,
}

impl HeldCounters {
    /// Adds what a batch has cost.
    pub fn add(&self, held: Held) {
        add(&self.operations, held.chains);
        add(&self.total_ns, held.total_ns);
        self.longest_ns.fetch_max(held.longest_ns, Relaxed);
    }
}
