//! What a loop did, in numbers that any thread may read while it runs (G24).
//!
//! The loop counts in plain fields and publishes them before it sleeps, and every sixteen handler calls while it does
//! not, so that counting costs no atomic operation per event. Written by the loop's thread, read by any.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A snapshot of a loop's counters. All count from the loop's creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Rounds of wait and dispatch.
    pub turns: u64,
    /// Times the loop slept and was woken by a signal it owns.
    pub wakes_signal: u64,
    /// ... by a timer.
    pub wakes_timer: u64,
    /// ... by a stream.
    pub wakes_stream: u64,
    /// ... by a command or message of another thread.
    pub wakes_post: u64,
    /// Handler calls.
    pub events: u64,
    /// Events for a watch that was gone when its turn came.
    pub stale: u64,
    /// Watches masked because their handler made no progress (G7).
    pub stuck: u64,
    /// Handlers that returned an error and were removed (G22).
    pub failed: u64,
    /// The longest stretch between two looks at the clock in which handlers were called, in nanoseconds. A stretch ends
    /// when the loop sleeps, and after sixteen calls. No single call took longer.
    pub longest_handler_ns: u64,
    /// Time spent waiting with nothing to do, in nanoseconds; a wait that is still going on counts up to now.
    pub asleep_ns: u64,
}

const FIELDS: usize = 10;

impl Counters {
    /// Wakes of all causes.
    pub fn wakes(&self) -> u64 {
        self.wakes_signal + self.wakes_timer + self.wakes_stream + self.wakes_post
    }

    fn to_array(self) -> [u64; FIELDS] {
        [
            self.turns,
            self.wakes_signal,
            self.wakes_timer,
            self.wakes_stream,
            self.wakes_post,
            self.events,
            self.stale,
            self.stuck,
            self.failed,
            self.longest_handler_ns,
        ]
    }
}

/// In the word for the time asleep: it counts from a moment, for the loop sleeps.
const SLEEPING: u64 = 1 << 63;

/// The published copy. Each word is consistent in itself; the words of one snapshot may be a turn apart.
#[derive(Default)]
pub(super) struct Board {
    words: [AtomicU64; FIELDS],
    /// While the loop is awake, the time it has been asleep; while it sleeps, the moment from which that time counts,
    /// so that one word says it all and a reader never sees a sleep twice or not at all.
    asleep: AtomicU64,
}

impl Board {
    /// What the loop has done so far, but for its sleep.
    pub fn publish(&self, counters: &Counters) {
        for (word, value) in self.words.iter().zip(counters.to_array()) {
            word.store(value, Relaxed);
        }
    }

    /// A sleep begins at `now_ns`, after `asleep_ns` of earlier sleep.
    pub fn publish_sleep(&self, now_ns: u64, asleep_ns: u64) {
        self.asleep.store(now_ns.saturating_sub(asleep_ns) | SLEEPING, Relaxed);
    }

    /// The sleep is over.
    pub fn publish_awake(&self, asleep_ns: u64) {
        self.asleep.store(asleep_ns, Relaxed);
    }

    pub fn read(&self, now_ns: u64) -> Counters {
        let w = |field: usize| self.words[field].load(Relaxed);
        let asleep = self.asleep.load(Relaxed);
        Counters {
            turns: w(0),
            wakes_signal: w(1),
            wakes_timer: w(2),
            wakes_stream: w(3),
            wakes_post: w(4),
            events: w(5),
            stale: w(6),
            stuck: w(7),
            failed: w(8),
            longest_handler_ns: w(9),
            asleep_ns: if asleep & SLEEPING == 0 { asleep } else { now_ns.saturating_sub(asleep & !SLEEPING) },
        }
    }
}
