//! Numbers out of samples, and what to say of the machine they were made on.

use std::fs;
use std::process::Command;

pub use loopvisor::sys::clock::monotonic_ns;

/// The value below which a share of `percent` of the samples lies; 50 is the median. Sorts them.
pub fn percentile(samples: &mut [f64], percent: usize) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples[(samples.len() * percent / 100).min(samples.len() - 1)]
}

/// What a pair of clock reads around nothing measures: it is taken off every stretch that is timed by such a pair.
pub fn clock_cost_ns() -> f64 {
    let mut samples: Vec<f64> = (0..10_001)
        .map(|_| {
            let begin_ns = monotonic_ns();
            (monotonic_ns() - begin_ns) as f64
        })
        .collect();
    percentile(&mut samples, 50)
}

/// One line: processor, kernel, date.
pub fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field =
        |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).and_then(|line| line.split(": ").nth(1));
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let guest = if cpuinfo.contains(" hypervisor") { ", itself a virtual machine" } else { "" };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let date = Command::new("date").arg("-u").arg("+%F").output().map(|out| out.stdout).unwrap_or_default();
    format!(
        "{} x {}{guest}, Linux {}, {}",
        cpus,
        field("model name").unwrap_or("?"),
        kernel.trim(),
        String::from_utf8_lossy(&date).trim()
    )
}

/// A markdown table: a row per case, a column per contestant.
pub fn table(first: &str, contestants: &[&str], rows: &[(String, Vec<f64>)]) {
    println!("| {first} | {} |", contestants.join(" | "));
    println!("|---|{}", "---:|".repeat(contestants.len()));
    for (name, cells) in rows {
        let cells: Vec<String> = cells
            .iter()
            .map(|cell| if *cell < 10_000.0 { format!("{cell:.0}") } else { format!("{:.0} k", cell / 1000.0) })
            .collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    println!();
}
