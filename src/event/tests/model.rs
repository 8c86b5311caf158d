//! P1: whatever is done to a loop in whatever order, exactly those are called that a small reference model expects.
//!
//! Each of a few handlers has a bell, a pipe and a timer. Its bell always gets the same descriptor number, so that every
//! removal and addition is a close and reopen; the bells of earlier tenants stay open elsewhere and go on ringing. The
//! model does not say in which order signals and streams are called, only that timers go first and in their order.

use std::collections::BTreeSet;
use std::io::{PipeWriter, Read, Write, pipe};

use proptest::prelude::*;

use super::*;

const HANDLERS: usize = 4;
/// Nobody else's descriptors have numbers from here on.
const NUMBERS: RawFd = 1015;

const BELL: u32 = 0;
const PIPE: u32 = 1;
const TIMER: u32 = 2;

/// What a handler does to its loop in its next call.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Finish,
    Remove(usize),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Add(usize),
    Remove(usize),
    Ring(usize),
    RingOld(usize),
    Write(usize),
    HangUp(usize),
    MaskBell(usize, bool),
    MaskPipe(usize, bool),
    Arm(usize, u64),
    Cancel(usize),
    Plan(usize, Deed),
    Advance(u64),
    Turn,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..HANDLERS;
    prop_oneof![
        4 => who.clone().prop_map(Step::Add),
        1 => who.clone().prop_map(Step::Remove),
        3 => who.clone().prop_map(Step::Ring),
        1 => who.clone().prop_map(Step::RingOld),
        3 => who.clone().prop_map(Step::Write),
        1 => who.clone().prop_map(Step::HangUp),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, mask)| Step::MaskBell(who, mask)),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, mask)| Step::MaskPipe(who, mask)),
        2 => (who.clone(), 0..40u64).prop_map(|(who, at)| Step::Arm(who, 990 + at)),
        1 => who.clone().prop_map(Step::Cancel),
        1 => who.clone().prop_map(|who| Step::Plan(who, Deed::Finish)),
        1 => (who.clone(), who).prop_map(|(who, whom)| Step::Plan(who, Deed::Remove(whom))),
        1 => (0..20u64).prop_map(Step::Advance),
        5 => Just(Step::Turn),
    ]
}

/// What the model knows of a handler that is there.
#[derive(Clone, Default)]
struct Expected {
    generation: u32,
    rung: bool,
    ever_rung: bool,
    bell_masked: bool,
    bytes: usize,
    pipe_masked: bool,
    hung_up: bool,
    let_go: bool,
    armed: Option<(u64, u64)>,
    deed: Option<Deed>,
}

impl Expected {
    fn causes(&self, now: u64) -> impl Iterator<Item = u32> {
        let pipe = !self.let_go && (self.hung_up || self.bytes > 0 && !self.pipe_masked);
        let timer = self.armed.is_some_and(|(at, _)| at <= now);
        [(BELL, self.rung), (PIPE, pipe), (TIMER, timer)].into_iter().filter(|(_, due)| *due).map(|(cause, _)| cause)
    }

    fn told(&mut self, cause: u32) {
        match cause {
            BELL => self.rung = false,
            PIPE if self.bytes > 0 => self.bytes -= 1,
            PIPE => self.let_go = true,
            _ => self.armed = None,
        }
    }
}

/// The real things of a handler, as far as the test holds them.
struct Held {
    key: Key,
    watches: Vec<Key>,
    bell: EventFd,
    writer: Option<PipeWriter>,
}

type Deeds = Arc<Mutex<[Option<Deed>; HANDLERS]>>;
type Keys = Arc<Mutex<[Option<Key>; HANDLERS]>>;

struct World {
    clock: Arc<AtomicU64>,
    event_loop: EventLoop,
    log: Log<(usize, u32, u32)>,
    deeds: Deeds,
    keys: Keys,
    held: [Option<Held>; HANDLERS],
    old_bells: [Option<EventFd>; HANDLERS],
    expected: [Option<Expected>; HANDLERS],
    generation: u32,
    order: u64,
}

impl World {
    fn new() -> Self {
        let (clock, event_loop) = stepped();
        World {
            clock,
            event_loop,
            log: Log::new(),
            deeds: Arc::default(),
            keys: Arc::default(),
            held: [const { None }; HANDLERS],
            old_bells: [const { None }; HANDLERS],
            expected: [const { None }; HANDLERS],
            generation: 0,
            order: 0,
        }
    }

    fn add(&mut self, who: usize) {
        if self.held[who].is_some() {
            return;
        }
        self.generation += 1;
        let generation = self.generation;
        let bell = eventfd();
        let mut number = Some(duplicate_as(&bell, NUMBERS + who as RawFd));
        let (mut reader, writer) = pipe().unwrap();
        let stream = reader.try_clone().unwrap();
        let (log, deeds, keys) = (self.log.clone(), self.deeds.clone(), self.keys.clone());
        let watches = Arc::new(Mutex::new(Vec::new()));
        let theirs = watches.clone();
        let attach = move |cx: &mut Cx<'_>| {
            let keys = vec![
                cx.own(Box::new(number.take().unwrap()), BELL)?,
                cx.watch(&stream, Interest::READ, PIPE)?,
                cx.timer(TIMER)?,
            ];
            *theirs.lock().unwrap() = keys;
            Ok(())
        };
        let ready = move |event: Event, cx: &mut Cx<'_>| {
            log.push((who, generation, event.tag));
            match deeds.lock().unwrap()[who].take() {
                Some(Deed::Finish) => cx.finish(),
                Some(Deed::Remove(whom)) => {
                    if let Some(key) = keys.lock().unwrap()[whom] {
                        cx.remove(key);
                    }
                }
                None => {}
            }
            if event.tag == PIPE && reader.read(&mut [0]).unwrap() > 0 && event.is_hang_up() {
                return Ok(Flow::More);
            }
            Ok(Flow::Done)
        };
        let key = self.event_loop.add(probe(attach, ready)).unwrap();
        let watches = watches.lock().unwrap().clone();
        self.keys.lock().unwrap()[who] = Some(key);
        self.held[who] = Some(Held { key, watches, bell, writer: Some(writer) });
        self.expected[who] = Some(Expected { generation, ..Expected::default() });
    }

    /// The handler is gone from the loop: so it is from the model.
    fn gone(&mut self, who: usize) {
        self.keys.lock().unwrap()[who] = None;
        self.deeds.lock().unwrap()[who] = None;
        self.expected[who] = None;
        if let Some(held) = self.held[who].take() {
            self.old_bells[who] = Some(held.bell);
        }
    }

    fn mask(&mut self, who: usize, cause: u32, masked: bool) {
        let (Some(held), Some(expected)) = (&self.held[who], &mut self.expected[who]) else { return };
        let interest = if masked { Interest::NONE } else { Interest::READ };
        let mut cx = Cx { event_loop: &mut self.event_loop, me: held.key };
        cx.set_interest(held.watches[cause as usize], interest).unwrap();
        if cause == PIPE {
            expected.pipe_masked = masked;
        } else if expected.bell_masked != masked {
            expected.bell_masked = masked;
            expected.rung = !masked && expected.ever_rung;
        }
    }

    fn arm(&mut self, who: usize, at: Option<u64>) {
        let (Some(held), Some(expected)) = (&self.held[who], &mut self.expected[who]) else { return };
        let mut cx = Cx { event_loop: &mut self.event_loop, me: held.key };
        let timer = held.watches[TIMER as usize];
        match at {
            Some(at) => cx.arm(timer, at).unwrap(),
            None => cx.cancel(timer).unwrap(),
        }
        self.order += 1;
        expected.armed = at.map(|at| (at, self.order));
    }

    fn turn(&mut self) -> std::result::Result<(), TestCaseError> {
        let now = self.clock.load(Relaxed);
        let mut due = BTreeSet::new();
        let mut timers = Vec::new();
        for (who, expected) in self.expected.iter().enumerate() {
            let Some(expected) = expected else { continue };
            due.extend(expected.causes(now).map(|cause| (who, cause)));
            timers.extend(expected.armed.filter(|(at, _)| *at <= now).map(|deadline| (deadline, who)));
        }
        timers.sort_unstable();
        self.event_loop.turn(Wait::Poll).unwrap();
        let mut timers = timers.into_iter().map(|(_, who)| who);
        for (who, generation, cause) in self.log.take() {
            prop_assert!(due.remove(&(who, cause)), "handler {} was told {} and should not have been", who, cause);
            if cause == TIMER {
                prop_assert!(timers.any(|next| next == who), "the timer of {} fired out of its order", who);
            } else {
                prop_assert!(due.iter().all(|(_, other)| *other != TIMER), "{} went before a timer", who);
            }
            let Some(expected) = &mut self.expected[who] else { unreachable!("what is due is there") };
            prop_assert_eq!(expected.generation, generation);
            expected.told(cause);
            let removed = match expected.deed.take() {
                Some(Deed::Finish) => who,
                Some(Deed::Remove(whom)) => whom,
                None => continue,
            };
            self.gone(removed);
            due.retain(|(other, _)| *other != removed);
        }
        prop_assert!(due.is_empty(), "not told: {:?}", due);
        Ok(())
    }

    fn step(&mut self, step: Step) -> std::result::Result<(), TestCaseError> {
        match step {
            Step::Add(who) => self.add(who),
            Step::Remove(who) => {
                if let Some(held) = &self.held[who] {
                    prop_assert!(self.event_loop.remove(held.key));
                    self.gone(who);
                }
            }
            Step::Ring(who) => {
                if let (Some(held), Some(expected)) = (&self.held[who], &mut self.expected[who]) {
                    held.bell.write(1).unwrap();
                    expected.ever_rung = true;
                    expected.rung |= !expected.bell_masked;
                }
            }
            Step::RingOld(who) => {
                if let Some(bell) = &self.old_bells[who] {
                    bell.write(1).unwrap();
                }
            }
            Step::Write(who) => {
                if let (Some(Held { writer: Some(writer), .. }), Some(expected)) =
                    (&mut self.held[who], &mut self.expected[who])
                {
                    writer.write_all(&[0]).unwrap();
                    expected.bytes += 1;
                }
            }
            Step::HangUp(who) => {
                if let (Some(held), Some(expected)) = (&mut self.held[who], &mut self.expected[who]) {
                    held.writer = None;
                    expected.hung_up = true;
                }
            }
            Step::MaskBell(who, masked) => self.mask(who, BELL, masked),
            Step::MaskPipe(who, masked) => self.mask(who, PIPE, masked),
            Step::Arm(who, at) => self.arm(who, Some(at)),
            Step::Cancel(who) => self.arm(who, None),
            Step::Plan(who, deed) => {
                if let Some(expected) = &mut self.expected[who] {
                    expected.deed = Some(deed);
                    self.deeds.lock().unwrap()[who] = Some(deed);
                }
            }
            Step::Advance(by) => {
                self.clock.fetch_add(by, Relaxed);
            }
            Step::Turn => self.turn()?,
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn p1_exactly_those_are_called_whom_the_reference_model_expects(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new();
        (0..HANDLERS).for_each(|who| world.add(who));
        for step in steps {
            world.step(step)?;
        }
        world.turn()?;
        world.turn()?;
    }
}
