//! What an idle machine costs: memory beside the guest's, threads, descriptors, processor time, wake-ups.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use super::Result;
use super::monitor::{Cache, Drive, Machine, Monitor};
use super::process;
use super::programs::Programs;
use super::running::Running;
use super::scratch::Scratch;
use super::table::Table;

/// Until everything that a start leaves behind is over.
const SETTLE: Duration = Duration::from_secs(2);
const WATCHED: Duration = Duration::from_secs(10);

pub fn report(programs: &Programs) -> Result<()> {
    let scratch = Scratch::new("/dev/shm")?;
    let drive = Drive { file: scratch.image("disk")?, cache: Cache::Cached, read_only: true, iothread: true };
    let mut table = Table::new(&["", "loopvisor", "QEMU"]);
    // Both idle at the same time, which costs neither anything.
    let mut running = Vec::new();
    for monitor in [Monitor::Loopvisor, Monitor::Qemu] {
        let qmp = Some(scratch.path(monitor.name()));
        let machine = Machine { words: "mode=idle".to_owned(), drives: vec![drive.clone()], qmp };
        let mut started = Running::start(monitor.command(programs, &machine))?;
        started.line("idle: begin")?;
        running.push(started);
    }
    sleep(SETTLE);
    let pids: Vec<u32> = running.iter().map(Running::pid).collect();
    let each = |read: &dyn Fn(u32) -> Result<String>| pids.iter().map(|&pid| read(pid)).collect::<Result<Vec<_>>>();
    let before = pids.iter().map(|&pid| process::used(pid)).collect::<Result<Vec<_>>>()?;
    sleep(WATCHED);
    let after = pids.iter().map(|&pid| process::used(pid)).collect::<Result<Vec<_>>>()?;
    let mut row = |name: &str, cells: Vec<String>| table.row([name.to_owned()].into_iter().chain(cells));
    row("resident, KiB", each(&|pid| Ok(process::memory(pid)?.rss.to_string()))?);
    row("proportional (PSS), KiB", each(&|pid| Ok(process::memory(pid)?.pss.to_string()))?);
    row("private dirty, KiB", each(&|pid| Ok(process::memory(pid)?.private_dirty.to_string()))?);
    row("guest's pages, KiB", each(&|pid| Ok(process::memory(pid)?.guest.to_string()))?);
    row("threads, of KVM's own too", each(&|pid| Ok(process::threads(pid)?.len().to_string()))?);
    row("descriptors", each(&|pid| Ok(process::descriptors(pid)?.to_string()))?);
    row("binary, bytes", each(&|pid| Ok(fs::metadata(format!("/proc/{pid}/exe"))?.len().to_string()))?);
    let used = |read: &dyn Fn(&process::Used) -> u64| {
        before.iter().zip(&after).map(|(before, after)| (read(after) - read(before)).to_string()).collect()
    };
    row("CPU in 10 s, us", used(&|used| used.cpu_ns / 1000));
    row("wake-ups in 10 s", used(&|used| used.sleeps));
    for running in running {
        running.kill()?;
    }
    table.print(
        "An idle machine: 256 MiB, 1 vCPU, a disk on an iothread, QMP. Memory is the monitor's without the mapping of \
         the guest's RAM; CPU and wake-ups are those of all threads but the vCPU.",
    );
    Ok(())
}
