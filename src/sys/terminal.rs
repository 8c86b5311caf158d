//! The operator's terminal in raw mode, and back.
//!
//! While a guest's console is on the terminal, keys go to the guest one by one and unechoed. However the program
//! ends, the terminal must come back as it was: [`Terminal`] restores it when dropped, [`restore`] does the same from
//! anywhere (an exit path, a panic hook, a signal handler). Main thread; [`restore`] from any.

#![allow(unsafe_code)] // termios has no safe wrapper in the standard library.

use std::io::IsTerminal;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// The terminal as it was found: its descriptor and settings. Written once, so that reading it takes no lock and is
/// fit for a signal handler.
static FOUND: OnceLock<(RawFd, libc::termios)> = OnceLock::new();
/// Whether the terminal is not as it was found.
static RAW: AtomicBool = AtomicBool::new(false);
/// Whether there is a [`Terminal`].
static HELD: AtomicBool = AtomicBool::new(false);

/// A terminal in raw mode; as it was found once this is dropped.
#[derive(Debug)]
pub struct Terminal(());

impl Terminal {
    /// Puts `input` into raw mode; `None` if it is not a terminal.
    ///
    /// Output processing is off too: the guest sends its own carriage returns. `input` must stay open for as long as
    /// the program runs, as standard input does: it is what [`restore`] acts on.
    ///
    /// # Errors
    ///
    /// The host refuses to read or change the settings, or a second terminal is asked for.
    pub fn raw(input: &impl AsFd) -> Result<Option<Terminal>> {
        let input = input.as_fd();
        if !input.is_terminal() {
            return Ok(None);
        }
        let fd = input.as_raw_fd();
        let found = match FOUND.get() {
            Some(found) => found.0,
            None => {
                let settings = settings(fd)?;
                FOUND.get_or_init(|| (fd, settings)).0
            }
        };
        if found != fd {
            return Err(Error::host("terminal: only one can be the guest's console"));
        }
        HELD.store(true, Ordering::SeqCst);
        claim()?;
        Ok(Some(Terminal(())))
    }
}

/// Puts the terminal into raw mode, if there is a [`Terminal`] and it is not raw yet. False if another job is in the foreground.
///
/// # Errors
/// The host refuses to change the settings.
pub fn claim() -> Result<bool> {
    let Some((fd, found)) = FOUND.get().filter(|_| HELD.load(Ordering::SeqCst)) else { return Ok(true) };
    if is_anothers(*fd) {
        return Ok(false);
    }
    if !RAW.swap(true, Ordering::SeqCst) {
        let mut raw = *found;
        // SAFETY: `raw` is a valid termios, and the call changes only it.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        apply(*fd, &raw)?;
    }
    Ok(true)
}

/// Puts the terminal into raw mode again: the process was stopped, and the shell has changed the terminal.
pub fn again() {
    RAW.store(false, Ordering::SeqCst);
    // Nothing can be done about a terminal that is gone.
    let _ = claim();
}

/// Whether this process is in the background of the terminal. Changing its settings or reading from it would then stop the
/// process.
fn is_anothers(fd: RawFd) -> bool {
    // SAFETY: neither call touches memory.
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(fd), libc::getpgrp()) };
    foreground >= 0 && foreground != ours
}

impl Drop for Terminal {
    fn drop(&mut self) {
        HELD.store(false, Ordering::SeqCst);
        restore();
    }
}

/// Gives the terminal back as it was found. Does nothing if it is that already; safe in a signal handler.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some((fd, found)) = FOUND.get()
        && !is_anothers(*fd)
    {
        // Nothing can be done about a terminal that is gone.
        let _ = apply(*fd, found);
    }
}

fn settings(fd: RawFd) -> Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: the call writes one termios to a place of that size.
    if unsafe { libc::tcgetattr(fd, settings.as_mut_ptr()) } != 0 {
        return Err(Error::host("terminal: read its settings").because(std::io::Error::last_os_error()));
    }
    // SAFETY: the call succeeded, so it has written all of it.
    Ok(unsafe { settings.assume_init() })
}

fn apply(fd: RawFd, settings: &libc::termios) -> Result<()> {
    // SAFETY: `settings` is a valid termios that the call only reads. TCSANOW, not TCSADRAIN: a terminal that does
    // not take output must not hold up the end of the program.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, settings) } != 0 {
        return Err(Error::host("terminal: change its settings").because(std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, OwnedFd};

    /// Both ends of a new pseudo-terminal.
    fn pty() -> (OwnedFd, OwnedFd) {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: the call writes two descriptors and is given nothing else.
        let done = unsafe { libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: both descriptors are new and nobody else's.
        unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
    }

    fn is_raw(fd: &OwnedFd) -> bool {
        let settings = settings(fd.as_raw_fd()).unwrap();
        settings.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    // One test, because the terminal of a process is one.
    #[test]
    fn a_terminal_is_raw_while_it_is_held_and_as_it_was_found_after() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Terminal::raw(&file).unwrap().is_none(), "not a terminal");

        let (_master, slave) = pty();
        let held = Terminal::raw(&slave).unwrap();
        assert!(held.is_some() && is_raw(&slave));
        drop(held);
        assert!(!is_raw(&slave));

        let held = Terminal::raw(&slave).unwrap();
        assert!(is_raw(&slave));
        restore();
        assert!(!is_raw(&slave), "restored while still held");
        restore();
        drop(held);
        assert!(!is_raw(&slave), "restoring twice is harmless");

        let (_other_master, other) = pty();
        assert!(Terminal::raw(&other).is_err(), "a second terminal");
        assert!(!is_raw(&other));
    }
}
