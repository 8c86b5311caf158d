//! The ring against every driver: one that keeps the rules, one that breaks them, and any there may be between.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{DATA, Desc, HIGH, HIGH_BYTES, INDIRECT, LOW_BYTES, NEXT, RINGS, Vring, WRITE, ram};

/// Where the tests put indirect tables.
const TABLE: u64 = DATA + 0x8_0000;

/// Both ends of a ring.
fn rig(size: u16, event_idx: bool) -> (Ring, Vring) {
    let ram = ram();
    let vring = Vring::new(ram.clone(), RINGS, size, event_idx);
    let Vring { descriptors, available, used, .. } = vring;
    let setup = RingSetup { size, ready: true, descriptors, available, used };
    (Ring::new(&setup, 256, event_idx, ram).unwrap(), vring)
}

/// The heads that a call of `serve` handed over, each answered with `Used(0)`, and what it left behind.
fn heads(ring: &mut Ring, budget: usize) -> (Vec<u16>, Result<Served, Fault>) {
    let mut heads = Vec::new();
    let served = ring.serve(budget, 0, |chain| {
        heads.push(chain.head());
        Verdict::Used(0)
    });
    (heads, served)
}

fn buffers(descs: &[Desc]) -> Vec<Buffer> {
    descs.iter().map(|desc| Buffer { address: GuestAddress(desc.addr), len: desc.len }).collect()
}

#[test]
fn a_chain_arrives_with_its_buffers_in_order_direct_or_not() {
    let (mut ring, mut vring) = rig(8, true);
    let reads = [Desc::readable(DATA, 16), Desc::readable(u64::MAX, 0), Desc::readable(7, 3)];
    let writes = [Desc::writable(DATA + 1, 512), Desc::writable(DATA + 4096, 1)];
    let all = [&reads[..], &writes[..]].concat();
    vring.add(&all);
    vring.add_indirect(TABLE, &all);
    // A chain may go on in a table; the flag WRITE of the descriptor that says so means nothing (section 2.7.5.3.2).
    vring.put(7, all[0].and(NEXT, 6));
    vring.put(6, Desc { addr: TABLE + 0x1000, len: 64, flags: INDIRECT | WRITE, next: 0 });
    for (i, desc) in (0..).zip(&all[1..]) {
        vring.write_desc(TABLE + 0x1000, i, if i == 3 { *desc } else { desc.and(NEXT, i + 1) });
    }
    vring.offer(7);
    let mut seen = Vec::new();
    let served = ring.serve(64, 0, |chain| {
        seen.push((chain.head(), chain.readable().to_vec(), chain.writable().to_vec()));
        Verdict::Used(u32::from(chain.head()) + 100)
    });
    assert_eq!(served, Ok(Served::All));
    let (reads, writes) = (buffers(&reads), buffers(&writes));
    assert_eq!(seen, [0, 5, 7].map(|head| (head, reads.clone(), writes.clone())));
    assert_eq!(vring.take_used(), [(0, 100), (5, 105), (7, 107)]);
}

/// A way to spoil the chain at head 0 of a queue of four.
type Spoil = fn(&mut Vring);

#[test]
fn a_malformed_chain_is_given_back_once_and_stops_the_ring() {
    let cases: [(&str, Spoil); 15] = [
        ("it is its own next", |v| v.put(0, Desc::readable(DATA, 1).and(NEXT, 0))),
        ("two go round", |v| {
            v.put(0, Desc::readable(DATA, 1).and(NEXT, 1));
            v.put(1, Desc::readable(DATA, 1).and(NEXT, 0));
        }),
        ("its next is outside the queue", |v| v.put(0, Desc::readable(DATA, 1).and(NEXT, 4))),
        ("its next is far outside the queue", |v| v.put(0, Desc::readable(DATA, 1).and(NEXT, u16::MAX))),
        ("readable behind writable", |v| {
            v.put(0, Desc::writable(DATA, 1).and(NEXT, 1));
            v.put(1, Desc::readable(DATA, 1));
        }),
        ("readable between writables", |v| {
            v.put(0, Desc::writable(DATA, 1).and(NEXT, 1));
            v.put(1, Desc::readable(DATA, 1).and(NEXT, 2));
            v.put(2, Desc::writable(DATA, 1));
        }),
        ("a table in a table", |v| {
            v.put(0, Desc { addr: TABLE, len: 16, flags: INDIRECT, next: 0 });
            v.write_desc(TABLE, 0, Desc { addr: TABLE, len: 16, flags: INDIRECT, next: 0 });
        }),
        ("an empty table", |v| v.put(0, Desc { addr: TABLE, len: 0, flags: INDIRECT, next: 0 })),
        ("a table of one and a half", |v| v.put(0, Desc { addr: TABLE, len: 24, flags: INDIRECT, next: 0 })),
        ("a table of a million", |v| v.put(0, Desc { addr: TABLE, len: 16 << 20, flags: INDIRECT, next: 0 })),
        ("a table in the hole of memory", |v| v.put(0, Desc { addr: LOW_BYTES, len: 16, flags: INDIRECT, next: 0 })),
        ("a table that ends behind memory", |v| {
            let addr = HIGH + HIGH_BYTES - 16;
            v.put(0, Desc { addr, len: 32, flags: INDIRECT, next: 0 });
            v.write_desc(addr, 0, Desc::readable(DATA, 1).and(NEXT, 1));
        }),
        ("a table at the last address", |v| v.put(0, Desc { addr: u64::MAX - 7, len: 32, flags: INDIRECT, next: 0 })),
        ("a table with more descriptors than the queue", |v| {
            v.put(0, Desc { addr: TABLE, len: 80, flags: INDIRECT, next: 0 });
            for i in 0..5 {
                v.write_desc(
                    TABLE,
                    i,
                    if i == 4 { Desc::readable(1, 1) } else { Desc::readable(1, 1).and(NEXT, i + 1) },
                );
            }
        }),
        ("more than four gigabytes", |v| {
            v.put(0, Desc::readable(DATA, u32::MAX).and(NEXT, 1));
            v.put(1, Desc::readable(DATA, 1));
        }),
    ];
    for event_idx in [false, true] {
        for (what, spoil) in cases {
            let (mut ring, mut vring) = rig(4, event_idx);
            vring.put(3, Desc::readable(DATA, 1));
            vring.offer(3);
            spoil(&mut vring);
            vring.offer(0);
            assert_eq!(heads(&mut ring, 64), (vec![3], Err(Fault::Chain(0))), "{what}");
            assert_eq!(vring.take_used(), [(3, 0), (0, 0)], "{what}");
            assert_eq!(ring.in_flight(), 0, "{what}");
        }
    }
}

#[test]
fn a_chain_as_long_as_the_queue_is_well_formed() {
    let (mut ring, mut vring) = rig(4, false);
    vring.add(&[Desc::readable(DATA, 1); 4]);
    assert_eq!(heads(&mut ring, 64), (vec![0], Ok(Served::All)));
    vring.take_used();
    let head = vring.add_indirect(TABLE, &[Desc::writable(DATA, 1); 4]);
    assert_eq!(heads(&mut ring, 64), (vec![head], Ok(Served::All)));
}

#[test]
fn an_available_index_further_ahead_than_the_ring_is_long_is_refused() {
    for size in [1, 4, 256] {
        for ahead in [size + 1, 0x7fff, 0x8000, 0xffff] {
            let (mut ring, vring) = rig(size, true);
            vring.publish(ahead);
            assert_eq!(heads(&mut ring, 64), (vec![], Err(Fault::AvailIndex)), "{ahead} of {size}");
        }
    }
}

#[test]
fn a_head_outside_the_queue_is_refused() {
    for head in [4, 5, 0x7fff, 0xffff] {
        let (mut ring, mut vring) = rig(4, false);
        vring.offer(head);
        assert_eq!(heads(&mut ring, 64), (vec![], Err(Fault::HeadRange(head))));
        assert_eq!((vring.take_used(), ring.in_flight()), (vec![], 0));
    }
}

#[test]
fn a_head_that_is_in_flight_is_refused_until_it_is_given_back() {
    // CVE-2026-45782: the second request's end freed the first one's buffers under the kernel's hands.
    let (mut ring, mut vring) = rig(4, false);
    vring.put(2, Desc::writable(DATA, 1));
    for _ in 0..3 {
        vring.offer(2);
        assert_eq!(ring.serve(64, 0, |_| Verdict::Pending), Ok(Served::All));
        assert_eq!(ring.in_flight(), 1);
        assert_eq!(ring.give_back(2, 1), Ok(()));
        assert_eq!(vring.take_used(), [(2, 1)]);
    }
    vring.offer(2);
    vring.offer(2);
    assert_eq!(ring.serve(64, 0, |_| Verdict::Pending), Err(Fault::HeadInFlight(2)));
    assert_eq!(vring.take_used(), []);
    assert_eq!((ring.give_back(2, 1), ring.in_flight()), (Ok(()), 0));
    assert_eq!(vring.take_used(), [(2, 1)]);
}

#[test]
fn a_chain_is_given_back_once_and_only_if_it_was_taken() {
    let (mut ring, mut vring) = rig(4, false);
    let head = vring.add(&[Desc::writable(DATA, 1)]);
    assert_eq!(ring.give_back(head, 1), Err(Fault::HeadRange(head)));
    assert_eq!(ring.serve(64, 0, |_| Verdict::Pending), Ok(Served::All));
    assert_eq!(ring.give_back(head, 1), Ok(()));
    for wrong in [head, 3, 4, u16::MAX] {
        assert_eq!(ring.give_back(wrong, 1), Err(Fault::HeadRange(wrong)));
    }
    assert_eq!((vring.take_used(), ring.in_flight()), (vec![(head, 1)], 0));
}

#[test]
fn a_budget_ends_the_batch_and_the_rest_comes_with_the_next() {
    let (mut ring, mut vring) = rig(128, false);
    for _ in 0..100 {
        vring.add(&[Desc::readable(DATA, 1)]);
    }
    let (first, served) = heads(&mut ring, 64);
    assert_eq!((first.len(), served), (64, Ok(Served::More)));
    assert!(!vring.wants_kick(), "the device comes back by itself");
    let (rest, served) = heads(&mut ring, 64);
    assert_eq!((rest.len(), served), (36, Ok(Served::All)));
    assert!(vring.wants_kick());
}

#[test]
fn an_interrupt_is_due_only_when_something_was_given_back() {
    for event_idx in [false, true] {
        let (mut ring, mut vring) = rig(4, event_idx);
        assert_eq!(heads(&mut ring, 64), (vec![], Ok(Served::All)));
        assert_eq!(ring.needs_interrupt(), Ok(false), "nothing was there");
        let head = vring.add(&[Desc::writable(DATA, 1)]);
        assert_eq!(ring.serve(64, 0, |_| Verdict::Pending), Ok(Served::All));
        assert_eq!(ring.needs_interrupt(), Ok(false), "nothing is finished");
        ring.give_back(head, 1).unwrap();
        assert_eq!(ring.needs_interrupt(), Ok(true));
        assert_eq!(ring.needs_interrupt(), Ok(false), "the driver knows");
    }
}

#[test]
fn a_driver_without_event_idx_turns_interrupts_off_by_a_flag() {
    let (mut ring, mut vring) = rig(4, false);
    for (flags, due) in [(0, true), (1, false), (0, true)] {
        vring.set_flags(flags);
        vring.add(&[Desc::readable(DATA, 1)]);
        assert_eq!(heads(&mut ring, 64).0.len(), 1);
        assert_eq!(ring.needs_interrupt(), Ok(due));
        vring.take_used();
    }
}

#[test]
fn a_driver_with_event_idx_names_the_chain_that_it_wants_to_hear_of() {
    let (mut ring, mut vring) = rig(8, true);
    // At any point of the index's way round: five chains in one batch, wanted after the third, then not until later.
    for _ in 0..0x1_0000 / 5 + 10 {
        let start = vring.seen_used;
        for (wanted, due) in [(start.wrapping_add(2), true), (start.wrapping_add(20), false)] {
            vring.set_used_event(wanted);
            let batch = if due { 3 } else { 2 };
            for _ in 0..batch {
                vring.add(&[Desc::readable(DATA, 1)]);
            }
            assert_eq!(heads(&mut ring, 64).0.len(), batch);
            assert_eq!(ring.needs_interrupt(), Ok(due), "from {start}");
            vring.take_used();
        }
    }
}

/// What the driver does in the model: publishes a chain, or looks whether the device wants a kick.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Publish,
    Decide,
}

/// Runs a driver's program against the device. At each point where the device leaves the ring alone, `choose` says how
/// many of the driver's steps come next. False if the device sleeps with a chain available and no kick due.
fn play(
    ring: &mut Ring,
    vring: &mut Vring,
    program: &[Step],
    budget: usize,
    mut choose: impl FnMut(usize) -> usize,
) -> bool {
    let (mut at, mut kick, mut taken) = (0, false, 0);
    let wanted = program.iter().filter(|step| **step == Step::Publish).count();
    let mut drive = |vring: &mut Vring, kick: &mut bool, all: bool| {
        let steps = if all { program.len() - at } else { choose(program.len() - at) };
        for step in &program[at..at + steps] {
            match step {
                Step::Publish => drop(vring.add(&[Desc::readable(DATA, 1)])),
                Step::Decide => *kick |= vring.wants_kick(),
            }
        }
        at += steps;
        at == program.len()
    };
    loop {
        // The device sleeps here.
        let finished = drive(vring, &mut kick, false);
        if std::mem::take(&mut kick) {
            let mut served = Served::More;
            while served == Served::More {
                let serve = ring.serve(budget, 0, |_| {
                    taken += 1;
                    drive(vring, &mut kick, false);
                    Verdict::Used(0)
                });
                served = serve.unwrap();
                if served == Served::More {
                    drive(vring, &mut kick, false);
                }
            }
        } else if finished || (drive(vring, &mut kick, true) && !kick) {
            vring.take_used();
            return taken == wanted;
        }
    }
}

#[test]
fn p5_no_interleaving_leaves_a_chain_behind_with_nobody_to_be_told() {
    use Step::{Decide as D, Publish as P};
    let programs = [&[P, D, P, D, P, D][..], &[P, P, D, P, D], &[P, D, P, P, D], &[P, P, P, D]];
    let indices = [0, 1, 0x7ffd, 0x7ffe, 0x7fff, 0x8000, 0xfffc, 0xfffd, 0xfffe, 0xffff];
    for event_idx in [true, false] {
        let (mut ring, mut vring) = rig(4, event_idx);
        for index in indices {
            ring.queue.set_next_avail(index);
            ring.queue.set_next_used(index);
            vring.start_at(index);
            assert_eq!(heads(&mut ring, 64).1, Ok(Served::All));
            for (program, budget) in programs.iter().flat_map(|program| [1, 2, 64].map(|budget| (program, budget))) {
                // Counts through all sequences of choices: each is as long as the play that it led to.
                let mut choices: Vec<(usize, usize)> = Vec::new();
                loop {
                    let mut depth = 0;
                    let lost = !play(&mut ring, &mut vring, program, budget, |most| {
                        if depth == choices.len() {
                            choices.push((0, most));
                        }
                        depth += 1;
                        choices[depth - 1].0
                    });
                    assert!(!lost, "event_idx {event_idx}, from {index:#x}, budget {budget}: {choices:?}");
                    choices.truncate(depth);
                    while choices.last().is_some_and(|(chosen, most)| chosen == most) {
                        choices.pop();
                    }
                    let Some((chosen, _)) = choices.last_mut() else { break };
                    *chosen += 1;
                }
            }
        }
    }
}

#[test]
fn p5_no_kick_is_lost_between_a_driver_and_a_device_that_really_run_at_once() {
    for event_idx in [true, false] {
        let (mut ring, mut vring) = rig(4, event_idx);
        let (kick, stop, rounds) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let device = scope.spawn(|| {
                while !stop.load(SeqCst) {
                    if kick.swap(false, SeqCst) {
                        while heads(&mut ring, 3).1.unwrap() == Served::More {}
                    } else {
                        // Asleep: whatever was decided before the round began has been heard when it ends.
                        rounds.fetch_add(1, SeqCst);
                        std::thread::yield_now();
                    }
                }
            });
            // The second chain comes while the device is about to sleep, sooner or later in each round.
            for round in 0..35_000 {
                for delay in [0, round % 200] {
                    (0..delay).for_each(|_| std::hint::spin_loop());
                    vring.add(&[Desc::readable(DATA, 1)]);
                    if vring.wants_kick() {
                        kick.store(true, SeqCst);
                    }
                }
                let decided = rounds.load(SeqCst);
                while vring.free() < 4 {
                    let asleep = rounds.load(SeqCst) >= decided + 2;
                    if vring.take_used().is_empty() && asleep {
                        stop.store(true, SeqCst);
                        panic!("asleep in round {round} with a chain available");
                    }
                    assert!(!device.is_finished());
                    std::thread::yield_now();
                }
            }
            stop.store(true, SeqCst);
        });
    }
}

/// A descriptor that is more often sane than not.
fn any_desc() -> impl Strategy<Value = Desc> {
    let addr = prop::sample::select(vec![DATA, TABLE, TABLE + 64, LOW_BYTES - 8, HIGH + HIGH_BYTES - 16, u64::MAX, 0]);
    let len = prop::sample::select(vec![0, 1, 16, 32, 128, 24, 512, u32::MAX]);
    (addr, len, 0..8_u16, 0..10_u16).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// P6: every head that was taken comes back exactly once, whatever the chains are like.
    #[test]
    fn p6_every_head_that_was_taken_comes_back_exactly_once(
        table in prop::collection::vec(any_desc(), 8),
        indirect in prop::collection::vec(any_desc(), 8),
        offered in prop::collection::vec(0..9_u16, 0..12),
        verdicts in prop::collection::vec(0..6_u8, 24),
        budget in 1..16_usize,
        event_idx in any::<bool>(),
    ) {
        let (mut ring, mut vring) = rig(8, event_idx);
        for (i, desc) in (0..).zip(&table) {
            vring.put(i, *desc);
        }
        for (i, desc) in (0..).zip(&indirect) {
            vring.write_desc(TABLE, i, *desc);
        }
        for head in &offered {
            vring.offer(*head);
        }
        let (mut taken, mut waiting, mut calls, mut asked) = (Vec::new(), Vec::new(), 0, 0);
        let fault = loop {
            calls += 1;
            prop_assert!(calls < 80, "it must end");
            let served = ring.serve(budget, calls, |chain| {
                assert!(chain.readable().len() + chain.writable().len() <= 8);
                asked += 1;
                let later = |direction, other_may_go| Verdict::Later(direction, Wait { until_ns: calls + 1, other_may_go });
                match verdicts.get(asked - 1) {
                    Some(2) => return later(Direction::Read, true),
                    Some(3) => return later(Direction::Write, true),
                    Some(4) => return later(Direction::Read, false),
                    _ => taken.push(chain.head()),
                }
                if verdicts.get(asked - 1) == Some(&1) {
                    waiting.push(chain.head());
                    Verdict::Pending
                } else {
                    Verdict::Used(0)
                }
            });
            match served {
                Ok(Served::More) => {}
                Ok(Served::Held { until_ns, .. }) => prop_assert_eq!(until_ns, calls + 1),
                Ok(Served::All) => break None,
                Err(fault) => break Some(fault),
            }
        };
        // Those that were told to wait are not in the device, and are forgotten when the driver has broken the rules.
        let aside: usize = ring.aside.iter().map(|aside| aside.chains.len()).sum();
        prop_assert!(fault.is_some() || aside == 0);
        prop_assert_eq!(ring.in_flight() - aside, waiting.len());
        if let Some(Fault::Chain(head)) = fault {
            taken.push(head);
        }
        while let Some(head) = waiting.pop() {
            prop_assert_eq!(ring.give_back(head, 0), Ok(()));
            prop_assert_eq!(ring.give_back(head, 0), Err(Fault::HeadRange(head)));
        }
        let mut back: Vec<u16> = vring.take_used().iter().map(|(head, _)| *head).collect();
        if offered.len() <= 8 {
            let expected = if fault.is_none() { offered.len() } else { taken.len() };
            prop_assert_eq!(taken.len(), expected);
        }
        taken.sort_unstable();
        back.sort_unstable();
        prop_assert_eq!(taken, back);
        prop_assert_eq!(ring.in_flight(), aside);
    }
}

/// A chain that the tests' device takes for one of this direction: by its length.
fn one(direction: Direction) -> Desc {
    Desc::readable(DATA, 1 + direction as u32)
}

/// Serves with a device that lets go what `may_go` says, and wants the rest to wait until 100: the heads that went.
fn served(ring: &mut Ring, now_ns: u64, may_go: impl Fn(Direction) -> bool, total: bool) -> (Vec<u16>, Served) {
    let mut went = Vec::new();
    let served = ring.serve(64, now_ns, |chain| {
        let direction = if chain.readable()[0].len == 1 { Direction::Read } else { Direction::Write };
        if !may_go(direction) {
            return Verdict::Later(direction, Wait { until_ns: 100, other_may_go: !total });
        }
        went.push(chain.head());
        Verdict::Used(0)
    });
    (went, served.unwrap())
}

#[test]
fn a_ring_that_is_told_to_wait_hands_over_nothing_more_asks_for_no_kick_and_goes_on_in_order() {
    for event_idx in [false, true] {
        let (mut ring, mut vring) = rig(8, event_idx);
        let mut heads: Vec<u16> = (0..3).map(|_| vring.add(&[one(Direction::Read)])).collect();
        assert_eq!(
            served(&mut ring, 0, |_| false, true),
            (vec![], Served::Held { until_ns: 100, kicks: false, went: false })
        );
        assert_eq!(ring.queue.next_avail(), 1, "one is set aside, the others stay in the ring");
        vring.wants_kick();
        heads.push(vring.add(&[one(Direction::Write)]));
        assert!(!vring.wants_kick(), "it could not go");
        assert_eq!(served(&mut ring, 100, |_| true, true), (heads, Served::All));
        vring.add(&[one(Direction::Read)]);
        assert!(vring.wants_kick());
    }
}

#[test]
fn what_must_wait_does_not_hold_up_the_other_direction_and_keeps_its_order() {
    let (mut ring, mut vring) = rig(16, true);
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        writes.push(vring.add(&[one(Direction::Write)]));
        reads.push(vring.add(&[one(Direction::Read)]));
    }
    let held = Served::Held { until_ns: 100, kicks: true, went: true };
    assert_eq!(served(&mut ring, 0, |direction| direction == Direction::Read, false), (reads, held));
    writes.push(vring.add(&[one(Direction::Write)]));
    let read = vring.add(&[one(Direction::Read)]);
    assert!(vring.wants_kick(), "it may be one that can go");
    assert_eq!(served(&mut ring, 50, |direction| direction == Direction::Read, false), (vec![read], held));
    assert_eq!(served(&mut ring, 100, |_| true, false), (writes, Served::All));
}

#[test]
fn each_chain_that_waits_is_counted_once_and_the_wait_of_the_first_in_the_row_is_measured() {
    let (mut ring, mut vring) = rig(16, true);
    for _ in 0..5 {
        vring.add(&[one(Direction::Read)]);
    }
    assert_eq!(served(&mut ring, 10, |_| true, true).1, Served::All);
    assert_eq!(ring.take_held(), None, "nobody waited");
    for _ in 0..5 {
        vring.add(&[one(Direction::Read)]);
    }
    served(&mut ring, 10, |_| false, true);
    assert_eq!(ring.take_held(), Some(Held { chains: 5, total_ns: 0, longest_ns: 0 }));
    served(&mut ring, 20, |_| false, true);
    assert_eq!(ring.take_held(), None, "they were counted before");
    vring.add(&[one(Direction::Read)]);
    let went = std::cell::Cell::new(0);
    let two = |_| went.replace(went.get() + 1) < 2;
    assert_eq!(served(&mut ring, 30, two, true).0.len(), 2);
    assert_eq!(ring.take_held(), Some(Held { chains: 1, total_ns: 20, longest_ns: 20 }));
    assert_eq!(served(&mut ring, 35, |_| true, true).0.len(), 4);
    assert_eq!(ring.take_held(), Some(Held { chains: 0, total_ns: 5, longest_ns: 5 }));
    assert_eq!(ring.take_held(), None);
}
