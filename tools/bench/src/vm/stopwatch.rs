//! Starts a command several times and says when a line of its output came and when it ended: what runs inside the nested
//! host.

use std::process::Command;

use super::Result;
use super::running::Running;

/// Runs the command `words` for each run; prints a line about it.
pub fn run(runs: &str, start: &str, words: &[&str]) -> Result<()> {
    let [program, arguments @ ..] = words else { return Err("no command".into()) };
    for _ in 0..runs.parse::<u32>()? {
        let mut command = Command::new(program);
        command.args(arguments);
        let mut running = Running::start(command)?;
        let line = running.line(start)?;
        let line_s = running.age().as_secs_f64();
        let exit_s = running.finish()?.wall.as_secs_f64();
        println!("stopwatch: line_s={line_s:.3} exit_s={exit_s:.3} {line}");
    }
    Ok(())
}
