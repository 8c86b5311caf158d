//! Timers: never early, in order, cancelled means cancelled (G12 to G15); and P2, timers against a sorted vector.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// A handler with `count` timers, tags from 0, that says which fired; its key, and theirs by tag.
fn clocks(event_loop: &mut EventLoop, count: u32, log: &Log<u32>) -> (Key, Vec<Key>) {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let (theirs, log) = (keys.clone(), log.clone());
    let handler = probe(
        move |cx| {
            for tag in 0..count {
                theirs.lock().unwrap().push(cx.timer(tag)?);
            }
            Ok(())
        },
        move |event, _| {
            log.push(event.tag);
            Ok(Flow::Done)
        },
    );
    let me = event_loop.add(handler).unwrap();
    let keys = keys.lock().unwrap().clone();
    (me, keys)
}

#[test]
fn t12_zero_and_past_deadlines_fire_next_turn_and_a_future_one_not_before_its_time() {
    let (clock, mut event_loop) = stepped();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 4, &log);
    let mut cx = Cx { event_loop: &mut event_loop, me };
    for (timer, deadline_ns) in timers.iter().zip([1000, 0, 999, 1001]) {
        cx.arm(*timer, deadline_ns).unwrap();
    }
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [1, 2, 0], "the earliest first");
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [0u32; 0], "each fires once");
    clock.store(1001, Relaxed);
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [3]);
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], 1).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "a loop does not fall asleep over a timer that is due");
}

#[test]
fn t12_a_sleeping_loop_wakes_for_its_timer_and_never_before_the_deadline() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    for wait_ns in [0, 1, 1000, 200_000, 1_000_000] {
        let mut cx = Cx { event_loop: &mut event_loop, me };
        let deadline_ns = cx.clock_ns() + wait_ns;
        cx.arm(timers[0], deadline_ns).unwrap();
        while log.take().is_empty() {
            event_loop.turn(Wait::Block).unwrap();
        }
        assert!(event_loop.now_ns() >= deadline_ns, "the time of the turn in which it fired");
    }
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.arm(timers[0], 0).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "a deadline of zero does not disarm");
}

/// The first timer does `act` to the second, which is due in the same turn.
fn first_acts_on_second(act: impl Fn(&mut Cx<'_>, Key) + Send + 'static) -> (Arc<AtomicU64>, EventLoop, Log<u32>) {
    let (clock, mut event_loop) = stepped();
    let log = Log::new();
    let inner = log.clone();
    let mut second = None;
    let handler = probe(
        |_| Ok(()),
        move |event, cx| {
            inner.push(event.tag);
            match event.tag {
                9 => {
                    let (one, two) = (cx.timer(1)?, cx.timer(2)?);
                    cx.arm(one, 1100)?;
                    cx.arm(two, 1100)?;
                    second = Some(two);
                }
                1 => act(cx, second.unwrap()),
                _ => {}
            }
            Ok(Flow::Done)
        },
    );
    let me = event_loop.add(handler).unwrap();
    let mut cx = Cx { event_loop: &mut event_loop, me };
    let begin = cx.timer(9).unwrap();
    cx.arm(begin, 0).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [9]);
    clock.store(1100, Relaxed);
    (clock, event_loop, log)
}

#[test]
fn t13_a_timer_cancelled_in_a_callback_never_fires_even_if_it_was_due_in_the_same_turn() {
    let (clock, mut event_loop, log) = first_acts_on_second(|cx, second| cx.cancel(second).unwrap());
    event_loop.turn(Wait::Poll).unwrap();
    clock.store(u64::MAX, Relaxed);
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [1]);
}

#[test]
fn t13_an_unwatched_timer_never_fires() {
    let (clock, mut event_loop, log) = first_acts_on_second(|cx, second| cx.unwatch(second));
    let (me, others) = clocks(&mut event_loop, 1, &Log::new());
    Cx { event_loop: &mut event_loop, me }.arm(others[0], u64::MAX - 1).unwrap();
    event_loop.remove(me);
    event_loop.turn(Wait::Poll).unwrap();
    assert!(event_loop.timers.is_empty(), "neither it nor a removed handler's is kept");
    clock.store(u64::MAX, Relaxed);
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [1]);
}

#[test]
fn t13_a_cancelled_timer_of_a_sleeping_loop_does_not_fire() {
    let (clock, mut event_loop) = stepped();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], 2000).unwrap();
    // By the kernel's clock the deadline has long passed: the timerfd fires although its timer is cancelled.
    event_loop.timers.before_sleep().unwrap();
    clock.store(2000, Relaxed);
    Cx { event_loop: &mut event_loop, me }.cancel(timers[0]).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 0, "it woke for nothing");
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(log.take(), [0u32; 0]);
}

#[test]
fn g12_an_expiry_that_the_clock_does_not_confirm_is_waited_for_again() {
    let (clock, mut event_loop) = stepped();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], 2000).unwrap();
    for _ in 0..3 {
        // A deadline that has long passed by the kernel's clock, and has not by the loop's: each time it is set, it
        // ends the sleep, which nothing else would.
        event_loop.timers.before_sleep().unwrap();
        assert_eq!(event_loop.turn(Wait::Block).unwrap(), 0);
    }
    clock.store(2000, Relaxed);
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [0]);
}

#[test]
fn g12_a_timer_that_was_seen_by_the_clock_ends_no_later_sleep() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 2, &log);
    let mut cx = Cx { event_loop: &mut event_loop, me };
    let soon_ns = cx.clock_ns() + 100_000;
    cx.arm(timers[0], soon_ns).unwrap();
    event_loop.timers.before_sleep().unwrap();
    while event_loop.clock_ns() < soon_ns {}
    let now_ns = event_loop.clock_ns();
    assert_eq!(event_loop.timers.take_due(now_ns).count(), 1);
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.arm(timers[1], soon_ns + 2_000_000).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "the timerfd was set anew for the second");
}

#[test]
fn t14_a_timer_armed_again_fires_once_by_its_last_deadline() {
    let (clock, mut event_loop, log) = first_acts_on_second(|cx, second| cx.arm(second, 1200).unwrap());
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [1], "later: not this turn");
    clock.store(1199, Relaxed);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    clock.store(1200, Relaxed);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(log.take(), [2]);
}

#[test]
fn t14_an_earlier_deadline_than_the_one_slept_for_is_kept() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    let (bell, _) = add_bell(&mut event_loop, 7, &log);
    let far_ns = event_loop.clock_ns() + 3600 * 1_000_000_000;
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], far_ns).unwrap();
    bell.write(1).unwrap();
    // The timerfd is set for the far deadline; the bell ends the sleep.
    event_loop.turn(Wait::Block).unwrap();
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.arm(timers[0], cx.clock_ns() + 1_000_000).unwrap();
    event_loop.turn(Wait::Block).unwrap();
    assert_eq!(log.take(), [7, 0]);
}

#[test]
fn t15_a_deadline_near_the_end_of_time_neither_overflows_nor_fires() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 3, &log);
    let (bell, _) = add_bell(&mut event_loop, 7, &log);
    for deadline_ns in [u64::MAX, u64::MAX - 1, i64::MAX as u64, i64::MAX as u64 + 1] {
        Cx { event_loop: &mut event_loop, me }.arm(timers[0], deadline_ns).unwrap();
        bell.write(1).unwrap();
        // Blocks, so the timerfd is set to it.
        event_loop.turn(Wait::Block).unwrap();
        assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
        assert_eq!(log.take(), [7]);
    }
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.arm(timers[1], cx.clock_ns() + 1_000_000).unwrap();
    event_loop.turn(Wait::Block).unwrap();
    assert_eq!(log.take(), [1], "a near one is not hidden behind it");
    let (clock, mut event_loop) = stepped();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], u64::MAX).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    clock.store(u64::MAX, Relaxed);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1, "and even the last nanosecond is a time");
}

#[test]
fn g12_due_timers_go_before_signals_of_the_same_turn() {
    let (clock, mut event_loop) = stepped();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 1, &log);
    let (bell, _) = add_bell(&mut event_loop, 7, &log);
    Cx { event_loop: &mut event_loop, me }.arm(timers[0], 1500).unwrap();
    bell.write(1).unwrap();
    clock.store(1500, Relaxed);
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [0, 7]);
}

#[test]
fn g14_equal_deadlines_fire_in_the_order_in_which_they_were_armed() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (me, timers) = clocks(&mut event_loop, 5, &log);
    let mut cx = Cx { event_loop: &mut event_loop, me };
    for tag in [3, 1, 4, 0, 2] {
        cx.arm(timers[tag], 1000).unwrap();
    }
    cx.arm(timers[4], 1000).unwrap();
    event_loop.turn(Wait::Poll).unwrap();
    assert_eq!(log.take(), [3, 1, 0, 2, 4], "armed again is armed last");
}

const TIMERS: usize = 6;

#[derive(Clone, Copy, Debug)]
enum Step {
    Arm(usize, u64),
    Cancel(usize),
    /// What a timer does to another one when it fires: arm it so many nanoseconds from then, or cancel it.
    Plan(usize, usize, Option<u64>),
    Advance(u64),
    Turn,
}

fn step() -> impl Strategy<Value = Step> {
    let timer = 0..TIMERS;
    prop_oneof![
        3 => (timer.clone(), 0..60u64).prop_map(|(timer, at)| Step::Arm(timer, 990 + at)),
        1 => timer.clone().prop_map(Step::Cancel),
        1 => (timer.clone(), timer, proptest::option::of(0..30u64)).prop_map(|(from, to, after)| Step::Plan(from, to, after)),
        2 => (0..20u64).prop_map(Step::Advance),
        3 => Just(Step::Turn),
    ]
}

type Plans = HashMap<usize, (usize, Option<u64>)>;

/// The reference: a vector that is sorted anew whenever it is looked at.
#[derive(Default)]
struct Sorted {
    armed: Vec<(u64, u64, usize)>,
    order: u64,
}

impl Sorted {
    fn cancel(&mut self, timer: usize) {
        self.armed.retain(|(_, _, other)| *other != timer);
    }

    fn arm(&mut self, timer: usize, at: u64) {
        self.cancel(timer);
        self.order += 1;
        self.armed.push((at, self.order, timer));
    }

    /// What fires in a turn at `now`: what is due when it begins, unless an earlier one of them takes it back.
    fn turn(&mut self, now: u64, plans: &Plans) -> Vec<usize> {
        self.armed.sort_unstable();
        let due: Vec<_> = self.armed.iter().copied().filter(|(at, _, _)| *at <= now).collect();
        let mut fired = Vec::new();
        for entry in due {
            if !self.armed.contains(&entry) {
                continue;
            }
            self.cancel(entry.2);
            fired.push(entry.2);
            match plans.get(&entry.2) {
                Some((to, Some(after))) => self.arm(*to, now + after),
                Some((to, None)) => self.cancel(*to),
                None => {}
            }
        }
        fired
    }
}

proptest! {
    #[test]
    fn p2_timers_fire_as_a_sorted_vector_says(steps in proptest::collection::vec(step(), 1..60)) {
        let (clock, mut event_loop) = stepped();
        let log = Log::new();
        let plans = Arc::new(Mutex::new(Plans::new()));
        let keys = Arc::new(Mutex::new(Vec::new()));
        let (inner, their_plans, their_keys) = (log.clone(), plans.clone(), keys.clone());
        let handler = probe(|_| Ok(()), move |event, cx| {
            let timer = event.tag as usize;
            inner.push(timer);
            let keys: std::sync::MutexGuard<'_, Vec<Key>> = their_keys.lock().unwrap();
            match their_plans.lock().unwrap().get(&timer) {
                Some((to, Some(after))) => cx.arm(keys[*to], cx.now_ns() + after)?,
                Some((to, None)) => cx.cancel(keys[*to])?,
                None => {}
            }
            Ok(Flow::Done)
        });
        let me = event_loop.add(handler).unwrap();
        for tag in 0..TIMERS {
            let key = Cx { event_loop: &mut event_loop, me }.timer(tag as u32).unwrap();
            keys.lock().unwrap().push(key);
        }
        let mut model = Sorted::default();
        for step in steps {
            let mut cx = Cx { event_loop: &mut event_loop, me };
            match step {
                Step::Arm(timer, at) => {
                    cx.arm(keys.lock().unwrap()[timer], at).unwrap();
                    model.arm(timer, at);
                }
                Step::Cancel(timer) => {
                    cx.cancel(keys.lock().unwrap()[timer]).unwrap();
                    model.cancel(timer);
                }
                Step::Plan(from, to, after) => {
                    plans.lock().unwrap().insert(from, (to, after));
                }
                Step::Advance(by) => {
                    clock.fetch_add(by, Relaxed);
                }
                Step::Turn => {
                    event_loop.turn(Wait::Poll).unwrap();
                    let expected = model.turn(clock.load(Relaxed), &plans.lock().unwrap());
                    prop_assert_eq!(log.take(), expected);
                }
            }
        }
    }
}
