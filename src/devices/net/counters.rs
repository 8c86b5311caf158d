//! What a NIC has done: words that its thread writes and anybody reads, so that no query waits for a loop.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::devices::counters::{HeldCounters, add};

/// What has been done since the NIC was made (`query-netstats`).
#[derive(Debug, Default)]
pub struct NetCounters {
    /// What the guest received.
    pub receive: Way,
    /// What the guest sent.
    pub transmit: Way,
    /// Whether the link is up: there is a tap, and nobody has pulled the cable.
    pub link: AtomicBool,
    /// Whether there is a tap.
    pub tap: AtomicBool,
    /// Pairs of queues that the driver uses; zero without a driver.
    pub pairs: AtomicU64,
}

/// Counts of one direction. Bytes are those of Ethernet frames, without the header of virtio.
#[derive(Debug, Default)]
pub struct Way {
    /// Packets that reached the other side.
    pub packets: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Packets that were dropped though nothing was wrong with them: the link was down, or the guest's buffer too small.
    pub dropped: AtomicU64,
    /// Packets and buffers of the guest's that made no sense, and packets that the host refused.
    pub errors: AtomicU64,
    /// How often the limits held back the packet that was next, and for how long.
    pub held: HeldCounters,
}

/// Since when the packet that is next has been held back; one a direction of a pair.
#[derive(Debug, Default)]
pub(super) struct HeldSince(Option<u64>);

impl HeldSince {
    /// It is held back.
    pub(super) fn begin(&mut self, way: &Way, now_ns: u64) {
        if self.0.is_none() {
            self.0 = Some(now_ns);
            add(&way.held.operations, 1);
        }
    }

    /// It goes.
    pub(super) fn end(&mut self, way: &Way, now_ns: u64) {
        if let Some(since_ns) = self.0.take() {
            let wait_ns = now_ns.saturating_sub(since_ns);
            add(&way.held.total_ns, wait_ns);
            way.held.longest_ns.fetch_max(wait_ns, Relaxed);
        }
    }
}
