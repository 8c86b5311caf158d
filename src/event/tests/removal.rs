//! Removal, addition and reuse: no event reaches anybody it was not meant for (G1 to G5, G18, G19).

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::event::thread::LoopThread;

/// Two handlers, each with a bell and the keys of both; whichever is called first does `act` to the other.
fn rivals(event_loop: &mut EventLoop, log: &Log<u32>, act: impl Fn(&mut Cx<'_>, Key) + Clone + Send + 'static) {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let bells: Vec<EventFd> = (0..2).map(|_| eventfd()).collect();
    for (tag, bell) in bells.iter().enumerate() {
        let (bell, log, rivals, act) = (bell.try_clone().unwrap(), log.clone(), keys.clone(), act.clone());
        let handler = probe(
            move |cx| cx.own(Box::new(bell.try_clone().unwrap()), tag as u32).map(drop),
            move |event, cx| {
                log.push(event.tag);
                let rival = rivals.lock().unwrap()[1 - event.tag as usize];
                act(cx, rival);
                Ok(Flow::Done)
            },
        );
        let key = event_loop.add(handler).unwrap();
        keys.lock().unwrap().push(key);
    }
    for bell in &bells {
        bell.write(1).unwrap();
    }
}

#[test]
fn t01_a_handler_removed_by_the_first_of_two_ready_ones_is_not_called() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    rivals(&mut event_loop, &log, |cx, rival| assert!(cx.remove(rival)));
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(log.take().len(), 1);
    assert_eq!(event_loop.counters().stale, 1, "what the removed one had coming is counted");
}

#[test]
fn t02_a_new_descriptor_of_the_same_number_does_not_get_the_old_ones_event() {
    const NUMBER: RawFd = 1010;
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let old = eventfd();
    let victim = {
        let old = duplicate_as(&old, NUMBER);
        let log = log.clone();
        let mut old = Some(old);
        probe(
            move |cx| cx.own(Box::new(old.take().unwrap()), 1).map(drop),
            move |_, _| {
                log.push("the old one");
                Ok(Flow::Done)
            },
        )
    };
    let first = eventfd();
    let new = eventfd();
    let victim_key = Arc::new(Mutex::new(None));
    let replacer = {
        let (first, new, log, victim_key) =
            (first.try_clone().unwrap(), new.try_clone().unwrap(), log.clone(), victim_key.clone());
        probe(
            move |cx| cx.own(Box::new(first.try_clone().unwrap()), 0).map(drop),
            move |_, cx| {
                assert!(cx.remove(victim_key.lock().unwrap().unwrap()));
                let mut reused = Some(duplicate_as(&new, NUMBER));
                let log = log.clone();
                cx.add(probe(
                    move |cx| cx.own(Box::new(reused.take().unwrap()), 2).map(drop),
                    move |_, _| {
                        log.push("the new one");
                        Ok(Flow::Done)
                    },
                ))?;
                Ok(Flow::Done)
            },
        )
    };
    event_loop.add(replacer).unwrap();
    *victim_key.lock().unwrap() = Some(event_loop.add(victim).unwrap());
    // In this order, so that the replacer is called first.
    first.write(1).unwrap();
    old.write(1).unwrap();
    for _ in 0..3 {
        event_loop.turn(Wait::Poll).unwrap();
    }
    assert_eq!(log.take(), Vec::<&str>::new());
    old.write(1).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), Vec::<&str>::new(), "the old eventfd is gone although a duplicate of it lives");
    new.write(1).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), ["the new one"]);
}

#[test]
fn t03_an_old_key_whose_slot_has_a_new_tenant_is_counted_as_stale() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (_old, handler) = add_bell(&mut event_loop, 1, &log);
    let old_key = event_loop.watches.iter().next().unwrap().0;
    assert!(event_loop.remove(handler));
    let (new, _) = add_bell(&mut event_loop, 2, &log);
    let new_key = event_loop.watches.iter().next().unwrap().0;
    assert_eq!(old_key.to_bits() as u32, new_key.to_bits() as u32, "the slot is used again");
    event_loop.mark_ready(old_key, EventSet::IN);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(event_loop.counters().stale, 1);
    assert!(!event_loop.remove(handler), "the old handler's key is as stale");
    new.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [2]);
}

/// A handler that says in `log` when it is called and when it is dropped, and puts a successor in its own place.
fn successor(generation: u32, bell: EventFd, log: Log<String>) -> Box<dyn Handler> {
    struct Last(u32, Log<String>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.1.push(format!("{} dropped", self.0));
        }
    }
    let mine = bell.try_clone().unwrap();
    let last = Last(generation, log.clone());
    probe(
        move |cx| cx.own(Box::new(mine.try_clone().unwrap()), generation).map(drop),
        move |event, cx| {
            let last: &Last = &last;
            assert_eq!(event.tag, last.0);
            log.push(format!("{generation} called"));
            cx.finish();
            cx.add(successor(generation + 1, bell.try_clone().unwrap(), log.clone()))?;
            log.push(format!("{generation} returns"));
            Ok(Flow::Done)
        },
    )
}

#[test]
fn t04_a_handler_may_remove_itself_and_add_its_successor_in_one_call() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let bell = eventfd();
    event_loop.add(successor(0, bell.try_clone().unwrap(), log.clone())).unwrap();
    bell.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), ["0 called", "0 returns", "0 dropped"], "a handler lives until its call returns");
    // An eventfd that has rung before is told at once to whoever owns it next: by the next turn, and once.
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), ["1 called", "1 returns", "1 dropped"]);
}

#[test]
fn g03_one_callback_may_remove_every_handler_itself_included() {
    let (_, mut event_loop) = stepped();
    let keys = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::new(AtomicUsize::new(0));
    let bells: Vec<EventFd> = (0..20).map(|_| eventfd()).collect();
    for bell in &bells {
        let (mine, keys, calls) = (bell.try_clone().unwrap(), keys.clone(), calls.clone());
        let all = keys.clone();
        let handler = probe(
            move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop),
            move |_, cx| {
                calls.fetch_add(1, SeqCst);
                for key in all.lock().unwrap().drain(..) {
                    assert!(cx.remove(key));
                }
                Ok(Flow::More)
            },
        );
        let key = event_loop.add(handler).unwrap();
        keys.lock().unwrap().push(key);
        bell.write(1).unwrap();
    }
    event_loop.turn(Wait::Poll).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(calls.load(SeqCst), 1);
    assert_eq!(event_loop.watches.iter().count(), 0);
}

#[test]
fn g04_a_handler_added_in_a_callback_is_called_by_the_next_turn() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let first = eventfd();
    let second = eventfd();
    second.write(1).unwrap();
    let (mine, theirs, inner) = (first.try_clone().unwrap(), second.try_clone().unwrap(), log.clone());
    let adder = probe(
        move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop),
        move |_, cx| {
            let (theirs, log) = (theirs.try_clone().unwrap(), inner.clone());
            cx.add(probe(
                move |cx| cx.own(Box::new(theirs.try_clone().unwrap()), 9).map(drop),
                move |event, _| {
                    log.push(event.tag);
                    Ok(Flow::Done)
                },
            ))?;
            Ok(Flow::Done)
        },
    );
    event_loop.add(adder).unwrap();
    first.write(1).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [9]);
}

#[test]
fn t05_a_stream_closed_without_being_unwatched_neither_panics_nor_spins() {
    let (_, mut event_loop) = stepped();
    let (reader, writer) = std::io::pipe().unwrap();
    let duplicate = reader.try_clone().unwrap();
    let mut reader = Some(reader);
    let handler = probe(
        // The handler drops its own descriptor while the loop still watches it.
        move |cx| cx.watch(&reader.take().unwrap(), Interest::READ, 0).map(drop),
        |_, _| Ok(Flow::Idle),
    );
    let key = event_loop.add(handler).unwrap();
    std::io::Write::write_all(&mut &writer, b"x").unwrap();
    let calls: usize = (0..200).map(|_| event_loop.turn(Wait::Poll).unwrap()).sum();
    assert_eq!(calls, 64, "called until it is clear that nobody reads, then masked");
    assert_eq!(event_loop.counters().stuck, 1);
    assert!(event_loop.remove(key));
    assert_eq!((0..10).map(|_| event_loop.turn(Wait::Poll).unwrap()).sum::<usize>(), 0);
    assert_eq!(event_loop.counters().stale, 0, "epoll had let go of it although a duplicate is open");
    drop(duplicate);
}

#[test]
fn t17_a_removal_with_acknowledgement_waits_for_the_callback_that_is_going_on() {
    let thread = LoopThread::start("t17", || {}).unwrap();
    let log = Log::new();
    let (inside, is_inside) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let bell = eventfd();
    let (mine, theirs) = (bell.try_clone().unwrap(), log.clone());
    let handler = probe(
        move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop),
        move |_, _| {
            inside.send(()).unwrap();
            may_go.recv().unwrap();
            theirs.push("the callback ends");
            Ok(Flow::More)
        },
    );
    let (done, added) = Done::waited();
    thread.remote().adopt(handler, done);
    let key = added.wait().unwrap().unwrap();
    bell.write(1).unwrap();
    is_inside.recv().unwrap();
    let (remote, theirs) = (thread.remote().clone(), log.clone());
    let remover = std::thread::spawn(move || {
        assert!(remote.remove_and_wait(key));
        theirs.push("the removal returns");
    });
    while !thread.remote().inbox.urgent() {
        std::thread::yield_now();
    }
    go.send(()).unwrap();
    remover.join().unwrap();
    // The callback asked to be called again, and would panic the loop's thread by doing so: `go` is gone.
    drop(go);
    bell.write(1).unwrap();
    assert!(!thread.remote().remove_and_wait(key), "it is not there any more, and its loop still answers");
    assert_eq!(log.take(), ["the callback ends", "the removal returns"]);
}

#[test]
fn t17_a_removal_with_acknowledgement_from_the_loops_own_thread_returns_at_once_and_holds() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let remote = event_loop.remote();
    rivals(&mut event_loop, &log, move |_, rival| assert!(remote.remove_and_wait(rival)));
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(log.take().len(), 1);
}

#[test]
fn a_loop_goes_to_sleep_again_after_a_removal_from_outside() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (_bell, victim) = add_bell(&mut event_loop, 1, &log);
    let sleeper = event_loop.add(bystander()).unwrap();
    let (done, removed) = Done::waited();
    event_loop.remote().remove(victim, done);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(removed.wait(), Ok(true));
    let mut cx = Cx { event_loop: &mut event_loop, me: sleeper };
    let timer = cx.timer(5).unwrap();
    cx.arm(timer, cx.clock_ns() + 1_000_000).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "it slept until the timer and did not return for nothing");
}
