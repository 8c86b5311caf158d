//! Rings that are lent: when they are out, what reaches whom meanwhile, and that nothing is lost when they come back. The
//! test stands where the host's kernel would.

use std::sync::atomic::Ordering::SeqCst;

use super::testing::*;
use super::{Command, RingSetup};
use crate::event::{Done, Wait};

const CHAIN: &[Desc] = &[Desc { addr: DATA, len: 1, flags: 0, next: 0 }];

/// A live device and its three queues.
fn live() -> (Guest, Borrower, [Vring; 3]) {
    let (device, borrower) = Lender::new();
    let mut guest = Guest::new(device, ram());
    let queues = begin(&guest);
    guest.turn();
    (guest, borrower, queues)
}

fn begin(guest: &Guest) -> [Vring; 3] {
    guest.negotiate(VERSION_1);
    let queues = [(0, 16), (1, 8), (2, 8)].map(|(queue, size)| guest.set_up(queue, size, false));
    guest.driver_ok();
    queues
}

/// Does what the kernel does with one ring: gives back what is available, however many that is.
fn serve(vring: &Vring, heads: &[u16]) {
    for (at, head) in (vring.used_index()..).zip(heads) {
        let entry = vring.used + 4 + 8 * u64::from(at % vring.size);
        vring.poke(entry, &u64::from(*head).to_le_bytes());
        vring.poke(vring.used + 2, &at.wrapping_add(1).to_le_bytes());
    }
}

#[test]
fn rings_go_out_as_the_driver_set_them_up_and_their_kicks_pass_the_loop_by() {
    let (mut guest, borrower, mut queues) = live();
    assert_eq!(borrower.steps(), "r+");
    borrower.with(|out| {
        let numbers: Vec<_> = out.iter().map(|ring| (ring.queue, ring.next)).collect();
        assert_eq!(numbers, [(0, 0), (1, 0)]);
        for (ring, vring) in out.iter().zip(&queues) {
            let Vring { size, descriptors, available, used, .. } = *vring;
            assert_eq!(ring.setup, RingSetup { size, ready: true, descriptors, available, used });
        }
    });
    for vring in &mut queues {
        vring.add(CHAIN);
    }
    for queue in 0..3 {
        guest.kick(queue);
    }
    assert_eq!(guest.event_loop.turn(Wait::Poll).unwrap(), 1, "the loop heard of a kick that is not its own");
    guest.turn();
    assert_eq!(borrower.taken(), [(2, 0)], "the third is the device's own");
    borrower.with(|out| assert_eq!((out[0].kick.read().unwrap(), out[1].kick.read().unwrap()), (1, 1)));
}

#[test]
fn a_call_is_an_interrupt_with_its_bit_and_none_after_the_reset() {
    let (mut guest, borrower, _queues) = live();
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (0, 0));
    borrower.with(|out| out[1].call.write(1).unwrap());
    guest.turn();
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 1));
    guest.write(reg::INTERRUPT_ACK, 1);
    let call = borrower.with(|out| out[0].call.try_clone().unwrap());
    guest.reset();
    call.write(1).unwrap();
    guest.turn();
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn a_pause_has_the_rings_back_before_it_ends_and_the_resume_sends_them_on_from_where_they_were() {
    let (mut guest, borrower, mut queues) = live();
    borrower.steps();
    let heads: Vec<u16> = (0..5).map(|_| queues[1].add(CHAIN)).collect();
    serve(&queues[1], &heads[..3]);
    borrower.came_to(&[(0, 0), (1, 3)]);
    borrower.with(|out| out[1].call.write(1).unwrap());
    let paused = guest.command(Command::Pause);
    guest.turn();
    assert_eq!((paused.load(SeqCst), borrower.steps()), (1, "-s".to_owned()));
    assert_eq!(guest.interrupts(), 1, "what was called for before is not lost");
    guest.kick(1);
    guest.turn();
    assert!(borrower.taken().is_empty(), "nobody serves them meanwhile");
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!((borrower.steps(), guest.interrupts()), ("r+".to_owned(), 0));
    borrower.with(|out| {
        assert_eq!((out[0].next, out[1].next), (0, 3));
        assert_eq!(out[1].kick.read().unwrap(), 1, "it is the same eventfd, and the kick is in it");
    });
    assert_eq!(queues[1].take_used().len(), 3);
}

#[test]
fn a_driver_that_comes_while_the_machine_is_paused_has_its_rings_out_at_the_resume() {
    let (device, borrower) = Lender::new();
    let mut guest = Guest::new(device, ram());
    let paused = guest.command(Command::Pause);
    let _queues = begin(&guest);
    guest.turn();
    assert_eq!((paused.load(SeqCst), borrower.steps()), (1, String::new()));
    assert!(guest.worker.send(Command::Resume).is_ok());
    guest.turn();
    assert_eq!(borrower.steps(), "r+");
}

#[test]
fn a_reset_has_the_rings_back_and_ends_their_kicks_and_the_next_driver_begins_at_zero() {
    let (mut guest, borrower, _queues) = live();
    borrower.came_to(&[(0, 7), (1, 9)]);
    borrower.steps();
    guest.reset();
    assert_eq!(borrower.steps(), "-s");
    assert!(!(0..3).any(|queue| guest.has_kick(queue)), "KVM would still know a kick");
    let _queues = begin(&guest);
    guest.turn();
    assert_eq!(borrower.steps(), "r+");
    borrower.with(|out| assert_eq!((out[0].next, out[1].next), (0, 0)));
}

#[test]
fn who_finds_a_ring_broken_ends_the_device_until_the_reset() {
    let (mut guest, borrower, mut queues) = live();
    borrower.steps();
    borrower.with(|out| out[0].broken.write(1).unwrap());
    guest.turn();
    assert_eq!((borrower.steps(), guest.status() & NEEDS_RESET), ("-s".to_owned(), NEEDS_RESET));
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 2));
    queues[2].add(CHAIN);
    guest.run(2);
    assert!(borrower.taken().is_empty());
    guest.reset();
    let _queues = begin(&guest);
    guest.turn();
    assert_eq!((borrower.steps(), guest.status() & NEEDS_RESET), ("r+".to_owned(), 0));
}

#[test]
fn rings_that_nobody_takes_end_the_device_until_the_reset() {
    let (device, borrower) = Lender::new();
    let mut guest = Guest::new(device, ram());
    borrower.refuse(true);
    let _queues = begin(&guest);
    guest.turn();
    assert_eq!((borrower.steps(), guest.status() & NEEDS_RESET), ("rs".to_owned(), NEEDS_RESET));
    guest.reset();
    borrower.refuse(false);
    let _queues = begin(&guest);
    guest.turn();
    assert_eq!((borrower.steps(), guest.status() & NEEDS_RESET), ("r+".to_owned(), 0));
}

#[test]
fn a_queue_that_the_driver_leaves_out_is_not_lent() {
    let (device, borrower) = Lender::new();
    let mut guest = Guest::new(device, ram());
    guest.negotiate(VERSION_1);
    guest.set_up(1, 8, false);
    guest.driver_ok();
    guest.turn();
    borrower.with(|out| assert_eq!(out.iter().map(|ring| ring.queue).collect::<Vec<_>>(), [1]));
}

#[test]
fn the_dump_says_which_rings_are_lent_and_how_far_memory_says_they_are() {
    let (mut guest, borrower, mut queues) = live();
    let heads: Vec<u16> = (0..5).map(|_| queues[1].add(CHAIN)).collect();
    serve(&queues[1], &heads[..3]);
    let dump = |guest: &mut Guest| {
        let (done, waiter) = Done::waited();
        assert!(guest.worker.send(Command::Dump(done)).is_ok());
        guest.turn();
        waiter.wait().unwrap()
    };
    let told = dump(&mut guest);
    assert!(
        told.contains("queue 1: lent, driver has made available up to 5, given back up to 3; queue 2: driver"),
        "{told}"
    );
    borrower.came_to(&[(0, 0), (1, 3)]);
    guest.command(Command::Pause);
    guest.turn();
    let told = dump(&mut guest);
    assert!(told.contains("queue 1: driver has made available up to 5, taken up to 3, given back up to 3"), "{told}");
}
