//! The device as a driver meets it: real chains, a real loop, and as sources the kernel's generator and the ends of sockets
//! that have something, nothing, or no other end.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::virtio::Command;
use crate::virtio::testing::*;

const SECOND_NS: u64 = 1_000_000_000;

fn urandom() -> File {
    File::open("/dev/urandom").unwrap()
}

/// A source that has what is written to the other end.
fn trickle() -> (File, UnixStream) {
    let (source, other) = UnixStream::pair().unwrap();
    source.set_nonblocking(true).unwrap();
    (File::from(OwnedFd::from(source)), other)
}

fn start(source: File, limit: Option<u64>) -> (Guest, Vring) {
    let ram = ram();
    let mut guest = Guest::new(Rng::new("rng", source, limit, ram.clone()), ram);
    let ring = guest.start(0, 64);
    (guest, ring)
}

/// Sends a chain and turns the loop until nothing happens: the lengths that have come back.
fn send(guest: &mut Guest, ring: &mut Vring, descs: &[Desc]) -> Vec<u32> {
    ring.add(descs);
    guest.run(0);
    ring.take_used().into_iter().map(|(_, len)| len).collect()
}

#[test]
fn a_buffer_of_any_shape_is_filled_with_bytes_that_differ_and_nothing_beside_it_is_touched() {
    let (mut guest, mut ring) = start(urandom(), None);
    guest.put(DATA, &[0; 8192]);
    let pieces = [Desc::writable(DATA + 16, 100), Desc::writable(DATA + 500, 0), Desc::writable(DATA + 1000, 3000)];
    assert_eq!(send(&mut guest, &mut ring, &pieces), [3100]);
    let bytes = guest.get(DATA, 8192);
    let outside = [&bytes[..16], &bytes[116..1000], &bytes[4000..]].concat();
    assert!(outside.iter().all(|byte| *byte == 0));
    let filled = [&bytes[16..116], &bytes[1000..4000]].concat();
    // Of 3100 random bytes none of the 256 values is missing but once in a thousand runs, and 200 never are.
    let values: std::collections::BTreeSet<u8> = filled.iter().copied().collect();
    assert!(values.len() > 200, "{} values", values.len());
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA + 4096, 100)]), [100]);
    assert_ne!(guest.get(DATA + 4096, 100), filled[..100]);
}

#[test]
fn a_longer_buffer_than_64_kib_comes_back_short() {
    let (mut guest, mut ring) = start(urandom(), None);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(HIGH, HIGH_BYTES as u32)]), [64 << 10]);
    assert!(guest.get(HIGH + (64 << 10), 4096).iter().all(|byte| *byte == 0));
    // A table of more pieces than one call takes: what fits.
    let pieces: Vec<Desc> = (0..64).map(|n| Desc::writable(HIGH + 4096 * n, 4096)).collect();
    assert_eq!(send(&mut guest, &mut ring, &pieces), [64 << 10]);
}

#[test]
fn buffers_that_make_no_sense_are_answered_empty_and_logged_at_a_limited_rate() {
    let (mut guest, mut ring) = start(urandom(), None);
    for _ in 0..100 {
        for desc in [
            Desc::readable(DATA, 100),
            Desc::writable(DATA, 0),
            Desc::writable(LOW_BYTES, 8),
            Desc::writable(LOW_BYTES - 4, 8),
            Desc::writable(u64::MAX - 3, 8),
        ] {
            assert_eq!(send(&mut guest, &mut ring, &[desc]), [0]);
        }
    }
    // What lies in memory before that is filled.
    let cut = [Desc::writable(DATA, 10), Desc::writable(LOW_BYTES - 4, 8)];
    assert_eq!(send(&mut guest, &mut ring, &cut), [10]);
    assert_eq!(guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_turn_reads_a_bounded_number_of_bytes_and_the_rest_comes_in_the_next() {
    let (mut guest, mut ring) = start(urandom(), None);
    for _ in 0..64 {
        ring.add(&[Desc::writable(HIGH, 64 << 10)]);
    }
    guest.kick(0);
    let mut turns = 0;
    let mut done = 0;
    while done < 64 {
        guest.event_loop.turn(crate::event::Wait::Poll).unwrap();
        let now = ring.take_used();
        assert!(now.iter().map(|(_, len)| u64::from(*len)).sum::<u64>() <= BYTES_PER_TURN);
        done += now.len();
        turns += 1;
        assert!(turns < 200, "{done} in {turns} turns");
    }
    assert!(turns >= 32, "{turns}");
}

#[test]
fn a_source_that_has_nothing_is_waited_for_without_a_turn_and_goes_on_when_it_has_something() {
    let (source, mut other) = trickle();
    let (mut guest, mut ring) = start(source, None);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [0; 0]);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA + 10, 10)]), [0; 0]);
    let mut called = 0;
    for _ in 0..100 {
        guest.kick(0);
        called += guest.event_loop.turn(crate::event::Wait::Poll).unwrap();
    }
    assert!(called <= 2, "{called} calls for kicks that say nothing");
    other.write_all(&[7; 15]).unwrap();
    guest.turn();
    assert_eq!(ring.take_used().iter().map(|(_, len)| *len).collect::<Vec<_>>(), [10, 5]);
    assert_eq!(guest.get(DATA, 16), [[7; 15].as_slice(), &[0]].concat());
    // What comes while nobody asks is left where it is, and wakes nobody.
    other.write_all(&[8; 4]).unwrap();
    assert_eq!(guest.event_loop.turn(crate::event::Wait::Poll).unwrap(), 0);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [4]);
}

#[test]
fn a_source_that_ends_while_it_is_waited_for_is_answered_empty_from_then_on() {
    let (source, other) = trickle();
    let (mut guest, mut ring) = start(source, None);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [0; 0]);
    drop(other);
    guest.turn();
    assert_eq!(ring.take_used().len(), 1);
    for _ in 0..100 {
        assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [0]);
    }
}

#[test]
fn neither_a_pause_nor_a_reset_waits_for_the_source_and_the_next_driver_gets_its_bytes() {
    let (source, mut other) = trickle();
    let (mut guest, mut ring) = start(source, None);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [0; 0]);
    let paused = guest.command(Command::Pause);
    guest.turn();
    assert_eq!(paused.load(SeqCst), 1);
    other.write_all(&[7; 3]).unwrap();
    guest.turn();
    assert!(ring.take_used().is_empty(), "a paused machine's memory stands still");
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!(ring.take_used().len(), 1);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [0; 0]);
    guest.reset();
    other.write_all(&[9; 3]).unwrap();
    let mut ring = guest.start(0, 64);
    assert_eq!(send(&mut guest, &mut ring, &[Desc::writable(DATA, 10)]), [3]);
}

/// How many bytes came when, from a driver that always has `depth` buffers of `len` bytes with the device.
fn arrivals(limit: u64, depth: usize, len: u32, seconds: u64, mut each: impl FnMut(&mut Guest)) -> Vec<(u64, u64)> {
    let (mut guest, mut ring) = start(urandom(), Some(limit));
    for _ in 0..depth {
        ring.add(&[Desc::writable(DATA, len)]);
    }
    guest.kick(0);
    let mut came = Vec::new();
    let end = seconds * SECOND_NS;
    while guest.clock.load(SeqCst) < end {
        guest.turn();
        let used = ring.take_used();
        let bytes = used.iter().map(|(_, len)| u64::from(*len)).sum();
        if bytes > 0 {
            came.push((guest.clock.load(SeqCst), bytes));
        }
        for _ in &used {
            ring.add(&[Desc::writable(DATA, len)]);
        }
        if !used.is_empty() {
            guest.kick(0);
        }
        // Often late, and never exactly on time.
        guest.clock.fetch_add(170_001, SeqCst);
        each(&mut guest);
    }
    came
}

#[test]
fn no_second_has_more_bytes_than_the_limit_and_in_the_long_run_it_is_that_within_a_per_cent_or_so() {
    for (limit, depth, len, least) in [
        (64, 1, 64, 95),
        (64, 8, 1 << 20, 95),
        (1000, 2, 16, 98),
        (100_000, 4, 64, 98),
        (5_000_000, 16, 100_000, 98),
        (50_000_000, 64, 65_536, 98),
    ] {
        let came = arrivals(limit, depth, len, 5, |_| ());
        let mut first = 0;
        let mut sum = 0;
        let mut worst = 0;
        for &(at, bytes) in &came {
            sum += bytes;
            while came[first].0 + SECOND_NS <= at {
                sum -= came[first].1;
                first += 1;
            }
            worst = worst.max(sum);
        }
        assert!(worst <= limit, "{worst} bytes in a second of {limit}");
        let total: u64 = came.iter().map(|(_, bytes)| bytes).sum();
        assert!(total * 100 >= limit * 5 * least, "{total} bytes in five seconds of {limit}");
    }
}

#[test]
fn what_the_source_did_not_give_is_not_paid_for_twice() {
    let (source, mut other) = trickle();
    let (mut guest, mut ring) = start(source, Some(256 * 100));
    // Each buffer is let go for a hundred bytes, of which the source has one at a time.
    let mut came = 0;
    for _ in 0..1000 {
        ring.add(&[Desc::writable(DATA, 100)]);
        guest.run(0);
        other.write_all(&[1]).unwrap();
        guest.turn();
        came += ring.take_used().iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
        guest.clock.fetch_add(100_000, SeqCst);
    }
    // A thousand bytes in a tenth of a second that allows more than two thousand.
    assert!(came > 900, "{came}");
}
