//! The log: where it goes and what a line looks like.
//!
//! `error` is for what somebody must act on, `warn` for what somebody may have to, `info` for what an operator asks
//! about later. What a guest can cause is limited where it is caused. The level is `LOOPVISOR_LOG`'s
//! (`error`, `warn`, `info`, `debug`, `trace`, `off`), `info` without it; the original's name for it is heard, and env_logger's.
//! Set up once by the main thread; any thread logs.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use env_logger::{Builder, Target};
use log::LevelFilter;

use crate::config::spec::LogSpec;
use crate::error::{Context, Result};
use crate::sys::lock::{self, Lock};
use crate::sys::{clock, gettid};

/// Directs the log as asked. The level is `RUST_LOG`'s if it is set.
///
/// # Errors
/// The file cannot be opened for appending.
pub fn start(spec: &LogSpec, level: LevelFilter) -> Result<()> {
    let mut builder = Builder::new();
    builder
        .filter_level(level)
        .format(|line, record| writeln!(line, "{} {} {}: {}", clock::utc(), record.level(), gettid(), record.args()));
    let level =
        ["LOOPVISOR_LOG", "STRATOVIRT_LOG_LEVEL", "RUST_LOG"].into_iter().find_map(|name| std::env::var(name).ok());
    if let Some(level) = level {
        builder.parse_filters(&level);
    }
    if let LogSpec::File(path) = spec {
        let file = appending().create(true).open(path).context(|| what(path))?;
        lock(&file, path)?;
        builder.target(Target::Pipe(Box::new(file)));
    }
    // Refused only where a log was set up before: in a test.
    let _ = builder.try_init();
    Ok(())
}

/// Several VMs may share a log, which is only appended to. No drive may be it.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.metadata().context(|| what(path))?.is_file() {
        true => lock::take(file, path, Lock::Shared).context(|| what(path)),
        false => Ok(()),
    }
}

/// Whether a log could go where it is asked to: the file, locked, if there is one. A file that is not there yet is not there
/// afterwards either.
///
/// # Errors
/// As [`start`].
pub fn check(spec: &LogSpec) -> Result<Option<File>> {
    let LogSpec::File(path) = spec else { return Ok(None) };
    match appending().create_new(true).open(path) {
        Ok(_) => fs::remove_file(path).map(|()| None).context(|| what(path)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let file = appending().open(path).context(|| what(path))?;
            lock(&file, path).map(|()| Some(file))
        }
        Err(error) => Err(error).context(|| what(path)),
    }
}

fn appending() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.append(true).mode(0o640);
    options
}

fn what(path: &Path) -> String {
    format!("-D {}: open the log file", path.display())
}
