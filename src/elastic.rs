//! The policy of the automatic balloon (`-balloon auto=on`): from what is seen of host and guest to the next target.
//!
//! A pure function of its arguments, asked once for each set of statistics that the guest sends, and so never on old ones.
//! It takes when the host is pressed and the guest has memory to spare, and gives when the guest needs it, pressed or not:
//! between the two lies a wide band in which nothing happens, so that what is taken is not given back at once. Where the
//! pressure comes from and how a target reaches the guest is Control's. Main thread.

/// Targets are multiples of this many bytes: a huge page.
const UNIT: u64 = 2 << 20;
/// A target is lowered at most once in this time, in nanoseconds, and by at most this part of the memory.
const TAKE_EVERY_NS: u64 = 1_000_000_000;
const TAKE_PART: u64 = 16;

/// Shares of the memory that the guest has, in fortieths, that it may use without swapping. Above the first it has memory
/// to spare, and is left the second; below the third it needs some, and is given up to the fourth.
const SPARE_ABOVE: u64 = 12;
const TAKE_DOWN_TO: u64 = 10;
const NEEDS_BELOW: u64 = 5;
const GIVE_UP_TO: u64 = 8;
const WHOLE: u64 = 40;

/// What is known at the moment of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub now_ns: u64,
    /// What the guest is to have, in bytes.
    pub target: u64,
    /// What it has.
    pub actual: u64,
    /// The guest is not on its way to the target: it is there, or has not moved for a while.
    pub settled: bool,
    /// What it says that it could still use without swapping.
    pub available: u64,
    /// The host is short of memory.
    pub pressed: bool,
}

/// Why a target is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The host is pressed, and the guest has memory to spare.
    HostPressed,
    /// The guest is short of memory.
    GuestNeeds,
}

/// How far it may go, and when it last took.
#[derive(Clone, Debug)]
pub struct Policy {
    memory: u64,
    floor: u64,
    took_ns: Option<u64>,
}

impl Policy {
    /// For a guest with `memory` bytes that is left at least `floor` of them.
    pub fn new(memory: u64, floor: u64) -> Self {
        Policy { memory, floor: floor.min(memory), took_ns: None }
    }

    /// The new target, in bytes, and why; `None` if it stays.
    pub fn decide(&mut self, sight: &Sight) -> Option<(u64, Reason)> {
        let actual = sight.actual.min(self.memory);
        // The guest's word: no more than there is.
        let available = sight.available.min(actual);
        let share = |part: u64| actual / WHOLE * part;
        if available < share(NEEDS_BELOW) {
            // So much that what is available is that share of what there is then.
            let missing = (share(GIVE_UP_TO) - available) / (WHOLE - GIVE_UP_TO) * WHOLE;
            let target = actual.saturating_add(missing).next_multiple_of(UNIT).min(self.memory);
            return (target > sight.target).then_some((target, Reason::GuestNeeds));
        }
        let rests = self.took_ns.is_some_and(|took_ns| sight.now_ns.saturating_sub(took_ns) < TAKE_EVERY_NS);
        if !sight.pressed || !sight.settled || rests || available <= share(SPARE_ABOVE) {
            return None;
        }
        let spare = (available - share(TAKE_DOWN_TO)) / (WHOLE - TAKE_DOWN_TO) * WHOLE;
        let least = actual.saturating_sub(spare.min(self.memory / TAKE_PART)).max(self.floor);
        let target = least.next_multiple_of(UNIT).min(self.memory);
        (target < actual).then(|| {
            self.took_ns = Some(sight.now_ns);
            (target, Reason::HostPressed)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Reason::{GuestNeeds, HostPressed};
    use super::*;

    const MIB: u64 = 1 << 20;
    const SECOND: u64 = 1_000_000_000;

    /// In MiB, of a guest of 1600 that is left at least 400, with everything where it is to be.
    fn sight(actual: u64, available: u64, pressed: bool) -> Sight {
        let actual = actual * MIB;
        Sight { now_ns: SECOND, target: actual, actual, settled: true, available: available * MIB, pressed }
    }

    fn decide(sight: &Sight) -> Option<(u64, Reason)> {
        Policy::new(1600 * MIB, 400 * MIB).decide(sight).map(|(target, reason)| (target / MIB, reason))
    }

    #[test]
    fn memory_is_taken_of_a_guest_that_has_it_to_spare_when_the_host_is_pressed() {
        for (actual, available, pressed, expected) in [
            // A sixteenth at once, or what is to spare: more than 30 %, down to 25 %.
            (1600, 1600, true, Some(1500)),
            (1600, 481, true, Some(1500)),
            (820, 250, true, Some(760)),
            (820, 246, true, None),
            (1600, 480, true, None),
            (1600, 1600, false, None),
            (800, 400, true, Some(700)),
            // Not below the floor, and not by nothing.
            (450, 450, true, Some(400)),
            (401, 401, true, Some(400)),
            (400, 400, true, None),
        ] {
            let expected = expected.map(|target| (target, HostPressed));
            assert_eq!(decide(&sight(actual, available, pressed)), expected, "{actual} {available} {pressed}");
        }
    }

    #[test]
    fn memory_is_given_to_a_guest_that_needs_it_whether_or_not_the_host_is_pressed() {
        for pressed in [false, true] {
            for (actual, available, expected) in [
                // Less than 12.5 %, up to 20 %, all at once.
                (800, 100, None),
                (800, 99, Some(878)),
                (800, 0, Some(1000)),
                (1500, 10, Some(1600)),
                (1600, 10, None),
            ] {
                let expected = expected.map(|target| (target, GuestNeeds));
                assert_eq!(decide(&sight(actual, available, pressed)), expected, "{actual} {available} {pressed}");
            }
        }
    }

    #[test]
    fn a_guest_on_its_way_is_not_asked_for_more_but_gets_back_what_it_needs() {
        let moving = Sight { target: 1000 * MIB, settled: false, ..sight(1400, 900, true) };
        assert_eq!(decide(&moving), None);
        let stuck = Sight { settled: true, ..moving };
        assert_eq!(decide(&stuck), Some((1300, HostPressed)), "from what it has, not from what it was to have");
        let short = Sight { available: 0, ..moving };
        assert_eq!(decide(&short), Some((1600, GuestNeeds)));
        let given = Sight { target: 1600 * MIB, ..short };
        assert_eq!(decide(&given), None, "it is on its way already");
    }

    /// A guest that has used `used` MiB and follows its target at once, second by second.
    fn live(policy: &mut Policy, from: u64, seconds: u64, used: u64, pressed: bool, targets: &mut Vec<u64>) {
        for second in from..from + seconds {
            let target = *targets.last().unwrap() * MIB;
            let available = target.saturating_sub(used * MIB);
            let sight = Sight { now_ns: second * SECOND, target, actual: target, settled: true, available, pressed };
            let target = policy.decide(&sight).map_or(target, |(target, _)| target);
            targets.push(target / MIB);
        }
    }

    #[test]
    fn under_pressure_the_guest_comes_to_rest_with_some_to_spare_and_stays_there() {
        let mut policy = Policy::new(1600 * MIB, 400 * MIB);
        let mut targets = vec![1600];
        live(&mut policy, 1, 20, 600, true, &mut targets);
        let rest = targets[20];
        assert_eq!(targets[..4], [1600, 1500, 1400, 1300]);
        assert!((800..=860).contains(&rest), "25 to 30 % of it are available: {targets:?}");
        live(&mut policy, 21, 1000, 600, true, &mut targets);
        live(&mut policy, 1021, 1000, 600, false, &mut targets);
        assert!(targets[20..].iter().all(|target| *target == rest), "it does not swing");
        // A little more or less used moves nothing; a lot more is given within a second.
        live(&mut policy, 2021, 10, 680, true, &mut targets);
        assert_eq!(*targets.last().unwrap(), rest);
        live(&mut policy, 2031, 1, rest - 10, true, &mut targets);
        assert!(*targets.last().unwrap() >= rest + 180, "{:?}", targets.last());
    }

    #[test]
    fn memory_is_taken_once_a_second_however_often_it_is_asked() {
        let mut policy = Policy::new(1600 * MIB, 400 * MIB);
        let moves = (0..30).filter(|tenth| {
            let sight = Sight { now_ns: tenth * SECOND / 10, ..sight(1600, 1600, true) };
            policy.decide(&sight).is_some()
        });
        assert_eq!(moves.collect::<Vec<_>>(), [0, 10, 20]);
    }

    proptest! {
        #[test]
        fn a_target_lies_between_floor_and_memory_whatever_is_seen(
            memory in 1u64..1 << 39, floor in any::<u64>(), seen in any::<[u64; 4]>(), flags in any::<[bool; 2]>()
        ) {
            let [now_ns, target, actual, available] = seen;
            let sight = Sight { now_ns, target, actual, settled: flags[0], available, pressed: flags[1] };
            if let Some((target, reason)) = Policy::new(memory, floor).decide(&sight) {
                prop_assert!(target <= memory);
                prop_assert!(reason == GuestNeeds || target >= floor.min(memory));
                prop_assert!(reason == HostPressed || target > sight.target);
            }
        }
    }
}
