//! The log: where it goes and what a line looks like.
//!
//! `error` is for what somebody must act on, `warn` for what somebody may have to, `info` for what an operator asks
//! about later. What a guest can cause is limited where it is caused. The level is `LOOPVISOR_LOG`'s
//! (`error`, `warn`, `info`, `debug`, `trace`, `off`), `info` without it; the original's name for it is heard, and env_logger's.
//! Set up once by the main thread; any thread logs.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use env_logger::{Builder, Target};
use log::LevelFilter;

use crate::config::spec::LogSpec;
use crate::error::{Context, Result};
use crate::sys::{clock, gettid};

/// Directs the log as asked.
///
/// # Errors
/// The file cannot be opened for appending.
pub fn start(spec: &LogSpec) -> Result<()> {
    let mut builder = Builder::new();
    builder
        .filter_level(LevelFilter::Info)
        .format(|line, record| writeln!(line, "{} {} {}: {}", clock::utc(), record.level(), gettid(), record.args()));
    let level =
        ["LOOPVISOR_LOG", "STRATOVIRT_LOG_LEVEL", "RUST_LOG"].into_iter().find_map(|name| std::env::var(name).ok());
    if let Some(level) = level {
        builder.parse_filters(&level);
    }
    if let LogSpec::File(path) = spec {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)
            .context(|| format!("-D {}: open the log file", path.display()))?;
        builder.target(Target::Pipe(Box::new(file)));
    }
    // Refused only where a log was set up before: in a test.
    let _ = builder.try_init();
    Ok(())
}
