//! What a drive has done: words that its thread writes and anybody reads, so that no query waits for a loop.
//!
//! Written by the drive's thread alone, without locked instructions; the words of one reading may be a request apart.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::devices::counters::{HeldCounters, add};

/// Kinds of request that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN
    Read,
    /// VIRTIO_BLK_T_OUT
    Write,
    /// VIRTIO_BLK_T_FLUSH
    Flush,
    /// VIRTIO_BLK_T_DISCARD and VIRTIO_BLK_T_WRITE_ZEROES
    Unmap,
}

/// What has been done since the drive was opened (`query-blockstats`).
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Each kind's counts, indexed by [`Kind`].
    pub kinds: [KindCounters; 4],
    /// Requests taken from the guest and not given back.
    pub in_flight: AtomicU64,
    /// What its limits have cost.
    pub held: HeldCounters,
    /// What it did lately.
    pub recent: Recent,
}

/// Counts of one kind of request.
#[derive(Debug, Default)]
pub struct KindCounters {
    /// Finished with VIRTIO_BLK_S_OK.
    pub operations: AtomicU64,
    /// Bytes of those.
    pub bytes: AtomicU64,
    /// From the turn that took the request to its end, in nanoseconds, summed over those.
    pub time_ns: AtomicU64,
    /// Finished with an error of the host's.
    pub failed: AtomicU64,
    /// Refused because the guest asked for what cannot be.
    pub invalid: AtomicU64,
}

impl BlockCounters {
    /// Takes note of what has been finished up to now: once a batch, and not for each request.
    pub(super) fn note(&self, now_ns: u64) {
        let sum = |field: fn(&KindCounters) -> &AtomicU64| {
            [Kind::Read, Kind::Write, Kind::Unmap]
                .iter()
                .map(|&kind| field(&self.kinds[kind as usize]).load(Relaxed))
                .sum()
        };
        self.recent.note(now_ns, [sum(|kind| &kind.operations), sum(|kind| &kind.bytes)]);
    }
}

/// A tenth of a second, in nanoseconds.
const TENTH_NS: u64 = 100_000_000;
/// How many of them are remembered: a second's, the present one, and one that is being overwritten.
const TENTHS: usize = 12;

/// Reads, writes and discards, and their bytes, by tenths of a second.
#[derive(Debug, Default)]
pub struct Recent {
    tenths: [Tenth; TENTHS],
    noted: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct Tenth {
    /// Which one since the clock's zero.
    number: AtomicU64,
    done: [AtomicU64; 2],
}

impl Recent {
    fn note(&self, now_ns: u64, total: [u64; 2]) {
        let number = now_ns / TENTH_NS;
        let tenth = &self.tenths[(number % TENTHS as u64) as usize];
        if tenth.number.load(Relaxed) != number {
            tenth.done.iter().for_each(|done| done.store(0, Relaxed));
            tenth.number.store(number, Relaxed);
        }
        for ((done, noted), total) in tenth.done.iter().zip(&self.noted).zip(total) {
            add(done, total - noted.load(Relaxed));
            noted.store(total, Relaxed);
        }
    }

    /// Operations and bytes finished in the ten tenths of a second before the one that `now_ns` is in: the rate over the
    /// last second.
    pub fn last_second(&self, now_ns: u64) -> [u64; 2] {
        let now = now_ns / TENTH_NS;
        let mut sum = [0; 2];
        for tenth in &self.tenths {
            let number = tenth.number.load(Relaxed);
            if number < now && number + 10 >= now {
                sum.iter_mut().zip(&tenth.done).for_each(|(sum, done)| *sum += done.load(Relaxed));
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_over_the_last_second_is_that_of_its_ten_whole_tenths() {
        let counters = BlockCounters::default();
        let reads = &counters.kinds[Kind::Read as usize];
        // A thousand a second, noted every 3 ms; flushes are no work.
        add(&counters.kinds[Kind::Flush as usize].operations, 7);
        for ms in 0..3000 {
            add(&reads.operations, 1);
            add(&reads.bytes, 512);
            if ms % 3 == 0 {
                counters.note(ms * 1_000_000);
            }
        }
        assert_eq!(counters.recent.last_second(2_999_999_999), [999, 999 * 512]);
        assert_eq!(counters.recent.last_second(3_450_000_000)[0], 600, "four tenths in which nothing was done");
        assert_eq!(counters.recent.last_second(9_000_000_000), [0, 0]);
        counters.note(9_000_000_000);
        assert_eq!(counters.recent.last_second(9_150_000_000)[0], 2, "what was not noted yet, and nothing of old");
    }
}
