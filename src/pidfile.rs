//! `-pidfile`: the process's number in a file, for as long as the process is there.
//!
//! The file of a process that has ended is replaced; the file of a process that is running is refused. Main thread.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process;

use log::warn;

use crate::error::{Context, Error, Result};
use crate::sys::own_file::OwnFile;

/// More bytes than any process id has.
const MAX_BYTES: u64 = 64;

/// The file, removed when this is dropped.
#[derive(Debug)]
pub struct Pidfile {
    _file: OwnFile,
}

impl Pidfile {
    /// Writes the file, with mode 0600 if it is new.
    ///
    /// # Errors
    /// The file belongs to a running process, is not a pidfile, or cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let name = || name(path);
        let mut file = take(path, true)?;
        // Of two processes that replace the same file at the same time, one holds the lock and writes; the other is refused.
        file.set_len(0).and_then(|()| file.rewind()).context(name)?;
        writeln!(file, "{}", process::id()).context(name)?;
        Ok(Pidfile { _file: OwnFile::new(path).context(name)? })
    }

    /// Checks whether the file could be written. A file that does not exist is made, and removed when the result is dropped.
    ///
    /// # Errors
    /// As [`Pidfile::create`].
    pub fn check(path: &Path) -> Result<Option<Self>> {
        if path.symlink_metadata().is_ok() {
            return take(path, false).map(|_| None);
        }
        Pidfile::create(path).map(Some)
    }
}

fn name(path: &Path) -> String {
    format!("-pidfile {}", path.display())
}

/// Opens and locks the file, unless it belongs to a running process.
fn take(path: &Path, create: bool) -> Result<File> {
    let name = || name(path);
    let refused = |sentence: String| Err(Error::host(format!("{}: {sentence}", name())));
    // O_NONBLOCK: the open of a FIFO would wait for its other end. O_NOFOLLOW: a link could lead to any file of root's.
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    let file = options.open(path).context(name)?;
    if !file.metadata().context(name)?.is_file() {
        return refused("it is not a regular file: name another".into());
    }
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return refused("another process has locked it: name another".into()),
        Err(TryLockError::Error(error)) => return Err(error).context(name),
    }
    let mut text = String::new();
    (&file).take(MAX_BYTES).read_to_string(&mut text).context(name)?;
    let text = text.trim();
    if text.is_empty() {
        return Ok(file);
    }
    let Ok(pid) = text.parse::<u32>() else {
        return refused("the file has other contents than a process id: remove it, or name another".into());
    };
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        // In a container each start of the monitor may get the same process id.
        Ok(command) if pid != process::id() => refused(format!(
            "process {pid} ({}) is running: end it, or name another file; if it is no virtual machine, remove this one",
            command.trim_end()
        )),
        _ => {
            warn!("{}: process {pid} has ended and has left this file: it is replaced", name());
            Ok(file)
        }
    }
}
