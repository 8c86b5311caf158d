//! What a vsock has done, published for QMP. Written by its loop's thread, read by any.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The counts.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections at the moment, clients that have not said a port among them.
    pub open: AtomicU64,
    /// Connections that were open on both sides, since the start.
    pub opened: AtomicU64,
    /// Connections that were refused, by either side or for want of room.
    pub refused: AtomicU64,
    /// Bytes of data in packets to the guest.
    pub to_guest: AtomicU64,
    /// The same from it.
    pub from_guest: AtomicU64,
}

impl VsockCounters {
    pub(super) fn set_open(&self, count: usize) {
        self.open.store(count as u64, Relaxed);
    }
}

/// Adds, where one thread writes.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed) + count, Relaxed);
}
