//! How a machine begins and ends, its terminal, its signals, and its rest.

use std::fs::{self, File};
use std::io::{Write, pipe};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::monitor::{Monitor, Setup, guest, has_kvm, skipped};
use crate::proc;
use crate::pty::Pty;
use crate::stall::Stall;

/// Lets a machine that was frozen run, to its end: the event SHUTDOWN's data.
#[track_caller]
fn run_to_the_end(monitor: &mut Monitor) -> serde_json::Value {
    let mut client = monitor.qmp();
    client.call("cont");
    let mut event = client.await_event("SHUTDOWN");
    client.expect_end();
    event["data"].take()
}

#[test]
fn a_guest_that_switches_itself_off_or_resets_itself_ends_the_monitor_with_0_and_its_reason() {
    for (end, reason) in [("acpi", "guest-shutdown"), ("i8042", "guest-reset"), ("triple", "guest-reset")] {
        let Some(setup) = Setup::guest(&format!("mode=hello end={end}")) else { return };
        let mut monitor = setup.flag("-S").start();
        assert_eq!(run_to_the_end(&mut monitor), json!({"guest": true, "reason": reason}), "end={end}");
        monitor.expect_ok();
    }
}

#[test]
fn a_frozen_machine_does_nothing_before_cont() {
    for flag in ["-S", "-freeze"] {
        let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
        let mut monitor = setup.flag(flag).start();
        let mut client = monitor.qmp();
        let status = client.call("query-status");
        assert_eq!(status, json!({"running": false, "singlestep": false, "status": "prelaunch"}));
        assert_eq!(monitor.serial.text(), "");
        client.call("cont");
        monitor.expect_ok();
    }
}

#[test]
fn what_the_host_refuses_ends_with_1_and_the_whole_cause_on_standard_error() {
    let bare = || Setup::bare().option("-kernel", guest().to_str().unwrap());
    let text = |setup: &Setup, name: &str, text: &str| {
        fs::write(setup.folder.path(name), text).unwrap();
        setup.folder.path(name)
    };
    let missing = Setup::bare().option("-kernel", "/no/such/kernel");
    let empty = Setup::bare();
    let empty_kernel = text(&empty, "kernel", "");
    let no_kernel = Setup::bare();
    let script = text(&no_kernel, "kernel", &"#!/bin/sh\n".repeat(1000));
    let small = bare();
    let sector = text(&small, "d.img", "less than a sector");
    let mut cases = vec![
        (bare().drive("vda", "/no/such/file".as_ref(), ""), vec!["\"vda\"", "/no/such/file", "No such file"]),
        (bare().drive("vda", "/tmp".as_ref(), "readonly=on"), vec!["\"vda\"", "/tmp", "regular file"]),
        (bare().drive("vda", "/dev/null".as_ref(), ""), vec!["\"vda\"", "/dev/null", "block device"]),
        (small.drive("vda", &sector, "direct=off"), vec!["\"vda\"", "18 bytes", "512"]),
        (bare().option("-initrd", "/no/such/initrd"), vec!["/no/such/initrd", "No such file"]),
        (bare().option("-qmp", "unix:/no/such/folder/s,server"), vec!["/no/such/folder/s", "No such file"]),
    ];
    if has_kvm() {
        cases.push((missing, vec!["/no/such/kernel", "No such file"]));
        cases.push((empty.option("-kernel", empty_kernel.to_str().unwrap()), vec!["kernel"]));
        cases.push((no_kernel.option("-kernel", script.to_str().unwrap()), vec!["kernel", "bzImage", "ELF"]));
    }
    for (setup, parts) in cases {
        let (code, told) = setup.run();
        assert_eq!(code, 1, "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        for part in ["loopvisor: "].iter().chain(&parts) {
            assert!(told.contains(part), "{part:?} is not in {told}");
        }
    }
}

/// Starts as a user who may do nothing, if the program can be reached by him.
const AS_NOBODY: [&str; 5] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];

#[test]
fn without_permission_the_file_and_the_cause_are_named() {
    let probe =
        Command::new(AS_NOBODY[0]).args(&AS_NOBODY[1..]).arg(env!("CARGO_BIN_EXE_loopvisor")).arg("-V").output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("the program cannot be run as another user: {probe:?}"));
    }
    let setup = Setup::bare().option("-kernel", "/dev/null").disk("vda", 1 << 20, "direct=off");
    Command::new("chmod").arg("600").arg(setup.folder.path("vda.img")).status().unwrap();
    let (code, told) = setup.under(&AS_NOBODY).run();
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("vda.img") && told.contains("Permission denied"), "{told}");

    if File::options().read(true).open("/dev/kvm").is_ok() && !is_open_to_all("/dev/kvm") {
        let (code, told) = Setup::bare().option("-kernel", "/dev/null").under(&AS_NOBODY).run();
        assert_eq!(code, 1, "{told}");
        assert!(told.contains("/dev/kvm") && told.contains("Permission denied"), "{told}");
    }
}

/// Becomes "$@" where the folder $0 is on a file system that is mounted read-only.
const READ_ONLY: &str = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";

#[test]
fn drive_that_can_only_be_read_is_told_how_to_be_read() {
    let advice = "use readonly=on (\"read_only\": true in a file for -config, \"read-only\": true in QMP)";
    let probe = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("a private mount is refused: {probe:?}"));
    }
    let setup = Setup::bare().option("-kernel", "/dev/null").disk("vda", 1 << 20, "direct=off");
    let folder = setup.folder.path("").to_str().unwrap().to_owned();
    let (code, told) = setup.under(&["unshare", "-m", "sh", "-c", READ_ONLY, &folder]).run();
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("vda.img\" cannot be written (Read-only file system") && told.contains(advice), "{told}");

    let setup = Setup::bare().option("-kernel", "/dev/null");
    let program = setup.folder.path("program");
    fs::copy("/bin/sleep", &program).unwrap();
    let mut runs = Command::new(&program).arg("600").spawn().unwrap();
    let (code, told) = setup.drive("vda", &program, "direct=off").run();
    runs.kill().unwrap();
    runs.wait().unwrap();
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("cannot be written (Text file busy") && told.contains(advice), "{told}");
}

fn is_open_to_all(path: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o6 == 0o6)
}

#[test]
fn a_signal_ends_the_machine_in_order_and_its_socket_is_removed() {
    for signal in ["TERM", "INT", "HUP"] {
        let Some(setup) = Setup::guest("mode=idle") else { return };
        let mut monitor = setup.disk("vda", 1 << 20, "direct=off").start();
        monitor.serial.expect("idle: begin");
        let mut client = monitor.qmp();
        monitor.signal(signal);
        let event = client.await_event("SHUTDOWN");
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-signal"}));
        client.expect_end();
        assert_eq!(monitor.exit_code(), 0);
        assert!(!monitor.socket().exists());
    }
}

#[test]
fn a_signal_ends_a_machine_whose_guest_makes_no_exit_and_one_that_is_paused() {
    let Some(setup) = Setup::guest("mode=spin ms=600000 cpus=2") else { return };
    let mut monitor = setup.option("-smp", "2").start();
    monitor.serial.expect("spin: begin");
    monitor.signal("TERM");
    assert_eq!(monitor.exit_code(), 0);

    let mut monitor = Setup::guest("mode=idle").unwrap().start();
    monitor.qmp().call("stop");
    monitor.signal("TERM");
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn sigusr1_writes_the_loops_and_the_devices_to_the_log_and_the_machine_goes_on() {
    let Some(setup) = Setup::guest("mode=idle end=acpi") else { return };
    let setup = setup.iothread("io1").disk("vda", 1 << 20, "direct=off,iothread=io1").stdin(Stdio::piped());
    let mut monitor = setup.start();
    monitor.serial.expect("idle: begin");
    let dump = monitor.dump(1);
    for part in ["run state Running", "loop main", "loop io1", "vda: "] {
        assert!(dump.contains(part), "{part:?} is not in {dump}");
    }
    monitor.type_in("x");
    monitor.expect_ok();
}

/// The guest on a terminal.
fn on_a_terminal(pty: &Pty) -> Option<Monitor> {
    let [input, output] = [(); 2].map(|()| pty.line.try_clone().unwrap());
    Some(Setup::guest("mode=echo end=acpi")?.stdin(input).stdout(output).start())
}

#[test]
fn a_terminal_is_raw_while_the_machine_runs_and_as_before_however_it_ends() {
    type End = fn(&mut Pty, &Monitor);
    let ends: [(&str, End); 4] = [
        ("the guest", |pty, _| pty.type_in(b"q")),
        ("SIGTERM", |_, monitor| monitor.signal("TERM")),
        ("quit", |_, monitor| _ = monitor.qmp().call("quit")),
        ("Ctrl-a x", |pty, _| pty.type_in(b"\x01x")),
    ];
    for (name, end) in ends {
        let mut pty = Pty::new();
        let before = pty.settings();
        let Some(mut monitor) = on_a_terminal(&pty) else { return };
        pty.screen.expect("echo: begin");
        assert_ne!(pty.settings(), before, "{name}");
        // In raw mode a carriage return and Ctrl-C are the guest's, and nothing is echoed.
        pty.type_in(b"\r\x03");
        pty.screen.expect("echo: 0d\necho: 03\n");
        end(&mut pty, &monitor);
        assert_eq!(monitor.exit_code(), 0, "{name}");
        assert_eq!(pty.settings(), before, "{name}");
    }
}

#[test]
fn a_terminal_is_as_before_when_the_start_fails() {
    let pty = Pty::new();
    let before = pty.settings();
    let setup = Setup::bare().option("-kernel", "/dev/null").option("-serial", "stdio");
    let (code, _) = setup.stdin(pty.line.try_clone().unwrap()).run();
    assert_eq!(code, 1);
    assert_eq!(pty.settings(), before);
}

#[test]
fn ctrl_a_twice_types_one_and_ctrl_a_x_quits_with_its_reason() {
    let mut pty = Pty::new();
    let Some(mut monitor) = on_a_terminal(&pty) else { return };
    pty.screen.expect("echo: begin");
    let mut client = monitor.qmp();
    pty.type_in(b"\x01\x01a");
    pty.screen.expect("echo: 01\necho: 61\n");
    pty.type_in(b"\x01x");
    let event = client.await_event("SHUTDOWN");
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-ui"}));
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn input_that_is_no_terminal_reaches_the_guest_byte_for_byte() {
    let Some(setup) = Setup::guest("mode=echo end=acpi") else { return };
    let mut monitor = setup.stdin(Stdio::piped()).start();
    // Longer than the port's FIFO, with bytes that mean something on a terminal.
    let bytes: Vec<u8> = (0..=0x7f).filter(|&byte| byte != b'q').chain([b'q']).collect();
    monitor.type_in(std::str::from_utf8(&bytes).unwrap());
    monitor.expect_ok();
    let told: Vec<String> = bytes.iter().map(|byte| format!("echo: {byte:02x}")).collect();
    let text = monitor.serial.text();
    let heard: Vec<&str> = text.lines().filter(|line| line.starts_with("echo: ") && !line.ends_with("begin")).collect();
    assert_eq!(heard, told);
}

#[test]
fn a_file_as_input_reaches_the_guest_whole() {
    let Some(setup) = Setup::guest("mode=echo end=acpi") else { return };
    let path = setup.folder.path("input");
    fs::write(&path, "a".repeat(1000) + "q").unwrap();
    let mut monitor = setup.stdin(File::open(&path).unwrap()).start();
    monitor.expect_ok();
    assert_eq!(monitor.serial.text().matches("echo: 61").count(), 1000);
}

#[test]
fn output_that_nobody_reads_stops_neither_the_guest_nor_qmp() {
    let Some(setup) = Setup::guest("mode=echo end=acpi") else { return };
    let path = setup.folder.path("input");
    fs::write(&path, "a".repeat(1000) + "q").unwrap();
    let (_reader, mut writer) = pipe().unwrap();
    // A pipe holds 64 KiB unless told otherwise: there is no room for one byte of the guest's.
    writer.write_all(&[b'.'; 64 << 10]).unwrap();
    let mut monitor = setup.stdin(File::open(&path).unwrap()).stdout(writer).start();
    let mut client = monitor.qmp();
    // The guest gets through its thousand lines, and QMP answers meanwhile.
    client.call("query-status");
    client.await_event("SHUTDOWN");
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn output_whose_reader_is_gone_stops_neither_the_guest_nor_qmp() {
    let Some(setup) = Setup::guest("mode=echo end=acpi") else { return };
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut monitor = setup.stdin(Stdio::piped()).stdout(writer).start();
    monitor.qmp().call("query-status");
    monitor.type_in("q");
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn standard_input_at_its_end_and_a_closed_one_are_no_trouble() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let empty = setup.folder.path("empty");
    File::create(&empty).unwrap();
    setup.stdin(File::open(empty).unwrap()).start().expect_ok();
    for closing in ["exec \"$@\" <&-", "exec \"$@\" </dev/null"] {
        let setup = Setup::guest("mode=hello end=acpi").unwrap();
        setup.under(&["sh", "-c", closing, "sh"]).start().expect_ok();
    }
}

/// How long an idle machine is watched.
const REST: Duration = Duration::from_secs(10);

#[test]
fn an_idle_machine_has_let_go_of_the_code_that_it_needed_to_start() {
    let Some(setup) = Setup::guest("mode=idle end=acpi") else { return };
    let mut monitor = setup.disk("vda", 1 << 20, "direct=off").stdin(Stdio::piped()).start();
    monitor.serial.expect("idle: begin");
    // The guest may be there before the main loop is. What runs comes back in pieces of sixteen pages, so a program that is
    // not optimised for size keeps more than it needs.
    let (mut mapped, mut size) = (1, 0);
    for _ in 0..100 {
        (mapped, size) = proc::code_kib(monitor.pid());
        if mapped < size / 4 * 3 {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    monitor.type_in("x");
    monitor.expect_ok();
    assert!(mapped < size / 4 * 3, "{mapped} of {size} KiB of code are mapped");
}

#[test]
fn an_idle_machine_wakes_no_loop_in_ten_seconds() {
    let Some(setup) = Setup::guest("mode=idle end=acpi") else { return };
    let setup = setup.iothread("io1").iothread("io2").disk("vda", 1 << 20, "direct=off,iothread=io1");
    let mut monitor = setup.disk("vdb", 1 << 20, "direct=on").stdin(Stdio::piped()).start();
    monitor.serial.expect("idle: begin");
    let mut client = monitor.qmp();
    client.call("query-iothreads");
    let pid = monitor.pid();
    let sleeps = || -> Vec<(String, u64)> {
        let all = proc::threads(pid).into_iter();
        // The vCPU halts in KVM, whose own workers may look after it.
        let ours = all.filter(|(_, name)| !name.starts_with("CPU ") && !name.starts_with("kvm-"));
        ours.map(|(id, name)| (name, proc::sleeps(pid, id))).collect()
    };
    // Each wait of a thread ends in a wake-up: as many sleeps as before means none. A thread that is still on its way
    // to its wait is given a moment.
    let before = (0..100)
        .find_map(|_| {
            let first = sleeps();
            thread::sleep(Duration::from_millis(50));
            (sleeps() == first).then_some(first)
        })
        .expect("the machine comes to rest");
    thread::sleep(REST);
    assert_eq!(sleeps(), before);
    let loops = client.call("query-iothreads");
    monitor.type_in("x");
    monitor.expect_ok();
    assert!(
        loops.as_array().unwrap().iter().all(|one| one["loop"]["asleep-ns"].as_u64() > Some(10_000_000_000)),
        "{loops}"
    );
}

#[test]
fn a_start_that_takes_longer_than_a_second_says_what_it_is_at() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let Some(stall) = Stall::new(&setup.folder, 1 << 20) else { return };
    let (mounting, device) = stall.mounting();
    let initrd = stall.path().to_str().unwrap().to_owned();
    stall.stall();
    let mut monitor = setup.option("-initrd", &initrd).flag("-S").under(&mounting).stdin(device).start();
    monitor.log.expect("loopvisor: after 1 s: reading \"");
    monitor.log.expect(&format!(" and {initrd:?}\n"));
    // A client that connects now is served as soon as the machine runs.
    let mut client = monitor.connect();
    let id = {
        client.send(r#"{"execute":"qmp_capabilities"}"#);
        client.ask("query-status")
    };
    stall.release();
    assert!(client.line()["QMP"].is_object());
    assert_eq!(client.answer(), json!({"return": {}}));
    assert_eq!(client.answer()["id"], id);
    client.call("cont");
    monitor.expect_ok();
}

#[test]
fn pidfile_of_a_process_that_has_ended_is_replaced() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let path = setup.folder.path("pid");
    let mut ended = Command::new("true").spawn().unwrap();
    let pid = ended.id();
    ended.wait().unwrap();
    fs::write(&path, format!("{pid}\n")).unwrap();
    let mut monitor = setup.option("-pidfile", path.to_str().unwrap()).start();
    let mut client = monitor.qmp();
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", monitor.pid()));
    monitor.log.expect(&format!("pid: process {pid} has ended and has left this file: it is replaced"));

    let second = || Setup::bare().option("-kernel", "/nowhere").option("-pidfile", path.to_str().unwrap()).run();
    let (code, told) = second();
    assert!(code == 1 && told.contains(&format!("pid: process {} (loopvisor) is running", monitor.pid())), "{told}");
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!path.exists());
    for (text, sentence) in [("", "/nowhere"), ("notes\n", "other contents than a process id")] {
        fs::write(&path, text).unwrap();
        let (code, told) = second();
        assert!(code == 1 && told.contains(sentence), "{told}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "notes\n");
}

#[test]
fn pidfile_that_another_process_has_replaced_stays() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let [path, new] = ["pid", "new"].map(|name| setup.folder.path(name));
    let mut monitor = setup.option("-pidfile", path.to_str().unwrap()).start();
    let mut client = monitor.qmp();
    fs::write(&new, "1\n").unwrap();
    fs::rename(&new, &path).unwrap();
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(path.exists());
}
