//! The worker between a driver and a device that takes its time: batches, pauses, resets, faults.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

use super::Command;
use super::testing::*;
use crate::event::{Done, Wait};

/// A chain that the device keeps in flight.
const SLOW: &[Desc] = &[Desc { addr: DATA, len: 1, flags: WRITE, next: 0 }];
/// A chain that the device finishes on the spot.
const FAST: &[Desc] = &[Desc { addr: DATA, len: 1, flags: 0, next: 0 }];

fn guest(queue_sizes: &[u16]) -> (Guest, Held) {
    let (device, held) = Holding::new(queue_sizes);
    (Guest::new(device, ram()), held)
}

/// All of the guest's memory that a test uses.
fn memory(guest: &Guest) -> Vec<u8> {
    guest.get(0, LOW_BYTES as usize)
}

#[test]
fn a_batch_is_one_interrupt() {
    for features in [EVENT_IDX, 0] {
        let (mut guest, held) = guest(&[16]);
        let mut vring = guest.start(features, 16);
        for _ in 0..5 {
            vring.add(FAST);
            vring.add(SLOW);
        }
        guest.run(0);
        assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 1));
        held.finish_all();
        vring.set_used_event(vring.used_index());
        guest.turn();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(vring.take_used().len(), 10);
    }
}

#[test]
fn a_driver_is_interrupted_for_what_is_finished_and_for_nothing_else() {
    let (mut guest, held) = guest(&[16]);
    let mut vring = guest.start(0, 16);
    guest.run(0);
    assert_eq!(guest.interrupts(), 0, "there was nothing");
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(guest.interrupts(), 0, "it is in flight");
    held.finish_all();
    guest.turn();
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn a_queue_that_wants_no_interrupts_gets_none_because_of_another() {
    let (mut guest, held) = guest(&[8, 8]);
    guest.negotiate(VERSION_1);
    let (mut quiet, _other) = (guest.set_up(0, 8, false), guest.set_up(1, 8, false));
    guest.driver_ok();
    guest.turn();
    quiet.set_flags(1);
    quiet.add(SLOW);
    guest.run(0);
    held.finish_all();
    guest.turn();
    assert_eq!(quiet.take_used().len(), 1);
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn a_long_queue_lets_the_others_have_their_turn_after_64_chains() {
    let (mut guest, held) = guest(&[256, 8]);
    guest.negotiate(VERSION_1);
    let (mut long, mut short) = (guest.set_up(0, 256, false), guest.set_up(1, 8, false));
    guest.driver_ok();
    guest.turn();
    for _ in 0..200 {
        long.add(FAST);
    }
    short.add(FAST);
    guest.kick(0);
    guest.kick(1);
    guest.turn();
    let queues: Vec<usize> = held.taken().iter().map(|(queue, _)| *queue).collect();
    assert_eq!(queues.iter().position(|queue| *queue == 1), Some(64));
    assert_eq!(queues.len(), 201);
}

#[test]
fn a_pause_ends_when_nothing_is_in_flight_and_serves_nothing_until_the_resume() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(EVENT_IDX, 8);
    vring.add(SLOW);
    vring.add(SLOW);
    guest.run(0);
    let paused = guest.command(Command::Pause);
    guest.turn();
    vring.add(SLOW);
    guest.run(0);
    assert_eq!((paused.load(SeqCst), held.held().len()), (0, 2), "two are in flight, the third waits");
    held.finish(0);
    guest.turn();
    assert_eq!(paused.load(SeqCst), 0);
    held.finish(0);
    guest.turn();
    assert_eq!((paused.load(SeqCst), vring.take_used().len()), (1, 2));
    guest.run(0);
    assert!(held.held().is_empty());
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!(held.held().len(), 1, "the kick was told during the pause, and is not lost (G20)");
}

#[test]
fn a_batch_that_a_pause_cuts_short_goes_on_with_the_resume() {
    let (mut guest, held) = guest(&[256]);
    let mut vring = guest.start(EVENT_IDX, 256);
    for _ in 0..200 {
        vring.add(FAST);
    }
    guest.kick(0);
    assert_eq!(guest.event_loop.turn(Wait::Poll).unwrap(), 1);
    let paused = guest.command(Command::Pause);
    guest.turn();
    let before = held.taken().len();
    assert!(before < 200 && paused.load(SeqCst) == 1, "{before}");
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!(held.taken().len(), 200);
}

#[test]
fn every_pause_gets_its_answer() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    let slips = [guest.command(Command::Pause), guest.command(Command::Pause)];
    guest.turn();
    held.finish_all();
    guest.turn();
    assert_eq!(slips.each_ref().map(|slip| slip.load(SeqCst)), [1, 1]);
    // One that has nothing to wait for gets it at once, and so does one without a driver.
    let third = guest.command(Command::Pause);
    guest.turn();
    assert_eq!(third.load(SeqCst), 1);
}

#[test]
fn a_reset_ends_when_nothing_is_in_flight_and_nothing_is_written_afterwards() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    vring.add(SLOW);
    guest.run(0);
    let reset = guest.command(Command::Reset);
    guest.turn();
    assert!(!guest.has_kick(0), "KVM forgets the kicks at once (I5)");
    vring.add(SLOW);
    guest.turn();
    held.finish(1);
    guest.turn();
    assert_eq!((reset.load(SeqCst), held.held().len()), (0, 1), "the device still has a buffer of the guest's");
    held.finish(0);
    guest.turn();
    assert_eq!(reset.load(SeqCst), 1);
    let before = memory(&guest);
    held.make_up(0, 0);
    guest.turn();
    assert!(memory(&guest) == before, "a chain of the old life reached the new one");
}

#[test]
fn a_vcpu_that_resets_goes_on_when_the_last_request_is_back() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    let bus = guest.bus.clone();
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(move || bus.write(MMIO + reg::STATUS, &[0; 4]));
        // The front has posted the reset when the worker drops its kicks.
        while guest.has_kick(0) {
            guest.turn();
        }
        assert!(!vcpu.is_finished());
        held.finish_all();
        while !vcpu.is_finished() {
            guest.turn();
        }
    });
    assert_eq!((guest.status(), guest.read(reg::INTERRUPT_STATUS)), (0, 0));
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
}

#[test]
fn a_reset_and_a_pause_that_wait_for_the_same_request_both_end() {
    for reset_first in [true, false] {
        let (mut guest, held) = guest(&[8]);
        let mut vring = guest.start(0, 8);
        vring.add(SLOW);
        guest.run(0);
        let (reset, pause);
        if reset_first {
            reset = guest.command(Command::Reset);
            pause = guest.command(Command::Pause);
        } else {
            pause = guest.command(Command::Pause);
            guest.turn();
            reset = guest.command(Command::Reset);
        }
        guest.turn();
        assert_eq!((reset.load(SeqCst), pause.load(SeqCst)), (0, 0));
        held.finish_all();
        guest.turn();
        assert_eq!((reset.load(SeqCst), pause.load(SeqCst)), (1, 1));
    }
}

#[test]
fn a_driver_may_reset_as_often_as_it_likes() {
    let (mut guest, held) = guest(&[8]);
    guest.reset();
    for _ in 0..3 {
        let mut vring = guest.start(EVENT_IDX, 8);
        vring.add(FAST);
        guest.run(0);
        assert_eq!(vring.take_used().len(), 1);
        guest.reset();
        guest.reset();
        assert_eq!(guest.status(), 0);
    }
    assert_eq!(held.taken().len(), 3);
}

#[test]
fn a_device_that_is_reset_and_activated_during_a_pause_hears_its_kicks_after_it() {
    let (mut guest, held) = guest(&[8]);
    let _ = guest.start(EVENT_IDX, 8);
    let _ = guest.command(Command::Pause);
    guest.reset();
    let mut vring = guest.start(EVENT_IDX, 8);
    vring.add(SLOW);
    guest.run(0);
    assert!(held.held().is_empty(), "it is paused");
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!(held.held().len(), 1);
}

#[test]
fn a_device_whose_driver_broke_the_rules_is_silent_until_the_reset_and_works_after_it() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    vring.offer(8);
    guest.run(0);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 2));
    assert!(!guest.has_kick(0), "a driver that goes on kicking wakes nobody");
    vring.add(SLOW);
    guest.run(0);
    assert_eq!((held.taken().len(), guest.interrupts()), (1, 0));
    // What was in flight is still the driver's to have back.
    held.finish_all();
    guest.turn();
    assert_eq!(vring.take_used(), [(0, 1)]);
    guest.reset();
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    held.finish_all();
    guest.turn();
    assert_eq!(vring.take_used(), [(0, 1)]);
    assert_eq!(guest.status() & NEEDS_RESET, 0);
}

#[test]
fn a_fault_during_a_pause_or_with_requests_in_flight_holds_up_neither_pause_nor_reset() {
    let (mut guest, held) = guest(&[8]);
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    vring.offer(99);
    guest.run(0);
    let pause = guest.command(Command::Pause);
    guest.turn();
    assert_eq!(pause.load(SeqCst), 0);
    held.finish_all();
    guest.turn();
    assert_eq!(pause.load(SeqCst), 1);
    guest.reset();
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_device_that_gives_back_what_it_does_not_have_is_stopped_like_a_bad_driver() {
    for (queue, head) in [(0, 3), (0, 300), (1, 0), (9, 0)] {
        let (mut guest, held) = guest(&[8, 8]);
        let mut vring = guest.start(0, 8);
        held.make_up(queue, head);
        guest.turn();
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET, "head {head} of queue {queue}");
        assert_eq!(vring.take_used(), []);
    }
}

#[test]
fn a_queue_that_the_driver_leaves_out_is_not_missed() {
    let (mut guest, held) = guest(&[8, 8, 8]);
    guest.negotiate(VERSION_1 | EVENT_IDX);
    let mut vring = guest.set_up(1, 8, true);
    guest.driver_ok();
    guest.turn();
    vring.add(SLOW);
    guest.run(1);
    assert_eq!(held.held(), [(1, 0)]);
    held.finish_all();
    guest.turn();
    assert_eq!((vring.take_used().len(), guest.interrupts()), (1, 1));
    guest.reset();
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(held.held(), [(0, 0)]);
}

#[test]
fn a_kick_that_came_before_the_worker_heard_of_the_driver_is_told() {
    let (mut guest, held) = guest(&[8]);
    guest.negotiate(VERSION_1);
    let mut vring = guest.set_up(0, 8, false);
    guest.driver_ok();
    vring.add(SLOW);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
}

#[test]
fn chains_from_before_the_driver_was_ready_are_served_without_a_kick_and_after_a_pause_too() {
    for paused in [false, true] {
        let (mut guest, held) = guest(&[8, 8, 8]);
        if paused {
            guest.command(Command::Pause);
        }
        guest.negotiate(VERSION_1);
        let mut vrings = [0, 2].map(|queue| guest.set_up(queue, 8, false));
        for vring in &mut vrings {
            vring.add(SLOW);
        }
        guest.driver_ok();
        guest.turn();
        assert_eq!(held.held().len(), if paused { 0 } else { 2 });
        assert!(guest.worker.send(Command::Resume).is_ok());
        guest.turn();
        assert_eq!(held.held().iter().map(|chain| chain.0).collect::<Vec<_>>(), [0, 2]);
    }
}

#[test]
fn a_vcpu_that_resets_a_device_whose_loop_is_gone_does_not_wait() {
    let (mut guest, _held) = guest(&[8]);
    let _ = guest.start(0, 8);
    guest.event_loop = crate::event::EventLoop::new().unwrap();
    guest.write(reg::STATUS, 0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_dump_names_the_device_its_state_and_how_far_each_ring_is() {
    let (mut guest, held) = guest(&[8, 8]);
    let line = |guest: &mut Guest| {
        let (done, waiter) = Done::waited();
        assert!(guest.worker.send(Command::Dump(done)).is_ok());
        guest.turn();
        waiter.wait().unwrap()
    };
    assert_eq!(line(&mut guest), "holding: no driver, 0 in flight in the device");
    let mut vring = guest.start(0, 8);
    vring.add(SLOW);
    vring.add(FAST);
    guest.run(0);
    assert_eq!(
        line(&mut guest),
        "holding: live, 1 in flight in the device; queue 0: driver has made available up to 2, taken up to 2, \
         given back up to 1 (driver sees 1), 1 in flight"
    );
    held.finish_all();
    let _ = guest.command(Command::Pause);
    guest.turn();
    assert!(line(&mut guest).starts_with("holding: paused, 0 in flight"));
    guest.reset();
    assert_eq!(line(&mut guest), "holding: no driver, 0 in flight in the device", "the rings are gone");
}

/// What may happen to a device at any moment.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Add { slow: bool },
    Turn,
    Finish(usize),
    Pause,
    Resume,
    Reset,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => any::<bool>().prop_map(|slow| Happening::Add { slow }),
        4 => Just(Happening::Turn),
        3 => (0..8_usize).prop_map(Happening::Finish),
        1 => Just(Happening::Pause),
        2 => Just(Happening::Resume),
        1 => Just(Happening::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// P7: whenever pause, resume and reset come, everything comes to rest, and no chain is lost or doubled.
    #[test]
    fn p7_pauses_resumes_and_resets_lose_and_double_nothing(
        happenings in prop::collection::vec(happening(), 1..120),
        event_idx in any::<bool>(),
    ) {
        let features = if event_idx { EVENT_IDX } else { 0 };
        let (mut guest, held) = guest(&[8]);
        let mut vring = guest.start(features, 8);
        let (mut added, mut pauses) = (0, Vec::new());
        for happening in happenings {
            match happening {
                Happening::Add { slow } if vring.free() > 0 => {
                    vring.add(if slow { SLOW } else { FAST });
                    added += 1;
                    if vring.wants_kick() {
                        guest.kick(0);
                    }
                }
                Happening::Turn => drop(guest.event_loop.turn(Wait::Poll)),
                Happening::Finish(n) if n < held.held().len() => held.finish(n),
                Happening::Pause => pauses.push(guest.command(Command::Pause)),
                Happening::Resume => prop_assert!(guest.worker.send(Command::Resume).is_ok()),
                Happening::Reset => {
                    guest.reset_while(|| held.finish_all());
                    prop_assert!(held.held().is_empty());
                    vring = guest.start(features, 8);
                    added = 0;
                }
                _ => {}
            }
            let back = vring.take_used().len();
            prop_assert!(back <= added);
            added -= back;
        }
        // In the end the machine runs and the disk answers.
        guest.turn();
        held.finish_all();
        guest.turn();
        prop_assert!(pauses.iter().all(|slip| slip.load(SeqCst) == 1));
        prop_assert!(guest.worker.send(Command::Resume).is_ok());
        guest.turn();
        held.finish_all();
        guest.turn();
        prop_assert!(held.held().is_empty());
        prop_assert_eq!(vring.take_used().len(), added);
        prop_assert_eq!(vring.free(), 8);
        prop_assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}
