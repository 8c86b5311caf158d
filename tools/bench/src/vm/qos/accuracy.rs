//! What a limit gives: requests done, of those asked for, over the run and in each second of it; and the picture of it.

use std::path::Path;

use super::super::Result;
use super::super::monitor::Monitor;
use super::super::programs::Programs;
use super::super::running::number;
use super::super::scratch::Scratch;
use super::super::table::{Table, greatest, least};
use super::super::target::{Figure, Limit};
use super::picture::{self, Point};
use super::{MONITORS, drive, load};

const SECONDS: usize = 10;
const RATES: [u64; 7] = [1, 9, 99, 200, 1000, 20_000, 100_000];
/// About the most that the disk can do, so what it gives there is its own rate rather than the limit's.
const MOST: u64 = 1_000_000;

/// A run at one rate.
struct Sample {
    asked: u64,
    requests: f64,
    /// Requests of each whole second.
    seconds: Vec<f64>,
    longest_gap_ms: f64,
    /// Of all threads but the vCPU, in per cent of a core.
    cpu_share: f64,
}

impl Sample {
    /// Done to asked over the whole run.
    fn achieved(&self) -> f64 {
        self.requests / (self.asked as f64 * SECONDS as f64)
    }

    /// The same without the first second.
    fn later(&self) -> f64 {
        let requests: f64 = self.seconds.iter().skip(1).sum();
        requests / (self.asked as f64 * (SECONDS - 1) as f64)
    }

    /// Each second's done to asked.
    fn relative(&self) -> Vec<f64> {
        self.seconds.iter().map(|requests| requests / self.asked as f64).collect()
    }

    /// What the longest gap has more than the time between two requests, in milliseconds.
    fn late_ms(&self) -> f64 {
        self.longest_gap_ms - 1e3 / self.asked as f64
    }
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let file = scratch.image("disk")?;
    let mut samples = MONITORS.map(|_| Vec::new());
    for asked in RATES.into_iter().chain([MOST]) {
        for (monitor, samples) in MONITORS.into_iter().zip(&mut samples) {
            samples.push(measure(programs, monitor, &file, asked)?);
        }
    }
    let mut ahead = MONITORS.map(|_| Vec::new());
    for (monitor, ahead) in MONITORS.into_iter().zip(&mut ahead) {
        *ahead = first_requests(programs, monitor, &file)?;
    }
    print(&samples);
    for samples in &mut samples {
        samples.pop();
    }
    let errors = samples
        .each_ref()
        .map(|samples| samples.iter().map(|sample| (sample.asked as f64, 100.0 * (sample.achieved() - 1.0))).collect());
    picture::write(&errors, &ahead)?;
    Ok(targets(&samples))
}

/// The worst of all rates, each.
fn targets(samples: &[Vec<Sample>; 2]) -> Vec<Figure> {
    let worst = |name: &str, read: fn(&Sample) -> f64, most| {
        let of = |monitor: usize| greatest(&samples[monitor].iter().map(read).collect::<Vec<_>>());
        Figure::new(format!("limits of 1 to 100,000, {name}"), of(0), of(1), Limit::AtMost(most))
    };
    vec![
        worst("10 s: less than asked, %", |sample| 100.0 * (1.0 - sample.achieved()), 1.0),
        worst("10 s: more than asked, %", |sample| 100.0 * (sample.achieved() - 1.0), 0.0),
        worst("a whole second: more than asked, %", |sample| 100.0 * (greatest(&sample.relative()) - 1.0), 0.0),
        worst("longest gap beyond 1/n, ms", Sample::late_ms, 1.0),
    ]
}

fn print(samples: &[Vec<Sample>; 2]) {
    let mut table = Table::new(&[
        "asked",
        "",
        "achieved / asked",
        "after the first second",
        "first second",
        "least second",
        "greatest second",
        "longest gap, ms",
        "CPU, % of a core",
    ]);
    for (ours, theirs) in samples[0].iter().zip(&samples[1]) {
        for (monitor, sample) in MONITORS.iter().zip([ours, theirs]) {
            let seconds = sample.relative();
            let first = seconds.first().copied().unwrap_or(0.0);
            let figures = [sample.achieved(), sample.later(), first, least(&seconds), greatest(&seconds)];
            let cells = [sample.asked.to_string(), monitor.name().to_owned()];
            let figures = figures.map(|ratio| format!("{ratio:.4}"));
            let rest = [format!("{:.2}", sample.longest_gap_ms), format!("{:.2}", sample.cpu_share)];
            table.row(cells.into_iter().chain(figures).chain(rest));
        }
    }
    table.print(&format!(
        "Accuracy: random reads of 4 KiB at depth 32, tmpfs, an iothread, {SECONDS} s at each rate: requests done to \
         requests asked for, in all, and in whole seconds from the first request on. CPU is all threads but the vCPU. \
         {MOST} is about the most that the disk can do."
    ));
}

fn measure(programs: &Programs, monitor: Monitor, file: &Path, asked: u64) -> Result<Sample> {
    let ms = SECONDS as u64 * 1000;
    let load = load(programs, monitor, vec![drive(monitor, file, asked)], ms, "windows=1")?;
    let mut seconds = vec![0.0; SECONDS];
    let (mut requests, mut longest_gap_ms) = (0.0, 0.0);
    for line in &load.lines {
        if line.starts_with("load: disk=") {
            requests = number(line, "requests")?;
            longest_gap_ms = number(line, "longest_gap_ns")? / 1e6;
        } else if line.starts_with("window: ") {
            // What comes after the end is in no whole second.
            if let Some(second) = seconds.get_mut(number(line, "second")? as usize) {
                *second = number(line, "requests")?;
            }
        }
    }
    let cpu_share = load.used.cpu_ns as f64 / (ms as f64 * 1e4);
    Ok(Sample { asked, requests, seconds, longest_gap_ms, cpu_share })
}

/// The first seconds of a run: when each request was done, in seconds, and how many more it made than are due by then.
fn first_requests(programs: &Programs, monitor: Monitor, file: &Path) -> Result<Vec<Point>> {
    let ms = picture::SECONDS * 1000;
    let words = format!("times={}", 2 * picture::SECONDS * picture::IOPS);
    let load = load(programs, monitor, vec![drive(monitor, file, picture::IOPS)], ms, &words)?;
    let times = load.lines.iter().filter_map(|line| line.strip_prefix("times: ")?.split_once(" us="));
    let times =
        times.flat_map(|(_, times)| times.split(',')).filter_map(|us| us.parse::<f64>().ok()).map(|us| us / 1e6);
    Ok(times.zip(1..).map(|(s, done)| (s, f64::from(done) - s * picture::IOPS as f64)).collect())
}
