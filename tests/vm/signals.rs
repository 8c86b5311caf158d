//! Signals from the host: those that end the machine, those that are ignored, and the shell's `^Z` and `fg`; and threads that
//! hang while the machine is to end.

#![allow(unsafe_code)] // The standard library cannot stop a single thread.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::monitor::{Folder, Monitor, PATIENCE, Setup};
use crate::proc;
use crate::pty::Pty;
use crate::stall::Stall;

const MIB: u64 = 1 << 20;

/// Returns when it is so.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < limit, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The first letter of the state of a process: T if it is stopped.
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap()
}

fn idle(words: &str) -> Option<Setup> {
    let setup = Setup::guest(words)?;
    let pidfile = setup.folder.path("pid");
    Some(setup.option("-pidfile", pidfile.to_str().unwrap()))
}

fn expect_clean(monitor: &Monitor) {
    assert!(!monitor.socket().exists());
    assert!(!monitor.folder.path("pid").exists());
}

#[test]
fn signals_that_would_end_the_process_end_the_machine() {
    for signal in ["QUIT", "ALRM", "VTALRM", "PROF", "XCPU", "IO", "PWR", "STKFLT", "RTMIN", "RTMIN+7", "RTMAX"] {
        let pty = Pty::new();
        let before = pty.settings();
        let Some(setup) = idle("mode=echo") else { return };
        let [input, output] = [(); 2].map(|()| pty.line.try_clone().unwrap());
        let mut monitor = setup.stdin(input).stdout(output).start();
        pty.screen.expect("echo: begin");
        let mut client = monitor.qmp();
        assert!(
            Command::new("bash").args(["-c", &format!("kill -{signal} {}", monitor.pid())]).status().unwrap().success()
        );
        assert_eq!(
            client.await_event("SHUTDOWN")["data"],
            json!({"guest": false, "reason": "host-signal"}),
            "{signal}"
        );
        assert_eq!(monitor.exit_code(), 0, "{signal}");
        assert_eq!(pty.settings(), before, "{signal}");
        expect_clean(&monitor);
        assert!(monitor.log.text().contains(" from process "), "{}", monitor.log.text());
    }
}

#[test]
fn signals_of_writes_and_of_vcpus_end_nothing() {
    let Some(setup) = idle("mode=idle end=acpi") else { return };
    let mut monitor = setup.stdin(Stdio::piped()).start();
    monitor.serial.expect("idle: begin");
    let mut client = monitor.qmp();
    for signal in ["USR2", "XFSZ", "PIPE", "CONT", "WINCH", "URG", "CHLD"] {
        (0..20).for_each(|_| monitor.signal(signal));
        assert_eq!(client.call("query-status")["status"], "running", "{signal}");
    }
    monitor.type_in("x");
    monitor.expect_ok();
}

#[test]
fn signals_ignored_at_the_start_stay_ignored() {
    // As nohup and a script's & do.
    for (ignored, sent) in [("HUP", "HUP"), ("INT QUIT", "INT"), ("INT QUIT", "QUIT")] {
        let Some(setup) = idle("mode=idle") else { return };
        let script = format!("trap '' {ignored}; exec \"$@\"");
        let mut monitor = setup.under(&["sh", "-c", &script, "sh"]).start();
        monitor.serial.expect("idle: begin");
        let mut client = monitor.qmp();
        monitor.signal(sent);
        (0..10).for_each(|_| assert_eq!(client.call("query-status")["status"], "running"));
        monitor.signal("TERM");
        assert_eq!(monitor.exit_code(), 0);
    }
}

/// The guest on a terminal of its own, started by a shell with job control.
struct Job {
    pty: Pty,
    shell: std::process::Child,
    monitor: u32,
}

impl Job {
    fn start(folder: &Folder) -> Option<Job> {
        let setup = Setup::guest("mode=echo")?;
        drop(setup);
        let pty = Pty::new();
        let line = || Stdio::from(pty.line.try_clone().unwrap());
        let mut shell = Command::new("setsid");
        shell.args(["--ctty", "bash", "--norc", "--noediting", "-i"]).env("PS1", "ready> ");
        let shell = shell.stdin(line()).stdout(line()).stderr(line()).spawn().unwrap();
        let mut job = Job { pty, shell, monitor: 0 };
        job.pty.screen.expect("ready> ");
        let pidfile = folder.path("pid");
        let words = format!(
            "{} -kernel {} -append mode=echo -serial stdio -pidfile {} -qmp unix:{},server,nowait\n",
            env!("CARGO_BIN_EXE_loopvisor"),
            crate::monitor::guest().display(),
            pidfile.display(),
            folder.path("qmp").display(),
        );
        job.type_in(&words);
        job.pty.screen.expect("echo: begin");
        job.monitor = fs::read_to_string(pidfile).unwrap().trim().parse().unwrap();
        job.expect_raw();
        Some(job)
    }

    fn type_in(&mut self, text: &str) {
        self.pty.type_in(text.as_bytes());
    }

    fn signal(&self, signal: &str) {
        let pid = self.monitor.to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
    }

    /// Keys reach the guest one by one, and no key is a signal.
    #[track_caller]
    fn expect_raw(&mut self) {
        until("the terminal is not raw", || self.stty().contains("-icanon") && self.stty().contains("-isig"));
        let seen = |job: &Job| job.pty.screen.text().matches("echo: 03").count();
        let before = seen(self);
        self.type_in("\x03");
        until("^C does not reach the guest", || seen(self) > before);
    }

    fn stty(&self) -> String {
        let line = Stdio::from(self.pty.line.try_clone().unwrap());
        String::from_utf8(Command::new("stty").arg("-a").stdin(line).output().unwrap().stdout).unwrap()
    }

    /// The turns of the main loop so far.
    fn turns(&self) -> u64 {
        let before = self.pty.screen.text().len();
        self.signal("USR1");
        let line = self.pty.screen.wait(PATIENCE, |text, _| {
            let (_, line) = text[before..].split_once("loop main")?;
            line.split_once('\n').map(|(line, _)| line.to_owned())
        });
        let line = line.expect("a dump on the terminal");
        let turns = line.split_once("turns: ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        turns.unwrap_or_else(|| panic!("{line}"))
    }

    /// `^Z`, and `bg` at the shell's next prompt.
    fn go_to_background(&mut self) {
        let prompts = self.prompts();
        self.signal("TSTP");
        until("the process does not stop", || state(self.monitor) == 'T');
        until("the shell has no prompt", || self.prompts() > prompts);
        self.type_in("bg\n");
        until("the job does not go on", || state(self.monitor) != 'T');
    }

    fn prompts(&self) -> usize {
        self.pty.screen.text().matches("ready> ").count()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &self.monitor.to_string()]).stderr(Stdio::null()).status();
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[test]
fn terminal_is_raw_again_after_a_stop_and_fg() {
    for signal in ["TSTP", "STOP"] {
        let folder = Folder::new();
        let Some(mut job) = Job::start(&folder) else { return };
        for _ in 0..2 {
            let prompts = job.prompts();
            job.signal(signal);
            until("the process does not stop", || state(job.monitor) == 'T');
            until("the shell has no prompt", || job.prompts() > prompts);
            job.type_in("fg\n");
            job.expect_raw();
        }
    }
}

#[test]
fn stop_signal_restores_the_terminal_before_the_stop() {
    let Some(setup) = Setup::guest("mode=echo") else { return };
    let pty = Pty::new();
    let before = pty.settings();
    let [input, output] = [(); 2].map(|()| pty.line.try_clone().unwrap());
    let monitor = setup.stdin(input).stdout(output).start();
    pty.screen.expect("echo: begin");
    monitor.signal("TSTP");
    until("the process does not stop", || state(monitor.pid()) == 'T');
    // No shell has this terminal, which might have restored it.
    assert_eq!(pty.settings(), before);
    monitor.signal("CONT");
    until("the terminal is not raw", || pty.settings() != before);
}

#[test]
fn job_in_the_background_leaves_the_terminal_alone() {
    let folder = Folder::new();
    let Some(mut job) = Job::start(&folder) else { return };
    job.go_to_background();
    job.type_in("stty -a | grep -c ' icanon'; echo done\n");
    job.pty.screen.expect("done\r\nready> ");
    assert!(!job.stty().contains("-icanon"), "{}", job.stty());
    assert_ne!(state(job.monitor), 'T', "reading the shell's keys stops the process");
    // No signal tells of this one: the job has not stopped.
    job.type_in("fg\n");
    until("the shell has the terminal", || job.pty.screen.text().ends_with("server,nowait\r\n"));
    job.type_in("\n");
    job.expect_raw();
    job.go_to_background();
    // Restoring the terminal would stop the process here.
    job.signal("TERM");
    until("the process does not end", || !Path::new(&format!("/proc/{}", job.monitor)).exists());
    assert!(!folder.path("qmp").exists());
}

#[test]
fn line_that_another_job_has_not_read_keeps_no_loop_busy() {
    let folder = Folder::new();
    let Some(mut job) = Job::start(&folder) else { return };
    job.go_to_background();
    job.type_in("echo be''gun; sleep 1000\n");
    job.pty.screen.expect("begun\r\n");
    job.type_in("unread\n");
    job.pty.screen.expect("unread\r\n");
    let before = job.turns();
    // Each dump takes the loop a few turns.
    (0..20).for_each(|_| _ = job.turns());
    let turns = job.turns() - before;
    assert!(turns < 400, "{turns} turns");
}

/// A thread that is stopped, and no other of its process; by the test's thread, with which that ends.
struct Stopped(i32);

impl Stopped {
    fn new(thread: u32) -> Stopped {
        let thread = thread as i32;
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: neither request reads or writes memory of ours.
        let stopped = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) == 0
                && libc::waitpid(thread, ptr::null_mut(), libc::__WALL) == thread
        };
        assert!(stopped, "{}", std::io::Error::last_os_error());
        Stopped(thread)
    }
}

impl Stopped {
    /// Waits for it to end with its process, which has not ended before that is seen.
    #[track_caller]
    fn await_end(self) {
        // SAFETY: nothing is written.
        let ended = || unsafe { libc::waitpid(self.0, ptr::null_mut(), libc::__WALL | libc::WNOHANG) == self.0 };
        until("the process does not end", ended);
    }
}

#[test]
fn thread_that_hangs_does_not_keep_the_machine_from_ending() {
    for name in ["io1", "CPU 0/KVM", "CPU 1/KVM", "vda/aio0"] {
        for end in ["quit", "TERM"] {
            let Some(setup) = idle("mode=blk-load depth=4 count=100000000 op=write") else { return };
            let setup =
                setup.iothread("io1").option("-smp", "2").disk("vda", MIB, "direct=off,aio=threads,iothread=io1");
            let mut monitor = setup.start();
            monitor.serial.expect("load: begin");
            let mut client = monitor.qmp();
            // A new thread has the name of the one that made it at first.
            let count = |pid| proc::threads(pid).values().filter(|thread| *thread == name).count();
            until("the thread does not start", || count(monitor.pid()) == 1);
            let stopped = Stopped::new(proc::thread(monitor.pid(), name));
            match end {
                "quit" => _ = client.call("quit"),
                _ => monitor.signal(end),
            }
            stopped.await_end();
            assert_eq!(monitor.exit_code(), 0, "{name} {end}");
            expect_clean(&monitor);
            let log = monitor.log.text();
            // A thread of a disk is not waited for.
            assert!(name.contains("aio") || log.contains(&format!("thread {name:?} is in \"ptrace_stop\"")), "{log}");
        }
    }
}

#[test]
fn job_thread_that_hangs_does_not_keep_the_machine_from_ending() {
    for end in ["quit", "TERM"] {
        let Some(setup) = idle("mode=idle") else { return };
        let Some(stall) = Stall::new(&setup.folder, MIB) else { return };
        let (mounting, device) = stall.mounting();
        let mut monitor = setup.under(&mounting).stdin(device).start();
        let [mut client, mut other] = [(); 2].map(|()| monitor.qmp());
        stall.stall();
        let file = json!({"driver": "file", "filename": stall.path()});
        let asked =
            json!({"execute": "blockdev-add", "arguments": {"node-name": "slow", "driver": "raw", "file": file}});
        client.send(&asked.to_string());
        stall.await_held(1);
        match end {
            "quit" => _ = other.call("quit"),
            _ => monitor.signal(end),
        }
        // The host's kernel does not let go of a thread whose request the file's server has taken (state D), so the process
        // stays for that long; what it does by itself is done.
        until("the machine does not end", || !monitor.socket().exists() && !monitor.folder.path("pid").exists());
        stall.release();
        assert_eq!(monitor.exit_code(), 0, "{end}");
    }
}

#[test]
fn start_that_hangs_is_ended_by_a_signal() {
    let Some(setup) = idle("mode=idle") else { return };
    let Some(stall) = Stall::new(&setup.folder, MIB) else { return };
    let (mounting, device) = stall.mounting();
    stall.stall();
    let initrd = stall.path().to_str().unwrap().to_owned();
    let mut monitor = setup.option("-initrd", &initrd).under(&mounting).stdin(device).start();
    monitor.log.expect("loopvisor: after 1 s: reading \"");
    assert!(monitor.folder.path("pid").exists());
    monitor.signal("TERM");
    assert_eq!(monitor.exit_code(), 1);
    assert!(monitor.log.text().contains("ended by a signal while reading"), "{}", monitor.log.text());
    expect_clean(&monitor);
}
