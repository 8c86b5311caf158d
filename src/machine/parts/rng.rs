//! From the specification of a source of random numbers to its device: the file is opened here. Main thread.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use crate::config::rng::RngSpec;
use crate::devices::rng::Rng;
use crate::error::{Context, Error, Result};
use crate::memory::GuestRam;

/// The device.
///
/// # Errors
/// The file is not there, may not be read, or is no character device.
pub fn rng(asked: &RngSpec, ram: &Arc<GuestRam>) -> Result<Rng> {
    let path = &asked.source;
    let what = || format!("-rng: random numbers from {}", path.display());
    // Looked at first: to open what it should not be may wait, or do something.
    if !fs::metadata(path).context(what)?.file_type().is_char_device() {
        let path = path.display();
        return Err(Error::usage(format!(
            "-rng: {path} is no character device; accepted: /dev/urandom, /dev/hwrng or the like"
        )));
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let source = File::options().read(true).custom_flags(flags).open(path).context(what)?;
    Ok(Rng::new(&asked.id, source, asked.bytes_per_second, ram.clone()))
}
