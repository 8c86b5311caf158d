//! The console as a driver and a client meet it, honest or not: real chains, a real loop, a real socket, a clock set by hand.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::super::chardev::{INPUT_BYTES, PATIENCE_NS};
use super::*;
use crate::virtio::Command;
use crate::virtio::testing::*;

const ALL: u64 = SIZE | VERSION_1;
/// Where the driver has its buffers for output, and those for input.
const OUT: u64 = DATA;
const IN: u64 = DATA + 0x4_0000;
/// Bytes of a buffer for input.
const IN_BYTES: u32 = 4096;

fn place() -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Relaxed);
    std::env::temp_dir().join(format!("loopvisor-console-{}-{count}", std::process::id()))
}

fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

/// A driver with a console, and its socket.
struct Rig {
    guest: Guest,
    rings: Vec<Vring>,
    path: PathBuf,
    orders: Sender<Order>,
    state: Arc<ChardevState>,
    open: Arc<AtomicBool>,
    /// Buffers for input that the device has, by head.
    offered: std::collections::BTreeMap<u16, u64>,
}

impl Rig {
    fn new() -> Rig {
        let mut rig = Rig::idle();
        rig.start();
        rig
    }

    /// A driver that has not begun.
    fn idle() -> Rig {
        let (path, ram) = (place(), ram());
        let console = Console::new("con0", ram.clone(), PrivateListener::bind(&path).unwrap());
        let (orders, state, open) = (console.orders(), console.state(), console.open());
        let mut guest = Guest::new(console, ram);
        guest.turn();
        Rig { guest, rings: Vec::new(), path, orders, state, open, offered: Default::default() }
    }

    fn start(&mut self) {
        self.guest.negotiate(ALL);
        self.rings = (0..2).map(|queue| self.guest.set_up(queue, 64, false)).collect();
        self.offered.clear();
        self.guest.driver_ok();
        self.guest.turn();
    }

    fn client(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.guest.turn();
        stream
    }

    /// Offers output in buffers of the given lengths, as one chain.
    fn offer(&mut self, data: &[u8], lens: &[usize]) -> u16 {
        assert!(data.len() <= 0x4_0000);
        self.guest.put(OUT, data);
        let mut at = OUT;
        let descs: Vec<Desc> = lens
            .iter()
            .map(|&len| {
                at += len as u64;
                Desc::readable(at - len as u64, len as u32)
            })
            .collect();
        self.rings[TRANSMIT].add(&descs)
    }

    /// Sends in one buffer: whether it has come back.
    fn send(&mut self, data: &[u8]) -> bool {
        let head = self.offer(data, &[data.len()]);
        self.guest.run(TRANSMIT);
        self.rings[TRANSMIT].take_used().contains(&(head, 0))
    }

    /// Offers `count` buffers for input.
    fn take_input(&mut self, count: usize) {
        for _ in 0..count {
            let place = (0..16)
                .map(|n| IN + n * u64::from(IN_BYTES))
                .find(|place| self.offered.values().all(|other| other != place));
            let Some(place) = place else { break };
            let head = self.rings[RECEIVE].add(&[Desc::writable(place, IN_BYTES)]);
            self.offered.insert(head, place);
        }
        self.guest.run(RECEIVE);
    }

    /// What has come into the buffers offered.
    fn received(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        for (head, len) in self.rings[RECEIVE].take_used() {
            let place = self.offered.remove(&head).unwrap();
            all.extend(self.guest.get(place, len as usize));
        }
        all
    }

    /// Takes input until no more comes.
    fn receive_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            self.take_input(8);
            let more = self.received();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }

    fn pass(&mut self, ns: u64) {
        self.guest.clock.fetch_add(ns, Relaxed);
        self.guest.turn();
    }

    fn lost(&self) -> u64 {
        self.state.lost_bytes.load(Relaxed)
    }

    fn connected(&self) -> bool {
        self.state.connected.load(Relaxed)
    }

    fn listen(&mut self, listener: Option<PrivateListener>) {
        let done = Done::posted(|listens| assert!(matches!(listens, Ok(Ok(())))));
        assert!(self.orders.send(Order::Listen(listener, done)).is_ok());
        self.guest.turn();
    }

    fn size(&self) -> [u32; 2] {
        let word = self.guest.read(reg::CONFIG);
        [word & 0xffff, word >> 16]
    }

    /// What the client can have now, the loop having its turn in between.
    fn drain(&mut self, stream: &mut UnixStream) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let more = available(stream, usize::MAX);
            self.guest.turn();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }
}

/// What is there to be read, up to `most`.
fn available(stream: &mut UnixStream, most: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    while all.len() < most {
        let len = piece.len().min(most - all.len());
        match stream.read(&mut piece[..len]) {
            Ok(0) => break,
            Ok(count) => all.extend(&piece[..count]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    all
}

fn is_let_go(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0; 1]).is_ok_and(|count| count == 0)
}

#[test]
fn bytes_go_both_ways() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    assert!(rig.connected() && rig.open.load(Relaxed));
    assert!(rig.send(b"login: "));
    assert_eq!(available(&mut client, 100), b"login: ");
    rig.take_input(2);
    client.write_all(b"root\n").unwrap();
    rig.guest.turn();
    assert_eq!(rig.received(), b"root\n");
    // And without an interrupt that says so nobody would look.
    assert!(rig.guest.interrupts() > 0);
    client.write_all(b"x").unwrap();
    rig.guest.turn();
    assert_eq!(rig.received(), b"x");
}

#[test]
fn a_chain_of_many_buffers_is_sent_in_order_and_input_fills_one_in_order() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let data = bytes(7, 10_000);
    rig.offer(&data, &[1, 0, 4999, 2, 4000, 998, 0]);
    rig.guest.run(TRANSMIT);
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1);
    assert_eq!(available(&mut client, usize::MAX), data);
    client.write_all(&data[..3000]).unwrap();
    let lens = [1, 0, 999, 1500];
    let descs: Vec<Desc> = (0..).zip(lens).map(|(n, len)| Desc::writable(IN + n * 0x1000, len)).collect();
    rig.rings[RECEIVE].add(&descs);
    rig.guest.run(RECEIVE);
    assert_eq!(rig.rings[RECEIVE].take_used()[0].1, 2500);
    let filled: Vec<u8> = (0..).zip(lens).flat_map(|(n, len)| rig.guest.get(IN + n * 0x1000, len as usize)).collect();
    assert_eq!(filled, data[..2500]);
    assert_eq!(rig.receive_all(), data[2500..3000]);
}

#[test]
fn without_a_client_the_last_64_kib_are_kept_for_the_next_and_the_guest_waits_for_nobody() {
    let mut rig = Rig::new();
    let data = bytes(0, 300_000);
    for piece in data.chunks(1000) {
        assert!(rig.send(piece));
    }
    assert_eq!(rig.lost(), (data.len() - OUTPUT_BYTES) as u64);
    let mut client = rig.client();
    assert_eq!(rig.drain(&mut client), data[data.len() - OUTPUT_BYTES..]);
    assert!(rig.send(b"now"));
    assert_eq!(available(&mut client, 100), b"now");
    assert_eq!(rig.lost(), (data.len() - OUTPUT_BYTES) as u64);
}

#[test]
fn a_client_that_reads_in_its_own_time_loses_nothing_and_the_guest_waits() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let data = bytes(0, 2 << 20);
    let (mut read, mut waited) = (Vec::new(), 0);
    for piece in data.chunks(1 << 16) {
        let head = rig.offer(piece, &[piece.len()]);
        rig.guest.run(TRANSMIT);
        while rig.rings[TRANSMIT].take_used() != [(head, 0)] {
            waited += 1;
            // It takes a little shortly before its time is over, each time.
            rig.pass(PATIENCE_NS - 1);
            read.extend(available(&mut client, 50_000));
            rig.guest.turn();
        }
    }
    read.extend(rig.drain(&mut client));
    assert!(read == data, "{} of {}", read.len(), data.len());
    assert!(waited > 10, "{waited}");
    assert_eq!(rig.lost(), 0);
}

#[test]
fn a_client_that_does_not_read_for_a_second_loses_the_oldest_and_the_guest_waits_no_more() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let data = bytes(0, 3 << 20);
    let (mut pieces, mut sent) = (data.chunks(5000), 0);
    // Until its socket and the buffer are full.
    loop {
        let piece = pieces.next().unwrap();
        sent += piece.len();
        if !rig.send(piece) {
            break;
        }
    }
    assert!(sent > OUTPUT_BYTES && rig.lost() == 0);
    rig.pass(PATIENCE_NS - 1);
    assert!(rig.rings[TRANSMIT].take_used().is_empty());
    rig.pass(1);
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1, "its time is over");
    for piece in pieces {
        assert!(rig.send(piece), "waits again after {sent}");
        sent += piece.len();
    }
    assert_eq!(sent, data.len());
    // What is missing is one piece in the middle, and counted.
    let read = rig.drain(&mut client);
    assert_eq!(read.len() as u64 + rig.lost(), sent as u64);
    assert_eq!(read[read.len() - OUTPUT_BYTES..], data[data.len() - OUTPUT_BYTES..]);
    let before = read.len() - OUTPUT_BYTES;
    assert_eq!(read[..before], data[..before]);
    // Who reads again is waited for again.
    let lost = rig.lost();
    let mut head = None;
    for piece in data.chunks(5000) {
        let sent = rig.offer(piece, &[piece.len()]);
        rig.guest.run(TRANSMIT);
        if rig.rings[TRANSMIT].take_used() != [(sent, 0)] {
            head = Some(sent);
            break;
        }
    }
    assert!(head.is_some());
    rig.drain(&mut client);
    assert_eq!(rig.rings[TRANSMIT].take_used(), [(head.unwrap(), 0)]);
    assert_eq!(rig.lost(), lost);
}

#[test]
fn a_guest_that_waits_for_a_client_goes_on_when_it_leaves() {
    let mut rig = Rig::new();
    let client = rig.client();
    while rig.send(&bytes(0, 60_000)) {}
    drop(client);
    rig.guest.turn();
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1);
    assert!(!rig.connected());
}

#[test]
fn what_a_client_writes_is_read_as_the_guest_takes_it_and_the_loop_does_not_spin_meanwhile() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let data = bytes(3, 1 << 20);
    let mut written = 0;
    // Nobody takes anything: this ends.
    while let Ok(count) = client.write(&data[written..]) {
        written += count;
        rig.guest.turn();
    }
    assert!(written < 600_000, "{written} bytes are somewhere");
    let mut received = Vec::new();
    while received.len() < data.len() {
        let more = rig.receive_all();
        assert!(!more.is_empty(), "nothing comes after {}", received.len());
        received.extend(more);
        written += client.write(&data[written..]).unwrap_or(0);
        rig.guest.turn();
    }
    assert!(received == data);
    assert!(rig.receive_all().is_empty());
}

#[test]
fn what_a_client_wrote_before_it_left_reaches_the_guest() {
    let mut rig = Rig::new();
    let data = bytes(5, 3 * INPUT_BYTES);
    let mut client = rig.client();
    client.write_all(&data).unwrap();
    drop(client);
    rig.guest.turn();
    assert!(!rig.connected());
    assert!(rig.receive_all() == data);
    // And before the driver came, too.
    let mut rig = Rig::idle();
    let mut client = rig.client();
    client.write_all(&data[..INPUT_BYTES]).unwrap();
    drop(client);
    let mut next = rig.client();
    assert!(rig.connected() && !rig.open.load(Relaxed));
    next.write_all(b"next").unwrap();
    rig.guest.turn();
    rig.start();
    assert_eq!(rig.receive_all(), [&data[..INPUT_BYTES], b"next"].concat());
}

#[test]
fn a_client_that_ends_its_own_side_is_still_written_to() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"uname\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    rig.guest.turn();
    assert_eq!(rig.receive_all(), b"uname\n");
    assert!(rig.send(b"Linux\n"));
    assert_eq!(available(&mut client, 100), b"Linux\n");
    assert!(rig.connected());
    drop(client);
    rig.guest.turn();
    assert!(!rig.connected());
    rig.client();
    assert!(rig.connected());
}

#[test]
fn a_client_that_reads_no_more_keeps_nothing_from_the_next() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.shutdown(Shutdown::Read).unwrap();
    assert!(rig.send(b"kept") && rig.send(b" too"));
    client.write_all(b"in").unwrap();
    rig.guest.turn();
    assert_eq!(rig.receive_all(), b"in");
    drop(client);
    rig.guest.turn();
    let mut next = rig.client();
    assert_eq!(available(&mut next, 100), b"kept too");
}

#[test]
fn a_chain_longer_than_the_buffer_waits_neither_for_a_client_that_reads_nor_for_one_that_will_not() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    // As much as the socket has room for.
    let data = bytes(0, 100_000);
    assert!(rig.send(&data));
    assert_eq!(rig.drain(&mut client), data);
    client.shutdown(Shutdown::Read).unwrap();
    assert!(rig.send(&data) && rig.send(&data));
    assert_eq!(rig.lost(), (2 * data.len() - OUTPUT_BYTES) as u64);
}

#[test]
fn a_second_client_waits_until_the_first_has_gone() {
    let mut rig = Rig::new();
    let mut first = rig.client();
    let mut second = rig.client();
    assert!(rig.send(b"one"));
    second.write_all(b"second").unwrap();
    rig.guest.turn();
    assert_eq!(available(&mut second, 100), b"");
    assert_eq!(rig.receive_all(), b"");
    assert_eq!(available(&mut first, 100), b"one");
    drop(first);
    rig.guest.turn();
    assert_eq!(rig.receive_all(), b"second");
    assert!(rig.send(b"two"));
    assert_eq!(available(&mut second, 100), b"two");
}

#[test]
fn a_hundred_clients_in_a_row_are_each_served() {
    let mut rig = Rig::new();
    for n in 0..100_u8 {
        let mut client = rig.client();
        client.write_all(&[n]).unwrap();
        assert!(rig.send(&[n, n]));
        assert_eq!(available(&mut client, 10), [n, n]);
        rig.guest.turn();
        assert_eq!(rig.receive_all(), [n]);
    }
}

#[test]
fn the_next_client_ends_what_the_last_has_left_unread() {
    let mut rig = Rig::new();
    let data = bytes(1, INPUT_BYTES + 5000);
    let mut client = rig.client();
    client.write_all(&data).unwrap();
    drop(client);
    rig.guest.turn();
    let mut next = rig.client();
    assert!(rig.connected());
    next.write_all(b"next").unwrap();
    rig.guest.turn();
    assert!(rig.receive_all() == [&data[..INPUT_BYTES], b"next"].concat());
}

#[test]
fn a_pause_and_a_resume_lose_nothing() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(Relaxed), 1);
    // What arrives on either side meanwhile waits.
    rig.offer(b"output", &[6]);
    rig.guest.kick(TRANSMIT);
    client.write_all(b"input").unwrap();
    rig.take_input(1);
    assert_eq!(rig.received(), b"");
    assert_eq!(available(&mut client, 100), b"");
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.guest.turn();
    assert_eq!(rig.received(), b"input");
    assert_eq!(available(&mut client, 100), b"output");
}

#[test]
fn a_pause_while_the_guest_waits_for_a_client_ends_at_once_and_the_client_reads_on() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let mut sent = 0;
    while rig.send(&bytes(sent, 60_000)) {
        sent += 60_000;
    }
    sent += 60_000;
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(Relaxed), 1);
    let mut read = rig.drain(&mut client);
    assert!(read.len() < sent, "what the guest has not passed on stays there");
    rig.pass(10 * PATIENCE_NS);
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.guest.turn();
    read.extend(rig.drain(&mut client));
    assert!(read == bytes(0, sent));
    assert_eq!(rig.lost(), 0);
}

#[test]
fn a_reset_leaves_what_is_on_its_way_to_the_next_driver_and_the_next_client() {
    let mut rig = Rig::new();
    assert!(rig.send(b"from the first life"));
    let mut client = rig.client();
    let (mut sent, mut read) = (19, Vec::new());
    while rig.send(&bytes(sent, 50_000)) {
        sent += 50_000;
    }
    client.write_all(&bytes(0, 3000)).unwrap();
    rig.guest.turn();
    rig.guest.reset();
    assert!(!rig.open.load(Relaxed));
    // The chain that was cut off is gone; what had been taken of it is sent.
    read.extend(rig.drain(&mut client));
    assert!(read.starts_with(b"from the first life") && read.len() >= sent && read.len() < sent + 50_000);
    assert!(read[19..] == bytes(19, read.len() - 19));
    rig.start();
    assert!(rig.open.load(Relaxed));
    assert_eq!(rig.receive_all(), bytes(0, 3000));
    assert!(rig.send(b"from the second"));
    assert_eq!(available(&mut client, 100), b"from the second");
}

#[test]
fn the_size_of_the_terminal_is_told_and_outlives_a_driver() {
    let mut rig = Rig::new();
    assert_eq!(rig.size(), [0, 0]);
    let generation = rig.guest.read(reg::CONFIG_GENERATION);
    rig.guest.interrupts();
    assert!(rig.orders.send(Order::Resize { columns: 132, rows: 43 }).is_ok());
    rig.guest.turn();
    assert_eq!(rig.size(), [132, 43]);
    assert_ne!(rig.guest.read(reg::CONFIG_GENERATION), generation);
    assert_eq!((rig.guest.interrupts(), rig.guest.read(reg::INTERRUPT_STATUS)), (1, 2));
    rig.client();
    assert_eq!(rig.guest.interrupts(), 0, "it is told once");
    rig.guest.reset();
    assert!(rig.orders.send(Order::Resize { columns: u16::MAX, rows: 1 }).is_ok());
    rig.guest.turn();
    assert_eq!(rig.guest.interrupts(), 0, "there is no driver");
    rig.start();
    assert_eq!(rig.size(), [65535, 1]);
}

#[test]
fn a_socket_that_is_taken_away_takes_its_client_along_and_the_output_waits_for_another() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let second = rig.client();
    while rig.send(&bytes(0, 60_000)) {}
    rig.listen(None);
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1, "there is nobody to wait for");
    available(&mut client, usize::MAX);
    assert!(is_let_go(&mut client) && !rig.path.exists() && !rig.connected());
    drop(second);
    assert!(rig.send(b"kept"));
    rig.path = place();
    let listener = PrivateListener::bind(&rig.path).unwrap();
    rig.listen(Some(listener));
    let mut client = rig.client();
    let read = rig.drain(&mut client);
    assert!(read.len() == OUTPUT_BYTES && read.ends_with(b"kept"));
    client.write_all(b"in").unwrap();
    rig.guest.turn();
    assert_eq!(rig.receive_all(), b"in");
    // One in the place of another, with nothing in between.
    let (old, new) = (rig.path.clone(), place());
    let listener = PrivateListener::bind(&new).unwrap();
    rig.listen(Some(listener));
    assert!(is_let_go(&mut client) && !old.exists());
    rig.path = new;
    rig.client();
    assert!(rig.connected());
}

#[test]
fn the_work_of_one_turn_is_bounded_whatever_the_length_of_a_chain() {
    let mut rig = Rig::new();
    // All of the lower memory, again and again: 120 MiB in 60 chains.
    for _ in 0..60 {
        rig.rings[TRANSMIT].add(&[Desc::readable(0, LOW_BYTES as u32)]);
    }
    rig.guest.kick(TRANSMIT);
    let mut turns = 0;
    while rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap() > 0 {
        turns += 1;
    }
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 60);
    // Only the end of each is copied, 64 KiB, and four such ends a turn; the buffer itself took one more.
    assert!((16..=32).contains(&turns), "{turns} turns");
    assert_eq!(rig.lost(), 60 * LOW_BYTES - OUTPUT_BYTES as u64);
}

#[test]
fn a_guest_that_kicks_for_nothing_and_sends_empty_chains_costs_a_batch_at_a_time() {
    let mut rig = Rig::new();
    for _ in 0..1000 {
        rig.guest.kick(TRANSMIT);
        rig.guest.kick(RECEIVE);
    }
    rig.guest.turn();
    let mut client = rig.client();
    client.write_all(b"still here").unwrap();
    rig.guest.turn();
    // Buffers of no length take nothing and come back; the input waits for one that takes something.
    for _ in 0..60 {
        rig.rings[RECEIVE].add(&[Desc::writable(IN, 0)]);
        rig.rings[TRANSMIT].add(&[Desc::readable(OUT, 0)]);
    }
    rig.guest.run(RECEIVE);
    rig.guest.run(TRANSMIT);
    let used = |used: Vec<(u16, u32)>| (used.len(), used.iter().map(|(_, len)| len).sum::<u32>());
    assert_eq!(used(rig.rings[RECEIVE].take_used()), (60, 0));
    assert_eq!(used(rig.rings[TRANSMIT].take_used()), (60, 0));
    assert_eq!(rig.receive_all(), b"still here");
}

#[test]
fn buffers_outside_memory_and_of_the_wrong_direction_are_passed_over_and_the_device_works_on() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let end = LOW_BYTES;
    for desc in [
        Desc::readable(end, 4096),
        Desc::readable(u64::MAX, 1),
        Desc::readable(u64::MAX - 5, u32::MAX),
        Desc::readable(end - 4, 8),
        Desc::writable(OUT, 100),
    ] {
        let head = rig.rings[TRANSMIT].add(&[desc]);
        rig.guest.run(TRANSMIT);
        assert_eq!(rig.rings[TRANSMIT].take_used(), [(head, 0)], "{desc:?}");
    }
    assert_eq!(available(&mut client, 100), b"");
    // What lies before the bad one is sent, what lies behind it is not.
    rig.guest.put(OUT, b"ab");
    let two = [Desc::readable(OUT, 1), Desc::readable(end, 1), Desc::readable(OUT + 1, 1)];
    rig.rings[TRANSMIT].add(&two);
    rig.guest.run(TRANSMIT);
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1);
    assert_eq!(available(&mut client, 100), b"a");
    assert!(rig.send(b"cd"));
    assert_eq!(available(&mut client, 100), b"cd", "the next chain begins at its beginning");
    client.write_all(b"input").unwrap();
    rig.guest.turn();
    for desc in [
        Desc::writable(end, 4096),
        Desc::writable(u64::MAX, 1),
        Desc::writable(u64::MAX - 2, u32::MAX),
        Desc::writable(end - 2, 8),
        Desc::readable(IN, 100),
    ] {
        let head = rig.rings[RECEIVE].add(&[desc]);
        rig.guest.run(RECEIVE);
        assert_eq!(rig.rings[RECEIVE].take_used(), [(head, 0)], "{desc:?}");
    }
    // Nothing goes behind a bad one: the driver would take it for what lies before.
    let head = rig.rings[RECEIVE].add(&[Desc::writable(end, 1), Desc::writable(IN, 100)]);
    rig.guest.run(RECEIVE);
    assert_eq!(rig.rings[RECEIVE].take_used(), [(head, 0)]);
    assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
    assert_eq!(rig.receive_all(), b"input");
}

#[test]
fn a_chain_longer_than_memory_is_passed_over() {
    let mut rig = Rig::new();
    let descs: Vec<Desc> = (0..60).map(|_| Desc::readable(0, u32::MAX / 64)).collect();
    rig.rings[TRANSMIT].add(&descs);
    rig.guest.run(TRANSMIT);
    assert_eq!(rig.rings[TRANSMIT].take_used().len(), 1);
    assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
    assert!(rig.send(b"and on"));
}

/// What the two sides may do next.
#[derive(Clone, Debug)]
enum Step {
    Output(usize, usize),
    Read(usize),
    Write(usize),
    Take(usize),
    Pass(u64),
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1_usize..20_000, 1_usize..5).prop_map(|(len, pieces)| Step::Output(len, pieces)),
        (1_usize..200_000).prop_map(Step::Read),
        (1_usize..20_000).prop_map(Step::Write),
        (1_usize..8).prop_map(Step::Take),
        (1_u64..PATIENCE_NS / 200).prop_map(Step::Pass),
        Just(Step::Pause),
    ];
    proptest::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn bytes_arrive_in_order_and_none_is_lost_while_the_client_reads(steps in steps()) {
        let mut rig = Rig::new();
        let mut client = rig.client();
        let (mut sent, mut read) = (0, Vec::new());
        let (mut written, mut received) = (0, Vec::new());
        for step in steps {
            match step {
                // A driver that reuses a buffer which has not come back would send something else.
                Step::Output(len, pieces) if rig.rings[TRANSMIT].free() == 64 => {
                    let mut lens = vec![len / pieces; pieces];
                    lens[0] += len % pieces;
                    rig.offer(&bytes(sent, len), &lens);
                    rig.guest.run(TRANSMIT);
                    sent += len;
                }
                Step::Output(..) => {}
                Step::Read(most) => {
                    read.extend(available(&mut client, most));
                    rig.guest.turn();
                }
                Step::Write(len) => {
                    written += client.write(&bytes(written, len)).unwrap_or(0);
                    rig.guest.turn();
                }
                Step::Take(count) => rig.take_input(count),
                Step::Pass(ns) => rig.pass(ns),
                Step::Pause => {
                    let _ = rig.guest.command(Command::Pause);
                    rig.guest.turn();
                    prop_assert!(rig.guest.worker.send(Command::Resume).is_ok());
                    rig.guest.turn();
                }
            }
            rig.rings[TRANSMIT].take_used();
            received.extend(rig.received());
        }
        read.extend(rig.drain(&mut client));
        rig.rings[TRANSMIT].take_used();
        received.extend(rig.receive_all());
        prop_assert_eq!(rig.rings[TRANSMIT].free(), 64);
        prop_assert_eq!((read.len(), received.len(), rig.lost()), (sent, written, 0));
        prop_assert!(read == bytes(0, sent));
        prop_assert!(received == bytes(0, written));
    }
}
