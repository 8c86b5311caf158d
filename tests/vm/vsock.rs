//! Streams between a guest and Unix sockets of the host's: both ways, many at once, through a stop and a reset, and with a
//! driver that breaks every rule.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::monitor::{Monitor, PATIENCE, Setup};

/// A guest that listens at port 52.
fn start(words: &str) -> Option<Monitor> {
    let monitor = prepare(words)?.stdin(Stdio::piped()).start();
    monitor.serial.expect("vsock: begin");
    Some(monitor)
}

fn prepare(words: &str) -> Option<Setup> {
    let setup = Setup::guest(&format!("mode=vsock end=acpi {words}"))?;
    let device = format!("vsock,id=v,guest-cid=7,uds_path={}", setup.folder.path("v").display());
    Some(setup.option("-device", &device))
}

/// A client that is to be connected to this port of the guest's.
fn dial(monitor: &Monitor, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(monitor.folder.path("v")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    stream
}

/// One that is connected.
fn connect(monitor: &Monitor, port: u32) -> UnixStream {
    let stream = dial(monitor, port);
    assert!(line(&stream).starts_with("OK 1"));
    stream
}

/// The monitor's answer, read a byte at a time: what follows is the guest's.
fn line(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    line
}

/// Bytes that differ from their neighbours and from those of another seed.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(|_| next()).collect()
}

/// Sends bytes, ends the sending side, and expects the same bytes and the end.
#[track_caller]
fn echo(mut stream: UnixStream, bytes: &[u8]) {
    let mut reader = stream.try_clone().unwrap();
    let reads = thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).map(|_| back)
    });
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let back = reads.join().unwrap().unwrap();
    assert!(back == bytes, "{} bytes came back of {}, or others", back.len(), bytes.len());
}

#[track_caller]
fn finish(mut monitor: Monitor) {
    monitor.type_in("q");
    monitor.expect_ok();
    assert!(monitor.serial.text().contains("open=0"), "a stream was left");
}

#[test]
fn a_client_of_the_hosts_talks_to_a_listener_in_the_guest() {
    let Some(monitor) = start("") else { return };
    let mode = std::fs::metadata(monitor.folder.path("v")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for size in [1, 100, 4096, 65_536, 1_000_003] {
        echo(connect(&monitor, 52), &noise(size as u64, size));
    }
    let path = monitor.folder.path("v");
    let told = monitor.qmp().call("query-vsock")[0].take();
    let bytes = 1 + 100 + 4096 + 65_536 + 1_000_003;
    assert_eq!((&told["id"], &told["guest-cid"], &told["uds-path"]), (&json!("v"), &json!(7), &json!(path)));
    assert_eq!((&told["opened"], &told["refused"]), (&json!(5), &json!(0)));
    assert_eq!((&told["rx-bytes"], &told["tx-bytes"]), (&json!(bytes), &json!(bytes)));
    finish(monitor);
    assert!(!path.exists());
}

/// Listens at a port of the host's, and sends back what comes through each connection until its end.
fn echo_service(monitor: &Monitor, port: u32) {
    let listener = UnixListener::bind(monitor.folder.path(&format!("v_{port}"))).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                let _ = std::io::copy(&mut from, &mut to);
            });
        }
    });
}

/// How many descriptors the monitor has open.
fn descriptors(monitor: &Monitor) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().count()
}

/// How often the main loop has turned.
fn turns(monitor: &Monitor) -> u64 {
    let dump = monitor.dump(1);
    let (_, rest) = dump.split_once("Counters { turns: ").unwrap();
    rest.split(',').next().unwrap().parse().unwrap()
}

#[test]
fn the_guest_talks_to_who_listens_on_the_host_and_is_refused_where_nobody_does() {
    let Some(mut monitor) = start("connect=53 count=40 bytes=200000") else { return };
    monitor.serial.expect("vsock: connected=0 refused=40");
    echo_service(&monitor, 53);
    monitor.type_in("c");
    monitor.serial.expect("vsock: connected=40 refused=0");
    finish(monitor);
}

/// What Kata Containers' Rust runtime and Firecracker's clients send.
#[test]
fn a_client_may_say_connect_in_any_case_and_with_blanks() {
    let Some(monitor) = start("") else { return };
    for said in ["connect 52\n", "CONNECT 52\r\n", " Connect  52 \n"] {
        let mut stream = UnixStream::connect(monitor.folder.path("v")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(said.as_bytes()).unwrap();
        assert!(line(&stream).starts_with("OK "), "{said:?}");
        echo(stream, b"well");
    }
    finish(monitor);
}

#[test]
fn a_client_is_let_go_whose_line_is_none_or_whose_port_nobody_listens_at() {
    let Some(monitor) = start("") else { return };
    for stream in [dial(&monitor, 53), dial(&monitor, u32::MAX)] {
        assert_eq!(line(&stream), "");
    }
    for said in ["HELLO 52\n", "CONNECT fifty\n", "CONNECT 99999999999\n", "GET / HTTP/1.1\r\nHost: x\r\n"] {
        let mut stream = UnixStream::connect(monitor.folder.path("v")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(said.as_bytes()).unwrap();
        // The end, or a reset for what was not read.
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "{said:?}");
    }
    echo(connect(&monitor, 52), b"well");
    finish(monitor);
}

#[test]
fn a_thousand_connections_are_opened_and_closed_and_leave_no_descriptor_behind() {
    let Some(monitor) = start("") else { return };
    echo(connect(&monitor, 52), b"first");
    let before = descriptors(&monitor);
    for round in 0..20u64 {
        let streams: Vec<UnixStream> = (0..50).map(|_| connect(&monitor, 52)).collect();
        for (number, stream) in (0..).zip(streams) {
            let bytes = noise(round * 50 + number, 3000);
            match number % 5 {
                // Some leave without a word, some before they were answered.
                0 => drop(stream),
                1 => drop(dial(&monitor, 52)),
                _ => echo(stream, &bytes),
            }
        }
    }
    let left = || descriptors(&monitor).saturating_sub(before);
    for _ in 0..500 {
        if left() == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(left(), 0, "descriptors are left of {before}");
    finish(monitor);
}

#[test]
fn streams_go_on_after_any_number_of_stops_and_no_byte_is_lost() {
    let Some(monitor) = start("") else { return };
    let mut client = monitor.qmp();
    let streams: Vec<_> = (1..4)
        .map(|seed| {
            let stream = connect(&monitor, 52);
            thread::spawn(move || echo(stream, &noise(seed, 3_000_000)))
        })
        .collect();
    let mut stops = 0;
    while !streams.iter().all(|stream| stream.is_finished()) {
        client.call("stop");
        thread::sleep(Duration::from_millis(2));
        client.call("cont");
        thread::sleep(Duration::from_millis(5));
        stops += 1;
    }
    streams.into_iter().for_each(|stream| stream.join().unwrap());
    assert!(stops > 2, "{stops}");
    finish(monitor);
}

#[test]
fn a_reset_of_the_device_closes_all_streams_and_new_ones_work() {
    let Some(mut monitor) = start("") else { return };
    for round in 1..4 {
        let mut streams: Vec<UnixStream> = (0..10).map(|_| connect(&monitor, 52)).collect();
        monitor.type_in("r");
        let resets = |text: &str, _| (text.matches("vsock: reset").count() == round).then_some(());
        assert!(monitor.serial.wait(PATIENCE, resets).is_some());
        for stream in &mut streams {
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        }
        echo(connect(&monitor, 52), b"anew");
    }
    finish(monitor);
}

#[test]
fn a_driver_that_breaks_every_rule_harms_nobody_and_works_after_a_reset() {
    let Some(monitor) = start("hostile=on connect=53") else { return };
    monitor.serial.expect("vsock: misbehaved");
    let lines = monitor.log.text().lines().filter(|line| line.contains(" v: ")).count();
    assert!((1..=60).contains(&lines), "{lines} lines of some thousand faults:\n{}", monitor.log.text());
    echo(connect(&monitor, 52), &noise(1, 100_000));
    finish(monitor);
}

#[test]
fn a_guest_that_takes_nothing_costs_the_host_nothing_and_gets_everything_later() {
    let Some(mut monitor) = start("") else { return };
    let stream = connect(&monitor, 52);
    monitor.type_in("p");
    monitor.serial.expect("vsock: reads nothing");
    let sends = thread::spawn(move || echo(stream, &noise(5, 2_000_000)));
    // Until all is full: then the loop has nothing to do but to answer us.
    thread::sleep(Duration::from_millis(500));
    let before = turns(&monitor);
    thread::sleep(Duration::from_millis(1000));
    let turned = turns(&monitor) - before;
    assert!(turned < 50, "{turned} turns");
    assert!(!sends.is_finished());
    monitor.type_in("g");
    sends.join().unwrap();
    finish(monitor);
}

#[test]
fn a_live_socket_of_somebody_else_is_left_alone_and_the_start_fails() {
    let Some(setup) = prepare("") else { return };
    let _listener = UnixListener::bind(setup.folder.path("v")).unwrap();
    let (code, told) = setup.run();
    assert!(code == 1 && told.contains("-device vsock,id=v") && told.contains("another process listens"), "{told}");
}
