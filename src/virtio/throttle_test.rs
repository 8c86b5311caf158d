//! The worker of a device that is limited: what waits costs nothing, nobody starves, and no trick of the driver's or the
//! operator's earns anything. The bucket alone is tested in `qos`.

use std::sync::atomic::Ordering::SeqCst;

use super::Command;
use super::testing::*;
use crate::event::Wait;
use crate::qos::{Direction, Limit, Limits, QUANTUM_NS, Quantity};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const READ: &[Desc] = &[Desc { addr: DATA, len: 512, flags: WRITE, next: 0 }];
const WRITING: &[Desc] = &[Desc { addr: DATA, len: 512, flags: 0, next: 0 }];

/// A driver with so many queues of one limited device, which keeps `depth` chains on each.
struct Rig {
    guest: Guest,
    hand: Hand,
    vrings: Vec<Vring>,
    chain: &'static [Desc],
    depth: usize,
}

impl Rig {
    fn new(queues: usize, depth: usize, limits: &Limits) -> Rig {
        let (device, hand) = Metered::new(&vec![64; queues], limits);
        let mut rig = Rig { guest: Guest::new(device, ram()), hand, vrings: Vec::new(), chain: READ, depth };
        rig.guest.clock.store(SECOND, SeqCst);
        rig.start();
        rig
    }

    fn start(&mut self) {
        self.guest.negotiate(VERSION_1 | EVENT_IDX);
        let queues = self.vrings.len().max(self.guest_queues());
        self.vrings = (0..queues).map(|queue| self.guest.set_up(queue as u32, 64, true)).collect();
        self.guest.driver_ok();
        self.guest.turn();
    }

    fn guest_queues(&self) -> usize {
        (0..8)
            .take_while(|&queue| {
                self.guest.write(reg::QUEUE_SEL, queue);
                self.guest.read(reg::QUEUE_NUM_MAX) > 0
            })
            .count()
    }

    fn now(&self) -> u64 {
        self.guest.clock.load(SeqCst)
    }

    /// Takes what is back, fills the queues up again, and kicks those that want it.
    fn drive(&mut self) {
        for queue in 0..self.vrings.len() {
            let vring = &mut self.vrings[queue];
            vring.take_used();
            while 64 - vring.free() < self.depth {
                vring.add(self.chain);
            }
            if vring.wants_kick() {
                self.guest.kick(queue);
            }
        }
        self.guest.turn();
    }

    /// Lets time pass in steps, driving at each.
    fn run(&mut self, ns: u64, step_ns: u64) {
        let end = self.now() + ns;
        while self.now() < end {
            self.drive();
            self.guest.clock.fetch_add(step_ns.min(end - self.now()), SeqCst);
        }
        self.drive();
    }

    fn went(&self) -> usize {
        self.hand.went().len()
    }
}

#[test]
fn one_to_eight_rings_get_the_same_in_all_and_each_the_same_as_the_others() {
    for queues in 1..=8 {
        for (rate, seconds) in [(9, 40), (200, 4), (20_000, 1)] {
            let mut rig = Rig::new(queues, 16, &Limits::iops(rate));
            rig.run(seconds * SECOND, 50_000);
            let went = rig.hand.went();
            let expected = rate * seconds;
            assert!(
                (expected - expected / 500 - 1..=expected + 1).contains(&(went.len() as u64)),
                "{queues}: {}",
                went.len()
            );
            for queue in 0..queues {
                let share = went.iter().filter(|(of, ..)| *of == queue).count() as f64 / went.len() as f64;
                let fair = 1.0 / queues as f64;
                assert!((share / fair - 1.0).abs() < 0.1, "{rate}: queue {queue} of {queues} has {share}");
            }
        }
    }
}

#[test]
fn a_queue_that_waits_is_served_by_the_timer_and_its_kicks_cost_nothing() {
    let mut rig = Rig::new(1, 32, &Limits::iops(1));
    rig.drive();
    assert_eq!((rig.went(), rig.hand.asked()), (1, 2));
    // A driver that kicks all the same, a thousand times.
    rig.guest.kick(0);
    assert!(rig.guest.event_loop.turn(Wait::Poll).unwrap() <= 1);
    let calls: usize = (0..1000)
        .map(|_| {
            rig.guest.kick(0);
            rig.guest.event_loop.turn(Wait::Poll).unwrap()
        })
        .sum();
    assert_eq!((calls, rig.hand.asked()), (0, 2), "it is masked");
    rig.run(2 * SECOND + 100 * MS, 10 * MS);
    assert_eq!(rig.went(), 3);
    // The limit goes, the queue empties, and kicks are heard again.
    rig.hand.set(rig.now(), &Limits::default());
    rig.guest.turn();
    let went = rig.went();
    assert_eq!(went, 3 + 32, "what waited went at once");
    rig.drive();
    assert_eq!(rig.went(), went + 32);
}

#[test]
fn a_change_of_the_limit_wakes_what_waits_for_the_old_one() {
    let mut rig = Rig::new(1, 32, &Limits::iops(1));
    rig.drive();
    rig.run(10 * MS, MS);
    assert_eq!(rig.went(), 1);
    rig.hand.set(rig.now(), &Limits::iops(5_000));
    rig.run(10 * MS, 50_000);
    assert!((47..=52).contains(&(rig.went() - 1)), "{} in 10 ms at 5000 a second", rig.went() - 1);
    rig.hand.set(rig.now(), &Limits::iops(100));
    let before = rig.went();
    rig.run(SECOND, MS);
    assert!((99..=101).contains(&(rig.went() - before)));
}

#[test]
fn a_pause_does_not_wait_for_what_is_held_back_and_earns_nothing() {
    let mut rig = Rig::new(2, 32, &Limits::iops(100));
    rig.run(SECOND, MS);
    let before = rig.went();
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(SeqCst), 1, "nothing is in flight");
    rig.run(3_600 * SECOND, 600 * SECOND);
    assert_eq!(rig.went(), before, "nothing is served");
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.run(SECOND, MS);
    assert!((98..=101).contains(&(rig.went() - before)), "{} in the first second", rig.went() - before);
}

#[test]
fn a_storm_of_resets_earns_nothing_and_the_new_life_works() {
    let mut rig = Rig::new(2, 32, &Limits::iops(100));
    let begin = rig.now();
    for _ in 0..1000 {
        rig.drive();
        rig.guest.clock.fetch_add(MS, SeqCst);
        rig.guest.turn();
        rig.guest.reset();
        rig.start();
    }
    let seconds = (rig.now() - begin) / SECOND;
    assert!((95..=101).contains(&(rig.went() as u64 / seconds)), "{}", rig.went());
    rig.run(SECOND, MS);
    assert!(rig.went() as u64 <= 100 * (seconds + 1) + 1);
}

#[test]
fn reads_pass_writes_that_wait_and_writes_go_at_their_rate() {
    let mut limits = Limits::default();
    limits.each[Quantity::IopsWrite as usize] = Limit { rate: 10, ..Limit::default() };
    let mut rig = Rig::new(1, 8, &limits);
    rig.chain = WRITING;
    rig.drive();
    for _ in 0..10 * 1000 {
        rig.vrings[0].add(READ);
        if rig.vrings[0].wants_kick() {
            rig.guest.kick(0);
        }
        rig.guest.clock.fetch_add(MS, SeqCst);
        rig.drive();
    }
    let went = |direction| rig.hand.went().iter().filter(|(_, of, _)| *of == direction).count();
    assert_eq!(went(Direction::Read), 10_000, "each at once");
    assert!((99..=101).contains(&went(Direction::Write)), "{}", went(Direction::Write));
}

#[test]
fn reads_and_writes_that_share_a_limit_take_turns_even_if_one_has_another_limit_of_its_own() {
    let mut limits = Limits::iops(10);
    limits.each[Quantity::IopsWrite as usize].rate = 6;
    let mut rig = Rig::new(1, 0, &limits);
    let went = |rig: &Rig, direction| rig.hand.went().iter().filter(|(_, of, _)| *of == direction).count();
    let mut added = [0, 0];
    for _ in 0..10_000 {
        // Eight of each are always there.
        for (direction, chain) in [(Direction::Read, READ), (Direction::Write, WRITING)] {
            while added[direction as usize] < went(&rig, direction) + 8 {
                rig.vrings[0].add(chain);
                added[direction as usize] += 1;
            }
        }
        rig.drive();
        rig.guest.clock.fetch_add(MS, SeqCst);
    }
    let (reads, writes) = (went(&rig, Direction::Read), went(&rig, Direction::Write));
    assert!((95..=101).contains(&(reads + writes)), "{reads} and {writes}");
    assert!(reads.abs_diff(writes) <= 8, "{reads} and {writes}");
}

#[test]
fn the_timer_goes_at_most_once_a_quantum() {
    let mut rig = Rig::new(1, 64, &Limits::iops(50_000));
    rig.run(10 * MS, 10_000);
    let times: Vec<u64> = rig.hand.went().iter().map(|(.., time)| *time).collect();
    let mut wakes = times.clone();
    wakes.dedup();
    assert!(wakes.len() as u64 <= 10 * MS / QUANTUM_NS + 1, "{} times", wakes.len());
    assert!((498..=526).contains(&times.len()), "{}", times.len());
}

#[test]
fn what_waits_is_counted_and_the_longest_wait_is_the_rates() {
    let mut rig = Rig::new(1, 4, &Limits::iops(10));
    rig.run(SECOND, MS);
    let (chains, longest_ns) = rig.hand.held();
    assert_eq!(chains, rig.went() as u64 - 1 + 3, "all but the first, and those that were seen to wait");
    assert!((99 * MS..=102 * MS).contains(&longest_ns), "{longest_ns}");
}

#[test]
fn a_fault_or_a_reset_while_chains_wait_leaves_no_timer_that_does_anything() {
    let mut rig = Rig::new(1, 8, &Limits::iops(1));
    rig.drive();
    rig.vrings[0].publish(u16::MAX / 2);
    rig.guest.clock.fetch_add(2 * SECOND, SeqCst);
    rig.guest.turn();
    assert_eq!(rig.guest.status() & NEEDS_RESET, NEEDS_RESET);
    let asked = rig.hand.asked();
    rig.guest.clock.fetch_add(9 * SECOND, SeqCst);
    rig.guest.turn();
    assert_eq!(rig.hand.asked(), asked);
    rig.guest.reset();
    rig.start();
    rig.run(10 * SECOND, MS);
    assert!(rig.went() >= 10);
}
