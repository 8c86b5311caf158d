//! The clocks: CLOCK_MONOTONIC as a number, and the time of day as a text for the log.
//!
//! The event loop reads the first once a turn and hands the value on (invariant I8); what lives in a loop does not read
//! it again, but to measure what it just did. Any thread.

use std::mem::MaybeUninit;

fn read(clock: libc::clockid_t) -> libc::timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the kernel to fill; neither of our clocks can fail on Linux.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now
}

/// Nanoseconds of CLOCK_MONOTONIC. Never zero in practice; a u64 holds 584 years of them.
pub fn monotonic_ns() -> u64 {
    let now = read(libc::CLOCK_MONOTONIC);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// The time of day, as in `2026-11-23T08:30:00.123456Z`.
pub fn utc() -> String {
    let now = read(libc::CLOCK_REALTIME);
    let mut date = MaybeUninit::<libc::tm>::uninit();
    // SAFETY: gmtime_r fills `date` from a valid time and touches nothing else.
    let date = unsafe {
        if libc::gmtime_r(&raw const now.tv_sec, date.as_mut_ptr()).is_null() {
            return String::new();
        }
        date.assume_init()
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        date.tm_year + 1900,
        date.tm_mon + 1,
        date.tm_mday,
        date.tm_hour,
        date.tm_min,
        date.tm_sec,
        now.tv_nsec / 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_is_written_as_iso_8601_has_it() {
        let text = utc();
        assert_eq!(text.len(), "2026-11-23T08:30:00.123456Z".len());
        assert!(text.starts_with("20") && text.ends_with('Z') && text.as_bytes()[10] == b'T', "{text}");
    }
}
