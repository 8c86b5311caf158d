//! Streams between a guest and Unix sockets of the host's: both ways, many at once, through a stop and a reset, and with a
//! driver that breaks every rule.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::thread;

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
    let bytes = stream.bytes().map(|byte| byte.unwrap()).take_while(|byte| *byte != b'\n');
    String::from_utf8(bytes.collect()).unwrap()
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
    finish(monitor);
    assert!(!path.exists());
}
