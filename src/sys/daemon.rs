//! Into the background: a process of its own session, without the terminal it was started from.
//!
//! The process that was started stays until the one in the background says that it is set up, and exits with its code:
//! what goes wrong before that is told on the terminal and by the exit code as it is in the foreground. KVM ties a
//! machine to the process that made it, so the fork comes before everything else. Main thread, before any other.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process;

use super::sink;

/// The line from the process in the background to the one that was started.
#[derive(Debug)]
pub struct Starter(File);

/// Forks twice and lets the first process wait. Returns in the background only.
///
/// # Errors
/// EAGAIN, ENOMEM or EMFILE from fork(2) and pipe(2).
pub fn detach() -> io::Result<Starter> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors into the array.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just made, and nobody else owns them.
    let [news, word] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    if fork()? {
        drop(word);
        // An end without a word is a failure, which has been told on standard error.
        let ready = File::from(news).read_exact(&mut [0]).is_ok();
        process::exit(if ready { 0 } else { 1 });
    }
    // SAFETY: setsid takes nothing; it fails only for a group leader, which a forked process is not.
    unsafe { libc::setsid() };
    // The second fork is no session leader, so no terminal it opens becomes its own.
    if fork()? {
        process::exit(0);
    }
    Ok(Starter(File::from(word)))
}

/// True in the parent. There is one thread only, so the child may go on as it likes.
fn fork() -> io::Result<bool> {
    // SAFETY: the process has one thread (see above), so no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(false),
        _ => Ok(true),
    }
}

impl Starter {
    /// Everything is set up: the first process exits with 0, and the standard streams lead nowhere from here on. If
    /// this is never said, the first process exits with 1 when this is dropped.
    ///
    /// # Errors
    /// /dev/null cannot be opened.
    pub fn ready(&self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        for stream in 0..=2 {
            // SAFETY: both are open descriptors of ours; the standard streams have no other owner than the process.
            if unsafe { libc::dup2(null.as_raw_fd(), stream) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        sink::stderr_changed();
        // A first process that was killed meanwhile is not told.
        let _ = (&self.0).write_all(&[1]);
        Ok(())
    }
}
