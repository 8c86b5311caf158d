//! The advisory lock on each file that the VM is made of (drives, kernel, initrd, memory, log): one VM that writes it, or any
//! number of VMs that only read it.
//!
//! It is `flock(2)`, because `/proc/locks` then names the holder, and because it belongs to the open file: it goes away
//! with the last descriptor, however the process ends. It stops only programs that take it too. Main thread, at open; for a
//! hot-plugged drive a job thread.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// How long to wait for a lock whose process is gone, because the kernel still has requests of that process in flight.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who else may have the file at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Other readers.
    Shared,
    /// No one else.
    Exclusive,
}

/// The uses of this VM's files: device and inode, and the use in words.
static USES: Mutex<Vec<(Identity, String)>> = Mutex::new(Vec::new());

type Identity = (u64, u64);

/// A use that is noted until this is dropped.
#[derive(Debug)]
pub struct Used((Identity, String));

/// Notes the use for which this VM is about to lock the file. Guest memory is not noted: it is the use of a file without a note.
///
/// # Errors
/// Those of fstat(2).
pub fn used(file: &File, what: impl Into<String>) -> io::Result<Used> {
    let facts = file.metadata()?;
    let used = ((facts.dev(), facts.ino()), what.into());
    USES.lock().unwrap_or_else(PoisonError::into_inner).push(used.clone());
    Ok(Used(used))
}

impl Used {
    /// Keeps the note until the process ends.
    pub fn keep(self) {
        mem::forget(self);
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut uses = USES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = uses.iter().rposition(|used| *used == self.0) {
            uses.remove(place);
        }
    }
}

/// The use that conflicts. The use that is being refused is noted last, so a conflicting use is noted before it, or is memory.
fn use_of(facts: &Metadata) -> String {
    let uses = USES.lock().unwrap_or_else(PoisonError::into_inner);
    let file = (facts.dev(), facts.ino());
    let known: Vec<&String> = uses.iter().filter(|(used, _)| *used == file).map(|(_, what)| what).collect();
    match known[..] {
        [first, _, ..] => first.clone(),
        _ => "memory".to_owned(),
    }
}

/// Locks the file until its last descriptor is closed.
///
/// # Errors
/// Another open file has it: the sentence names the process.
pub fn take(file: &File, path: &Path, lock: Lock) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let result = loop {
        let result = match lock {
            Lock::Shared => file.try_lock_shared(),
            Lock::Exclusive => file.try_lock(),
        };
        match result {
            Err(TryLockError::WouldBlock) if holder(file).is_none() && Instant::now() < until => {
                thread::sleep(PATIENCE / 50);
            }
            result => break result,
        }
    };
    match result {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let holder = holder(file).unwrap_or_else(|| "another process".to_owned());
            Err(Error::host(format!("{path:?} is in use by {holder}")))
        }
        Err(TryLockError::Error(error)) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
            if lock == Lock::Exclusive {
                log::warn!("{path:?}: its file system has no locks; nothing keeps another VM from writing it");
            }
            Ok(())
        }
        Err(TryLockError::Error(error)) => Err(error).context(|| format!("lock {path:?}")),
    }
}

/// The living process that holds a lock on the file, as far as this process may see.
fn holder(file: &File) -> Option<String> {
    let facts = file.metadata().ok()?;
    let device = facts.dev();
    let key = format!("{:02x}:{:02x}:{}", libc::major(device), libc::minor(device), facts.ino());
    let pid = pid_in(&fs::read_to_string("/proc/locks").ok()?, &key)?;
    if pid == std::process::id() {
        return Some(format!("this VM, as its {}", use_of(&facts)));
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("process {pid} ({})", name.trim_end()))
}

/// The holder's process id, from the lines of `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`.
fn pid_in(locks: &str, key: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let is_flock = words.next()? == "FLOCK";
        let pid = words.nth(2)?.parse().ok()?;
        (is_flock && words.next()? == key).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_the_one_with_a_lock_of_our_kind_on_our_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 08:01:77 0 EOF\n\
                     2: FLOCK  ADVISORY  READ  22 08:01:78 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 33 08:01:77 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 44 08:01:77 0 EOF\n";
        assert_eq!(pid_in(locks, "08:01:77"), Some(33));
        assert_eq!(pid_in(locks, "08:01:7"), None);
        assert_eq!(pid_in("1: OFDLCK ADVISORY  WRITE -1 08:01:77 0 EOF\nnonsense", "08:01:77"), None);
    }
}
