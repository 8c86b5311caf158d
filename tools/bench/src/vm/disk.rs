//! Random requests of 4 KiB by the guest, which polls for their completions: rate, latency, and the monitor's cost.
//!
//! In the page cache on tmpfs and on a real file system; and past the page cache on the real disk, where the yardstick
//! is fio with io_uring on the host.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::Result;
use super::monitor::{Cache, Drive, Machine, Monitor};
use super::process;
use super::programs::Programs;
use super::running::{Running, number};
use super::scratch::Scratch;
use super::table::{Table, median};
use super::target::{Figure, Limit};

const ROUNDS: usize = 3;
const DEPTHS: [u32; 2] = [1, 32];
const LOAD_MS: u32 = 1000;

/// One line of a table: where the file is, how it is used.
struct Case {
    name: String,
    file: PathBuf,
    operation: &'static str,
    cache: Cache,
    iothread: bool,
    depth: u32,
}

/// What one run of a case gave.
#[derive(Clone, Copy)]
struct Sample {
    rate: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us: f64,
    kicks: f64,
}

impl Sample {
    /// Of each figure the median.
    fn median(samples: &[Sample]) -> Sample {
        let of = |figure: fn(&Sample) -> f64| median(&samples.iter().map(figure).collect::<Vec<_>>());
        Sample {
            rate: of(|sample| sample.rate),
            p50_us: of(|sample| sample.p50_us),
            p99_us: of(|sample| sample.p99_us),
            cpu_us: of(|sample| sample.cpu_us),
            kicks: of(|sample| sample.kicks),
        }
    }
}

/// Who does the work.
#[derive(Clone, Copy, PartialEq)]
enum Contestant {
    Monitor(Monitor),
    /// On the host, without any guest.
    Fio,
}

/// The medians of each case, a sample per contestant.
type Medians = Vec<Vec<Sample>>;

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let (memory, disk) = (Scratch::new("/dev/shm")?, Scratch::new("/tmp")?);
    let (in_memory, on_disk) = (memory.image("disk")?, disk.image("disk")?);
    let case = |place: &str, file: &Path, operation: &'static str, cache: Cache, iothread: bool, depth: u32| Case {
        name: format!("{place}, {operation}, {}, depth {depth}", if iothread { "iothread" } else { "main" }),
        file: file.to_path_buf(),
        operation,
        cache,
        iothread,
        depth,
    };
    let tmpfs: Vec<Case> = DEPTHS.map(|depth| case("tmpfs", &in_memory, "read", Cache::Cached, true, depth)).into();
    let mut others = Vec::new();
    let mut direct = Vec::new();
    for depth in DEPTHS {
        others.push(case("tmpfs", &in_memory, "read", Cache::Cached, false, depth));
        others.push(case("tmpfs", &in_memory, "write", Cache::Cached, true, depth));
        others.push(case("page cache", &on_disk, "read", Cache::Cached, true, depth));
        others.push(case("page cache", &on_disk, "write", Cache::Cached, true, depth));
        direct.push(case("disk", &on_disk, "read", Cache::Direct, true, depth));
        direct.push(case("disk", &on_disk, "read", Cache::Direct, false, depth));
    }
    let monitors = [Contestant::Monitor(Monitor::Loopvisor), Contestant::Monitor(Monitor::Qemu)];
    let all = [monitors[0], monitors[1], Contestant::Fio];
    let mut table = new_table();
    let tmpfs = compare(programs, &tmpfs, &monitors, &mut table)?;
    compare(programs, &others, &monitors, &mut table)?;
    table.print(&format!(
        "A disk in the host's memory (direct=off): random requests of 4 KiB, medians of {ROUNDS} rounds of {LOAD_MS} ms. \
         CPU is all threads but the vCPU."
    ));
    let mut table = new_table();
    let direct = compare(programs, &direct, &all, &mut table)?;
    table.print(&format!(
        "A disk past the page cache (direct=on), and fio with io_uring on the host; medians of {ROUNDS} rounds of \
         {LOAD_MS} ms."
    ));
    Ok(targets(&tmpfs, &direct))
}

/// The targets: tmpfs at both depths, and the real disk on an iothread at both.
fn targets(tmpfs: &Medians, direct: &Medians) -> Vec<Figure> {
    let tmpfs = |name: &str, case: usize, read: fn(&Sample) -> f64, limit| {
        Figure::new(format!("disk on tmpfs, {name}"), read(&tmpfs[case][0]), read(&tmpfs[case][1]), limit)
    };
    let to_fio = |depth: u32, case: usize| {
        let rate = |contestant: usize| direct[case][contestant].rate / direct[case][2].rate;
        let name = format!("real disk, depth {depth}, requests/s to fio's");
        Figure::new(name, rate(0), rate(1), Limit::AtLeast(0.95))
    };
    vec![
        tmpfs("depth 32, requests/s", 1, |sample| sample.rate, Limit::AtLeast(420_000.0)),
        tmpfs("depth 32, CPU us a request", 1, |sample| sample.cpu_us, Limit::AtMost(2.0)),
        tmpfs("depth 1, requests/s", 0, |sample| sample.rate, Limit::AtLeast(115_000.0)),
        tmpfs("depth 1, p99 us", 0, |sample| sample.p99_us, Limit::AtMost(14.0)),
        to_fio(DEPTHS[0], 0),
        to_fio(DEPTHS[1], 2),
    ]
}

fn new_table() -> Table {
    Table::new(&["", "", "requests/s", "p50 us", "p99 us", "CPU us a request", "kicks a request"])
}

/// Lets the contestants do each case, in turns; a row of the table for each.
fn compare(programs: &Programs, cases: &[Case], contestants: &[Contestant], table: &mut Table) -> Result<Medians> {
    let mut medians = Vec::new();
    for case in cases {
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); contestants.len()];
        for _ in 0..ROUNDS {
            for (contestant, samples) in contestants.iter().zip(&mut samples) {
                samples.push(match contestant {
                    Contestant::Monitor(monitor) => measure(programs, *monitor, case)?,
                    Contestant::Fio => fio(case)?,
                });
            }
        }
        let middle: Vec<Sample> = samples.iter().map(|samples| Sample::median(samples)).collect();
        for (contestant, sample) in contestants.iter().zip(&middle) {
            let name = match contestant {
                Contestant::Monitor(monitor) => monitor.name(),
                Contestant::Fio => "fio",
            };
            table.row([
                case.name.clone(),
                name.to_owned(),
                format!("{:.0}", sample.rate),
                format!("{:.1}", sample.p50_us),
                format!("{:.1}", sample.p99_us),
                format!("{:.2}", sample.cpu_us),
                format!("{:.3}", sample.kicks),
            ]);
        }
        medians.push(middle);
    }
    Ok(medians)
}

/// One run of the guest. It does not end by itself, so that the process can be looked at when the load is over.
fn measure(programs: &Programs, monitor: Monitor, case: &Case) -> Result<Sample> {
    let words = format!("mode=blk-load op={} depth={} ms={LOAD_MS} end=hang", case.operation, case.depth);
    let read_only = case.operation == "read";
    let cache = if case.file.starts_with("/dev/shm") { monitor.way_to_tmpfs() } else { case.cache };
    let iothread = case.iothread.then_some(0);
    let drive = Drive { file: case.file.clone(), cache, read_only, iothread, iops: 0 };
    let machine = Machine { words, drives: vec![drive], ..Machine::default() };
    let mut running = Running::start(monitor.command(programs, &machine))?;
    running.line("load: begin")?;
    let before = process::used(running.pid())?;
    let line = running.line("load: disk=")?;
    let after = process::used(running.pid())?;
    running.kill()?;
    let requests = number(&line, "requests")?;
    Ok(Sample {
        rate: number(&line, "iops")?,
        p50_us: number(&line, "p50_ns")? / 1e3,
        p99_us: number(&line, "p99_ns")? / 1e3,
        cpu_us: (after.cpu_ns - before.cpu_ns) as f64 / 1e3 / requests,
        kicks: number(&line, "kicks")? / requests,
    })
}

/// The same work by fio.
fn fio(case: &Case) -> Result<Sample> {
    let output = Command::new("fio")
        .args(["--name=bench", "--ioengine=io_uring", "--direct=1", "--bs=4k", "--time_based", "--output-format=json"])
        .args(["--clat_percentiles=0", "--lat_percentiles=1"])
        .arg(format!("--rw=rand{}", case.operation))
        .arg(format!("--iodepth={}", case.depth))
        .arg(format!("--runtime={LOAD_MS}ms"))
        .arg(format!("--filename={}", case.file.display()))
        .output()
        .map_err(|error| format!("fio: {error}"))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("fio: {error}: {}", String::from_utf8_lossy(&output.stderr)))?;
    let job = &report["jobs"][0];
    let done = &job[case.operation];
    let get = |value: &Value| value.as_f64().ok_or("fio: its report lacks a figure");
    let percentile = |name: &str| Ok::<f64, &str>(get(&done["lat_ns"]["percentile"][name])? / 1e3);
    let cpu_share = (get(&job["usr_cpu"])? + get(&job["sys_cpu"])?) / 100.0;
    Ok(Sample {
        rate: get(&done["iops"])?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        cpu_us: cpu_share * 1e6 / get(&done["iops"])?,
        kicks: 0.0,
    })
}
