//! Iothreads, counters that other threads read, and the handshake under two real threads (G16, G24).

use std::sync::mpsc;

use super::*;
use crate::event::thread::LoopThread;

/// Takes its time to go.
struct Last(Log<&'static str>);

impl Drop for Last {
    fn drop(&mut self) {
        (0..1000).for_each(|_| std::thread::yield_now());
        self.0.push("gone");
    }
}

#[test]
fn an_iothread_carries_its_id_and_ends_with_its_handle() {
    let (said, name) = mpsc::channel();
    let thread = LoopThread::start("iothread-0", move || {
        said.send(std::fs::read_to_string("/proc/thread-self/comm").unwrap()).unwrap();
    })
    .unwrap();
    assert_eq!(name.recv().unwrap(), "iothread-0\n");
    assert_eq!(thread.id(), "iothread-0");
    let log = Log::new();
    let last = Last(log.clone());
    let slow_to_go = probe(
        move |_| {
            let _held: &Last = &last;
            Ok(())
        },
        |_, _| Ok(Flow::Idle),
    );
    let (done, added) = Done::waited();
    thread.remote().adopt(slow_to_go, done);
    let key = added.wait().unwrap().unwrap();
    let id = thread.remote().thread_id();
    assert!(std::fs::exists(format!("/proc/self/task/{id}")).unwrap(), "the id is the kernel's");
    let remote = thread.remote().clone();
    drop(thread);
    assert_eq!(log.take(), ["gone"], "it is joined: its handlers are gone with the handle");
    assert!(!remote.remove_and_wait(key), "and nobody waits for it");
}

#[test]
fn g16_no_message_between_two_threads_is_ever_left_lying() {
    const ROUNDS: u32 = 2_000;
    // Each message is sent when the answer to the one before has come, so the loop is falling asleep, asleep, or
    // waking when it arrives. A lost wake-up would leave both threads waiting for ever.
    let thread = LoopThread::start("g16", || {}).unwrap();
    let (sender, receiver) = channel::<u32>();
    let (answer, answers) = mpsc::channel();
    let receiver = Arc::new(receiver);
    let mine = receiver.clone();
    let handler = probe(
        move |cx| {
            cx.listen(&mine, 0);
            Ok(())
        },
        move |_, _| {
            while let Some(number) = receiver.receive() {
                answer.send(number).unwrap();
            }
            Ok(Flow::Done)
        },
    );
    let (done, added) = Done::waited();
    thread.remote().adopt(handler, done);
    added.wait().unwrap().unwrap();
    for number in 0..ROUNDS {
        sender.send(number).unwrap();
        assert_eq!(answers.recv().unwrap(), number);
    }
    // And in bursts, from two sides at once.
    let other = sender.clone();
    let flood = std::thread::spawn(move || (0..ROUNDS).for_each(|number| other.send(number).unwrap()));
    (0..ROUNDS).for_each(|number| sender.send(number).unwrap());
    flood.join().unwrap();
    assert_eq!(answers.iter().take(2 * ROUNDS as usize).count(), 2 * ROUNDS as usize);
    let counters = thread.remote().counters();
    assert!(counters.wakes_post <= u64::from(3 * ROUNDS) + 1, "at most a wake a message (G17)");
}

/// Turns the loop once, and has another thread do `act` when it is asleep, so that nothing else can wake it.
fn wake(event_loop: &mut EventLoop, act: impl FnOnce() + Send + 'static) {
    let inbox = event_loop.inbox.clone();
    let other = std::thread::spawn(move || {
        while !inbox.is_asleep() {
            std::thread::yield_now();
        }
        act();
    });
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    other.join().unwrap();
}

#[test]
fn g24_the_counters_say_what_woke_the_loop_and_how_long_it_slept() {
    let mut event_loop = EventLoop::new().unwrap();
    let remote = event_loop.remote();
    let log = Log::new();
    let (bell, me) = add_bell(&mut event_loop, 0, &log);
    let (reader, writer) = std::io::pipe().unwrap();
    let (sender, receiver) = channel::<u32>();
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.watch(&reader, Interest::READ, 1).unwrap();
    cx.listen(&receiver, 2);
    let timer = cx.timer(3).unwrap();

    wake(&mut event_loop, move || bell.write(1).unwrap());
    wake(&mut event_loop, move || sender.send(1).unwrap());
    wake(&mut event_loop, move || drop(writer));
    assert_eq!(log.take(), [0, 2, 1]);
    // A thread that is held up before it falls asleep finds the timer due and has not slept for it.
    while event_loop.counters().wakes_timer == 0 {
        let mut cx = Cx { event_loop: &mut event_loop, me };
        cx.arm(timer, cx.clock_ns() + 1_000_000).unwrap();
        assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
        assert_eq!(log.take(), [3]);
    }
    // Counters are shown before a sleep, after sixteen calls, and when a turn that only looked ends.
    event_loop.turn(Wait::Poll).unwrap();

    let counters = event_loop.counters();
    assert_eq!(counters.turns, counters.events + 1);
    assert_eq!((counters.wakes_signal, counters.wakes_post, counters.wakes_timer, counters.wakes_stream), (1, 1, 1, 1));
    assert!(counters.asleep_ns > 0 && counters.longest_handler_ns > 0);
    assert_eq!(remote.counters(), counters, "another thread reads the same");
}

#[test]
fn g24_a_sleep_that_is_going_on_counts_and_is_never_counted_twice() {
    use crate::event::counters::Board;
    let board = Board::default();
    board.publish_awake(100);
    board.publish_sleep(5_000, 100);
    assert_eq!(board.read(5_000).asleep_ns, 100);
    assert_eq!(board.read(5_700).asleep_ns, 800);
    board.publish_awake(900);
    assert_eq!(board.read(9_999).asleep_ns, 900, "awake it stands still");
}

#[test]
fn g24_the_longest_stretch_of_calls_is_measured_by_the_loops_clock() {
    let (clock, mut event_loop) = stepped();
    let bells: Vec<EventFd> = (0..20).map(|_| eventfd()).collect();
    for (step_ns, bell) in bells.iter().enumerate() {
        let (clock, mine) = (clock.clone(), bell.try_clone().unwrap());
        let handler = probe(
            move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop),
            move |_, _| {
                clock.fetch_add(step_ns as u64, Relaxed);
                Ok(Flow::Done)
            },
        );
        event_loop.add(handler).unwrap();
    }
    bells[5].write(1).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(event_loop.counters().longest_handler_ns, 5, "one call alone is measured exactly");
    for bell in &bells {
        bell.write(1).unwrap();
    }
    event_loop.turn(Wait::Poll).unwrap();
    let longest: u64 = (0..16).sum();
    assert_eq!(event_loop.counters().longest_handler_ns, longest, "of twenty, the first sixteen took longest");
}
