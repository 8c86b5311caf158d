//! Signals from users of the host. SIGUSR1 writes the state of the machine to the log; SIGTSTP and SIGCONT are the shell's `^Z`
//! and `fg`; every other signal that would end the process ends the machine in order.
//!
//! Not handled here: signals of a fault in the program, signals that accompany an error of write(2) (SIGPIPE, SIGXFSZ), and
//! SIGUSR2, which interrupts a vCPU. A signal that was ignored when the program was started, as by `nohup`, stays ignored. A
//! handler of the main loop. The signals are blocked in every thread (`sys::signalfd`).

use std::fs;

use log::info;

use super::run::Message;
use crate::error::{Context, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Sender};
use crate::qmp::event::ShutdownCause;
use crate::sys::signalfd::{self, Signal, SignalFd};
use crate::sys::terminal;

/// The signals that end the machine, but for the real-time ones, which have no names.
const ENDS: [(i32, &str); 11] = [
    (libc::SIGTERM, "SIGTERM"),
    (libc::SIGINT, "SIGINT"),
    (libc::SIGHUP, "SIGHUP"),
    (libc::SIGQUIT, "SIGQUIT"),
    (libc::SIGALRM, "SIGALRM"),
    (libc::SIGVTALRM, "SIGVTALRM"),
    (libc::SIGPROF, "SIGPROF"),
    (libc::SIGXCPU, "SIGXCPU"),
    (libc::SIGIO, "SIGIO"),
    (libc::SIGPWR, "SIGPWR"),
    (libc::SIGSTKFLT, "SIGSTKFLT"),
];

/// The process's signals.
pub struct Signals {
    fd: SignalFd,
    control: Sender<Message>,
}

impl Signals {
    /// Blocks the signals and directs them to `control`. Comes before any thread is started.
    ///
    /// # Errors
    /// EMFILE and the like from signalfd(2).
    pub fn new(control: Sender<Message>) -> Result<Self> {
        let others = [libc::SIGUSR1, libc::SIGTSTP, libc::SIGCONT];
        let fd = SignalFd::new(Signals::that_end().chain(others)).context(|| "read signals")?;
        Ok(Signals { fd, control })
    }

    /// All signals that end the machine.
    pub fn that_end() -> impl Iterator<Item = i32> {
        ENDS.into_iter().map(|(number, _)| number).chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
    }
}

/// The signal and its sender, as a log line.
fn told(signal: Signal) -> String {
    let name = ENDS.into_iter().find(|(number, _)| *number == signal.number).map(|(_, name)| name.to_owned());
    let name = name.unwrap_or_else(|| format!("signal {}", signal.number));
    match (signal.sender, fs::read_to_string(format!("/proc/{}/comm", signal.sender))) {
        (0, _) => format!("{name} from the kernel (by ^C, for one), or from outside this container"),
        (sender, Ok(command)) => format!("{name} from process {sender} ({})", command.trim_end()),
        (sender, Err(_)) => format!("{name} from process {sender}, which has ended"),
    }
}

impl Handler for Signals {
    fn name(&self) -> &str {
        "signals"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.watch(&self.fd, Interest::READ, 0)?;
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> Result<Flow> {
        let Some(signal) = self.fd.read() else { return Ok(Flow::Idle) };
        let message = match signal.number {
            libc::SIGTSTP => {
                terminal::restore();
                signalfd::stop_process();
                terminal::again();
                return Ok(Flow::Done);
            }
            libc::SIGCONT => {
                terminal::again();
                return Ok(Flow::Done);
            }
            libc::SIGUSR1 => Message::Dump,
            _ => {
                info!("{}", told(signal));
                Message::End(ShutdownCause::HostSignal)
            }
        };
        // Control lives as long as the loop.
        let _ = self.control.send(message);
        Ok(Flow::Done)
    }
}
