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
    _own: OwnFile,
    /// Locked, and open so that no other file gets its inode number.
    _file: File,
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
        Ok(Pidfile { _own: OwnFile::new(path).context(name)?, _file: file })
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
    let locked = match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(error)) => return Err(error).context(name),
    };
    let mut text = String::new();
    (&file).take(MAX_BYTES).read_to_string(&mut text).context(name)?;
    let text = text.trim();
    let taken = "another process has locked it: name another";
    if text.is_empty() {
        return if locked { refused(taken.into()) } else { Ok(file) };
    }
    let Ok(pid) = text.parse::<u32>() else {
        return refused("the file has other contents than a process id: remove it, or name another".into());
    };
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        // In a container each start of the monitor may get the same process id.
        Ok(command) if pid != process::id() => refused(format!(
            "process {pid} ({}) is running: end it, or name another file; if it is not a virtual machine, remove this one",
            command.trim_end()
        )),
        _ if locked => refused(taken.into()),
        _ => {
            warn!("{}: process {pid} has ended and has left this file: it is replaced", name());
            Ok(file)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn file_that_has_replaced_ours_stays() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("pid");
        let ours = Pidfile::create(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // A file system may give it the inode number that has become free.
        fs::write(&path, "1\n").unwrap();
        drop(ours);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }
}
