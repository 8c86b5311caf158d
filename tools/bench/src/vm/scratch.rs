//! A directory for images and sockets, removed at the end.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Result;

/// Size of an image in bytes.
pub const IMAGE_BYTES: u64 = 256 << 20;

/// How the directories are called, before the number of the process.
const PREFIX: &str = "loopvisor-bench-";

/// The directory.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one below `parent`, and removes those of earlier runs that were ended before they could.
    pub fn new(parent: &str) -> Result<Scratch> {
        for entry in fs::read_dir(parent)?.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|pid| pid.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let path = Path::new(parent).join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("{path:?}: {error}"))?;
        Ok(Scratch(path))
    }

    /// The path of a name in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes an image without holes, which is then in the page cache and on its disk.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        let mut file = File::create(&path).map_err(|error| format!("{path:?}: {error}"))?;
        let mut block = vec![0u8; 1 << 20];
        for i in 0..IMAGE_BYTES / block.len() as u64 {
            block.iter_mut().zip(i..).for_each(|(byte, n)| *byte = (n % 251) as u8);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
