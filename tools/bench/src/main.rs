//! `loopvisor-bench loop`: what the event loop costs, beside mio, polling and event-manager doing the same work.
//!
//! Every figure is a median over rounds in which the contestants take turns, so that a noisy neighbour of this machine
//! disturbs them alike. The output is a set of markdown tables for `docs/performance.md`. One main thread, and a second
//! where a figure needs one.

mod dispatch;
mod lateness;
mod post;
mod stats;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["loop"] => {
            println!("{}\n", stats::machine());
            dispatch::report();
            post::report();
            lateness::report();
        }
        ["loop", "dispatch"] => dispatch::report(),
        ["loop", "post"] => post::report(),
        ["loop", "lateness"] => lateness::report(),
        _ => {
            eprintln!("usage: loopvisor-bench loop [dispatch|post|lateness]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
