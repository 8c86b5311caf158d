//! The console on its Unix socket: bytes both ways, clients that come, go, and do not read, and a guest that floods it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup};

const MIB: usize = 1 << 20;

/// The byte at a place of the sequence that the guest knows.
fn known(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
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
