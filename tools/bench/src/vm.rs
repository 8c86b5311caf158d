//! The machine's figures: boot, memory, disk, QMP, limits, balloon and network, ours beside QEMU's microvm, with the same bare-metal guest.
//!
//! Each part is a file. `monitor` says how a machine is asked for, `running` starts and ends it, `process` reads what the
//! kernel knows of it. One main thread, which sleeps while a guest is being measured.

mod balloon;
mod boot;
mod disk;
mod floor;
mod memory;
mod monitor;
mod nested;
mod net;
mod process;
mod programs;
mod qmp;
mod qmp_client;
mod qos;
mod running;
mod scratch;
mod stopwatch;
mod table;
mod target;

use std::error::Error;
use std::fs;

pub use floor::run as floor;
use programs::Programs;
pub use stopwatch::run as stopwatch;

/// Every error here ends the run and is a sentence for whoever started it.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What `all` measures; `nested`, `balloon`, `net` and the parts of `qos` take minutes and are asked for by name.
pub const PARTS: [&str; 4] = ["boot", "memory", "disk", "qmp"];
pub use qos::PARTS as QOS_PARTS;

/// Above this load average others are using the processors, and the figures are theirs too.
const QUIET_LOAD: f64 = 0.5;

/// Measures the parts and prints their tables, and last which targets are met.
pub fn report(parts: &[&str]) -> Result<()> {
    let programs = Programs::find()?;
    let mut figures = Vec::new();
    for &part in parts {
        figures.extend(match part {
            "boot" => boot::report(&programs)?,
            "memory" => memory::report(&programs)?,
            "disk" => disk::report(&programs)?,
            "qmp" => qmp::report(&programs)?,
            "nested" => nested::report(&programs)?,
            "net" => net::report(&programs)?,
            "balloon" => balloon::report(&programs)?,
            _ => qos::report(&programs, part)?,
        });
    }
    target::print(&figures);
    Ok(())
}

/// Prints the machine, and warns if it is not quiet.
pub fn header() {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN);
    if load > QUIET_LOAD {
        eprintln!("loopvisor-bench: the load average is {load}, above {QUIET_LOAD}: others are being measured too");
    }
    println!("{}, load average {load}\n", crate::stats::machine());
}
