//! The log: where it goes and what a line looks like.
//!
//! `error` is for what somebody must act on, `warn` for what somebody may have to, `info` for what an operator asks
//! about later. What a guest can cause is limited where it is caused. The level is `LOOPVISOR_LOG`'s
//! (`error`, `warn`, `info`, `debug`, `trace`, `off`), `info` without it; the original's name for it is heard, and env_logger's.
//! Set up once by the main thread; any thread logs, and none waits for the log (`sys::sink`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use env_logger::{Builder, Target};
use log::LevelFilter;

use crate::config::spec::{LogSpec, VmSpec};
use crate::error::{Context, Error, Result};
use crate::sys::lock::{self, Lock};
use crate::sys::sink::{self, Sink};
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
    let to: Box<dyn Write + Send> = match spec {
        LogSpec::Stderr => {
            sink::open_stderr();
            Box::new(Stderr)
        }
        LogSpec::Stdout => Box::new(Sink::stdout().context(|| "standard output")?),
        LogSpec::File(path) => {
            let file = open(path, OpenOptions::create)?;
            lock(&file, path)?;
            Box::new(Sink::new(file))
        }
    };
    builder.target(Target::Pipe(to));
    // Refused only where a log was set up before: in a test.
    let _ = builder.try_init();
    Ok(())
}

/// Several VMs may share a log, which is only appended to. No drive may be it.
///
/// # Errors
/// It is a block device, or a drive or another VM's memory.
fn lock(file: &File, path: &Path) -> Result<()> {
    let kind = file.metadata().context(|| what(path))?.file_type();
    if kind.is_block_device() {
        return Err(Error::host(format!("-D {}: a block device cannot be the log: name a file", path.display())));
    }
    match kind.is_file() {
        true => {
            let used = lock::used(file, "log").context(|| what(path))?;
            lock::take(file, path, Lock::Shared).context(|| what(path))?;
            used.keep();
            Ok(())
        }
        false => Ok(()),
    }
}

/// Refuses a log that is another file of the VM too. The lock does not refuse a file that is only read, and it refuses a writable
/// drive only after the first line of the log.
///
/// # Errors
/// The sentence names both options.
pub fn check_inputs(spec: &VmSpec) -> Result<()> {
    let LogSpec::File(log) = &spec.log else { return Ok(()) };
    let identity = |path: &Path| fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|it| (it.dev(), it.ino()));
    let drives = spec.drives.iter().map(|drive| (format!("-drive id={}", drive.id), &drive.file));
    let others = [("-initrd", &spec.initrd), ("-mem-path", &spec.mem_path), ("-pidfile", &spec.pidfile)];
    let others = others.into_iter().filter_map(|(option, path)| Some((option.to_owned(), path.as_ref()?)));
    let kernel = std::iter::once(("-kernel".to_owned(), &spec.kernel));
    let same = |(_, path): &(String, &PathBuf)| identity(path).is_some_and(|file| Some(file) == identity(log));
    match kernel.chain(others).chain(drives).find(same) {
        None => Ok(()),
        Some((option, _)) => Err(Error::usage(format!("-D {}: {option} has this file: name another", log.display()))),
    }
}

/// Checks whether the log could be written; returns the locked file, if it exists. A file that this call makes is
/// removed again.
///
/// # Errors
/// As [`start`].
pub fn check(spec: &LogSpec) -> Result<Option<File>> {
    let LogSpec::File(path) = spec else { return Ok(None) };
    if path.symlink_metadata().is_err() {
        open(path, OpenOptions::create_new)?;
        return fs::remove_file(path).map(|()| None).context(|| what(path));
    }
    let file = open(path, |options, _| options)?;
    lock(&file, path).map(|()| Some(file))
}

/// Opens the log with one option more.
fn open(path: &Path, option: impl FnOnce(&mut OpenOptions, bool) -> &mut OpenOptions) -> Result<File> {
    Sink::open(option(OpenOptions::new().mode(0o640), true), path).context(|| what(path))
}

/// Standard error, as a log.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        sink::stderr_line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn what(path: &Path) -> String {
    format!("-D {}: open the log file", path.display())
}
