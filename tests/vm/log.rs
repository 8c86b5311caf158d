//! A log that no process reads: the machine goes on, and the lines that were lost are counted.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::monitor::{Folder, Monitor, Setup, Tap};
use crate::pty::Pty;

/// What the count of the lines that were lost is in.
const LOST: &str = " log lines were lost: the log did not take them";

/// A machine with a disk whose requests are typed.
fn typed() -> Option<Setup> {
    let setup = Setup::guest("mode=blk-typed end=acpi")?.stdin(Stdio::piped());
    Some(setup.iothread("io1").disk("vda", 1 << 20, "direct=off,iothread=io1"))
}

/// More lines than a pipe has room for.
fn flood(monitor: &Monitor) {
    let mut client = monitor.qmp();
    for _ in 0..100 {
        monitor.signal("USR1");
        (0..3).for_each(|_| _ = client.call("query-status"));
    }
}

/// QMP and the guest's disk work while no line of the log is taken.
fn expect_at_work(monitor: &mut Monitor, request: u32) {
    assert_eq!(monitor.qmp().call("query-status")["status"], "running");
    monitor.type_in(&format!("write 0 8 1 {request}\n"));
    monitor.serial.expect(&format!("typed: {request} status=0"));
}

/// Has lines logged until the count of those that were lost is among them.
#[track_caller]
fn await_count(monitor: &Monitor, log: &Tap) {
    let mut client = monitor.qmp();
    for _ in 0..1000 {
        monitor.signal("USR1");
        client.call("query-status");
        if log.text().contains(LOST) {
            return;
        }
    }
    panic!("no count: {}", log.text());
}

fn expect_end(monitor: &mut Monitor) {
    monitor.signal("TERM");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!monitor.socket().exists());
}

fn fifo(folder: &Folder) -> PathBuf {
    let path = folder.path("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

fn reader(path: &Path) -> File {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

/// All that is in the pipe.
fn empty(mut reader: &File) -> String {
    let mut text = Vec::new();
    match reader.read_to_end(&mut text) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn log_fifo_that_is_no_longer_read_stops_nothing() {
    let Some(setup) = typed() else { return };
    let path = fifo(&setup.folder);
    let reader = reader(&path);
    let mut monitor = setup.option("-D", path.to_str().unwrap()).start();
    flood(&monitor);
    expect_at_work(&mut monitor, 1);
    // The last lines in it may be short ones, for which there was room when there was none for longer ones.
    let before = empty(&reader);
    assert!(before.ends_with('\n'), "{before}");
    monitor.signal("USR1");
    let mut after = String::new();
    while !after.contains("in flight in the device") {
        monitor.qmp().call("query-status");
        after += &empty(&reader);
    }
    let first = after.lines().next().unwrap();
    let count = first.strip_suffix(LOST).and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
    assert!(count > Some(100), "{first}");
    assert_eq!(after.matches(LOST).count(), 1, "{after}");
    flood(&monitor);
    expect_end(&mut monitor);
}

#[test]
fn log_fifo_needs_no_reader_at_the_start() {
    let Some(setup) = typed() else { return };
    let path = fifo(&setup.folder);
    let mut monitor = setup.option("-D", path.to_str().unwrap()).start();
    expect_at_work(&mut monitor, 1);
    monitor.signal("USR1");
    monitor.qmp().call("query-status");
    assert!(empty(&reader(&path)).contains("loop main"));
    // That reader has gone again.
    flood(&monitor);
    expect_at_work(&mut monitor, 2);
    expect_end(&mut monitor);
}

#[test]
fn full_standard_error_stops_nothing() {
    for stream in ["pipe", "socket"] {
        let Some(setup) = typed() else { return };
        let (reader, writer): (OwnedFd, OwnedFd) = match stream {
            "pipe" => pipe().map(|(reader, writer)| (reader.into(), writer.into())).unwrap(),
            _ => UnixStream::pair().map(|(one, other)| (one.into(), other.into())).unwrap(),
        };
        let mut monitor = setup.stderr(writer).start();
        // A socket has room for more than a pipe.
        flood(&monitor);
        flood(&monitor);
        expect_at_work(&mut monitor, 1);
        await_count(&monitor, &Tap::on(File::from(reader)));
        expect_end(&mut monitor);
    }
}

#[test]
fn terminal_stopped_by_ctrl_s_stops_nothing_else() {
    let Some(setup) = typed() else { return };
    let mut pty = Pty::new();
    let mut monitor = setup.stderr(pty.line.try_clone().unwrap()).start();
    let _handles_signals = monitor.qmp();
    monitor.signal("USR1");
    pty.screen.expect("loop main");
    pty.type_in(b"\x13");
    flood(&monitor);
    expect_at_work(&mut monitor, 1);
    assert!(!pty.screen.text().contains(LOST));
    pty.type_in(b"\x11");
    await_count(&monitor, &pty.screen);
    pty.type_in(b"\x13");
    flood(&monitor);
    expect_end(&mut monitor);
}

#[test]
fn failure_is_told_at_the_end_to_a_slow_reader() {
    let (mut reader, mut writer) = pipe().unwrap();
    writer.write_all(&[b'.'; 64 << 10]).unwrap();
    let mut monitor = Setup::bare().option("-kernel", "/nowhere").stderr(writer).start();
    // The pipe is empty again while the monitor still waits to say its last word, or before it comes to that.
    let mut text = vec![0; 64 << 10];
    reader.read_exact(&mut text).unwrap();
    text.clear();
    assert_eq!(monitor.exit_code(), 1);
    reader.read_to_end(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("/nowhere") && text.contains("No such file"), "{text}");
}

#[test]
fn config_fifo_is_waited_for_with_a_word() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let path = fifo(&setup.folder);
    let mut monitor = setup.option("-config", path.to_str().unwrap()).start();
    monitor.log.expect("fifo: still waiting for a process that writes to it and closes it");
    fs::write(&path, json!({"machine-config": {"mem_size": "64M"}}).to_string()).unwrap();
    monitor.expect_ok();
}

#[test]
fn config_is_read_from_a_process_substitution() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let script =
        "exec \"$@\" -config <(sleep 0.2; echo '{\"machine-config\":'; sleep 0.2; echo '{\"vcpu_count\": 1}}')";
    setup.under(&["bash", "-c", script, "bash"]).start().expect_ok();
}
