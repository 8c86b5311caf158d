//! What a drive without a limit loses by a limited one on the same iothread.

use super::super::Result;
use super::super::programs::Programs;
use super::super::running::number;
use super::super::scratch::Scratch;
use super::super::table::{Table, median};
use super::super::target::{Figure, Limit};
use super::{MONITORS, drive, load};
use crate::stats::percentile;

const ROUNDS: usize = 15;
const LOAD_MS: u64 = 1000;
/// The limited drive's, requests a second.
const IOPS: u64 = 100;
/// What the guest loads: the second drive alone, or both.
const CASES: [&str; 2] = ["disk=1", "disk=all"];

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("/dev/shm")?;
    let (limited, free) = (scratch.image("limited")?, scratch.image("free")?);
    // For each monitor and case the free drive's rates.
    let mut rates = MONITORS.map(|_| CASES.map(|_| Vec::new()));
    for _ in 0..ROUNDS {
        for (case, words) in CASES.into_iter().enumerate() {
            for (monitor, rates) in MONITORS.into_iter().zip(&mut rates) {
                let drives = vec![drive(monitor, &limited, IOPS), drive(monitor, &free, 0)];
                let load = load(programs, monitor, drives, LOAD_MS, words)?;
                let line = load.lines.iter().find(|line| line.starts_with("load: disk=1 "));
                rates[case]
                    .push(number(line.ok_or("no line about the second disk")?, "requests")? * 1e3 / LOAD_MS as f64);
            }
        }
    }
    let mut losses = rates.each_ref().map(|[alone, beside]| {
        alone.iter().zip(beside).map(|(alone, beside)| 100.0 * (1.0 - beside / alone)).collect::<Vec<f64>>()
    });
    let mut table = Table::new(&["", "alone, requests/s", "beside, requests/s", "lost, %", "its quartiles"]);
    for ((monitor, [alone, beside]), losses) in MONITORS.iter().zip(&rates).zip(&mut losses) {
        table.row([
            monitor.name().to_owned(),
            format!("{:.0}", median(alone)),
            format!("{:.0}", median(beside)),
            format!("{:.2}", median(losses)),
            format!("{:.2} to {:.2}", percentile(losses, 25), percentile(losses, 75)),
        ]);
    }
    table.print(&format!(
        "Isolation: an unlimited drive and one of {IOPS} requests a second on the same iothread. The rate of the unlimited \
         one while the other is idle, and while 32 requests wait at the other all the time; medians of {ROUNDS} rounds of \
         {LOAD_MS} ms, what is lost taken within each round."
    ));
    Ok(vec![Figure::new(
        "an unlimited drive beside a limited one: lost, %",
        median(&losses[0]),
        median(&losses[1]),
        Limit::AtMost(2.0),
    )])
}
