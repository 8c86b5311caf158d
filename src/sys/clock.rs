//! The clocks: CLOCK_MONOTONIC as a number, and the time of day as a text for the log.
//!
//! The event loop reads the first once a turn and hands the value on (invariant I8); what lives in a loop does not read
//! it again, but to measure what it just did. Any thread.

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
    let second = now.tv_sec.rem_euclid(86_400);
    let (year, month, day) = date(now.tv_sec.div_euclid(86_400));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", now.tv_nsec / 1000)
}

/// Year, month and day of the Gregorian calendar, so many days after 1970-01-01. `gmtime_r` knows it too, and brings the C
/// library's time zones and number formats with it: a twentieth of the program, which is memory of every machine.
fn date(days: i64) -> (i64, i64, i64) {
    // Years begin in March here, so the day that may be missing is the last one; 400 of them have 146,097 days.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months from March on have 153 days.
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_nine_centuries_follows_the_one_before_it() {
        assert_eq!([date(0), date(-1), date(20_780)], [(1970, 1, 1), (1969, 12, 31), (2026, 11, 23)]);
        let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let (mut year, mut month, mut day) = date(-141_427);
        assert_eq!((year, month, day), (1582, 10, 15));
        for days in -141_426..200_000 {
            let last = [31, 28 + i64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            (year, month, day) = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, day) if day == last => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
            assert_eq!(date(days), (year, month, day), "day {days}");
        }
    }

    #[test]
    fn the_time_of_day_is_written_as_iso_8601_has_it() {
        let text = utc();
        assert_eq!(text.len(), "2026-11-23T08:30:00.123456Z".len());
        assert!(text.starts_with("20") && text.ends_with('Z') && text.as_bytes()[10] == b'T', "{text}");
    }
}
