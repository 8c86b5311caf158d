//! CLOCK_MONOTONIC as a number.
//!
//! The event loop reads the clock once a turn and hands the value on (invariant I8); nothing above it reads it again.
//! Any thread.

/// Nanoseconds of CLOCK_MONOTONIC. Never zero in practice; a u64 holds 584 years of them.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the kernel to fill; this clock cannot fail on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
