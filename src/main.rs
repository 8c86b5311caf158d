//! The program: parse, log, build the machine, run the main loop, join, exit code; or with `-check` only build.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use log::{LevelFilter, debug, error};
use loopvisor::cli::{self, Command};
use loopvisor::config::spec::{LogSpec, SerialSpec, VmSpec};
use loopvisor::control::{Console, Control, End, Listener, Memory, Message, Signals};
use loopvisor::devices::serial::SerialEvent;
use loopvisor::error::{Context, Error, Result};
use loopvisor::event::{EventLoop, Receiver, Sender, channel};
use loopvisor::logging;
use loopvisor::machine::{Machine, Notice, Threads, balloon_suits};
use loopvisor::memory::{self, Found};
use loopvisor::pidfile::Pidfile;
use loopvisor::sys::daemon;
use loopvisor::sys::deadline::Deadline;
use loopvisor::sys::progress::Progress;
use loopvisor::sys::sink;
use loopvisor::sys::terminal::Terminal;
use loopvisor::sys::tune;

fn main() -> ExitCode {
    tune::one_heap();
    tune::file_size_limit_is_an_error();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match cli::parse(args.clone()) {
        Ok(Command::Print(text)) => {
            // Nobody is left to be told that nobody reads.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Command::Run(spec)) => launch(&spec),
        Ok(Command::Check(spec)) => match check(&spec) {
            Ok(()) => {
                let _ = writeln!(std::io::stdout(), "loopvisor: the configuration is good");
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error),
        },
        Err(error) => {
            if cli::logs_to_stdout(&args) {
                let _ = writeln!(std::io::stdout(), "loopvisor: {error}");
            }
            fail(&error)
        }
    }
}

fn fail(error: &Error) -> ExitCode {
    sink::stderr_last_line(format!("loopvisor: {error}\n").as_bytes());
    ExitCode::from(error.exit_code())
}

/// Builds everything as for a start, and takes it apart again: what the host refuses is found out, and nothing is left.
fn check(spec: &VmSpec) -> Result<()> {
    logging::start(&LogSpec::Stderr, LevelFilter::Warn)?;
    logging::check_inputs(spec)?;
    let _log = logging::check(&spec.log)?;
    let _pidfile = spec.pidfile.as_deref().map(Pidfile::check).transpose()?;
    let Some(path) = &spec.mem_path else { return Built::new(spec).map(drop) };
    let _found = Found::look(path);
    if spec.mem_share && !spec.balloons.is_empty() {
        let shared = memory::allocate_on(path, spec.memory_bytes, true, spec.dump_guest_core)?;
        balloon_suits(&shared)?;
    }
    // The kernel is loaded, and is not to be written over what the file holds.
    Built::new(&VmSpec { mem_share: false, ..spec.clone() }).map(drop)
}

/// Runs the machine of `spec` to its end, in the background if so asked.
fn launch(spec: &VmSpec) -> ExitCode {
    let starter = match spec.daemonize.then(daemon::detach).transpose() {
        Ok(starter) => starter,
        Err(e) => return fail(&Error::host("-daemonize: start a process").because(e)),
    };
    let ran = set_up(spec).and_then(|(_pidfile, running)| {
        if let Some(starter) = &starter {
            starter.ready().context(|| "-daemonize: let go of the terminal")?;
        }
        running.finish()
    });
    // A starter that is not told of anything until it is dropped, here, tells of a failure.
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With -daemonize standard error is /dev/null by now, and Kata Containers reads only standard output.
            if spec.log != LogSpec::Stderr {
                error!("{error}");
            }
            fail(&error)
        }
    }
}

/// Everything up to a running guest. The pidfile goes last.
fn set_up(spec: &VmSpec) -> Result<(Option<Pidfile>, Running)> {
    logging::check_inputs(spec)?;
    logging::start(&spec.log, LevelFilter::Info)?;
    spec.ignored.iter().for_each(|option| debug!("{option}: accepted, and means nothing here"));
    let pidfile = spec.pidfile.as_deref().map(Pidfile::create).transpose()?;
    Ok((pidfile, Running::start(spec)?))
}

/// Everything that a start needs, and nothing started. Taken apart, the loop goes first: what is in it removes its sockets.
struct Built {
    main: EventLoop,
    memory: Option<Memory>,
    machine: Machine,
    control: (Sender<Message>, Receiver<Message>),
    notices: Receiver<Notice>,
    serial_events: Receiver<SerialEvent>,
}

impl Built {
    fn new(spec: &VmSpec) -> Result<Built> {
        let mut main = EventLoop::new()?;
        let (control, messages) = channel();
        let (notices_sender, notices) = channel();
        let (serial_sender, serial_events) = channel();
        // Before any thread: signals are blocked for those that follow.
        main.add(Box::new(Signals::new(control.clone())?))?;
        for path in &spec.qmp {
            main.add(Box::new(Listener::bind(path, control.clone())?))?;
        }
        let progress = Progress::begin(Signals::that_end().collect());
        let mut machine = Machine::build(spec, &mut main, notices_sender, serial_sender, &progress)?;
        drop(progress);
        let memory = machine.take_balloon().map(Memory::new).transpose()?;
        Ok(Built { main, memory, machine, control: (control, messages), notices, serial_events })
    }
}

/// A machine that runs, and everything that must outlive its main loop.
struct Running {
    main: EventLoop,
    threads: Threads,
    terminal: Option<Terminal>,
    end: Arc<OnceLock<End>>,
}

impl Running {
    /// Builds everything and starts the guest.
    fn start(spec: &VmSpec) -> Result<Running> {
        let Built { mut main, memory, machine, control, notices, serial_events } = Built::new(spec)?;
        let mut terminal = None;
        if spec.serial == SerialSpec::Stdio {
            terminal = Terminal::raw(&std::io::stdin())?;
            let serial = machine.serial().clone();
            main.add(Box::new(Console::new(serial, serial_events, control.0.clone(), terminal.is_some())?))?;
        }
        let (inventory, threads) = machine.start(spec.freeze)?;
        let end = Arc::new(OnceLock::new());
        let control = Control::new(inventory, memory, spec, notices, control, end.clone());
        main.add(Box::new(control))?;
        Ok(Running { main, threads, terminal, end })
    }

    /// Runs the main loop until the machine ends, and takes everything apart.
    fn finish(mut self) -> Result<()> {
        // After the threads are made, which would inherit it.
        tune::short_slice();
        tune::forget_code();
        let ran = self.main.run();
        let failed = ran.is_err() || matches!(self.end.get(), Some(End::Failed(_)));
        let _deadline = Deadline::begin(u8::from(failed));
        // The loop first: a vCPU that waits for a device of it is answered by the device's end.
        drop(self.main);
        drop(self.threads);
        drop(self.terminal);
        ran?;
        match self.end.get() {
            Some(End::Failed(why)) => Err(Error::host(format!("the guest cannot go on: {why}"))),
            _ => Ok(()),
        }
    }
}
