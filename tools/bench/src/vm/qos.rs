//! Limits on a disk: how exactly they are kept, what they cost, and what a drive without one loses by its neighbour's.
//!
//! Each of the three is a file below, and `picture` draws the first. The guest keeps 32 random reads of 4 KiB in flight
//! and polls for their completions, on a file on tmpfs, served by an iothread. One main thread, which sleeps meanwhile.

mod accuracy;
mod cost;
mod isolation;
mod picture;
mod svg;

use std::path::Path;

use super::Result;
use super::monitor::{Drive, Machine, Monitor};
use super::process::{self, Used};
use super::programs::Programs;
use super::running::Running;
use super::target::Figure;

const MONITORS: [Monitor; 2] = [Monitor::Loopvisor, Monitor::Qemu];

/// The parts, in the order in which all of them are measured.
pub const PARTS: [&str; 3] = ["accuracy", "cost", "isolation"];

/// Measures one of the parts.
pub fn report(programs: &Programs, part: &str) -> Result<Vec<Figure>> {
    match part {
        "accuracy" => accuracy::report(programs),
        "cost" => cost::report(programs),
        _ => isolation::report(programs),
    }
}

/// A drive on the first iothread, limited to `iops` requests a second if that is not zero.
fn drive(monitor: Monitor, file: &Path, iops: u64) -> Drive {
    Drive { file: file.to_path_buf(), cache: monitor.way_to_tmpfs(), read_only: true, iothread: Some(0), iops }
}

/// What a run of the guest's load gave.
struct Load {
    /// By the monitor's threads but the vCPU, while it ran.
    used: Used,
    /// What the guest said about it.
    lines: Vec<String>,
}

/// One run of the guest's load for `ms`, with more `words` about it; 32 in flight if they say nothing else. What is in
/// flight at its end is left alone.
fn load(programs: &Programs, monitor: Monitor, drives: Vec<Drive>, ms: u64, words: &str) -> Result<Load> {
    let words = format!("mode=blk-load ms={ms} drain=off end=hang {words}");
    let machine = Machine { words, drives, ..Machine::default() };
    let mut running = Running::start(monitor.command(programs, &machine))?;
    running.line("load: begin")?;
    let before = process::used(running.pid())?;
    let mut lines = running.lines("load: disk=")?;
    let after = process::used(running.pid())?;
    lines.extend(running.lines("guest: ok")?);
    running.kill()?;
    Ok(Load { used: Used { cpu_ns: after.cpu_ns - before.cpu_ns, sleeps: after.sleeps - before.sleeps }, lines })
}
