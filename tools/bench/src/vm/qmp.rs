//! The round trip of `query-status`: while the machine is idle, while one disk is busy, and while eight are.

use std::path::Path;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use loopvisor::sys::tune;

use super::Result;
use super::monitor::{Cache, Drive, Machine, Monitor};
use super::programs::Programs;
use super::qmp_client::Client;
use super::running::Running;
use super::scratch::Scratch;
use super::table::{Table, median};
use super::target::{Figure, Limit};
use crate::stats::percentile;

const ROUNDS: usize = 3;
const ASKED: u32 = 250;
const A_SECOND: u32 = 60;
const CASES: [(&str, usize); 3] = [("idle", 0), ("one busy disk", 1), ("eight busy disks", 8)];

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let drives: Vec<Drive> = (0..8)
        .map(|i| {
            let file = scratch.image(&format!("disk{i}"))?;
            Ok(Drive { file, cache: Cache::Cached, read_only: true, iothread: Some(i), iops: 0 })
        })
        .collect::<Result<_>>()?;
    let mut table = Table::new(&["", "", "p50 us", "p99 us", "p99 to idle's"]);
    let monitors = [Monitor::Loopvisor, Monitor::Qemu];
    let mut samples = CASES.map(|_| [const { (Vec::new(), Vec::new()) }; 2]);
    for _ in 0..ROUNDS {
        for ((_, busy), samples) in CASES.iter().zip(&mut samples) {
            for (monitor, (p50, p99)) in monitors.iter().zip(samples) {
                let words = match busy {
                    0 => "mode=idle".to_owned(),
                    _ => "mode=blk-load depth=32 disk=all ms=60000".to_owned(),
                };
                let qmp = scratch.path("qmp");
                let drives = drives[..(*busy).max(1)].to_vec();
                let machine = Machine { words, drives, qmp: Some(qmp.clone()), ..Machine::default() };
                let mut running = Running::start(monitor.command(programs, &machine))?;
                running.line(if *busy == 0 { "idle: begin" } else { "load: begin" })?;
                let mut times = ask(&qmp)?;
                p50.push(percentile(&mut times, 50));
                p99.push(percentile(&mut times, 99));
                running.kill()?;
                let _ = std::fs::remove_file(&qmp);
            }
        }
    }
    for ((name, _), cells) in CASES.iter().zip(&samples) {
        for ((monitor, (p50, p99)), (_, idle)) in monitors.iter().zip(cells).zip(&samples[0]) {
            table.row([
                name.to_string(),
                monitor.name().to_owned(),
                format!("{:.0}", median(p50)),
                format!("{:.0}", median(p99)),
                format!("{:.2}", median(p99) / median(idle)),
            ]);
        }
    }
    table.print(&format!(
        "QMP: the round trip of query-status, one at a time, {A_SECOND} a second, {ASKED} of them; medians of {ROUNDS} \
         rounds; each disk on an iothread of its own, with 32 random reads of 4 KiB in flight."
    ));
    let [idle, _, eight] = samples;
    let ratio = |monitor: usize| median(&eight[monitor].1) / median(&idle[monitor].1);
    Ok(vec![
        Figure::new("QMP, idle, p50 us", median(&idle[0].0), median(&idle[1].0), Limit::AtMost(150.0)),
        Figure::new("QMP, eight busy iothreads, p99 to idle's", ratio(0), ratio(1), Limit::AtMost(1.5)),
    ])
}

/// Asks from a thread of its own, whose wish for short turns the monitors do not inherit: a client's wait for a processor
/// is not to be taken for the monitor's delay.
fn ask(qmp: &Path) -> Result<Vec<f64>> {
    let mut client = Client::connect(qmp)?;
    let asking = || {
        tune::short_slice();
        round_trips(&mut client).map_err(|error| error.to_string())
    };
    let times = thread::scope(|scope| scope.spawn(asking).join());
    Ok(times.map_err(|_| "the client's thread failed")??)
}

/// The times of all round trips, in microseconds.
fn round_trips(client: &mut Client) -> Result<Vec<f64>> {
    let mut due = Instant::now();
    let mut times = Vec::with_capacity(ASKED as usize);
    for _ in 0..ASKED {
        due += Duration::from_secs(1) / A_SECOND;
        sleep(due.saturating_duration_since(Instant::now()));
        times.push(client.ask("{\"execute\":\"query-status\"}\n")?.as_secs_f64() * 1e6);
    }
    Ok(times)
}
