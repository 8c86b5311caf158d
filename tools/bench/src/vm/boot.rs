//! From the start of the program to the first byte the guest writes, to the exit, and what that takes.
//!
//! The guest writes a newline with its first instructions, says what it found, and resets.

use super::Result;
use super::monitor::{Cache, Drive, Machine, Monitor};
use super::programs::Programs;
use super::running::Running;
use super::scratch::Scratch;
use super::table::{Table, least, median};
use super::target::{Figure, Limit};

const ROUNDS: usize = 60;

/// Samples of one contestant, in milliseconds.
#[derive(Default)]
struct Samples {
    first_byte: Vec<f64>,
    exit: Vec<f64>,
    cpu: Vec<f64>,
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let file = scratch.image("disk")?;
    let bare = Machine { words: "mode=hello".to_owned(), ..Machine::default() };
    let disk = |iothread| Drive { file: file.clone(), cache: Cache::Cached, read_only: true, iothread, iops: 0 };
    let disk_only = Machine { drives: vec![disk(None)], ..bare.clone() };
    let full = Machine { drives: vec![disk(Some(0))], qmp: Some(scratch.path("qmp")), ..bare.clone() };
    let contestants = [
        ("floor (no device)", Monitor::Floor, &bare),
        ("loopvisor", Monitor::Loopvisor, &disk_only),
        ("QEMU", Monitor::Qemu, &disk_only),
        ("loopvisor, iothread and QMP", Monitor::Loopvisor, &full),
        ("QEMU, iothread and QMP", Monitor::Qemu, &full),
    ];
    let mut samples = contestants.map(|_| Samples::default());
    for _ in 0..ROUNDS {
        for ((_, monitor, machine), samples) in contestants.iter().zip(&mut samples) {
            let mut running = Running::start(monitor.command(programs, machine))?;
            samples.first_byte.push(running.first_byte()?.as_secs_f64() * 1e3);
            let ended = running.finish()?;
            samples.exit.push(ended.wall.as_secs_f64() * 1e3);
            samples.cpu.push(ended.cpu.as_secs_f64() * 1e3);
        }
    }
    let mut table = Table::new(&["", "first byte", "least", "exit", "least", "CPU"]);
    for ((name, ..), samples) in contestants.iter().zip(&samples) {
        let figures = [
            median(&samples.first_byte),
            least(&samples.first_byte),
            median(&samples.exit),
            least(&samples.exit),
            median(&samples.cpu),
        ];
        table.row([name.to_string()].into_iter().chain(figures.map(|ms| format!("{ms:.2}"))));
    }
    table.print(&format!(
        "Boot: from posix_spawn to the guest's first byte and to the exit, and processor time of the whole run, in \
         milliseconds: medians of {ROUNDS}; 256 MiB, 1 vCPU, a disk."
    ));
    let first_byte = |contestant: usize| median(&samples[contestant].first_byte);
    Ok(vec![Figure::new("first byte, ms", first_byte(1), first_byte(2), Limit::AtMost(4.0))])
}
