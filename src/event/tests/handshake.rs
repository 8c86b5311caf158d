//! P4: every interleaving of a loop and two posters through the steps of `inbox.rs`, in a model small enough to walk
//! whole. No state may be "asleep and pending": the loop sleeping, the queue filled, and nobody on the way to the bell.
//!
//! The model is only worth something if it notices a mistake, so the same walk is made over three handshakes that look
//! nearly the same, and has to find the lost wake-up in each.

use std::collections::HashSet;

/// The handshake as it is, or with one mistake in it.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    AsWritten,
    /// The loop looks at the flags and then says that it sleeps, in two steps: no re-check.
    SleepWithoutRecheck,
    /// The poster puts its flag up before its command is in the queue.
    FlagBeforeQueue,
    /// The loop empties the queue before it takes the flag down.
    QueueBeforeFlag,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Loop {
    /// About to fall asleep.
    Awake,
    /// Has seen that no flag is up (only without the re-check).
    SawNothing,
    /// In epoll_wait, until the bell has rung.
    Asleep,
    /// Awake, about to take the commands.
    Woken,
    /// Has done the first half of taking them.
    Taking,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Poster {
    Begins,
    /// Has filled the queue (or put the flag up, in the wrong order).
    Halfway,
    /// Has found the loop asleep and nothing else: is about to ring.
    Rings,
    Finished,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    asleep: bool,
    posted: bool,
    queue: u8,
    /// An edge of the bell that epoll has not told yet.
    edge: bool,
    rings: u8,
    event_loop: Loop,
    posters: [Poster; 2],
}

impl State {
    /// Nothing moves any more, and something lies in the queue of a sleeping loop.
    fn is_lost(&self) -> bool {
        self.event_loop == Loop::Asleep
            && !self.edge
            && self.queue > 0
            && self.posters.iter().all(|poster| matches!(poster, Poster::Finished))
    }

    /// The state after the loop's next step; none while it sleeps.
    fn step_loop(&self, variant: Variant) -> Option<State> {
        let mut next = self.clone();
        next.event_loop = match self.event_loop {
            // `Inbox::sleep`: one compare-and-exchange.
            Loop::Awake if self.posted => Loop::Woken,
            Loop::Awake if variant == Variant::SleepWithoutRecheck => Loop::SawNothing,
            Loop::Awake | Loop::SawNothing => {
                next.asleep = true;
                Loop::Asleep
            }
            Loop::Asleep if self.edge => {
                next.edge = false;
                next.asleep = false;
                Loop::Woken
            }
            Loop::Asleep => return None,
            // `Inbox::take`: the flag down, then the queue.
            Loop::Woken if !self.posted => Loop::Awake,
            Loop::Woken => {
                if variant == Variant::QueueBeforeFlag {
                    next.queue = 0
                } else {
                    next.posted = false
                }
                Loop::Taking
            }
            Loop::Taking => {
                if variant == Variant::QueueBeforeFlag {
                    next.posted = false
                } else {
                    next.queue = 0
                }
                Loop::Awake
            }
        };
        Some(next)
    }

    /// The state after a poster's next step; none when it has finished.
    fn step_poster(&self, which: usize, variant: Variant) -> Option<State> {
        let mut next = self.clone();
        let flag_first = variant == Variant::FlagBeforeQueue;
        let raise = |next: &mut State| {
            // `Inbox::raise`: one fetch-or, which says whether there was a sleeper and nothing else.
            let ring = next.asleep && !next.posted;
            next.posted = true;
            ring
        };
        next.posters[which] = match self.posters[which] {
            Poster::Begins if flag_first => {
                // It rings at once, to give the mistake every chance to work.
                if raise(&mut next) {
                    next.edge = true;
                    next.rings += 1;
                }
                Poster::Halfway
            }
            Poster::Begins => {
                next.queue += 1;
                Poster::Halfway
            }
            Poster::Halfway if flag_first => {
                next.queue += 1;
                Poster::Finished
            }
            Poster::Halfway => {
                if raise(&mut next) {
                    Poster::Rings
                } else {
                    Poster::Finished
                }
            }
            Poster::Rings => {
                next.edge = true;
                next.rings += 1;
                Poster::Finished
            }
            Poster::Finished => return None,
        };
        Some(next)
    }
}

/// Walks every state that can be reached, and returns how many there are and how many of them are lost.
fn walk(variant: Variant) -> (usize, usize) {
    let start = State {
        asleep: false,
        posted: false,
        queue: 0,
        edge: false,
        rings: 0,
        event_loop: Loop::Awake,
        posters: [Poster::Begins; 2],
    };
    let mut seen = HashSet::from([start.clone()]);
    let mut open = vec![start];
    let mut lost = 0;
    while let Some(state) = open.pop() {
        lost += usize::from(state.is_lost());
        assert!(state.rings <= 2, "more rings than posts (G17)");
        let steps = [state.step_loop(variant), state.step_poster(0, variant), state.step_poster(1, variant)];
        open.extend(steps.into_iter().flatten().filter(|next| seen.insert(next.clone())));
    }
    (seen.len(), lost)
}

#[test]
fn p4_no_interleaving_of_the_handshake_leaves_the_loop_asleep_with_something_pending() {
    let (states, lost) = walk(Variant::AsWritten);
    assert_eq!(lost, 0);
    assert!(states > 50, "{states} states: the walk went somewhere");
}

#[test]
fn p4_the_model_notices_a_missing_recheck_before_sleep() {
    assert!(walk(Variant::SleepWithoutRecheck).1 > 0);
}

#[test]
fn p4_the_model_notices_a_flag_that_goes_up_before_the_queue_is_filled() {
    assert!(walk(Variant::FlagBeforeQueue).1 > 0);
}

#[test]
fn p4_the_model_notices_a_queue_that_is_emptied_before_the_flag_goes_down() {
    assert!(walk(Variant::QueueBeforeFlag).1 > 0);
}
