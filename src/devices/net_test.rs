//! The device as a driver meets it: real chains, a real loop, and as its tap a socket that keeps packets apart.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

use super::*;
use crate::event::Wait as Turn;
use crate::qos::{Limit, Quantity};
use crate::sys::tap::pair;
use crate::virtio::Command;
use crate::virtio::testing::*;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: usize = 12;
const CONFIG_INTERRUPT: u32 = 2;

fn setup(pairs: usize) -> Setup {
    Setup { id: "n0".into(), mac: [0x52, 0x54, 0, 1, 2, 3], mtu: 9000, pairs, queue_size: 256 }
}

/// A NIC whose driver is up, and the host's side of its tap.
struct Nic {
    guest: Guest,
    rx: Vring,
    tx: Vring,
    host: UnixDatagram,
    counters: Arc<NetCounters>,
    orders: Sender<Order>,
    /// Where the next buffer goes.
    next: u64,
}

fn limits(given: &[(Quantity, u64)]) -> Limits {
    let mut limits = Limits::default();
    for &(quantity, rate) in given {
        limits.each[quantity as usize] = Limit { rate, ..Limit::default() };
    }
    limits
}

impl Nic {
    fn start(features: u64, limits: &Limits) -> Nic {
        let (tap, host) = pair();
        host.set_nonblocking(true).unwrap();
        Nic::with(vec![tap], host, features, limits)
    }

    fn with(taps: Vec<Tap>, host: UnixDatagram, features: u64, limits: &Limits) -> Nic {
        let ram = ram();
        let net = Net::new(setup(1), taps, Bucket::new(limits), ram.clone());
        let (counters, orders) = (net.counters(), net.orders());
        let mut guest = Guest::new(net, ram);
        let (rx, tx) = bring_up(&mut guest, features);
        Nic { guest, rx, tx, host, counters, orders, next: DATA }
    }

    /// A buffer of so many bytes to receive in, full of 0xee; its address.
    fn room(&mut self, len: usize) -> u64 {
        let address = self.next;
        self.next += len as u64 + 16;
        self.guest.put(address, &vec![0xee; len]);
        address
    }

    /// Offers a chain of such buffers; where they are.
    fn offer(&mut self, lens: &[usize]) -> Vec<(u64, usize)> {
        let pieces: Vec<(u64, usize)> = lens.iter().map(|&len| (self.room(len), len)).collect();
        let descs: Vec<Desc> = pieces.iter().map(|&(address, len)| Desc::writable(address, len as u32)).collect();
        self.rx.add(&descs);
        pieces
    }

    /// Sends a packet to the guest.
    fn host_sends(&self, packet: &[u8]) {
        self.host.send(&[&[0; HEADER], packet].concat()).unwrap();
    }

    /// What the guest has sent, headers left off.
    fn host_receives(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        std::iter::from_fn(|| self.host.recv(&mut buffer).ok().map(|len| buffer[HEADER..len].to_vec())).collect()
    }

    /// Offers a packet in pieces of these lengths, header included.
    fn send(&mut self, packet: &[u8], lens: &[usize]) {
        let bytes = [&[0; HEADER], packet].concat();
        assert_eq!(lens.iter().sum::<usize>(), bytes.len());
        let mut at = 0;
        let mut descs = Vec::new();
        for &len in lens {
            let address = self.room(len);
            self.guest.put(address, &bytes[at..at + len]);
            descs.push(Desc::readable(address, len as u32));
            at += len;
        }
        self.tx.add(&descs);
    }

    fn bytes(&self, pieces: &[(u64, usize)]) -> Vec<u8> {
        pieces.iter().flat_map(|&(address, len)| self.guest.get(address, len)).collect()
    }

    /// Handler calls of one turn.
    fn calls(&mut self) -> usize {
        self.guest.event_loop.turn(Turn::Poll).unwrap()
    }

    /// Nothing is ready, whatever lies in the tap.
    #[track_caller]
    fn assert_rest(&mut self) {
        self.guest.turn();
        assert_eq!(self.calls(), 0, "the loop is called for nothing");
    }

    fn get(&self, counter: fn(&NetCounters) -> &AtomicU64) -> u64 {
        counter(&self.counters).load(Relaxed)
    }

    fn step(&mut self, ns: u64) {
        self.guest.clock.fetch_add(ns, SeqCst);
        self.guest.turn();
    }

    /// The link's bit in the configuration space.
    fn link(&self) -> u8 {
        self.guest.read(reg::CONFIG + 4).to_le_bytes()[2]
    }
}

fn bring_up(guest: &mut Guest, features: u64) -> (Vring, Vring) {
    guest.negotiate(features | VERSION_1);
    let event_idx = features & EVENT_IDX != 0;
    let rings = (guest.set_up(0, 256, event_idx), guest.set_up(1, 256, event_idx));
    guest.driver_ok();
    guest.turn();
    rings
}

fn packet(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((at >> 8) as u8)).collect()
}

#[test]
fn a_nic_says_the_same_of_itself_with_and_without_a_tap_but_for_its_link() {
    let ram = ram();
    let with = Net::new(setup(1), vec![pair().0], Bucket::default(), ram.clone());
    let without = Net::new(setup(1), vec![], Bucket::default(), ram.clone());
    assert_eq!(with.features(), without.features());
    for (net, link) in [(with, 1), (without, 0)] {
        let guest = Guest::new(net, ram.clone());
        let mut config = [0; 12];
        guest.read_bytes(reg::CONFIG, &mut config);
        assert_eq!(config, [0x52, 0x54, 0, 1, 2, 3, link, 0, 1, 0, 0x28, 0x23]);
        assert_eq!(guest.offered() & SEVERAL, 0);
    }
    let several = Guest::new(Net::new(setup(4), vec![], Bucket::default(), ram.clone()), ram);
    assert_eq!(several.offered() & SEVERAL, SEVERAL);
    assert_eq!(several.read(reg::CONFIG + 8) as u16, 4);
}

#[test]
fn a_packet_comes_with_the_number_of_its_buffers_which_are_used_in_their_order() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    let offered: Vec<Vec<(u64, usize)>> = (0..6).map(|_| nic.offer(&[100])).collect();
    let sent = packet(350, 7);
    nic.host_sends(&sent);
    nic.host_sends(&packet(20, 9));
    nic.guest.run(0);
    let used = nic.rx.take_used();
    let heads: Vec<u16> = used.iter().map(|used| used.0).collect();
    assert_eq!(used.iter().map(|used| used.1).collect::<Vec<_>>(), [100, 100, 100, 62, 32]);
    assert!(heads.windows(2).all(|two| two[0] != two[1]));
    let bytes: Vec<u8> = offered[..4].iter().flat_map(|chain| nic.bytes(chain)).collect();
    assert_eq!(bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
    assert_eq!(bytes[HEADER..HEADER + 350], sent);
    assert!(bytes[HEADER + 350..].iter().all(|&byte| byte == 0xee), "no byte beyond the packet is written");
    assert_eq!(nic.bytes(&offered[4])[10..12], [1, 0]);
    assert_eq!(nic.get(|c| &c.receive.packets), 2);
    assert_eq!(nic.get(|c| &c.receive.bytes), 370);
    assert!(nic.bytes(&offered[5]).iter().all(|&byte| byte == 0xee));
}

#[test]
fn the_buffers_of_one_packet_are_shown_to_the_driver_all_at_once() {
    // A driver that looks at the index finds none of it, or all of it: one store for four.
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    (0..3).for_each(|_| drop(nic.offer(&[100])));
    nic.host_sends(&packet(350, 1));
    nic.guest.run(0);
    assert_eq!(nic.rx.used_index(), 0, "three of four buffers were shown");
    let last = nic.offer(&[100]);
    nic.guest.run(0);
    assert_eq!(nic.rx.used_index(), 4);
    assert_eq!(nic.bytes(&last)[..62], packet(350, 1)[288..]);
}

#[test]
fn without_merging_a_packet_takes_one_chain_and_one_that_does_not_fit_is_dropped() {
    let mut nic = Nic::start(0, &Limits::default());
    let [first, second] = [(); 2].map(|()| nic.offer(&[12, 40]));
    for packet in [packet(41, 1), packet(40, 2), packet(3000, 3), packet(20, 4)] {
        nic.host_sends(&packet);
    }
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().iter().map(|used| used.1).collect::<Vec<_>>(), [52, 32]);
    assert_eq!(nic.bytes(&first)[10..], [&[1, 0], &packet(40, 2)[..]].concat());
    assert_eq!(nic.bytes(&second)[HEADER..HEADER + 20], packet(20, 4));
    assert_eq!(nic.get(|c| &c.receive.dropped), 2);
    assert_eq!(nic.get(|c| &c.receive.packets), 2);
}

#[test]
fn a_flood_of_packets_that_do_not_fit_leaves_the_other_handlers_their_turn() {
    let mut nic = Nic::start(0, &Limits::default());
    nic.offer(&[50]);
    for _ in 0..150 {
        nic.host_sends(&packet(100, 1));
    }
    nic.guest.kick(0);
    // 64 a call, and a call a turn.
    for left in [64, 128, 150] {
        assert!(nic.calls() > 0);
        assert_eq!(nic.get(|c| &c.receive.dropped), left);
    }
    nic.assert_rest();
    nic.host_sends(&packet(20, 1));
    nic.guest.turn();
    assert_eq!(nic.rx.take_used().len(), 1);
}

#[test]
fn packets_without_buffers_stay_with_the_host_and_wake_nobody() {
    let mut nic = Nic::start(MERGEABLE | EVENT_IDX, &Limits::default());
    for n in 0..20 {
        nic.host_sends(&packet(60, n));
    }
    nic.assert_rest();
    nic.offer(&[100]);
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().len(), 1);
    nic.assert_rest();
    nic.host_sends(&packet(60, 99));
    assert_eq!(nic.calls(), 0, "a packet that nobody can take wakes the loop");
    // And the driver is asked to kick.
    for n in 1..=20 {
        let pieces = nic.offer(&[100]);
        assert!(nic.rx.wants_kick());
        nic.guest.run(0);
        assert_eq!(nic.rx.take_used().len(), 1);
        assert_eq!(nic.bytes(&pieces)[HEADER..72], packet(60, if n == 20 { 99 } else { n }));
    }
}

#[test]
fn a_driver_whose_buffers_wait_for_packets_is_not_asked_to_kick() {
    let mut nic = Nic::start(MERGEABLE | EVENT_IDX, &Limits::default());
    nic.offer(&[1500]);
    assert!(nic.rx.wants_kick());
    nic.guest.run(0);
    // Of the second it learns that there is nothing to read for it.
    nic.offer(&[1500]);
    assert!(nic.rx.wants_kick());
    nic.guest.run(0);
    for _ in 0..100 {
        nic.offer(&[1500]);
        assert!(!nic.rx.wants_kick());
    }
    for n in 0..100 {
        nic.host_sends(&packet(60, n));
        nic.guest.turn();
        assert_eq!(nic.rx.take_used().len(), 1);
    }
    nic.assert_rest();
}

#[test]
fn buffers_that_are_none_come_back_empty_and_the_next_are_used() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    let bad = [
        vec![Desc::writable(LOW_BYTES - 4, 100)],
        vec![Desc::writable(u64::MAX - 3, 100)],
        vec![Desc::writable(DATA, 11)],
        vec![Desc::writable(DATA, 0)],
        vec![Desc::readable(DATA, 100)],
        vec![Desc::writable(DATA, 50), Desc::writable(LOW_BYTES, 50)],
    ];
    let heads: Vec<u16> = bad.iter().map(|descs| nic.rx.add(descs)).collect();
    let good = nic.offer(&[100]);
    nic.host_sends(&packet(60, 5));
    nic.guest.run(0);
    let used = nic.rx.take_used();
    let empty: Vec<u16> = used.iter().filter(|used| used.1 == 0).map(|used| used.0).collect();
    assert_eq!(empty, heads);
    assert_eq!(used.last().unwrap().1, 72);
    assert_eq!(nic.bytes(&good)[HEADER..72], packet(60, 5));
    assert_eq!(nic.get(|c| &c.receive.errors), 6);
    assert_eq!(nic.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_packet_that_the_whole_queue_has_no_room_for_is_dropped_and_its_buffers_take_the_next() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    (0..256).for_each(|_| drop(nic.offer(&[13])));
    nic.host_sends(&packet(4000, 5));
    nic.host_sends(&packet(30, 6));
    nic.guest.run(0);
    nic.guest.turn();
    assert_eq!(nic.get(|c| &c.receive.dropped), 1);
    assert_eq!(nic.rx.take_used().iter().map(|used| used.1).collect::<Vec<_>>(), [13, 13, 13, 3]);
}

#[test]
fn what_the_guest_sends_is_what_the_host_gets_however_it_is_cut() {
    let mut nic = Nic::start(0, &Limits::default());
    nic.send(&packet(60, 1), &[72]);
    nic.send(&packet(60, 2), &[12, 60]);
    nic.send(&packet(60, 3), &[5, 8, 1, 0, 58]);
    nic.send(&packet(65_550, 4), &[12, 30_000, 35_550]);
    nic.guest.run(1);
    assert_eq!(nic.host_receives(), [packet(60, 1), packet(60, 2), packet(60, 3), packet(65_550, 4)]);
    assert_eq!(nic.tx.take_used().iter().map(|used| used.1).collect::<Vec<_>>(), [0; 4]);
    assert_eq!((nic.get(|c| &c.transmit.packets), nic.get(|c| &c.transmit.bytes)), (4, 65_730));
}

#[test]
fn what_is_no_packet_is_dropped_and_counted_and_the_next_goes() {
    let mut nic = Nic::start(0, &Limits::default());
    for descs in [
        vec![Desc::readable(DATA, 25)],
        vec![Desc::readable(DATA, 0)],
        vec![Desc::writable(DATA, 100)],
        vec![Desc::readable(HIGH, 65_567)],
        vec![Desc::readable(LOW_BYTES - 10, 100)],
        vec![Desc::readable(DATA, u32::MAX)],
    ] {
        nic.tx.add(&descs);
    }
    nic.send(&packet(60, 2), &[72]);
    nic.guest.run(1);
    assert_eq!(nic.host_receives(), [packet(60, 2)]);
    assert_eq!(nic.tx.take_used().len(), 7);
    assert_eq!(nic.get(|c| &c.transmit.errors), 6);
    assert_eq!(nic.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_tap_without_room_holds_what_is_sent_and_neither_loses_nor_doubles_nor_counts_it_twice() {
    let mut nic = Nic::start(EVENT_IDX, &Limits::default());
    let mut sent = 0;
    let mut got = Vec::new();
    let mut held = 0;
    while sent < 400 {
        for _ in 0..50 {
            nic.next = DATA + 0x800 * u64::from(sent as u8);
            nic.send(&packet(1000, sent as u8), &[1012]);
            sent += 1;
        }
        nic.tx.wants_kick();
        nic.guest.run(1);
        nic.assert_rest();
        if nic.tx.take_used().len() < 50 {
            held += 1;
            nic.send(&packet(14, 0), &[26]);
            assert!(!nic.tx.wants_kick(), "what is added meanwhile could not go");
            while got.len() <= sent {
                let before = got.len();
                got.extend(nic.host_receives());
                nic.guest.turn();
                if got.len() == before {
                    break;
                }
            }
            nic.tx.take_used();
            got.retain(|packet| packet.len() == 1000);
        }
    }
    got.extend(nic.host_receives().into_iter().filter(|packet| packet.len() == 1000));
    assert!(held > 0, "the tap is never full");
    assert_eq!(got.len(), sent);
    assert!((0..).zip(&got).all(|(n, got)| *got == packet(1000, n as u8)));
    assert_eq!(nic.get(|c| &c.transmit.packets) as usize, sent + held, "a packet is counted when it goes");
}

#[test]
fn a_packet_that_the_limit_let_go_and_the_tap_had_no_room_for_is_not_asked_for_again() {
    let mut nic = Nic::start(0, &limits(&[(Quantity::IopsWrite, 1000)]));
    for n in 0.. {
        assert!(n < 1000, "the tap is never full");
        // Each has been earned when it comes.
        nic.step(2_000_000);
        nic.next = DATA;
        nic.send(&packet(3000, n as u8), &[3012]);
        nic.guest.run(1);
        if nic.tx.take_used().is_empty() {
            break;
        }
    }
    assert_eq!(nic.get(|c| &c.transmit.held.operations), 0, "the tap is full, and not the bucket");
    nic.host_receives();
    nic.guest.turn();
    assert_eq!(nic.tx.take_used().len(), 1, "it pays twice");
}

#[test]
fn a_packet_that_the_limit_let_go_and_that_waits_for_buffers_is_not_asked_for_again() {
    let mut nic = Nic::start(MERGEABLE, &limits(&[(Quantity::IopsRead, 1000)]));
    (0..3).for_each(|_| drop(nic.offer(&[100])));
    nic.host_sends(&packet(350, 1));
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().len(), 0);
    nic.offer(&[100]);
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().len(), 4, "it pays twice");
}

#[test]
fn a_limit_on_what_is_received_lets_no_second_have_more_and_holds_one_packet_only() {
    let mut nic = Nic::start(MERGEABLE, &limits(&[(Quantity::IopsRead, 1000)]));
    for _ in 0..200 {
        nic.offer(&[100]);
    }
    for n in 0..200 {
        nic.host_sends(&packet(60, n));
    }
    nic.guest.run(0);
    let mut came = nic.rx.take_used().len();
    assert!(came <= 2, "{came} at once");
    for ms in 1..=100 {
        nic.step(1_000_000);
        came += nic.rx.take_used().len();
        assert!(came <= ms + 2, "{came} in {ms} ms");
    }
    assert!(came >= 95, "{came} in 100 ms");
    assert!(nic.get(|c| &c.receive.held.operations) > 50);
    // Lifted, the rest comes at once, in order, without a kick.
    nic.orders.send(Order::SetLimits(Limits::default(), Done::posted(|_| ()))).ok().unwrap();
    nic.guest.turn();
    assert_eq!(came + nic.rx.take_used().len(), 200);
    nic.assert_rest();
}

#[test]
fn a_packet_that_waits_for_the_limit_in_the_only_buffer_needs_no_kick_to_go() {
    let mut nic = Nic::start(MERGEABLE, &limits(&[(Quantity::BpsRead, 60_000)]));
    let chains = [(); 2].map(|()| nic.offer(&[1100]));
    nic.host_sends(&packet(1000, 1));
    nic.host_sends(&packet(1000, 2));
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().len(), 1);
    nic.step(1_000_000);
    assert_eq!(nic.rx.take_used().len(), 0);
    nic.step(20_000_000);
    assert_eq!(nic.rx.take_used().len(), 1);
    assert_eq!(nic.bytes(&chains[1])[HEADER..1012], packet(1000, 2));
    let longest = nic.get(|c| &c.receive.held.longest_ns);
    assert!((16_000_000..=21_000_001).contains(&longest), "{longest}");
}

#[test]
fn a_limit_on_what_is_sent_holds_it_in_the_ring() {
    let mut nic = Nic::start(EVENT_IDX, &limits(&[(Quantity::IopsWrite, 1000)]));
    for n in 0..100 {
        nic.send(&packet(60, n), &[72]);
    }
    nic.guest.run(1);
    let mut went = nic.host_receives().len();
    assert!(went <= 2);
    for ms in 1..=50 {
        nic.step(1_000_000);
        went += nic.host_receives().len();
        assert!(went <= ms + 2, "{went} in {ms} ms");
    }
    assert!(went >= 46, "{went} in 50 ms");
    // What comes in is not limited.
    nic.offer(&[100]);
    nic.host_sends(&packet(60, 1));
    nic.guest.run(0);
    assert_eq!(nic.rx.take_used().len(), 1);
}

#[test]
fn a_pause_leaves_packets_in_the_tap_and_chains_in_the_ring_and_loses_none_of_either() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    let chains: Vec<_> = (0..20).map(|_| nic.offer(&[100])).collect();
    nic.host_sends(&packet(60, 0));
    nic.guest.run(0);
    let ended = nic.guest.command(Command::Pause);
    nic.guest.turn();
    assert_eq!(ended.load(SeqCst), 1);
    for n in 1..10 {
        nic.host_sends(&packet(60, n));
        nic.send(&packet(60, n), &[72]);
    }
    nic.guest.kick(0);
    nic.guest.kick(1);
    nic.assert_rest();
    nic.step(1_000_000_000);
    assert_eq!(nic.rx.take_used().len(), 1, "packets come while the machine stands still");
    assert!(nic.host_receives().is_empty());
    assert!(nic.bytes(&chains[1]).iter().all(|&byte| byte == 0xee), "guest memory is written in a pause");
    let _ = nic.guest.worker.send(Command::Resume);
    nic.guest.turn();
    assert_eq!(nic.rx.take_used().len(), 9);
    for (n, chain) in (0..10).zip(&chains) {
        assert_eq!(nic.bytes(chain)[HEADER..72], packet(60, n));
    }
    assert_eq!(nic.host_receives(), (1..10).map(|n| packet(60, n)).collect::<Vec<_>>());
}

#[test]
fn packets_that_came_in_a_pause_are_told_when_all_buffers_had_been_taken_in_before() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    // A large packet has the NIC take in more chains than the next needs: the ring is empty.
    (0..4).for_each(|_| drop(nic.offer(&[1000])));
    nic.host_sends(&packet(1500, 1));
    nic.guest.run(0);
    nic.host_sends(&packet(60, 2));
    nic.guest.turn();
    assert_eq!(nic.rx.take_used().len(), 3);
    nic.guest.command(Command::Pause);
    nic.guest.turn();
    nic.host_sends(&packet(60, 3));
    nic.assert_rest();
    let _ = nic.guest.worker.send(Command::Resume);
    nic.guest.turn();
    assert_eq!(nic.rx.take_used().len(), 1);
}

#[test]
fn a_reset_with_packets_and_buffers_held_leaves_nothing_of_the_old_life() {
    for held in ["limit", "chains", "idle"] {
        let rate = if held == "limit" { 1 } else { 0 };
        let mut nic = Nic::start(MERGEABLE, &limits(&[(Quantity::IopsRead, rate)]));
        let old: Vec<_> = (0..3).map(|_| nic.offer(&[100])).collect();
        nic.host_sends(&packet(60, 1));
        nic.host_sends(&packet(if held == "idle" { 60 } else { 400 }, 2));
        nic.guest.run(0);
        nic.guest.reset();
        assert_eq!(nic.guest.status(), 0);
        let before: Vec<_> = old.iter().map(|chain| nic.bytes(chain)).collect();
        nic.host_sends(&packet(60, 3));
        nic.step(10_000_000_000);
        nic.assert_rest();
        let after: Vec<_> = old.iter().map(|chain| nic.bytes(chain)).collect();
        assert_eq!(after, before, "{held}: buffers of the old life are written");
        (nic.rx, nic.tx) = bring_up(&mut nic.guest, MERGEABLE);
        nic.next = DATA + 0x8000;
        let new = nic.offer(&[100]);
        nic.guest.run(0);
        assert!(nic.rx.take_used().is_empty(), "{held}: what came before the driver is for nobody");
        nic.host_sends(&packet(60, 4));
        nic.guest.turn();
        nic.step(10_000_000_000);
        assert_eq!(nic.rx.take_used().len(), 1, "{held}");
        assert_eq!(nic.bytes(&new)[HEADER..72], packet(60, 4), "{held}");
    }
}

#[test]
fn a_ring_that_the_driver_breaks_stops_the_nic_which_reads_no_more_packets() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    let chain = nic.offer(&[100]);
    nic.guest.run(0);
    nic.tx.offer(300);
    nic.guest.run(1);
    assert_ne!(nic.guest.status() & NEEDS_RESET, 0);
    nic.host_sends(&packet(60, 1));
    nic.assert_rest();
    assert!(nic.bytes(&chain).iter().all(|&byte| byte == 0xee));
}

#[test]
fn a_tap_that_is_gone_is_a_link_that_is_down_and_what_is_sent_is_dropped() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    assert_eq!(nic.link(), 1);
    nic.offer(&[100]);
    nic.guest.run(0);
    let (_, other) = pair();
    drop(std::mem::replace(&mut nic.host, other));
    nic.guest.turn();
    assert_eq!((nic.link(), nic.counters.link.load(SeqCst), nic.counters.tap.load(SeqCst)), (0, false, false));
    assert_ne!(nic.guest.read(reg::INTERRUPT_STATUS) & CONFIG_INTERRUPT, 0);
    assert_eq!(nic.guest.interrupts(), 1);
    nic.send(&packet(60, 1), &[72]);
    nic.guest.run(1);
    assert_eq!(nic.tx.take_used().len(), 1);
    assert_eq!(nic.get(|c| &c.transmit.dropped), 1);
    nic.assert_rest();
    nic.guest.reset();
    bring_up(&mut nic.guest, MERGEABLE);
    nic.assert_rest();
}

#[test]
fn a_tap_that_goes_while_it_is_full_holds_nobody() {
    let mut nic = Nic::start(0, &Limits::default());
    for n in 0..200 {
        nic.next = DATA;
        nic.send(&packet(3000, n), &[3012]);
    }
    nic.guest.run(1);
    assert!(nic.tx.take_used().len() < 200);
    let (_, other) = pair();
    drop(std::mem::replace(&mut nic.host, other));
    nic.guest.turn();
    nic.tx.take_used();
    assert_eq!(nic.tx.free(), 256);
    nic.assert_rest();
}

#[test]
fn a_nic_without_a_tap_takes_what_is_sent_and_keeps_buffers_without_asking_for_more() {
    let (_, host) = pair();
    let mut nic = Nic::with(vec![], host, MERGEABLE | EVENT_IDX, &Limits::default());
    assert_eq!(nic.link(), 0);
    nic.offer(&[100]);
    assert!(nic.rx.wants_kick());
    nic.guest.run(0);
    nic.offer(&[100]);
    assert!(!nic.rx.wants_kick());
    nic.send(&packet(60, 1), &[72]);
    nic.guest.run(1);
    assert_eq!(nic.tx.take_used().len(), 1);
    nic.assert_rest();
    nic.guest.reset();
    assert_eq!(nic.guest.status(), 0);
}

#[test]
fn a_cable_that_is_pulled_stops_both_ways_and_what_came_meanwhile_is_lost() {
    let mut nic = Nic::start(MERGEABLE, &Limits::default());
    let chain = nic.offer(&[100]);
    nic.guest.run(0);
    let set = |nic: &mut Nic, up| {
        nic.orders.send(Order::SetLink(up, Done::posted(|_| ()))).ok().unwrap();
        nic.guest.turn();
    };
    set(&mut nic, false);
    assert_eq!((nic.link(), nic.guest.interrupts()), (0, 1));
    set(&mut nic, false);
    assert_eq!(nic.guest.interrupts(), 0, "nothing has changed");
    nic.host_sends(&packet(60, 1));
    nic.send(&packet(60, 2), &[72]);
    nic.guest.run(1);
    nic.assert_rest();
    assert_eq!((nic.tx.take_used().len(), nic.host_receives().len(), nic.rx.take_used().len()), (1, 0, 0));
    nic.guest.interrupts();
    set(&mut nic, true);
    assert_eq!((nic.link(), nic.guest.interrupts()), (1, 1));
    assert!(nic.rx.take_used().is_empty());
    nic.host_sends(&packet(60, 3));
    nic.guest.turn();
    assert_eq!(nic.rx.take_used().len(), 1);
    assert_eq!(nic.bytes(&chain)[HEADER..72], packet(60, 3));
}

/// A driver of four pairs with these features: the answers to commands of the control queue at `place`.
fn commands(features: u64, place: u32, asked: &[&[u8]]) -> (Vec<u8>, u64) {
    let ram = ram();
    let net = Net::new(setup(4), vec![], Bucket::default(), ram.clone());
    let counters = net.counters();
    let mut guest = Guest::new(net, ram);
    guest.negotiate(features | VERSION_1);
    let mut control = guest.set_up(place, 64, false);
    guest.driver_ok();
    guest.turn();
    let mut answers = Vec::new();
    for command in asked {
        guest.put(DATA, command);
        guest.put(DATA + 0x100, &[0xee]);
        let (class, data) = (Desc::readable(DATA, 2), Desc::readable(DATA + 2, command.len() as u32 - 2));
        control.add(&[class, data, Desc::writable(DATA + 0x100, 1)]);
        guest.run(place as usize);
        assert_eq!(control.take_used().len(), 1);
        answers.push(guest.get(DATA + 0x100, 1)[0]);
    }
    (answers, counters.pairs.load(SeqCst))
}

#[test]
fn a_driver_says_by_a_control_command_how_many_pairs_it_uses() {
    let asked: [&[u8]; 7] =
        [&[4, 0, 3, 0], &[4, 0, 0, 0], &[4, 0, 5, 0], &[4, 0, 2], &[4, 1, 2, 0], &[1, 0, 2, 0], &[4, 0, 2, 0]];
    let several = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    assert_eq!(commands(several, 8, &asked), (vec![0, 1, 1, 1, 1, 1, 0], 2));
    // One that knows of the queue only finds it behind the first pair, and may not ask for several.
    assert_eq!(commands(1 << VIRTIO_NET_F_CTRL_VQ, 2, &[&[4, 0, 2, 0]]), (vec![1], 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn p_packets_of_any_size_in_chains_of_any_shape_arrive_whole_and_in_order(
        mergeable in any::<bool>(),
        chains in prop::collection::vec(prop::collection::vec(1usize..400, 1..5), 60..120),
        packets in prop::collection::vec((14usize..1500, any::<u8>()), 1..20),
        burst in 1usize..8,
    ) {
        let features = if mergeable { MERGEABLE } else { 0 };
        let mut nic = Nic::start(features, &Limits::default());
        let mut chains: Vec<Vec<usize>> = chains;
        for chain in &mut chains {
            // Each is long enough for a header, and for a packet if it has to be.
            chain.push(if mergeable { 12 } else { 1512 });
        }
        let chains: Vec<_> = chains.iter().take(50).map(|lens| nic.offer(lens)).collect();
        nic.guest.run(0);
        let mut expected = Vec::new();
        for packets in packets.chunks(burst) {
            for &(len, seed) in packets {
                nic.host_sends(&packet(len, seed));
                expected.push(packet(len, seed));
            }
            nic.guest.turn();
        }
        // As a driver reads them: each packet's first buffer says how many it has.
        let used = nic.rx.take_used();
        let mut got = Vec::new();
        let mut place = 0;
        while place < used.len() {
            let first = nic.bytes(&chains[place]);
            let count = usize::from(u16::from_le_bytes([first[10], first[11]]));
            prop_assert!(count >= 1 && place + count <= used.len() && (mergeable || count == 1));
            let whole: Vec<u8> = (place..place + count)
                .flat_map(|at| nic.bytes(&chains[at])[..used[at].1 as usize].to_vec())
                .collect();
            got.push(whole[HEADER..].to_vec());
            place += count;
        }
        // The last may wait for more chains than there are.
        prop_assert!(got.len() == expected.len() || used.len() + 20 > chains.len());
        prop_assert_eq!(&got[..], &expected[..got.len()]);
        nic.assert_rest();
    }
}

fn hostile_desc() -> impl Strategy<Value = Desc> {
    let address = prop_oneof![
        6 => DATA..DATA + 0x1000,
        1 => LOW_BYTES - 64..LOW_BYTES + 64,
        1 => HIGH..HIGH + HIGH_BYTES,
        1 => RINGS..RINGS + 0x2_0000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![5 => 0..200_u32, 2 => 1000..70_000_u32, 1 => any::<u32>()];
    let flags =
        prop_oneof![3 => Just(WRITE), 2 => Just(0), 2 => Just(NEXT | WRITE), 2 => Just(NEXT), 1 => any::<u16>()];
    (address, len, flags, 0..20_u16).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever lies in the tables and rings, nothing breaks, everything ends, and after a reset the NIC works.
    #[test]
    fn no_driver_breaks_the_nic(
        tables in prop::collection::vec((prop::collection::vec(hostile_desc(), 16), 0..2_usize), 1..6),
        heads in prop::collection::vec(prop_oneof![9 => 0..16_u16, 1 => any::<u16>()], 0..24),
        features in prop::sample::select(vec![0, EVENT_IDX, INDIRECT_DESC, EVENT_IDX | INDIRECT_DESC]),
        mergeable in any::<bool>(),
        lens in prop::collection::vec(prop_oneof![3 => 14..2000_usize, 1 => 2000..65_000_usize], 0..10),
        rate in prop_oneof![Just(0), 1..1000_u64],
        jump in prop_oneof![9 => Just(0), 1 => any::<u16>()],
    ) {
        let mergeable = if mergeable { MERGEABLE } else { 0 };
        let mut nic = Nic::start(features | mergeable, &limits(&[(Quantity::Iops, rate)]));
        for (table, queue) in &tables {
            for (i, desc) in (0..).zip(table) {
                let ring = if *queue == 0 { &nic.rx } else { &nic.tx };
                ring.put(i, *desc);
            }
            for head in &heads {
                let ring = if *queue == 0 { &mut nic.rx } else { &mut nic.tx };
                ring.offer(*head);
                nic.guest.kick(*queue);
                nic.guest.event_loop.turn(Turn::Poll).unwrap();
            }
            for len in &lens {
                // What does not fit is the host's to lose.
                let _ = nic.host.send(&vec![7; HEADER + len]);
            }
            if jump != 0 {
                let ring = if *queue == 0 { &nic.rx } else { &nic.tx };
                ring.publish(jump);
            }
            nic.guest.kick(*queue);
            for _ in 0..20 {
                nic.step(1_000_000);
            }
            nic.host_receives();
        }
        nic.guest.reset();
        prop_assert_eq!(nic.guest.status(), 0);
        (nic.rx, nic.tx) = bring_up(&mut nic.guest, MERGEABLE);
        nic.host_receives();
        let chain = nic.offer(&[100]);
        nic.guest.run(0);
        nic.host_sends(&packet(60, 3));
        nic.send(&packet(60, 4), &[72]);
        nic.guest.kick(1);
        nic.step(10_000_000_000);
        nic.step(10_000_000_000);
        prop_assert_eq!(nic.rx.take_used().len(), 1);
        prop_assert_eq!(&nic.bytes(&chain)[HEADER..72], &packet(60, 3)[..]);
        prop_assert_eq!(nic.host_receives(), [packet(60, 4)]);
    }
}
