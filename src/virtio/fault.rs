//! `Fault`: trouble of the guest's making.
//!
//! It is answered on the device, with a status byte or with DEVICE_NEEDS_RESET, and logged at a limited rate; it never
//! becomes an `Error`, and nothing a guest can do costs the host an unlimited log. Worker's thread.

use std::fmt;

use log::warn;

/// What the driver broke. Each variant latches DEVICE_NEEDS_RESET (virtio 1.2, section 2.1.1) unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The available index ran further ahead than the ring is long.
    AvailIndex,
    /// A head that is not a descriptor of this queue.
    HeadRange(u16),
    /// A head that the device has not given back yet.
    HeadInFlight(u16),
    /// A chain that loops, is longer than the queue, points outside its table, nests indirect tables, or has a readable
    /// descriptor behind a writable one.
    Chain(u16),
    /// A ring, or the table of descriptors, outside guest memory.
    RingMemory,
    /// Whoever serves a ring that is lent cannot make sense of it.
    Lent,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::AvailIndex => f.write_str("the available index is further ahead than the queue is long"),
            Fault::HeadRange(head) => write!(f, "descriptor {head} is outside the queue"),
            Fault::HeadInFlight(head) => write!(f, "descriptor {head} was made available again while in flight"),
            Fault::Chain(head) => write!(f, "the chain at descriptor {head} is malformed"),
            Fault::RingMemory => f.write_str("a ring is not in guest memory"),
            Fault::Lent => f.write_str("who serves its rings finds one of them, or what is in it, malformed"),
        }
    }
}

const WINDOW_NS: u64 = 5_000_000_000;
const LINES_PER_WINDOW: u32 = 10;

/// A log that a guest drives: at most ten lines in five seconds, then a count of what was left out.
#[derive(Default)]
pub struct FaultLog {
    window_end_ns: u64,
    lines: u32,
    left_out: u64,
}

impl FaultLog {
    /// Writes one line about the device called `name`, or counts it.
    pub fn warn(&mut self, now_ns: u64, name: &str, what: &dyn fmt::Display) {
        let left_out = self.left_out;
        if self.allows(now_ns) {
            if self.left_out < left_out {
                warn!("{name}: {left_out} such lines were left out before this one");
            }
            warn!("{name}: {what}");
        }
    }

    /// Whether one more may be told now; one that may not is counted.
    pub fn allows(&mut self, now_ns: u64) -> bool {
        if now_ns >= self.window_end_ns {
            *self = FaultLog { window_end_ns: now_ns.saturating_add(WINDOW_NS), lines: 0, left_out: 0 };
        }
        let allowed = self.lines < LINES_PER_WINDOW;
        if allowed {
            self.lines += 1;
        } else {
            self.left_out += 1;
        }
        allowed
    }

    /// Lines written in the present window, and lines only counted.
    #[cfg(test)]
    pub fn counts(&self) -> (u32, u64) {
        (self.lines, self.left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_errs_a_million_times_in_a_second_gets_ten_lines() {
        let mut log = FaultLog::default();
        for i in 0..1_000_000 {
            log.warn(1 + i * 1000, "vda", &Fault::AvailIndex);
        }
        assert_eq!(log.counts(), (10, 999_990));
        log.warn(6_000_000_000, "vda", &Fault::AvailIndex);
        assert_eq!(log.counts(), (1, 0));
    }
}
