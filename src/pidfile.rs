//! `-pidfile`: the process's number in a file, for as long as the process is there.
//!
//! An existing file is refused, whatever is in it: whoever made it may still be running. Main thread.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process;

use log::warn;

use crate::error::{Context, Result};

/// The file, removed when this is dropped.
#[derive(Debug)]
pub struct Pidfile(PathBuf);

impl Pidfile {
    /// Writes the file, mode 0600.
    ///
    /// # Errors
    /// It exists already, or cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let name = || format!("-pidfile {}: must not exist yet, and be writable", path.display());
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(name)?;
        let pidfile = Pidfile(path.to_path_buf());
        writeln!(file, "{}", process::id()).context(name)?;
        Ok(pidfile)
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.0) {
            warn!("-pidfile {}: remove: {e}", self.0.display());
        }
    }
}
