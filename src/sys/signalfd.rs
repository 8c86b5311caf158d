//! Signals as something to read, so that they meet everything else in the main loop.
//!
//! The signals named are blocked for the thread that makes the descriptor and for those it starts afterwards, so this
//! comes before any other thread. Main thread.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

/// Blocked signals, one read each.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

/// A signal that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub number: i32,
    /// The process that sent it; 0 if it was the kernel.
    pub sender: u32,
}

impl SignalFd {
    /// Blocks `signals` and makes them readable here. A signal that is ignored, as by `nohup`, stays ignored.
    ///
    /// # Errors
    /// EMFILE and the like from signalfd(2); EINVAL for a number that is no signal.
    pub fn new(signals: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        let set = set(signals.into_iter().filter(|&signal| !is_ignored(signal)));
        // SAFETY: both calls read the set and nothing else.
        let fd = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else owns it.
        Ok(SignalFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next signal that has arrived, if any.
    pub fn read(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes at most `size` bytes into `info`, and all of them if it returns `size`.
        let info = unsafe {
            let got = libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size);
            (got == size.cast_signed()).then(|| info.assume_init())
        }?;
        Some(Signal { number: info.ssi_signo.cast_signed(), sender: info.ssi_pid })
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn set(signals: impl Iterator<Item = i32>) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set, which the calls after it only add to.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        signals.for_each(|signal| _ = libc::sigaddset(set.as_mut_ptr(), signal));
        set.assume_init()
    }
}

/// Whether one of these signals, which are blocked, is pending.
pub fn is_pending(signals: &[i32]) -> bool {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the kernel fills the set, which the calls after it only read.
    unsafe {
        libc::sigpending(set.as_mut_ptr()) == 0
            && signals.iter().any(|&signal| libc::sigismember(set.as_ptr(), signal) == 1)
    }
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the kernel only writes the present one; zeros are one too.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Stops the process as a SIGTSTP that is not blocked does. Returns when the process is continued.
pub fn stop_process() {
    let set = set([libc::SIGTSTP].into_iter());
    // SAFETY: the calls read the set; the signal comes to this thread, which is stopped with all others.
    unsafe {
        libc::raise(libc::SIGTSTP);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
    }
}
