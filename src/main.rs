//! The program: parse, log, build the machine, run the main loop, join, exit code.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use log::LevelFilter;
use loopvisor::cli::{self, Command};
use loopvisor::config::spec::{SerialSpec, VmSpec};
use loopvisor::control::{Console, Control, End, Listener, Signals};
use loopvisor::error::{Error, Result};
use loopvisor::event::{EventLoop, channel};
use loopvisor::machine::Machine;
use loopvisor::sys::terminal::Terminal;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => {
            // Nobody is left to be told that nobody reads.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Command::Run(spec)) => match run(&spec) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("loopvisor: {error}");
    ExitCode::from(error.exit_code())
}

/// Builds the machine, runs it to its end and takes it apart.
fn run(spec: &VmSpec) -> Result<()> {
    env_logger::Builder::new().filter_level(LevelFilter::Info).parse_default_env().init();
    let mut main = EventLoop::new()?;
    let (control, messages) = channel();
    let (notices_sender, notices) = channel();
    let (serial_sender, serial_events) = channel();
    // Before any thread: signals are blocked for those that follow, and the sockets' mode is the process's.
    main.add(Box::new(Signals::new(control.clone())?))?;
    for path in &spec.qmp {
        main.add(Box::new(Listener::bind(path, control.clone())?))?;
    }
    let machine = Machine::build(spec, &mut main, notices_sender, serial_sender)?;
    let terminal = if spec.serial == SerialSpec::Stdio { Terminal::raw(&std::io::stdin())? } else { None };
    if spec.serial == SerialSpec::Stdio {
        let console = Console::new(machine.serial().clone(), serial_events, control.clone(), terminal.is_some())?;
        main.add(Box::new(console))?;
    }
    let (inventory, threads) = machine.start(spec.freeze)?;
    let end = Arc::new(OnceLock::new());
    main.add(Box::new(Control::new(inventory, spec.freeze, notices, (control, messages), end.clone())))?;
    let ran = main.run();
    // The loop first: a vCPU that waits for a device of it is answered by the device's end.
    drop(main);
    drop(threads);
    drop(terminal);
    ran?;
    match end.get() {
        Some(End::Failed(why)) => Err(Error::host(format!("the guest cannot go on: {why}"))),
        _ => Ok(()),
    }
}
