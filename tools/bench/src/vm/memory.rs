//! What an idle machine costs: memory beside the guest's, threads, descriptors, processor time, wake-ups.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use super::Result;
use super::monitor::{Cache, Drive, Machine, Monitor};
use super::process::{self, Memory};
use super::programs::Programs;
use super::running::Running;
use super::scratch::Scratch;
use super::table::Table;
use super::target::{Figure, Limit};

/// Until everything that a start leaves behind is over.
const SETTLE: Duration = Duration::from_secs(2);
const WATCHED: Duration = Duration::from_secs(10);

/// What one monitor costs.
struct Cost {
    memory: Memory,
    threads: usize,
    descriptors: usize,
    binary_bytes: u64,
    cpu_us: u64,
    wakes: u64,
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let drive =
        Drive { file: scratch.image("disk")?, cache: Cache::Cached, read_only: true, iothread: Some(0), iops: 0 };
    // Both idle at the same time, which costs neither anything.
    let mut running = Vec::new();
    for monitor in [Monitor::Loopvisor, Monitor::Qemu] {
        let qmp = Some(scratch.path(monitor.name()));
        let machine = Machine { words: "mode=idle".to_owned(), drives: vec![drive.clone()], qmp, ..Machine::default() };
        let mut started = Running::start(monitor.command(programs, &machine))?;
        started.line("idle: begin")?;
        running.push(started);
    }
    sleep(SETTLE);
    let before = running.iter().map(|running| process::used(running.pid())).collect::<Result<Vec<_>>>()?;
    sleep(WATCHED);
    let mut costs = Vec::new();
    for (running, before) in running.iter().zip(before) {
        let pid = running.pid();
        let after = process::used(pid)?;
        costs.push(Cost {
            memory: process::memory(pid)?,
            threads: process::threads(pid)?.len(),
            descriptors: process::descriptors(pid)?,
            binary_bytes: fs::metadata(format!("/proc/{pid}/exe"))?.len(),
            cpu_us: (after.cpu_ns - before.cpu_ns) / 1000,
            wakes: after.sleeps - before.sleeps,
        });
    }
    for running in running {
        running.kill()?;
    }
    print(&costs);
    let figure = |name, read: fn(&Cost) -> u64, most| {
        Figure::new(name, read(&costs[0]) as f64, read(&costs[1]) as f64, Limit::AtMost(most))
    };
    Ok(vec![
        figure("PSS, KiB", |cost| cost.memory.pss, 2000.0),
        figure("private dirty, KiB", |cost| cost.memory.private_dirty, 200.0),
        figure("wake-ups in 10 s", |cost| cost.wakes, 0.0),
    ])
}

fn print(costs: &[Cost]) {
    let mut table = Table::new(&["", "loopvisor", "QEMU"]);
    let mut row = |name: &str, read: fn(&Cost) -> u64| {
        table.row([name.to_owned()].into_iter().chain(costs.iter().map(|cost| read(cost).to_string())));
    };
    row("resident, KiB", |cost| cost.memory.rss);
    row("proportional (PSS), KiB", |cost| cost.memory.pss);
    row("private dirty, KiB", |cost| cost.memory.private_dirty);
    row("guest's pages, KiB", |cost| cost.memory.guest);
    row("threads, one of KVM's own among them", |cost| cost.threads as u64);
    row("descriptors", |cost| cost.descriptors as u64);
    row("binary, bytes", |cost| cost.binary_bytes);
    row("CPU in 10 s, us", |cost| cost.cpu_us);
    row("wake-ups in 10 s", |cost| cost.wakes);
    table.print(
        "An idle machine: 256 MiB, 1 vCPU, a disk on an iothread, QMP. Memory is the monitor's without the mapping of \
         the guest's RAM; CPU and wake-ups are those of all threads but the vCPU.",
    );
}
