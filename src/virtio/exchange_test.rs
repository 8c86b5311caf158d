//! One device in the place of another, while a driver goes on: hot-plug, seen from the ring.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::testing::*;
use super::{Command, Device, Exchanged};
use crate::event::{Done, Wait};

/// A chain that a holding device keeps in flight.
const SLOW: &[Desc] = &[Desc { addr: DATA, len: 1, flags: WRITE, next: 0 }];

/// What is left over by an exchange, once it has been done.
type Left = Arc<Mutex<Option<Exchanged>>>;

fn exchange(guest: &Guest, device: impl Device) -> Left {
    let left = Left::default();
    let theirs = left.clone();
    let done = Done::posted(move |end| *theirs.lock().unwrap() = end.ok());
    assert!(guest.worker.send(Command::Exchange(Box::new(device), done)).is_ok());
    left
}

fn is_done(left: &Left) -> bool {
    left.lock().unwrap().is_some()
}

/// The first bytes of the configuration.
fn config(guest: &Guest) -> u32 {
    guest.read(reg::CONFIG)
}

#[test]
fn a_device_leaves_when_its_last_request_is_back_and_what_came_meanwhile_is_the_next_ones() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(EVENT_IDX, 8);
    let heads = [vring.add(SLOW), vring.add(SLOW)];
    guest.run(0);
    let (second, held_by_second) = Holding::new(&[8]);
    let left = exchange(&guest, second);
    guest.turn();
    vring.add(SLOW);
    guest.run(0);
    held.finish(0);
    guest.turn();
    assert!(!is_done(&left), "one is in flight");
    assert!(held_by_second.taken().is_empty());
    held.finish(0);
    guest.turn();
    assert!(matches!(&*left.lock().unwrap(), Some(Ok(device)) if device.id() == "holding"));
    assert_eq!(held.taken().len(), 2);
    assert_eq!(vring.take_used().iter().map(|used| used.0).collect::<Vec<_>>(), heads);
    assert_eq!(held_by_second.taken().len(), 1, "its kick was told while it waited, and is not lost");
    held_by_second.finish_all();
    guest.turn();
    assert_eq!(vring.take_used().len(), 1);
}

#[test]
fn the_driver_reads_the_new_configuration_and_is_told_of_it() {
    let mut guest = Guest::new(Keeper::new(&[8]).0, ram());
    assert_eq!(config(&guest), 0);
    let (before, _vring) = (guest.read(reg::CONFIG_GENERATION), guest.start(0, 8));
    let left = exchange(&guest, Holding::new(&[8]).0);
    guest.turn();
    assert!(is_done(&left));
    assert_eq!(config(&guest), 0x0302_0100);
    assert_ne!(guest.read(reg::CONFIG_GENERATION), before);
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 2));
}

#[test]
fn without_a_driver_nobody_is_interrupted_and_a_later_one_finds_the_new_device() {
    let mut guest = Guest::new(Keeper::new(&[8]).0, ram());
    let (device, held) = Holding::new(&[8]);
    exchange(&guest, device);
    guest.turn();
    assert_eq!((guest.interrupts(), config(&guest)), (0, 0x0302_0100));
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
}

#[test]
fn what_was_sent_when_nothing_was_there_is_never_the_next_devices() {
    for paused in [false, true] {
        let (keeper, kept) = Keeper::new(&[256]);
        let mut guest = Guest::new(keeper, ram());
        let mut vring = guest.start(0, 256);
        if paused {
            guest.command(Command::Pause);
            guest.turn();
        }
        for _ in 0..200 {
            vring.add(SLOW);
        }
        // The command is there before the kick is told.
        let (device, held) = Holding::new(&[256]);
        let left = exchange(&guest, device);
        guest.run(0);
        assert!(is_done(&left), "a paused machine's too: who asked may have nobody else to let it go on");
        assert!(guest.worker.send(Command::Resume).is_ok());
        guest.turn();
        assert_eq!((kept.lock().unwrap().len(), held.taken().len()), (200, 0), "paused: {paused}");
        assert_eq!(vring.take_used().len(), 200);
        vring.add(SLOW);
        guest.run(0);
        assert_eq!(held.taken().len(), 1);
    }
}

#[test]
fn what_a_paused_machine_has_sent_to_a_device_that_left_is_not_the_next_ones() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(0, 8);
    guest.command(Command::Pause);
    guest.turn();
    let head = vring.add(SLOW);
    guest.kick(0);
    let (keeper, kept) = Keeper::new(&[8]);
    let (second, held_by_second) = Holding::new(&[8]);
    let lefts = [exchange(&guest, keeper), {
        guest.turn();
        exchange(&guest, second)
    }];
    guest.turn();
    assert!(lefts.iter().all(is_done));
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!((held.taken().len(), held_by_second.taken().len()), (0, 0));
    assert_eq!(*kept.lock().unwrap(), [head]);
}

#[test]
fn what_a_limit_holds_back_is_answered_by_who_comes_next() {
    let (metered, hand) = Metered::new(&[8], &crate::qos::Limits::iops(1));
    let mut guest = Guest::new(metered, ram());
    let mut vring = guest.start(0, 8);
    for _ in 0..4 {
        vring.add(SLOW);
    }
    guest.run(0);
    assert_eq!(hand.went().len(), 1);
    let (keeper, kept) = Keeper::new(&[8]);
    let left = exchange(&guest, keeper);
    guest.turn();
    assert!(is_done(&left), "what waits for its turn is not in flight");
    assert_eq!((hand.went().len(), kept.lock().unwrap().len(), vring.take_used().len()), (1, 3, 4));
}

#[test]
fn a_device_that_cannot_be_set_up_comes_back_and_the_other_goes_on_as_before() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(0, 8);
    let left = exchange(&guest, Keeper::refused(&[8]));
    guest.turn();
    match left.lock().unwrap().take() {
        Some(Err((device, error))) => {
            assert_eq!((device.id(), error.to_string().as_str()), ("keeper", "no descriptor left"))
        }
        _ => panic!("it was taken"),
    };
    assert_eq!((config(&guest), guest.interrupts()), (0x0302_0100, 0));
    // Its watch, which has rung, is gone, or the other would have been told; the other's bell still rings.
    assert_eq!(guest.event_loop.turn(Wait::Poll).unwrap(), 0);
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
    held.finish_all();
    guest.turn();
    assert_eq!(vring.take_used().len(), 1);
}

#[test]
fn nothing_of_a_device_that_left_is_heard_any_more() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    let left = exchange(&guest, Keeper::new(&[8]).0);
    held.finish_all();
    guest.turn();
    assert!(is_done(&left));
    // The keeper panics if it is told of anything.
    held.make_up(0, 0);
    assert_eq!(guest.event_loop.turn(Wait::Poll).unwrap(), 0);
}

#[test]
fn a_second_exchange_is_refused_while_the_first_waits() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    let lefts = [(); 2].map(|()| exchange(&guest, Keeper::new(&[8]).0));
    guest.turn();
    assert_eq!(lefts.each_ref().map(is_done), [false, true]);
    assert!(matches!(&*lefts[1].lock().unwrap(), Some(Err((device, _))) if device.id() == "keeper"));
    held.finish_all();
    guest.turn();
    assert!(matches!(&*lefts[0].lock().unwrap(), Some(Ok(device)) if device.id() == "holding"));
}

#[test]
fn a_reset_a_pause_and_an_exchange_that_wait_for_the_same_request_all_end() {
    let (first, held) = Holding::new(&[8]);
    let mut guest = Guest::new(first, ram());
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    let left = exchange(&guest, Keeper::new(&[8]).0);
    let paused = guest.command(Command::Pause);
    let mut turns = 0;
    guest.reset_while(|| {
        turns += 1;
        if turns == 3 {
            held.finish_all();
        }
    });
    guest.turn();
    assert_eq!((is_done(&left), paused.load(SeqCst), guest.status()), (true, 1, 0));
    assert!(guest.worker.send(Command::Resume).is_ok());
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(vring.take_used().len(), 1, "the new life's chain is the new device's");
}

#[test]
fn a_device_whose_driver_broke_the_rules_is_exchanged_too_and_stays_silent() {
    let mut guest = Guest::new(Holding::new(&[8]).0, ram());
    let vring = guest.start(0, 8);
    vring.publish(100);
    guest.run(0);
    assert!(guest.status() & NEEDS_RESET != 0);
    guest.interrupts();
    let (keeper, kept) = Keeper::new(&[8]);
    let left = exchange(&guest, keeper);
    guest.turn();
    assert!(is_done(&left) && kept.lock().unwrap().is_empty());
    assert_eq!((guest.interrupts(), config(&guest)), (0, 0));
}

/// What may happen to a slot.
#[derive(Clone, Copy, Debug)]
enum Step {
    Send,
    Kick,
    Turn,
    Finish,
    Plug,
    Unplug,
    Pause,
    Resume,
}

proptest! {
    /// P8: whatever is plugged and unplugged meanwhile, each chain comes back exactly once, and none that was sent to an
    /// empty slot is ever seen by a device.
    #[test]
    fn p8_plugs_and_unplugs_lose_and_double_nothing(steps in prop::collection::vec(
        prop_oneof![
            4 => Just(Step::Send), 3 => Just(Step::Kick), 4 => Just(Step::Turn), 4 => Just(Step::Finish),
            1 => Just(Step::Plug), 1 => Just(Step::Unplug), 1 => Just(Step::Pause), 1 => Just(Step::Resume)
        ], 1..120)) {
        let mut guest = Guest::new(Keeper::new(&[64]).0, ram());
        let mut vring = guest.start(0, 64);
        // The hands on all devices that were ever there, and the exchange under way.
        let mut hands: Vec<Held> = Vec::new();
        let mut there = false;
        let mut under_way: Option<Left> = None;
        let (mut sent, mut back) = (0, 0);
        let mut to_nobody = Vec::new();
        for step in steps {
            let busy = under_way.as_ref().is_some_and(|left| !is_done(left));
            match step {
                Step::Send if sent - back < 60 => {
                    let head = vring.add(SLOW);
                    if !there && !busy {
                        to_nobody.push(head);
                    }
                    sent += 1;
                }
                Step::Send => {}
                Step::Kick => guest.kick(0),
                Step::Turn => _ = guest.event_loop.turn(Wait::Poll).unwrap(),
                Step::Finish => {
                    if let Some(held) = hands.iter().find(|held| !held.held().is_empty()) {
                        held.finish(0);
                    }
                }
                Step::Plug if !there && !busy => {
                    let (device, held) = Holding::new(&[64]);
                    hands.push(held);
                    under_way = Some(exchange(&guest, device));
                    there = true;
                }
                Step::Unplug if there && !busy => {
                    under_way = Some(exchange(&guest, Keeper::new(&[64]).0));
                    there = false;
                }
                Step::Plug | Step::Unplug => {}
                Step::Pause => _ = guest.command(Command::Pause),
                Step::Resume => assert!(guest.worker.send(Command::Resume).is_ok()),
            }
            for (head, _) in vring.take_used() {
                back += 1;
                to_nobody.retain(|nobody| *nobody != head);
            }
            // A head that was sent to nobody and is not back has been handed to no device.
            for held in &hands {
                prop_assert!(!held.held().iter().any(|(_, head)| to_nobody.contains(head)));
            }
        }
        assert!(guest.worker.send(Command::Resume).is_ok());
        for _ in 0..200 {
            guest.kick(0);
            guest.turn();
            hands.iter().for_each(Held::finish_all);
            guest.turn();
            back += vring.take_used().len();
        }
        prop_assert_eq!(back, sent);
        prop_assert!(guest.status() & NEEDS_RESET == 0);
    }
}
