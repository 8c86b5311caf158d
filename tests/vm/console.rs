//! The console on its Unix socket: bytes both ways, clients that come, go, and do not read, and a guest that floods it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup, guest, skipped};
use crate::proc;

const MIB: usize = 1 << 20;

/// The byte at a place of the sequence that the guest knows.
fn known(place: u64) -> u8 {
    let mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

/// So many bytes of the sequence, from a place on.
fn sequence(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(known).collect()
}

/// A guest whose driver is up, its console on the socket `console`.
#[track_caller]
fn start(words: &str, more: impl FnOnce(Setup) -> Setup) -> Option<(Monitor, Client)> {
    let setup = Setup::guest(&format!("mode=console end=acpi {words}"))?;
    let chardev = format!("id=con0,path={}", setup.folder.path("console").display());
    let monitor = more(setup.option("-chardev", &chardev).stdin(Stdio::piped())).start();
    monitor.serial.expect("console: begin");
    let client = monitor.qmp();
    Some((monitor, client))
}

#[track_caller]
fn connect(monitor: &Monitor) -> UnixStream {
    let stream = UnixStream::connect(monitor.folder.path("console")).expect("somebody listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[track_caller]
fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).expect("bytes come");
    bytes
}

/// Ends the guest, which must be content.
#[track_caller]
fn finish(mut monitor: Monitor) {
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn megabytes_come_back_as_they_were_sent() {
    let Some((monitor, _client)) = start("op=echo", |setup| setup) else { return };
    let mut stream = connect(&monitor);
    let sent = sequence(0, 4 * MIB);
    let mut writer = stream.try_clone().unwrap();
    let mine = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&mine).unwrap());
    let received = read(&mut stream, sent.len());
    writing.join().unwrap();
    assert!(received == sent, "what comes back is something else");
    finish(monitor);
}

fn await_text(monitor: &Monitor, part: &str) {
    monitor.serial.expect(part);
}

/// The console's chardev.
fn chardev(client: &mut Client) -> Value {
    client.call("query-chardev")[0].take()
}

fn add(path: &Path) -> Value {
    json!({"id": "con0", "backend": {"type": "socket", "data":
        {"addr": {"type": "unix", "data": {"path": path}}, "server": true, "wait": false}}})
}

/// What comes until the other side is silent for a moment.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut all = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return all,
            Ok(count) => all.extend(&piece[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return all,
        }
    }
}

#[test]
fn a_guest_that_sends_as_fast_as_it_can_loses_nothing_to_a_client_that_reads() {
    for size in [1, 61, 4096, 65536] {
        let bytes = if size == 1 { 100_000 } else { 8 * MIB };
        let more = |setup: Setup| setup.flag("-S");
        let Some(setup) = Setup::guest(&format!("mode=console end=acpi op=flood size={size} bytes={bytes}")) else {
            return;
        };
        let chardev = format!("id=con0,path={}", setup.folder.path("console").display());
        let monitor = more(setup.option("-chardev", &chardev).stdin(Stdio::piped())).start();
        let mut client = monitor.qmp();
        let mut stream = connect(&monitor);
        client.call("cont");
        assert!(read(&mut stream, bytes) == sequence(0, bytes), "size={size}");
        await_text(&monitor, &format!("console: done received=0 sent={bytes}\n"));
        assert_eq!(self::chardev(&mut client)["lost-bytes"], 0);
        finish(monitor);
    }
}

#[test]
fn what_is_typed_in_one_piece_of_ten_megabytes_reaches_the_guest_whole() {
    let Some((monitor, _client)) = start(&format!("op=check size=512 bytes={}", 10 * MIB), |setup| setup) else {
        return;
    };
    connect(&monitor).write_all(&sequence(0, 10 * MIB)).unwrap();
    await_text(&monitor, &format!("console: done received={} sent=0\n", 10 * MIB));
    finish(monitor);
}

#[test]
fn a_hundred_clients_in_a_row_are_each_served_and_none_sees_what_was_anothers() {
    let Some((monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    for n in 0..100 {
        let mut stream = connect(&monitor);
        let sent = sequence(1000 * n, 1000);
        stream.write_all(&sent).unwrap();
        assert_eq!(read(&mut stream, 1000), sent, "client {n}");
    }
    // The last has gone, and is soon known to have.
    until(|| chardev(&mut client)["filename"].as_str().unwrap().starts_with("disconnected:"));
    assert_eq!(client.call("query-status")["status"], "running");
    finish(monitor);
}

#[track_caller]
fn until(mut so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_second_client_is_served_when_the_first_has_gone() {
    let Some((monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    let mut first = connect(&monitor);
    first.write_all(b"first").unwrap();
    assert_eq!(read(&mut first, 5), b"first");
    let mut second = connect(&monitor);
    second.write_all(b"second").unwrap();
    for _ in 0..10 {
        first.write_all(b"again").unwrap();
        assert_eq!(read(&mut first, 5), b"again");
    }
    assert!(chardev(&mut client)["filename"].as_str().unwrap().starts_with("unix:"));
    drop(first);
    assert_eq!(read(&mut second, 6), b"second");
    finish(monitor);
}

#[test]
fn a_client_that_never_reads_hurts_neither_the_guest_nor_a_disk_of_the_loop_nor_qmp_nor_the_hosts_memory() {
    let disk = |setup: Setup| setup.disk("vda", MIB as u64, "direct=off");
    let Some((monitor, mut client)) = start("op=flood reads=20000", disk) else { return };
    let stream = connect(&monitor);
    let lost = |client: &mut Client| chardev(client)["lost-bytes"].as_u64().unwrap();
    until(|| lost(&mut client) > 0);
    let memory = proc::anonymous_kib(monitor.pid());
    let before = lost(&mut client);
    for _ in 0..100 {
        client.call("query-status");
    }
    until(|| lost(&mut client) > before + 200 * MIB as u64);
    await_text(&monitor, "console: reads done\n");
    let grown = proc::anonymous_kib(monitor.pid()).saturating_sub(memory);
    assert!(grown < 1024, "{grown} KiB more");
    // And with nobody there at all.
    drop(stream);
    let before = lost(&mut client);
    until(|| lost(&mut client) > before + 200 * MIB as u64);
    client.call("stop");
    let before = lost(&mut client);
    client.call("query-status");
    assert_eq!(lost(&mut client), before, "a guest that is stopped sends nothing");
    client.call("cont");
    until(|| lost(&mut client) > before);
    // Who comes now finds the last 64 KiB first and then loses nothing: one piece of the sequence.
    let mut stream = connect(&monitor);
    let seen = read(&mut stream, 4 * MIB);
    let is_from = |place: &u64| (*place..).zip(&seen[..32]).all(|(place, &byte)| known(place) == byte);
    let first = (before..before + (1 << 32)).find(is_from).expect("it is of the sequence");
    assert!(seen == sequence(first, seen.len()));
    finish(monitor);
}

#[test]
fn a_client_that_writes_what_nobody_takes_keeps_neither_a_disk_of_the_loop_nor_qmp_waiting() {
    let Some(setup) = Setup::guest("mode=blk-load end=acpi op=read count=20000 bs=4096 depth=4") else { return };
    // There is no driver for the console.
    let chardev = format!("id=con0,path={}", setup.folder.path("console").display());
    let mut monitor = setup.option("-chardev", &chardev).disk("vda", MIB as u64, "direct=off").start();
    let mut client = monitor.qmp();
    let mut stream = connect(&monitor);
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = stream.write(&[b'x'; 65536]) {
        written += count;
        client.call("query-status");
    }
    assert!(written < 2 * MIB, "{written}");
    monitor.expect_ok();
}

#[test]
fn stop_and_cont_lose_nothing_and_a_client_may_come_and_go_while_the_guest_is_stopped() {
    let Some((monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    let mut stream = connect(&monitor);
    let sent = sequence(0, 2 * MIB);
    let mut writer = stream.try_clone().unwrap();
    let mine = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&mine).unwrap());
    let mut received = Vec::new();
    while received.len() < sent.len() {
        client.call("stop");
        client.call("cont");
        let len = (sent.len() - received.len()).min(20_000);
        received.extend(read(&mut stream, len));
    }
    writing.join().unwrap();
    assert!(received == sent);
    client.call("stop");
    stream.write_all(b"before").unwrap();
    drop(stream);
    let mut stream = connect(&monitor);
    stream.write_all(b" and after").unwrap();
    client.call("query-chardev");
    client.call("cont");
    assert_eq!(read(&mut stream, 16), b"before and after");
    finish(monitor);
}

#[test]
fn a_reset_by_the_guest_loses_nothing_that_a_client_has_written() {
    let Some((mut monitor, mut client)) = start(&format!("op=check bytes={MIB}"), |setup| setup) else { return };
    let mut stream = connect(&monitor);
    let writing = thread::spawn(move || {
        stream.write_all(&sequence(0, MIB)).unwrap();
        stream
    });
    for n in 1..=20 {
        // What has come is taken at the reset; the guest does not look before.
        monitor.type_in(if n % 2 == 0 { "pr" } else { "gr" });
        await_text(&monitor, &format!("console: reset {n}\n"));
    }
    monitor.type_in("g");
    await_text(&monitor, &format!("console: done received={MIB} sent=0\n"));
    let _stream = writing.join().unwrap();
    assert_eq!(chardev(&mut client)["frontend-open"], true);
    finish(monitor);
}

#[test]
fn a_client_stays_through_a_reset_of_the_machine() {
    let Some(setup) = Setup::guest_that_reboots("mode=console op=echo end=acpi") else { return };
    let chardev = format!("id=con0,path={}", setup.folder.path("console").display());
    let monitor = setup.option("-chardev", &chardev).stdin(Stdio::piped()).start();
    let mut client = monitor.qmp();
    let mut stream = connect(&monitor);
    for _ in 0..3 {
        stream.write_all(b"life").unwrap();
        assert_eq!(read(&mut stream, 4), b"life");
        client.call("system_reset");
    }
    stream.write_all(b"and on").unwrap();
    assert_eq!(read(&mut stream, 6), b"and on");
    finish(monitor);
}

#[test]
fn the_size_of_the_terminal_reaches_the_guest() {
    let Some((mut monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    for (columns, rows) in [(80, 25), (132, 43), (65535, 1)] {
        client.call_with("chardev-resize", &json!({"id": "con0", "cols": columns, "rows": rows}));
        await_text(&monitor, &format!("console: terminal {columns}x{rows}\n"));
    }
    monitor.type_in("r");
    await_text(&monitor, "console: reset 1\n");
    let asked = json!({"execute": "chardev-resize", "arguments": {"id": "con0", "cols": 65536, "rows": 1}});
    let (class, told) = client.mistake(&asked.to_string());
    assert!(class == "GenericError" && told.contains("'cols' takes an integer from 0 to 65535"), "{told}");
    let asked = json!({"execute": "chardev-resize", "arguments": {"id": "con1", "cols": 1, "rows": 1}});
    assert_eq!(client.mistake(&asked.to_string()), ("DeviceNotFound".into(), "Chardev 'con1' not found".into()));
    finish(monitor);
}

#[test]
fn a_chardev_is_taken_from_its_console_and_another_given_to_it() {
    let Some((monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    let path = monitor.folder.path("console");
    let named = |path: &Path, prefix: &str| json!(format!("{prefix}unix:{},server=on", path.display()));
    assert_eq!(
        chardev(&mut client),
        json!({"label": "con0", "filename": named(&path, "disconnected:"), "frontend-open": true, "lost-bytes": 0})
    );
    let mut stream = connect(&monitor);
    stream.write_all(b"x").unwrap();
    assert_eq!(read(&mut stream, 1), b"x");
    assert_eq!(chardev(&mut client)["filename"], named(&path, ""));
    // One that is there is not added, nor one that no console has.
    let (class, told) = client.mistake(&json!({"execute": "chardev-add", "arguments": add(&path)}).to_string());
    assert_eq!(
        (class.as_str(), &told[..]),
        ("GenericError", "Chardev 'con0' already exists; accepted: after chardev-remove")
    );
    let mut other = add(&path);
    other["id"] = json!("con1");
    let (class, told) = client.mistake(&json!({"execute": "chardev-add", "arguments": other}).to_string());
    assert!(class == "DeviceNotFound" && told.contains("No console has the chardev 'con1'"), "{class} {told}");
    assert_eq!(client.call_with("chardev-remove", &json!({"id": "con0"})), json!({}));
    assert!(!path.exists());
    assert_eq!(rest(&mut stream), b"");
    assert_eq!(chardev(&mut client)["filename"], "null");
    let again = json!({"execute": "chardev-remove", "arguments": {"id": "con0"}}).to_string();
    assert_eq!(client.mistake(&again), ("DeviceNotFound".into(), "Chardev 'con0' not found".into()));
    // What cannot be made leaves it as it is.
    fs::write(&path, "precious").unwrap();
    let (class, told) = client.mistake(&json!({"execute": "chardev-add", "arguments": add(&path)}).to_string());
    assert!(class == "GenericError" && told.contains("no socket"), "{told}");
    fs::remove_file(&path).unwrap();
    let mut waits = add(&path);
    waits["backend"]["data"]["wait"] = json!(true);
    let (class, told) = client.mistake(&json!({"execute": "chardev-add", "arguments": waits}).to_string());
    assert!(class == "GenericError" && told.contains("without waiting"), "{told}");
    assert_eq!(client.call_with("chardev-add", &add(&path)), json!({}));
    let mut stream = connect(&monitor);
    stream.write_all(b"y").unwrap();
    assert_eq!(read(&mut stream, 1), b"y");
    finish(monitor);
    assert!(!path.exists());
}

#[test]
fn without_a_console_there_is_nothing_to_connect() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let path = setup.folder.path("console");
    let monitor = setup.start();
    let mut client = monitor.qmp();
    assert_eq!(client.call("query-chardev"), json!([]));
    let (class, told) = client.mistake(&json!({"execute": "chardev-add", "arguments": add(&path)}).to_string());
    assert!(
        class == "DeviceNotFound" && told.contains("a console cannot be plugged into a machine that runs"),
        "{told}"
    );
}

#[test]
fn the_socket_is_its_owners_alone_and_removed_at_the_end_and_a_live_one_is_left_alone() {
    let Some((mut monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    let path = monitor.folder.path("console");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let setup = Setup::bare().option("-kernel", guest().to_str().unwrap());
    let (code, told) = setup.option("-chardev", &format!("id=other,path={}", path.display())).run();
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("chardev \"other\"") && told.contains("another process listens"), "{told}");
    // It was asked whether anybody listens, which is a client that has gone again.
    let mut stream = connect(&monitor);
    stream.write_all(b"z").unwrap();
    assert_eq!(read(&mut stream, 1), b"z");
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!path.exists());
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn a_driver_that_breaks_every_rule_harms_nobody_and_works_after_a_reset() {
    let Some((monitor, mut client)) = start("op=echo hostile=on", |setup| setup) else { return };
    let lines = monitor.log.text().lines().filter(|line| line.contains("con0: ")).count();
    assert!((1..=60).contains(&lines), "{lines} lines:\n{}", monitor.log.text());
    // What it sent of its memory meanwhile is somebody's to read.
    let mut stream = connect(&monitor);
    assert!(rest(&mut stream).len() <= 64 << 10);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"works").unwrap();
    assert_eq!(read(&mut stream, 5), b"works");
    client.call("query-status");
    finish(monitor);
}

#[test]
fn the_later_spelling_is_the_same_console_and_several_are_each_their_own() {
    let Some(setup) = Setup::guest("mode=console end=acpi op=echo console=1") else { return };
    let path = |name: &str| setup.folder.path(name).display().to_string();
    let early = format!("id=con0,path={}", path("other"));
    let late = format!("socket,id=sock1,path={},server,nowait", path("console"));
    let setup = setup.option("-chardev", &early).option("-chardev", &late).flag("-device").flag("virtio-serial-device");
    let monitor = setup.option("-device", "virtconsole,chardev=sock1,id=con1").stdin(Stdio::piped()).start();
    monitor.serial.expect("console: begin");
    let mut client = monitor.qmp();
    let mut stream = connect(&monitor);
    stream.write_all(b"second").unwrap();
    assert_eq!(read(&mut stream, 6), b"second");
    let chardevs = client.call("query-chardev");
    let label = |n: usize| (chardevs[n]["label"].as_str().unwrap(), chardevs[n]["frontend-open"].as_bool().unwrap());
    assert_eq!([label(0), label(1)], [("con0", false), ("sock1", true)]);
    finish(monitor);
}

#[test]
fn a_monitor_without_descriptors_accepts_the_client_when_it_has_one_again() {
    let Some((monitor, mut client)) = start("op=echo", |setup| setup) else { return };
    let pid = monitor.pid();
    let limit = |count: &str| {
        let count = format!("--nofile={count}");
        Command::new("prlimit").args(["--pid", &pid.to_string(), &count]).status().is_ok_and(|status| status.success())
    };
    let open = |fd: &u32| fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_ok();
    // Below it there is none free.
    let none = (0..).find(|fd| !open(fd)).unwrap();
    if !limit(&format!("{none}:1024")) {
        return skipped("prlimit cannot be had");
    }
    let mut stream = connect(&monitor);
    stream.write_all(b"late").unwrap();
    monitor.log.expect("accept a client: ");
    client.call("query-status");
    assert!(limit("1024:1024"));
    assert_eq!(read(&mut stream, 4), b"late");
    let lines = monitor.log.text().lines().filter(|line| line.contains("accept a client: ")).count();
    assert!(lines < 20, "{lines} lines");
    finish(monitor);
}
