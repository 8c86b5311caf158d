//! `loopvisor-bench`: what loopvisor costs, beside its neighbours doing the same work in the same run.
//!
//! Every figure is a median over rounds in which the contestants take turns, so that a noisy neighbour of this machine
//! disturbs them alike. The output is a set of markdown tables for `docs/performance.md`.

mod stats;
mod vm;

use std::process::ExitCode;

const USAGE: &str = "usage: loopvisor-bench all|boot|memory|disk|qmp|nested";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let measured = match words[..] {
        ["floor", kernel, command_line] => vm::floor(kernel, command_line),
        ["stopwatch", runs, line, ref command @ ..] => vm::stopwatch(runs, line, command),
        [] | ["all"] => vm::report(&vm::PARTS),
        [part] if vm::PARTS.contains(&part) || part == "nested" => vm::report(&[part]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loopvisor-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
