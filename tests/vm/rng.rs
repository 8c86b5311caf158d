//! Random numbers for the guest: there, different, in bounded pieces, and never more than the limit lets through.

use std::collections::HashMap;

use crate::monitor::{Monitor, Setup};

/// What the guest says at its end.
fn figures(monitor: &Monitor) -> HashMap<String, i64> {
    let text = monitor.serial.text();
    let line = text.lines().find_map(|line| line.strip_prefix("rng: ")).expect("a line of figures");
    line.split(' ')
        .filter_map(|word| word.split_once('='))
        .map(|(key, value)| (key.into(), value.parse().unwrap()))
        .collect()
}

/// Runs the guest with these words and the device in these.
fn run(words: &str, options: &[(&str, &str)]) -> Option<HashMap<String, i64>> {
    let mut setup = Setup::guest(&format!("mode=rng end=acpi {words}"))?;
    for (name, value) in options {
        setup = if value.is_empty() { setup.flag(name) } else { setup.option(name, value) };
    }
    let mut monitor = setup.start();
    monitor.expect_ok();
    Some(figures(&monitor))
}

#[test]
fn a_guest_gets_bytes_that_differ_in_pieces_of_64_kib_at_most() {
    let Some(found) = run("count=500 bytes=64 depth=8", &[("-rng", "")]) else { return };
    assert_eq!((found["bytes"], found["shortest"], found["longest"]), (500 * 64, 64, 64));
    let options = [("-object", "rng-random,id=r,filename=/dev/urandom"), ("-device", "virtio-rng-device,rng=r")];
    let Some(found) = run("count=200 bytes=1M depth=16", &options) else { return };
    assert_eq!((found["shortest"], found["longest"]), (64 << 10, 64 << 10));
}

#[test]
fn a_guest_that_asks_for_more_is_never_ahead_of_its_limit() {
    for (rate, count, words) in [(4000, 300, "bytes=64 depth=4"), (1_000_000, 400, "bytes=100K depth=16")] {
        let limit = format!("random_file=/dev/urandom,bytes_per_sec={rate}");
        let words = format!("{words} count={count} rate={rate}");
        let Some(found) = run(&words, &[("-rng", &limit)]) else { return };
        println!("{limit}: {found:?}");
        // A half millisecond's worth saved up, an answer, and the clock's step.
        let saved = rate / 2000 + rate / 256 + 1;
        assert!(found["over"] <= saved, "{} bytes ahead of {rate} a second", found["over"]);
        assert!(found["longest"] <= rate / 256);
    }
}

#[test]
fn a_file_that_is_no_character_device_is_refused_with_those_that_do() {
    let Some(setup) = Setup::guest("mode=rng") else { return };
    let path = setup.folder.path("bytes");
    std::fs::write(&path, [7; 4096]).unwrap();
    let (code, told) = setup.option("-rng", &format!("random_file={}", path.display())).run();
    assert_eq!(code, 2, "{told}");
    assert!(told.contains("bytes is no character device; accepted: /dev/urandom"), "{told}");
    let Some(setup) = Setup::guest("mode=rng") else { return };
    let (code, told) = setup.option("-rng", "random_file=/dev/nothing-of-the-kind").run();
    assert!(code == 1 && told.contains("/dev/nothing-of-the-kind: No such file"), "{code} {told}");
}
