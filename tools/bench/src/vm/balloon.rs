//! The balloon: how fast memory goes back to the host and comes again, by how many calls, and what the monitor's clients
//! notice of it.
//!
//! The guest has touched all of its memory. It gives a GiB away and takes it back, its pages in order or in none, in
//! chains as long as Linux's. What it takes back it does not touch: that would measure the
//! host's page faults. Calls are counted by strace in runs of their own, which are not timed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::Duration;

use loopvisor::sys::tune;

use super::Result;
use super::monitor::{Machine, Monitor};
use super::process;
use super::programs::Programs;
use super::qmp_client::Client;
use super::running::{Running, number};
use super::scratch::Scratch;
use super::table::{Table, median};
use super::target::{Figure, Limit};
use crate::stats::percentile;

const ROUNDS: usize = 3;
const MEMORY_MIB: u64 = 1280;
const GIVEN_MIB: u64 = 1024;
const MONITORS: [Monitor; 2] = [Monitor::Loopvisor, Monitor::Qemu];
const CASES: [(&str, &str); 4] = [
    ("in order, 16 chains at once, vCPU busy", "order=up depth=16"),
    ("in order, a chain at a time, vCPU halted meanwhile", "order=up wait=halt"),
    ("in no order, a chain at a time, vCPU halted meanwhile", "order=random wait=halt"),
    ("in no order, a chain at a time, vCPU busy", "order=random"),
];

/// One run: a GiB away and back.
struct Sample {
    inflate_s: f64,
    deflate_s: f64,
    /// Of the monitor's threads but the vCPU, for both.
    cpu_ms: f64,
    /// Of the GiB, in per cent.
    fallen: f64,
    /// Of query-status, while it inflates.
    p99_ms: f64,
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let qmp = scratch.path("qmp");
    let mut samples = CASES.map(|_| MONITORS.map(|_| Vec::new()));
    for _ in 0..ROUNDS {
        for ((_, words), samples) in CASES.iter().zip(&mut samples) {
            for (monitor, samples) in MONITORS.into_iter().zip(samples) {
                samples.push(measure(programs, monitor, words, &qmp)?);
            }
        }
    }
    let mut table = Table::new(&[
        "",
        "",
        "inflate, GiB/s",
        "deflate, GiB/s",
        "CPU for both, ms",
        "resident falls by, %",
        "query-status meanwhile, p99 ms",
        "calls per GiB",
    ]);
    let of = |samples: &[Sample], read: fn(&Sample) -> f64| median(&samples.iter().map(read).collect::<Vec<_>>());
    let gib = GIVEN_MIB as f64 / 1024.0;
    for ((name, words), samples) in CASES.iter().zip(&samples) {
        for (monitor, samples) in MONITORS.into_iter().zip(samples) {
            table.row([
                name.to_string(),
                monitor.name().to_owned(),
                format!("{:.2}", gib / of(samples, |sample| sample.inflate_s)),
                format!("{:.2}", gib / of(samples, |sample| sample.deflate_s)),
                format!("{:.0}", of(samples, |sample| sample.cpu_ms)),
                format!("{:.2}", of(samples, |sample| sample.fallen)),
                format!("{:.2}", of(samples, |sample| sample.p99_ms)),
                format!("{:.0}", calls(programs, monitor, words, &qmp)? / gib),
            ]);
        }
    }
    table.print(&format!(
        "The balloon: a guest of {MEMORY_MIB} MiB that has touched all of it gives {GIVEN_MIB} MiB away and takes them back, \
         256 pages in a chain; medians of {ROUNDS}. CPU is all threads but the vCPU. Calls are madvise, \
         process_madvise, mincore and fallocate, for inflating and deflating together."
    ));
    let worst = |monitor: usize, read: fn(&Sample) -> f64, pick: fn(f64, f64) -> f64| {
        samples.iter().map(|samples| of(&samples[monitor], read)).reduce(pick).unwrap_or(f64::NAN)
    };
    let fallen = |monitor| worst(monitor, |sample| sample.fallen, f64::min);
    let p99 = |monitor| worst(monitor, |sample| sample.p99_ms, f64::max);
    Ok(vec![
        Figure::new("balloon: resident falls, % of what is given", fallen(0), fallen(1), Limit::AtLeast(99.0)),
        Figure::new("balloon: query-status while it inflates, p99 ms", p99(0), p99(1), Limit::AtMost(5.0)),
    ])
}

fn start(programs: &Programs, monitor: Monitor, words: &str, qmp: &Path) -> Result<(Running, Client)> {
    let _ = std::fs::remove_file(qmp);
    let words = format!("mode=balloon check=off {words}");
    let machine = Machine { words, qmp: Some(qmp.to_path_buf()), balloon_mib: Some(MEMORY_MIB), ..Machine::default() };
    let mut running = Running::start(monitor.command(programs, &machine))?;
    running.line("balloon: begin")?;
    Ok((running, Client::connect(qmp)?))
}

/// Leaves the guest so many MiB.
fn set(client: &mut Client, mib: u64) -> Result<()> {
    client.ask(&format!("{{\"execute\":\"balloon\",\"arguments\":{{\"value\":{}}}}}\n", mib << 20)).map(drop)
}

/// Waits until the guest has so many MiB; how long that took by its clock, in seconds.
fn reached(running: &mut Running, mib: u64) -> Result<f64> {
    let given = (MEMORY_MIB - mib) << 8;
    let line = running.line(&format!("balloon: given={given} "))?;
    Ok(number(&line, "ns")? / 1e9)
}

fn measure(programs: &Programs, monitor: Monitor, words: &str, qmp: &Path) -> Result<Sample> {
    let (mut running, mut client) = start(programs, monitor, words, qmp)?;
    let resident = process::resident_kib(running.pid())?;
    let before = process::used(running.pid())?;
    let over = AtomicBool::new(false);
    let asking = || {
        tune::short_slice();
        ask(&mut client, &over).map_err(|error| error.to_string())
    };
    let (inflate_s, times) = thread::scope(|scope| {
        let asking = scope.spawn(asking);
        let inflate_s = reached(&mut running, MEMORY_MIB - GIVEN_MIB);
        over.store(true, Relaxed);
        (inflate_s, asking.join())
    });
    let mut times = times.map_err(|_| "the client's thread failed")??;
    let fallen = resident.saturating_sub(process::resident_kib(running.pid())?);
    set(&mut client, MEMORY_MIB)?;
    let deflate_s = reached(&mut running, MEMORY_MIB)?;
    let after = process::used(running.pid())?;
    running.kill()?;
    Ok(Sample {
        inflate_s: inflate_s?,
        deflate_s,
        cpu_ms: (after.cpu_ns - before.cpu_ns) as f64 / 1e6,
        fallen: 100.0 * fallen as f64 / (GIVEN_MIB << 10) as f64,
        p99_ms: percentile(&mut times, 99),
    })
}

/// Has the guest give its GiB away and asks query-status until that is over: the round trips, in milliseconds. One client
/// for both, because QEMU serves no more.
fn ask(client: &mut Client, over: &AtomicBool) -> Result<Vec<f64>> {
    set(client, MEMORY_MIB - GIVEN_MIB)?;
    let mut times = Vec::new();
    while times.is_empty() || !over.load(Relaxed) {
        times.push(client.ask("{\"execute\":\"query-status\"}\n")?.as_secs_f64() * 1e3);
        sleep(Duration::from_millis(1));
    }
    Ok(times)
}

/// How many calls give the pages back and fetch them again.
fn calls(programs: &Programs, monitor: Monitor, words: &str, qmp: &Path) -> Result<f64> {
    let (mut running, mut client) = start(programs, monitor, words, qmp)?;
    let summary = qmp.with_extension("calls");
    let mut strace = Command::new("strace");
    strace.args(["-q", "-f", "-c", "-U", "calls,name", "-e", "trace=madvise,process_madvise,mincore,fallocate", "-o"]);
    let pid = running.pid().to_string();
    let mut strace = strace.arg(&summary).args(["-p", &pid]).stderr(Stdio::null()).spawn()?;
    // Until it has got hold of all threads.
    sleep(Duration::from_millis(500));
    for mib in [MEMORY_MIB - GIVEN_MIB, MEMORY_MIB] {
        set(&mut client, mib)?;
        reached(&mut running, mib)?;
    }
    running.kill()?;
    strace.wait()?;
    let text = std::fs::read_to_string(&summary)?;
    let total = text.lines().find_map(|line| line.trim().strip_suffix("total")).unwrap_or("0");
    Ok(total.trim().parse()?)
}
