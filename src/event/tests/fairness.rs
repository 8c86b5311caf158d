//! Who is served when: batches, budgets, bursts, a stop in between (G8 to G11, G21); and P3, the bound on waiting.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

#[test]
fn t08_six_hundred_ready_descriptors_are_all_served_in_three_turns_of_a_batch() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let bells: Vec<_> = (0..600).map(|tag| add_bell(&mut event_loop, tag, &log)).collect();
    for (bell, _) in &bells {
        bell.write(1).unwrap();
    }
    let calls: Vec<usize> = (0..4).map(|_| event_loop.turn(Wait::Poll).unwrap()).collect();
    assert_eq!(calls, [BATCH, BATCH, 600 - 2 * BATCH, 0]);
    let mut told = log.take();
    told.sort_unstable();
    assert_eq!(told, (0..600).collect::<Vec<u32>>());
}

#[test]
fn t09_a_handler_that_always_has_more_is_served_no_oftener_than_twenty_others() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let greedy = eventfd();
    greedy.write(1).unwrap();
    let inner = log.clone();
    let handler = probe(
        move |cx| cx.own(Box::new(greedy.try_clone().unwrap()), 99).map(drop),
        move |event, _| {
            inner.push(event.tag);
            Ok(Flow::More)
        },
    );
    event_loop.add(handler).unwrap();
    let bells: Vec<_> = (0..20).map(|tag| add_bell(&mut event_loop, tag, &log)).collect();
    for _ in 0..100 {
        for (bell, _) in &bells {
            bell.write(1).unwrap();
        }
        event_loop.turn(Wait::Poll).unwrap();
    }
    let told = log.take();
    let served = |tag: u32| told.iter().filter(|other| **other == tag).count();
    for tag in 0..20 {
        assert!(served(tag).abs_diff(served(99)) <= 1, "{tag}: {} and {}", served(tag), served(99));
    }
}

extern "C" fn no_op(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn t10_a_storm_of_signals_loses_nothing_and_keeps_the_order() {
    use vmm_sys_util::signal::{Killable, register_signal_handler};
    // The last real-time signal; nobody else here uses it.
    let storm = vmm_sys_util::signal::SIGRTMAX();
    register_signal_handler(storm, no_op).unwrap();
    let log = Log::new();
    let inner = log.clone();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let interrupted = Arc::new(AtomicU64::new(0));
    let count = interrupted.clone();
    let thread = std::thread::spawn(move || {
        let mut event_loop = EventLoop::new().unwrap();
        let reader = mine.try_clone().unwrap();
        let handler = probe(
            move |cx| cx.watch(&mine, Interest::READ, 0).map(drop),
            move |_, cx| {
                let mut byte = [0];
                (&reader).read_exact(&mut byte).unwrap();
                inner.push(byte[0]);
                if byte[0] == 199 {
                    cx.stop();
                }
                Ok(Flow::Done)
            },
        );
        event_loop.add(handler).unwrap();
        while !event_loop.inbox.stopped() {
            if event_loop.turn(Wait::Block).unwrap() == 0 {
                count.fetch_add(1, Relaxed);
            }
        }
    });
    // Until the wait was interrupted a hundred times; then bytes and signals together.
    while interrupted.load(Relaxed) < 100 {
        thread.kill(storm).unwrap();
        std::thread::yield_now();
    }
    for byte in 0..200 {
        theirs.write_all(&[byte]).unwrap();
        thread.kill(storm).unwrap();
    }
    thread.join().unwrap();
    assert_eq!(log.take(), (0..200).collect::<Vec<u8>>());
}

#[test]
fn t11_a_thousand_rings_before_a_turn_are_one_call() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (bell, _) = add_bell(&mut event_loop, 7, &log);
    for _ in 0..1000 {
        bell.write(1).unwrap();
    }
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    bell.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "the next ring is an edge although nobody has read the count");
    assert_eq!(log.take(), [7, 7]);
}

#[test]
fn g08_a_turn_with_nothing_ready_calls_nobody() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    add_bell(&mut event_loop, 1, &log);
    for _ in 0..100 {
        assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    }
    let counters = event_loop.counters();
    assert_eq!((counters.turns, counters.events, counters.stale), (100, 0, 0));
}

#[test]
fn g11_a_handler_that_rings_itself_is_called_once_a_turn() {
    let (_, mut event_loop) = stepped();
    let bell = eventfd();
    bell.write(1).unwrap();
    let mine = bell.try_clone().unwrap();
    let handler = probe(
        move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop),
        move |_, _| {
            bell.write(1).unwrap();
            Ok(Flow::More)
        },
    );
    event_loop.add(handler).unwrap();
    for _ in 0..50 {
        assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    }
}

#[test]
fn g10_a_loop_with_more_to_do_does_not_sleep() {
    let (_, mut event_loop) = stepped();
    let bell = Arc::new(eventfd());
    bell.write(1).unwrap();
    let handler = probe(move |cx| cx.own(Box::new(bell.clone()), 0).map(drop), |_, _| Ok(Flow::More));
    event_loop.add(handler).unwrap();
    for _ in 0..10 {
        assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    }
}

#[test]
fn t16_a_stop_while_a_whole_batch_is_pending_ends_the_run_within_one_handler() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let remote = event_loop.remote();
    let stopper = eventfd();
    let (mine, inner) = (stopper.try_clone().unwrap(), log.clone());
    let handler = probe(
        move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 1000).map(drop),
        move |event, _| {
            inner.push(event.tag);
            remote.stop();
            Ok(Flow::Done)
        },
    );
    let bells: Vec<_> = (0..255).map(|tag| add_bell(&mut event_loop, tag, &log)).collect();
    event_loop.add(handler).unwrap();
    bells[0].0.write(1).unwrap();
    bells[1].0.write(1).unwrap();
    stopper.write(1).unwrap();
    for (bell, _) in &bells[2..] {
        bell.write(1).unwrap();
    }
    event_loop.run().unwrap();
    assert_eq!(log.take(), [0, 1, 1000]);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 253, "the others are called when the loop goes on");
}

#[test]
fn g21_a_stop_that_came_before_the_run_ends_it_before_any_handler_is_called() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (bell, _) = add_bell(&mut event_loop, 1, &log);
    bell.write(1).unwrap();
    event_loop.remote().stop();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 0);
    event_loop.run().unwrap();
    assert_eq!(log.take(), [0u32; 0]);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
}

/// A handler with a pile of work, of which it does at most its budget a call.
fn worker(tag: usize, budget: u64, work: &Arc<AtomicU64>, bell: &EventFd, log: &Log<(usize, u64)>) -> Box<dyn Handler> {
    let (work, bell, log) = (work.clone(), bell.try_clone().unwrap(), log.clone());
    probe(
        move |cx| cx.own(Box::new(bell.try_clone().unwrap()), 0).map(drop),
        move |_, _| {
            let served = budget.min(work.load(Relaxed));
            let left = work.fetch_sub(served, Relaxed) - served;
            log.push((tag, served));
            Ok(if left > 0 { Flow::More } else { Flow::Done })
        },
    )
}

proptest! {
    #[test]
    fn p3_nobody_waits_longer_than_the_sum_of_the_others_budgets(
        loads in proptest::collection::vec((1..9u64, 1..200u64), 2..12),
    ) {
        let (_, mut event_loop) = stepped();
        let log = Log::new();
        let mut piles = Vec::new();
        for (tag, (budget, work)) in loads.iter().enumerate() {
            let (pile, bell) = (Arc::new(AtomicU64::new(*work)), eventfd());
            event_loop.add(worker(tag, *budget, &pile, &bell, &log)).unwrap();
            bell.write(1).unwrap();
            piles.push(pile);
        }
        while event_loop.turn(Wait::Poll).unwrap() > 0 {}
        let all: u64 = loads.iter().map(|(budget, _)| budget).sum();
        let mut waited = vec![0; loads.len()];
        let mut left: Vec<u64> = loads.iter().map(|(_, work)| *work).collect();
        for (tag, served) in log.take() {
            left[tag] -= served;
            waited[tag] = 0;
            for other in (0..loads.len()).filter(|other| *other != tag && left[*other] > 0) {
                waited[other] += served;
                prop_assert!(waited[other] <= all - loads[other].0, "{} waited for {}", other, waited[other]);
            }
        }
        prop_assert!(left.iter().all(|left| *left == 0), "all is done in the end");
    }
}
