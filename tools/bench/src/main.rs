//! `loopvisor-bench`: what loopvisor and its event loop cost, beside their neighbours doing the same work.
//!
//! Every figure is a median over rounds in which the contestants take turns, so that a noisy neighbour of this machine
//! disturbs them alike. The output is a set of markdown tables for `docs/performance.md`. One main thread, and a second
//! where a figure of the loop's needs one.

mod dispatch;
mod lateness;
mod post;
mod stats;
mod vm;

use std::process::ExitCode;

const USAGE: &str = "usage: loopvisor-bench all|boot|memory|disk|qmp|nested|balloon|net|qos [accuracy|cost|isolation]|loop [dispatch|post|lateness]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("loopvisor-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does what the words ask for; false if they ask for nothing that there is.
fn run(words: &[&str]) -> vm::Result<bool> {
    match *words {
        // What the parts below start as programs of their own.
        ["floor", kernel, command_line] => vm::floor(kernel, command_line)?,
        ["stopwatch", runs, line, ref command @ ..] => vm::stopwatch(runs, line, command)?,
        [] | ["all"] => {
            vm::header();
            vm::report(&vm::PARTS)?;
            all_of_the_loop();
        }
        ["loop"] => {
            vm::header();
            all_of_the_loop();
        }
        ["loop", "dispatch"] => dispatch::report(),
        ["loop", "post"] => post::report(),
        ["loop", "lateness"] => lateness::report(),
        [part] if vm::PARTS.contains(&part) || ["nested", "balloon", "net"].contains(&part) => {
            vm::header();
            vm::report(&[part])?;
        }
        ["qos"] => {
            vm::header();
            vm::report(&vm::QOS_PARTS)?;
        }
        ["qos", part] if vm::QOS_PARTS.contains(&part) => {
            vm::header();
            vm::report(&[part])?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn all_of_the_loop() {
    dispatch::report();
    post::report();
    lateness::report();
}
