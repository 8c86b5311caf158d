//! What is in the balloon and what it brought: words that its loop writes and anybody reads.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// The state of the balloon (`query-balloon`, `query-balloon-detail`).
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// A driver has it.
    pub driver: AtomicBool,
    /// Pages of 4 KiB in it.
    pub pages: AtomicU64,
    /// When that number changed last, or the driver came, in nanoseconds of CLOCK_MONOTONIC.
    pub moved_ns: AtomicU64,
    /// Bytes that were in the host's memory and have been given back to it, since the start.
    pub reclaimed_bytes: AtomicU64,
    /// Bytes that the guest has reported as free, since the start, each time it did.
    pub reported_bytes: AtomicU64,
    /// A change has been told and not been looked at.
    news: AtomicBool,
}

impl BalloonCounters {
    /// Says that a change that was told is being looked at: the next one is told again.
    pub fn take_news(&self) {
        self.news.store(false, SeqCst);
    }

    /// Whether the change, if it is one, is to be told.
    pub(super) fn set_pages(&self, pages: u64) -> bool {
        self.pages.swap(pages, SeqCst) != pages && !self.news.swap(true, SeqCst)
    }

    pub(super) fn add_reclaimed(&self, bytes: u64) {
        self.reclaimed_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_reported(&self, bytes: u64) {
        self.reported_bytes.fetch_add(bytes, Relaxed);
    }
}
