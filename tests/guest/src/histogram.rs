//! A histogram of durations with sixteen steps to each power of two: percentiles within 6 %.

use crate::memory;

const STEPS: usize = 16;

/// Counts of durations in nanoseconds.
pub struct Histogram {
    counts: &'static mut [u32],
    total: u64,
    max: u64,
}

impl Histogram {
    pub fn new() -> Self {
        Histogram { counts: memory::table(STEPS * 64, 0), total: 0, max: 0 }
    }

    /// Counts one duration.
    #[inline]
    pub fn add(&mut self, ns: u64) {
        // The highest five bits choose the step; below 16 each value has its own.
        let shift = (60 - (ns | STEPS as u64).leading_zeros() as usize) - 1;
        let index = shift * STEPS + (ns >> shift) as usize;
        self.counts[index] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// The longest duration.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The duration that `per_mille` of 1000 do not exceed: the upper edge of its step.
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let wanted = (self.total * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted && seen > 0 {
                let shift = (index / STEPS).saturating_sub(1);
                let base = if index < 2 * STEPS { index } else { index % STEPS + STEPS } as u64;
                return (((base + 1) << shift) - 1).min(self.max);
            }
        }
        0
    }
}
