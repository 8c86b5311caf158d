//! The bucket under a clock stepped by hand: every rate, every depth, timers that are late, limits that change, clocks
//! that jump, and numbers at the ends of their types.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use proptest::prelude::*;

use super::*;

const READ: Request = Request { direction: Direction::Read, size: 4096, moved: 4096 };
const WRITE: Request = Request { direction: Direction::Write, size: 4096, moved: 4096 };
/// The rates of the accuracy table.
const RATES: [u64; 14] = [1, 2, 5, 9, 10, 15, 99, 150, 200, 1_000, 3_000, 10_000, 100_000, 1_000_000];
/// What the disk behind takes for a request.
const SERVICE_NS: u64 = 80_000;
/// The water of a request while nobody comes late.
const UNIT: u64 = SECOND_NS + QUANTUM_NS + LATENESS_NS;
/// A time at which no request of a test's has gone before.
const BEGIN_NS: u64 = 3_600 * SECOND_NS;

fn limits(quantity: Quantity, limit: Limit) -> Limits {
    let mut limits = Limits::default();
    limits.each[quantity as usize] = limit;
    limits.check(Spelling::CommandLine).unwrap();
    limits
}

fn burst(rate: u64, max: u64, max_length: Option<u64>) -> Limit {
    Limit { rate, max, max_length }
}

/// How many of `READ` go at once.
fn at_once(bucket: &mut Bucket, now_ns: u64) -> u64 {
    (0..).take_while(|_| bucket.ask(now_ns, &READ).is_ok()).count() as u64
}

/// The most entries of `times`, which are in order, in any window of that length, closed at its beginning and open at
/// its end.
fn most_in(times: &[u64], window_ns: u64) -> u64 {
    let mut first = 0;
    let mut most = 0;
    for (last, &time) in times.iter().enumerate() {
        while times[first] + window_ns <= time {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most as u64
}

/// A number from 0 to `below`, always the same row of them.
struct Dice(u64);

impl Dice {
    fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// One drive of a play: its guest keeps `depth` requests in flight or waiting.
#[derive(Default)]
struct Drive {
    ready: u64,
    /// It waits for its timer, and does not ask before.
    waits: bool,
    /// When its requests went.
    went: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Timer(usize),
    Complete(usize),
}

/// How late the timers of a host with nothing else to do are, for each time that they were to go.
fn quiet(turn_ns: u64) -> u64 {
    Dice(turn_ns).below(200_000)
}

/// Those of a host whose processors others use too: now and then a waiter is not let run for some milliseconds.
fn crowded(turn_ns: u64) -> u64 {
    let mut dice = Dice(turn_ns);
    if dice.below(30) == 0 { 1_000_000 + dice.below(5_000_000) } else { dice.below(200_000) }
}

/// Plays what workers do, for the members of one group: a worker asks while it has requests and may, and if it may not,
/// again when its timer goes, which is `late`. Timers of one turn go in the order of their deadlines.
fn play(limits: &Limits, depths: &[u64], late: fn(u64) -> u64, end_ns: u64) -> Vec<Drive> {
    let mut group = Group::new(limits);
    let mut drives: Vec<Drive> = depths.iter().map(|&depth| Drive { ready: depth, ..Drive::default() }).collect();
    for _ in depths {
        group.join();
    }
    let mut events = BinaryHeap::new();
    let mut order = 0;
    for drive in 0..drives.len() {
        events.push(Reverse((BEGIN_NS, BEGIN_NS, order, Event::Timer(drive))));
    }
    while let Some(Reverse((now_ns, _, _, event))) = events.pop().filter(|event| event.0.0 < end_ns) {
        let (Event::Timer(number) | Event::Complete(number)) = event;
        let drive = &mut drives[number];
        match event {
            Event::Timer(_) => drive.waits = false,
            Event::Complete(_) => drive.ready += 1,
        }
        while drive.ready > 0 && !drive.waits {
            order += 1;
            match group.ask(number, now_ns, &READ) {
                Ok(()) => {
                    drive.ready -= 1;
                    drive.went.push(now_ns);
                    events.push(Reverse((now_ns + SERVICE_NS, 0, order, Event::Complete(number))));
                }
                Err(wait) => {
                    assert!(wait.until_ns > now_ns, "it would spin");
                    drive.waits = true;
                    // Deadlines of a nanosecond's distance are told in one turn, which is late for all of them.
                    let turn_ns = wait.until_ns.next_multiple_of(1000);
                    let late_ns = late(turn_ns);
                    events.push(Reverse((turn_ns + late_ns, wait.until_ns, order, Event::Timer(number))));
                }
            }
        }
    }
    drives
}

#[test]
fn rule_d2_3_every_rate_at_every_depth_is_kept_within_a_per_mille_and_no_second_exceeds_it() {
    for rate in RATES {
        for depth in [1, 32, 256] {
            // Ten thousand requests, and at least two seconds.
            let seconds = (10_000 / rate).max(2);
            let end_ns = BEGIN_NS + (seconds + 1) * SECOND_NS;
            let drives = play(&Limits::iops(rate), &[depth], quiet, end_ns);
            let went = &drives[0].went;
            let what = format!("{rate} a second, depth {depth}");
            assert!(most_in(went, SECOND_NS) <= rate, "{what}: {} in a second", most_in(went, SECOND_NS));
            // What the disk behind could do is less.
            if depth * SECOND_NS / SERVICE_NS < rate {
                continue;
            }
            let steady = went.iter().filter(|&&time| time >= BEGIN_NS + SECOND_NS).count() as f64;
            let error = steady / (rate * seconds) as f64 - 1.0;
            let one = 1.0 / (rate * seconds) as f64;
            assert!(-0.001 - one <= error && error <= one, "{what}: {error}");
            let gap = went.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
            assert!(gap <= SECOND_NS / rate + 1_000_000, "{what}: a pause of {gap} ns");
        }
    }
}

#[test]
fn rule_d2_3_a_crowded_host_costs_less_than_a_per_cent_and_no_second_exceeds_the_limit() {
    for rate in [200, 1_000, 20_000, 100_000] {
        for depth in [32, 256] {
            let seconds = 20;
            let drives = play(&Limits::iops(rate), &[depth], crowded, BEGIN_NS + (seconds + 1) * SECOND_NS);
            let went = &drives[0].went;
            assert!(most_in(went, SECOND_NS) <= rate, "{rate}: {} in a second", most_in(went, SECOND_NS));
            let steady = went.iter().filter(|&&time| time >= BEGIN_NS + SECOND_NS).count() as f64;
            let achieved = steady / (rate * seconds) as f64;
            assert!(achieved > 0.99, "{rate}, depth {depth}: {achieved}");
        }
    }
    // Once it is quiet again nothing of it is left: a stall of 6 ms, and 3 s of punctual waiters.
    let mut bucket = Bucket::new(&Limits::iops(1_000));
    at_once(&mut bucket, BEGIN_NS);
    let mut due = bucket.ask(BEGIN_NS, &READ).unwrap_err().until_ns + 6_000_000;
    for _ in 0..3_000 {
        at_once(&mut bucket, due);
        due = bucket.ask(due, &READ).unwrap_err().until_ns;
    }
    bucket.ask(due, &READ).unwrap();
    assert_eq!(bucket.ask(due, &READ).unwrap_err().until_ns - due, UNIT / 1_000);
}

#[test]
fn a_wake_up_a_quantum_is_all_that_any_rate_costs() {
    for rate in [1_000, 20_000, 100_000, 1_000_000] {
        let (mut bucket, mut now_ns, mut wakes) = (Bucket::new(&Limits::iops(rate)), BEGIN_NS, 0);
        while now_ns < BEGIN_NS + SECOND_NS {
            at_once(&mut bucket, now_ns);
            now_ns = bucket.ask(now_ns, &READ).unwrap_err().until_ns;
            wakes += 1;
        }
        assert!(wakes <= (SECOND_NS / QUANTUM_NS).min(rate + 1), "{rate}: {wakes} wake-ups");
    }
}

#[test]
fn rule_d2_4_idleness_however_long_saves_one_quantum_and_no_more() {
    for rate in RATES {
        for idle_ns in [QUANTUM_NS, SECOND_NS, 3_600 * SECOND_NS, 1 << 62] {
            let mut bucket = Bucket::new(&Limits::iops(rate));
            let most = rate * QUANTUM_NS / SECOND_NS + 1;
            assert!(at_once(&mut bucket, BEGIN_NS) <= most);
            // Nobody waits any more: the last question was answered by a yes.
            let due = bucket.ask(BEGIN_NS, &READ).unwrap_err().until_ns;
            bucket.ask(due, &READ).unwrap();
            let burst = at_once(&mut bucket, due + idle_ns);
            assert!(burst <= most, "{rate} a second, idle for {idle_ns}: {burst} at once");
            assert!(burst + 2 >= most);
        }
    }
}

#[test]
fn one_that_was_told_to_wait_and_went_away_comes_back_to_one_quantum() {
    for absence_ns in [ABSENCE_NS + 10_000_000, SECOND_NS, 3_600 * SECOND_NS] {
        let mut bucket = Bucket::new(&Limits::iops(100_000));
        at_once(&mut bucket, BEGIN_NS);
        let due = bucket.ask(BEGIN_NS, &READ).unwrap_err().until_ns;
        assert!((50..=51).contains(&at_once(&mut bucket, due + absence_ns)));
    }
}

#[test]
fn a_burst_goes_at_its_own_rate_for_its_length_and_is_earned_again_by_idleness() {
    let mut bucket = Bucket::new(&limits(Quantity::Iops, burst(100, 1_000, Some(5))));
    let mut run = |from_ns: u64, seconds: u64| {
        let (mut now_ns, mut went) = (from_ns, Vec::new());
        while now_ns < from_ns + seconds * SECOND_NS {
            match bucket.ask(now_ns, &READ) {
                Ok(()) => went.push(now_ns),
                Err(wait) => now_ns = wait.until_ns,
            }
        }
        assert!(most_in(&went, SECOND_NS) <= 1_000);
        move |second: u64| {
            let second = from_ns + second * SECOND_NS..from_ns + (second + 1) * SECOND_NS;
            went.iter().filter(|time| second.contains(time)).count()
        }
    };
    let in_second = run(BEGIN_NS, 20);
    assert!((0..5).all(|second| in_second(second) >= 998), "five seconds at the burst's rate");
    assert!((6..20).all(|second| (99..=100).contains(&in_second(second))), "then the average");
    // 4500 is what a burst exceeds the average by: 45 idle seconds earn it, 9 a fifth of it.
    let in_second = run(BEGIN_NS + 29 * SECOND_NS, 5);
    assert!((998..=1_000).contains(&in_second(0)) && in_second(2) <= 101, "a fifth of it");
    let in_second = run(BEGIN_NS + 3_600 * SECOND_NS, 10);
    assert!(in_second(4) >= 998 && in_second(6) <= 101, "all of it, and not more");
}

#[test]
fn each_limit_counts_its_own_requests_and_all_of_them_must_agree() {
    // What may go once the bucket is used up by reads.
    let after_reads = |quantity: Quantity, rate: u64| {
        let mut bucket = Bucket::new(&limits(quantity, burst(rate, 0, None)));
        at_once_or(&mut bucket, 10_000);
        [&READ, &WRITE].map(|request| bucket.ask(BEGIN_NS, request).map_err(|wait| wait.other_may_go))
    };
    assert_eq!(after_reads(Quantity::Iops, 100), [Err(false), Err(false)]);
    assert_eq!(after_reads(Quantity::IopsRead, 100), [Err(true), Ok(())]);
    assert_eq!(after_reads(Quantity::IopsWrite, 100), [Ok(()), Ok(())]);
    assert_eq!(after_reads(Quantity::Bps, 1_000), [Err(false), Err(false)]);
    assert_eq!(after_reads(Quantity::BpsRead, 1_000), [Err(true), Ok(())]);
    assert_eq!(after_reads(Quantity::BpsWrite, 1_000), [Ok(()), Ok(())]);
    // A total and a part of it: the lower one rules the reads, and the total all.
    let mut both = Limits::iops(100);
    both.each[Quantity::IopsRead as usize].rate = 10;
    let mut bucket = Bucket::new(&both);
    let (mut reads, mut writes) = (0, 0);
    for ms in 0..10_000 {
        reads += u64::from(bucket.ask(BEGIN_NS + ms * 1_000_000, &READ).is_ok());
        writes += u64::from(bucket.ask(BEGIN_NS + ms * 1_000_000, &WRITE).is_ok());
    }
    assert!((98..=100).contains(&reads) && (898..=902).contains(&writes), "{reads} reads, {writes} writes");
}

/// Asks for reads until one must wait, at most so many.
fn at_once_or(bucket: &mut Bucket, most: usize) {
    (0..most).take_while(|_| bucket.ask(BEGIN_NS, &READ).is_ok()).for_each(drop);
}

#[test]
fn bytes_are_counted_as_bytes_and_a_long_request_counts_as_so_many_of_iops_size() {
    let spaced = |limits: Limits, request: Request| {
        let mut bucket = Bucket::new(&limits);
        while bucket.ask(BEGIN_NS, &request).is_ok() {}
        let first = bucket.ask(BEGIN_NS, &request).unwrap_err().until_ns;
        bucket.ask(first, &request).unwrap();
        bucket.ask(first, &request).unwrap_err().until_ns - first
    };
    let request = |bytes| Request::new(Direction::Write, bytes);
    let by_bytes = limits(Quantity::Bps, burst(1 << 20, 0, None));
    let by_size = Limits { iops_size: 4096, ..Limits::iops(16) };
    for (limits, request, seconds) in [
        (by_bytes, request(1 << 20), 1.0),
        (by_bytes, request(1 << 22), 4.0),
        (by_size, request(4096), 1.0 / 16.0),
        (by_size, request(512), 1.0 / 16.0),
        (by_size, request(65_536), 1.0),
        (by_size, request(6_144), 3.0 / 32.0),
        (by_size, Request { direction: Direction::Write, size: 65_536, moved: 0 }, 1.0),
    ] {
        let expected = UNIT as f64 * seconds;
        assert!((spaced(limits, request) as f64 - expected).abs() <= 1.0, "{request:?}");
    }
}

#[test]
fn a_change_of_the_limit_gives_no_credit_and_takes_effect_at_once() {
    let mut bucket = Bucket::new(&Limits::iops(1));
    at_once(&mut bucket, BEGIN_NS);
    let asleep = bucket.ask(BEGIN_NS + 1_000, &READ).unwrap_err().until_ns;
    assert!(asleep > BEGIN_NS + 900_000_000);
    bucket.set(BEGIN_NS + 2_000, &Limits::iops(5_000));
    let due = bucket.ask(BEGIN_NS + 2_000, &READ).unwrap_err().until_ns;
    assert!(due <= BEGIN_NS + 2_000 + QUANTUM_NS, "and not a second later");
    bucket.ask(due, &READ).unwrap();
    // Down again: nobody pays for what was allowed then.
    at_once(&mut bucket, due);
    bucket.set(due, &Limits::iops(100));
    let next = bucket.ask(due, &READ).unwrap_err().until_ns;
    assert!(next <= due + 11_000_000, "{}", next - due);
    // What was saved at a high rate is more than a low one lets anybody save.
    let mut rich = Bucket::new(&Limits::iops(100_000));
    rich.ask(due, &READ).unwrap();
    rich.set(due, &Limits::iops(100));
    assert_eq!(at_once(&mut rich, due), 1);
    // No limit, and back: nothing was saved.
    bucket.set(due, &Limits::default());
    (0..1_000).for_each(|_| bucket.ask(due, &READ).unwrap());
    bucket.set(due, &Limits::iops(100_000));
    assert_eq!(at_once(&mut bucket, due), 1);
    // A burst that is allowed from now on has still to be earned.
    bucket.set(due + SECOND_NS, &limits(Quantity::Iops, burst(100_000, 200_000, Some(10))));
    let (mut now_ns, mut went) = (due + SECOND_NS, 0);
    while now_ns < due + 2 * SECOND_NS {
        went += at_once(&mut bucket, now_ns);
        now_ns = bucket.ask(now_ns, &READ).unwrap_err().until_ns;
    }
    assert!(went <= 100_000 + 75, "{went}");
}

#[test]
fn a_clock_that_goes_back_lets_nobody_through_and_stops_nobody_for_ever() {
    let mut bucket = Bucket::new(&Limits::iops(1_000));
    at_once(&mut bucket, BEGIN_NS);
    for now_ns in [BEGIN_NS - 1, BEGIN_NS - SECOND_NS, 0] {
        assert!(bucket.ask(now_ns, &READ).is_err());
    }
    assert_eq!(at_once(&mut bucket, BEGIN_NS + 1_000_750), 1);
}

#[test]
fn members_of_a_group_with_enough_to_do_get_equal_shares() {
    for rate in [10, 1_000, 20_000] {
        for depths in [&[32, 32][..], &[32, 1], &[1, 32], &[32, 32, 32], &[1, 8, 32, 256]] {
            let seconds = (4_000 / rate).max(1);
            let drives = play(&Limits::iops(rate), depths, quiet, BEGIN_NS + seconds * SECOND_NS);
            let mut all: Vec<u64> = drives.iter().flat_map(|drive| drive.went.iter().copied()).collect();
            all.sort_unstable();
            assert!(most_in(&all, SECOND_NS) <= rate);
            let fair = (rate * seconds) as f64 / depths.len() as f64;
            assert!(all.len() as f64 >= 0.998 * (rate * seconds) as f64, "{rate}, {depths:?}: {} in all", all.len());
            for drive in &drives {
                let share = drive.went.len() as f64 / fair;
                // One request at a time is as much as a member of depth 1 can have in a quantum.
                let able = rate <= 1_000 || depths.iter().all(|&depth| depth > 8);
                assert!(!able || (0.95..=1.05).contains(&share), "{rate}, {depths:?}: a share of {share}");
            }
        }
    }
}

#[test]
fn a_member_that_stops_asking_holds_nobody_up() {
    let mut group = Group::new(&Limits::iops(100));
    let (gone, left) = (group.join(), group.join());
    while group.ask(gone, BEGIN_NS, &READ).is_ok() {}
    let wait = group.ask(left, BEGIN_NS, &READ).unwrap_err();
    group.ask(left, wait.until_ns, &READ).unwrap();
    let wait = group.ask(left, wait.until_ns, &READ).unwrap_err();
    group.ask(left, wait.until_ns, &READ).unwrap();
}

#[test]
fn contradictions_are_refused_with_the_option_and_what_would_do() {
    let cases = [
        (Quantity::Iops, burst(MAX_IOPS + 1, 0, None), "iops-total is 1000001; accepted: 0 to 1000000"),
        (Quantity::BpsRead, burst(MAX_BPS + 1, 0, None), "accepted: 0 to 1000000000000000"),
        (Quantity::IopsWrite, burst(1, MAX_IOPS + 1, None), "iops-write-max is 1000001; accepted: 0 to 1000000"),
        (Quantity::Iops, burst(0, 5, None), "iops-total"),
        (Quantity::Iops, burst(5, 4, None), "lower than"),
        (Quantity::Iops, burst(5, 0, Some(1)), "iops-total-max-length"),
        (Quantity::Iops, burst(5, 6, Some(0)), "accepted: 1 to 86400"),
        (Quantity::Iops, burst(5, 6, Some(86_401)), "accepted: 1 to 86400"),
    ];
    for (quantity, limit, told) in cases {
        let mut limits = Limits::default();
        limits.each[quantity as usize] = limit;
        let refusal = limits.check(Spelling::CommandLine).unwrap_err().to_string();
        assert!(refusal.contains(told), "{told:?} is not in {refusal:?}");
    }
    assert!(Limits { iops_size: 1, ..Limits::default() }.check(Spelling::CommandLine).is_err());
    for limit in [burst(0, 0, None), burst(5, 5, None), burst(5, 6, Some(1)), burst(5, 6, Some(86_400))] {
        limits(Quantity::Iops, limit);
    }
}

/// Numbers as they are and as they should not be.
fn any_number() -> impl Strategy<Value = u64> {
    prop_oneof![
        prop::sample::select(vec![0, 1, 2, u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1, u64::from(u32::MAX)]),
        any::<u64>(),
        0..2_000_000_u64,
    ]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let limit = (any_number(), any_number(), prop::option::of(any_number()))
        .prop_map(|(rate, max, max_length)| Limit { rate, max, max_length });
    (prop::array::uniform6(limit), any_number()).prop_map(|(each, iops_size)| Limits { each, iops_size })
}

/// Limits that are accepted: the numbers are brought into their ranges.
fn good_limits() -> impl Strategy<Value = Limits> {
    any_limits().prop_map(|mut limits| {
        for quantity in Quantity::ALL {
            let limit = &mut limits.each[quantity as usize];
            limit.rate %= quantity.most() + 1;
            limit.max = if limit.rate == 0 { 0 } else { limit.max % (quantity.most() + 1) };
            limit.max = if limit.max < limit.rate { 0 } else { limit.max };
            limit.max_length = limit.max_length.filter(|_| limit.max > 0).map(|length| 1 + length % MAX_BURST_SECONDS);
        }
        if limits.each[..3].iter().all(|limit| limit.rate == 0) {
            limits.iops_size = 0;
        }
        limits.iops_size %= MAX_BPS + 1;
        limits.check(Spelling::CommandLine).unwrap();
        limits
    })
}

/// One thing that happens to a bucket.
#[derive(Clone, Copy, Debug)]
enum Step {
    Ask(Request),
    Pass(u64),
    Set(Limits),
}

fn any_request() -> impl Strategy<Value = Request> {
    (any::<bool>(), any_number(), any_number()).prop_map(|(read, size, moved)| {
        let direction = if read { Direction::Read } else { Direction::Write };
        Request { direction, size, moved }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// No number, checked or not, in a limit, a request or a clock makes the arithmetic overflow (this build would
    /// panic), and who is refused is told a later time.
    #[test]
    fn no_number_overflows_and_a_refusal_names_a_later_time(
        limits in prop_oneof![any_limits(), good_limits()],
        steps in prop::collection::vec(prop_oneof![
            4 => any_request().prop_map(Step::Ask),
            2 => any_number().prop_map(Step::Pass),
            1 => prop_oneof![any_limits(), good_limits()].prop_map(Step::Set),
        ], 1..40),
    ) {
        let (mut bucket, mut now_ns) = (Bucket::new(&limits), 0_u64);
        for step in steps {
            match step {
                Step::Ask(request) => if let Err(wait) = bucket.ask(now_ns, &request) {
                    prop_assert!(wait.until_ns > now_ns || now_ns == u64::MAX);
                },
                // Past the end of time it begins anew: a clock that jumps.
                Step::Pass(ns) => now_ns = now_ns.wrapping_add(ns),
                Step::Set(limits) => bucket.set(now_ns, &limits),
            }
        }
    }

    /// No window of `w` seconds admits more than `rate * w + burst + 1`, whenever and however often anybody asks,
    /// whatever the directions and sizes, and the limit may change at any instant; and who asks when it is told to is let
    /// through, so nothing stands idle.
    #[test]
    fn no_window_admits_more_than_its_rate_and_burst_and_nobody_waits_in_vain(
        rates in prop::collection::vec(prop::sample::select(RATES.to_vec()), 1..4),
        asks in prop::collection::vec((prop_oneof![0..100_000_u64, 0..2_000_000_u64, 0..20_000_000_u64], any::<bool>(), any::<bool>()), 50..400),
    ) {
        let mut bucket = Bucket::new(&Limits::iops(rates[0]));
        let (mut now_ns, mut due_ns, mut latest_ns) = (BEGIN_NS, None, LATENESS_NS);
        let mut changes = VecDeque::from([(BEGIN_NS, rates[0])]);
        let mut went = Vec::new();
        for (at, &(pass_ns, wait, read)) in asks.iter().enumerate() {
            // Either to the time that was named, or to some time before or after it.
            now_ns = match due_ns.filter(|_| wait) {
                Some(due_ns) => due_ns,
                None => now_ns + pass_ns,
            };
            let on_time = due_ns == Some(now_ns);
            latest_ns = latest_ns.max(now_ns.saturating_sub(due_ns.unwrap_or(now_ns)).min(MAX_LATENESS_NS));
            let change = (at * rates.len()).is_multiple_of(asks.len()) && at > 0;
            if change {
                let rate = rates[at * rates.len() / asks.len()];
                bucket.set(now_ns, &Limits::iops(rate));
                changes.push_back((now_ns, rate));
            }
            due_ns = match bucket.ask(now_ns, if read { &READ } else { &WRITE }) {
                Ok(()) => {
                    went.push(now_ns);
                    None
                }
                Err(refused) => {
                    prop_assert!(!on_time || change, "it was told to ask now");
                    prop_assert!(refused.until_ns <= now_ns + SECOND_NS + 9_000_000);
                    Some(refused.until_ns)
                }
            };
        }
        // The rate may change inside a window: the water that leaks in it, and the most that any rate lets anybody save.
        let leaked = |from: u64, to: u64| -> u128 {
            let ends = changes.iter().skip(1).map(|change| change.0).chain([u64::MAX]);
            changes.iter().zip(ends).map(|(&(begin, rate), end)| {
                u128::from(to.min(end).saturating_sub(from.max(begin))) * u128::from(rate)
            }).sum()
        };
        let fastest = u128::from(*rates.iter().max().unwrap());
        prop_assert!(most_in(&went, SECOND_NS) <= fastest as u64, "no second has more than the highest rate");
        for first in 0..went.len() {
            for last in first..went.len() {
                let admitted = (last - first + 1) as u128;
                let allowed = leaked(went[first], went[last]) + fastest * u128::from(QUANTUM_NS + latest_ns);
                prop_assert!((admitted - 1) * u128::from(SECOND_NS) <= allowed, "{admitted} within {} ns", went[last] - went[first]);
            }
        }
    }

    /// Mixes of directions and sizes under all limits at once: no limit is exceeded over any window from the beginning.
    #[test]
    fn random_mixes_of_reads_writes_and_sizes_exceed_no_limit(
        limits in good_limits(),
        asks in prop::collection::vec((0..50_000_000_u64, any::<bool>(), 0..(4_u64 << 20)), 1..300),
    ) {
        let (mut bucket, mut now_ns) = (Bucket::new(&limits), BEGIN_NS);
        let mut went: Vec<(u64, Request)> = Vec::new();
        for (pass_ns, read, bytes) in asks {
            now_ns += pass_ns;
            let request = Request::new(if read { Direction::Read } else { Direction::Write }, bytes);
            if bucket.ask(now_ns, &request).is_ok() {
                went.push((now_ns, request));
            }
        }
        for meter in meters(&limits) {
            // All but the last, which may be as long as it likes: it is paid for afterwards.
            let mut poured = 0;
            for (at_ns, request) in went.iter().filter(|(_, request)| meter.quantity.includes(request.direction)) {
                let leaked = i128::from(meter.rate) * i128::from(at_ns - BEGIN_NS);
                let slack = i128::from(meter.rate) * i128::from(MAX_LATENESS_NS);
                prop_assert!(poured <= leaked + meter.room + slack, "{meter:?}");
                poured += meter.cost(request, limits.iops_size);
            }
        }
    }
}

#[test]
fn a_member_that_left_a_group_is_waited_for_by_nobody() {
    let mut group = Group::new(&Limits::iops(10));
    let (first, second) = (group.join(), group.join());
    let request = Request::new(Direction::Read, 512);
    let mut now_ns = 1_000_000_000;
    // The second went longer ago, so the first is a place behind it.
    while group.ask(second, now_ns, &request).is_ok() {}
    now_ns += 1_000_000_000;
    group.ask(first, now_ns, &request).unwrap();
    let [mine, theirs] = [first, second].map(|member| group.ask(member, now_ns, &request).unwrap_err().until_ns);
    assert!(mine > theirs);
    group.leave(second);
    assert_eq!(group.ask(first, now_ns, &request).unwrap_err().until_ns, theirs);
}
