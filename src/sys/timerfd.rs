//! A non-blocking timerfd on CLOCK_MONOTONIC with absolute deadlines.
//!
//! vmm-sys-util's `TimerFd` cannot be made non-blocking at creation and takes relative times only. A deadline of zero
//! would disarm the timer instead of firing it, so the least deadline is one nanosecond. Not a timer queue: one
//! deadline each. Used by the thread whose loop owns it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One timerfd.
#[derive(Debug)]
pub struct TimerFd(OwnedFd);

impl TimerFd {
    /// A disarmed timer.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM from timerfd_create(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: timerfd_create takes two numbers and returns a new descriptor or -1.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else owns it.
        Ok(TimerFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Fires once when the clock reaches `deadline_ns` (absolute); at once if that has passed, zero included. An
    /// expiry that nobody has looked at yet is forgotten.
    ///
    /// # Errors
    /// None that a valid descriptor can cause.
    pub fn arm(&self, deadline_ns: u64) -> io::Result<()> {
        self.set(deadline_ns.max(1))
    }

    /// Never fires, and forgets an expiry that nobody has looked at yet.
    ///
    /// # Errors
    /// None that a valid descriptor can cause.
    pub fn disarm(&self) -> io::Result<()> {
        self.set(0)
    }

    fn set(&self, deadline_ns: u64) -> io::Result<()> {
        // u64 nanoseconds divided by 1e9 fit any time_t.
        let value = libc::timespec {
            tv_sec: (deadline_ns / 1_000_000_000).cast_signed(),
            tv_nsec: (deadline_ns % 1_000_000_000).cast_signed(),
        };
        let spec = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: the descriptor is ours and open, `spec` lives across the call, the old value is not asked for.
        let done = unsafe {
            libc::timerfd_settime(self.0.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &raw const spec, std::ptr::null_mut())
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsRawFd for TimerFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
