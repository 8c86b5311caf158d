//! Files that exist for as long as this process does: its sockets and its pidfile.
//!
//! Each is removed when its owner is dropped, and all of them by [`remove_all`] when the process ends without dropping them.
//! A file that another process has put in the place of ours stays. Any thread.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::warn;

/// All files of this process: path, device and inode.
static ALL: Mutex<Vec<(PathBuf, Identity)>> = Mutex::new(Vec::new());

type Identity = (u64, u64);

fn all() -> MutexGuard<'static, Vec<(PathBuf, Identity)>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn remove(path: &Path, file: Identity) {
    let ours = identity(path).is_ok_and(|found| found == file);
    if ours && let Err(e) = fs::remove_file(path) {
        warn!("{}: remove: {e}", path.display());
    }
}

/// A file that this process has made. It is removed when this is dropped.
#[derive(Debug)]
pub struct OwnFile {
    path: PathBuf,
    file: Identity,
}

impl OwnFile {
    /// Takes the file at `path`, which was just made.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn new(path: &Path) -> io::Result<OwnFile> {
        let file = identity(path)?;
        all().push((path.to_path_buf(), file));
        Ok(OwnFile { path: path.to_path_buf(), file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        all().retain(|(_, file)| *file != self.file);
        remove(&self.path, self.file);
    }
}

/// Removes the files of all owners that were not dropped.
pub fn remove_all() {
    let files = std::mem::take(&mut *all());
    files.into_iter().for_each(|(path, file)| remove(&path, file));
}
