//! What a limit costs: processor time of the monitor with it, less that of the same number of requests without.
//!
//! The limit comes and goes by QMP while the guest's load goes on, so that one process is compared with itself. Each
//! stretch with a limit is compared with the mean of those before and after it, which have none. Beside them stands a
//! guest that sends as many by itself, in the batches in which the timer would serve them.

use std::hint::black_box;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use loopvisor::qos::{Bucket, Direction, Limits, Request};

use super::super::Result;
use super::super::monitor::{Machine, Monitor};
use super::super::process;
use super::super::programs::Programs;
use super::super::qmp_client::Client;
use super::super::running::{Running, number};
use super::super::scratch::Scratch;
use super::super::table::{Table, median};
use super::super::target::{Figure, Limit};
use super::{MONITORS, drive, load};
use crate::stats::percentile;

const ROUNDS: usize = 7;
/// One that the disk hardly reaches, so that only the questions to the bucket cost anything; and one that holds most
/// requests back, so that the timer costs too.
const LIMITS: [u64; 2] = [1_000_000, 20_000];
/// What a guest does that sends as many as the second limit by itself: so many at once, so often.
const PACED: &str = "depth=10 look_us=500";
/// After a change, before anything is counted.
const SETTLE: Duration = Duration::from_millis(200);
const WATCHED: Duration = Duration::from_millis(1500);

/// What was seen in one stretch, each a second.
#[derive(Clone, Copy)]
struct Stretch {
    requests: f64,
    cpu_us: f64,
    wakes: f64,
}

/// A stretch with a limit, and what is without it on both sides.
struct Pair {
    limited: Stretch,
    free: Stretch,
}

impl Pair {
    /// Processor time that the limit costs, in per cent of a core: what the requests cost more than without it.
    fn share(&self) -> f64 {
        (self.limited.cpu_us - self.limited.requests * self.free.cpu_us / self.free.requests) / 1e4
    }
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let file = scratch.image("disk")?;
    // For each monitor and limit a pair a round.
    let mut pairs = MONITORS.map(|_| LIMITS.map(|_| Vec::new()));
    let mut paced = MONITORS.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for ((monitor, pairs), paced) in MONITORS.into_iter().zip(&mut pairs).zip(&mut paced) {
            for (pair, pairs) in measure(programs, monitor, &file, &scratch.path("qmp"))?.into_iter().zip(pairs) {
                pairs.push(pair);
            }
            paced.push(by_itself(programs, monitor, &file)?);
        }
    }
    print(&pairs, &paced);
    let figure = |name: &str, limit: usize| {
        let share = |monitor: usize| of(&pairs[monitor][limit], Pair::share);
        Figure::new(format!("cost of a limit of {name}, % of a core"), share(0), share(1), Limit::AtMost(1.0))
    };
    let beside = |monitor: usize| {
        let by_itself =
            median(&paced[monitor].iter().map(|stretch| stretch.cpu_us / stretch.requests).collect::<Vec<_>>());
        of(&pairs[monitor][1], |pair| (pair.limited.cpu_us - pair.limited.requests * by_itself) / 1e4)
    };
    let name = "cost of a limit of 20,000 beside a guest that sends as many, % of a core";
    let beside = Figure::new(name, beside(0), beside(1), Limit::AtMost(1.0));
    let question_ns = question_ns();
    println!(
        "A question to the bucket costs {question_ns:.1} ns: {:.2} % of a core at a million a second.\n",
        question_ns / 10.0
    );
    let asked = Figure::new(
        "questions to the bucket, 1,000,000 a second, % of a core",
        question_ns / 10.0,
        None,
        Limit::AtMost(1.0),
    );
    Ok(vec![asked, figure("1,000,000", 0), figure("20,000", 1), beside])
}

/// Questions to a bucket that are timed.
const QUESTIONS: u32 = 50_000_000;

/// What a question to the bucket of a drive costs, in nanoseconds: at a million a second, 32 in each look at the clock, as
/// the drive asks at depth 32. Measured by itself, because in a whole machine it is less than the noise.
fn question_ns() -> f64 {
    let mut bucket = Bucket::new(&Limits::iops(LIMITS[0]));
    let request = Request::new(Direction::Read, 4096);
    let begin = Instant::now();
    for question in 0..QUESTIONS {
        let now_ns = 1_000_000_000 + u64::from(question / 32) * 40_000;
        let _ = black_box(bucket.ask(black_box(now_ns), black_box(&request)));
    }
    begin.elapsed().as_nanos() as f64 / f64::from(QUESTIONS)
}

/// The median of what `read` says of each pair.
fn of(pairs: &[Pair], read: impl Fn(&Pair) -> f64) -> f64 {
    median(&pairs.iter().map(read).collect::<Vec<_>>())
}

fn print(pairs: &[[Vec<Pair>; 2]; 2], paced: &[Vec<Stretch>; 2]) {
    let mut table = Table::new(&[
        "limit",
        "",
        "requests/s",
        "CPU, % of a core",
        "CPU us a request",
        "without: requests/s",
        "without: CPU us a request",
        "wake-ups/s",
        "cost of the limit, % of a core",
        "its quartiles",
    ]);
    for (limit, asked) in LIMITS.into_iter().enumerate() {
        for (monitor, pairs) in MONITORS.into_iter().zip(pairs) {
            let pairs = &pairs[limit];
            let mut shares: Vec<f64> = pairs.iter().map(Pair::share).collect();
            table.row([
                asked.to_string(),
                monitor.name().to_owned(),
                format!("{:.0}", of(pairs, |pair| pair.limited.requests)),
                format!("{:.2}", of(pairs, |pair| pair.limited.cpu_us / 1e4)),
                format!("{:.3}", of(pairs, |pair| pair.limited.cpu_us / pair.limited.requests)),
                format!("{:.0}", of(pairs, |pair| pair.free.requests)),
                format!("{:.3}", of(pairs, |pair| pair.free.cpu_us / pair.free.requests)),
                format!("{:.0}", of(pairs, |pair| pair.limited.wakes)),
                format!("{:.2}", of(pairs, Pair::share)),
                format!("{:.2} to {:.2}", percentile(&mut shares, 25), percentile(&mut shares, 75)),
            ]);
        }
    }
    for (monitor, paced) in MONITORS.into_iter().zip(paced) {
        let of = |read: fn(&Stretch) -> f64| median(&paced.iter().map(read).collect::<Vec<_>>());
        let cells = [
            "none: the guest sends as many".to_owned(),
            monitor.name().to_owned(),
            format!("{:.0}", of(|stretch| stretch.requests)),
            format!("{:.2}", of(|stretch| stretch.cpu_us / 1e4)),
            format!("{:.3}", of(|stretch| stretch.cpu_us / stretch.requests)),
            "-".to_owned(),
            "-".to_owned(),
            format!("{:.0}", of(|stretch| stretch.wakes)),
        ];
        table.row(cells.into_iter().chain(["-".to_owned(), "-".to_owned()]));
    }
    table.print(&format!(
        "What a limit costs: the processor time of all threads but the vCPU with it, less the time that as many requests \
         take without it, each at depth 32 in the same running machine, {} s at a time, beside the mean of those before \
         and after; medians of {ROUNDS}. At 20,000 that includes the wake-ups, which no request needs without a limit as \
         long as the load never rests; what a guest costs that sends ten each half a millisecond by itself is in the last \
         rows.",
        WATCHED.as_secs_f64()
    ));
}

/// One machine: without a limit, with each, and without again after each.
fn measure(programs: &Programs, monitor: Monitor, file: &Path, qmp: &Path) -> Result<Vec<Pair>> {
    let words = "mode=blk-load depth=32 ms=600000".to_owned();
    let drives = vec![drive(monitor, file, 0)];
    let machine = Machine { words, drives, qmp: Some(qmp.to_path_buf()), ..Machine::default() };
    let mut running = Running::start(monitor.command(programs, &machine))?;
    running.line("load: begin")?;
    let mut client = Client::connect(qmp)?;
    let mut pairs = Vec::new();
    let mut before = watch(&mut client, running.pid(), 0)?;
    for iops in LIMITS {
        let limited = watch(&mut client, running.pid(), iops)?;
        let after = watch(&mut client, running.pid(), 0)?;
        let mean = |read: fn(&Stretch) -> f64| (read(&before) + read(&after)) / 2.0;
        let free = Stretch {
            requests: mean(|stretch| stretch.requests),
            cpu_us: mean(|stretch| stretch.cpu_us),
            wakes: mean(|stretch| stretch.wakes),
        };
        pairs.push(Pair { limited, free });
        before = after;
    }
    running.kill()?;
    let _ = std::fs::remove_file(qmp);
    Ok(pairs)
}

/// A machine without a limit whose guest sends no more than the limit would let through.
fn by_itself(programs: &Programs, monitor: Monitor, file: &Path) -> Result<Stretch> {
    let load = load(programs, monitor, vec![drive(monitor, file, 0)], WATCHED.as_millis() as u64, PACED)?;
    let requests = number(load.lines.first().ok_or("the guest said nothing")?, "requests")?;
    let seconds = WATCHED.as_secs_f64();
    Ok(Stretch {
        requests: requests / seconds,
        cpu_us: load.used.cpu_ns as f64 / 1e3 / seconds,
        wakes: load.used.sleeps as f64 / seconds,
    })
}

/// Sets the limit and looks at a stretch of it.
fn watch(client: &mut Client, pid: u32, iops: u64) -> Result<Stretch> {
    client.ask(&format!(
        "{{\"execute\":\"block_set_io_throttle\",\"arguments\":{{\"device\":\"d0\",\"bps\":0,\"bps_rd\":0,\"bps_wr\":0,\
         \"iops\":{iops},\"iops_rd\":0,\"iops_wr\":0}}}}\n"
    ))?;
    sleep(SETTLE);
    let mut look = || -> Result<(f64, Instant, process::Used, Instant)> {
        let stats = client.answer("{\"execute\":\"query-blockstats\"}\n")?;
        let requests = stats[0]["stats"]["rd_operations"].as_f64().ok_or("query-blockstats: no rd_operations")?;
        let counted = Instant::now();
        Ok((requests, counted, process::used(pid)?, Instant::now()))
    };
    let (requests, counted, used, used_at) = look()?;
    sleep(WATCHED);
    let (requests_after, counted_after, used_after, used_at_after) = look()?;
    let counted_s = (counted_after - counted).as_secs_f64();
    let used_s = (used_at_after - used_at).as_secs_f64();
    Ok(Stretch {
        requests: (requests_after - requests) / counted_s,
        cpu_us: (used_after.cpu_ns - used.cpu_ns) as f64 / 1e3 / used_s,
        wakes: (used_after.sleeps - used.sleeps) as f64 / used_s,
    })
}
