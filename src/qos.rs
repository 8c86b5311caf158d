//! `Bucket`: the leaky bucket that decides when a request may go (rules D2.1 to D2.4), as a meter in integers.
//!
//! Each limit is a bucket with a hole. A request pours in what it costs; the bucket leaks at the limit's rate; a request
//! may go while the water does not stand above the brim. The level is kept, and not a time or a number of tokens: so
//! nothing is rounded, and a change of the limit neither gives credit nor takes it. Time is an argument (invariant I8):
//! there is no clock in here, no descriptor and no timer. Who asks, and what becomes of a request that may not go, is
//! the device's and its worker's business. Any thread; each bucket belongs to one.
//!
//! # What is promised
//!
//! With a rate of `n` a second and no burst allowed, of the requests that are admitted
//! - no second has more than `n`: a second that is closed at its beginning and open at its end, anywhere in time;
//! - after idleness at most `n * 0.0005 + 1` go at once ([`QUANTUM_NS`]);
//! - in the long run it is `n / 1.00075` a second, as long as there are requests, and whoever was told to ask at a certain
//!   time does not ask later than a quarter of a millisecond after it ([`LATENESS_NS`]);
//! - where the host lets them ask later than that, it is less by the time of the longest such delay of the last second,
//!   and not by the sum of them, up to [`MAX_LATENESS_NS`].
//!
//! The last two are what the first one costs. A bucket that is behind by some time and catches up has let through, in the
//! second that begins just before, so much more than its share; it must be slower by as much for no second to notice.
//! So a request pours in a little more than its share of a second, by what the bucket may be behind
//! (`src/qos_test.rs` has the proof by example: any lateness, any rate, any second).

mod limits;

pub use limits::{Limit, Limits, MAX_BPS, MAX_BURST_SECONDS, MAX_IOPS, Quantity, Spelling};

/// The least distance between two wake-ups that a bucket asks for: what has become due meanwhile goes together, so the
/// timer costs the same at every rate. It is also the time for which an idle bucket saves credit. In nanoseconds.
pub const QUANTUM_NS: u64 = 500_000;
/// How much later than it was told to ask a waiter may always come without losing credit, in nanoseconds.
pub const LATENESS_NS: u64 = 250_000;
/// How much later it may come if that is so at the moment: on a host whose processors have others to serve. Beyond it
/// credit is lost, for a limit is within a per cent or it is none. In nanoseconds.
pub const MAX_LATENESS_NS: u64 = 8_000_000;

/// Who comes later than this was not kept by the host: the machine was paused, or the driver began anew. It has been idle.
const ABSENCE_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// A request as a bucket sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which limits it counts for.
    pub direction: Direction,
    /// Its length in bytes as `iops-size` measures it.
    pub size: u64,
    /// The bytes that it moves, for the limits on bytes.
    pub moved: u64,
}

impl Request {
    /// One that moves as many bytes as it is long.
    pub fn new(direction: Direction, bytes: u64) -> Self {
        Request { direction, size: bytes, moved: bytes }
    }
}

/// The answer to a request that may not go yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When to ask again, in nanoseconds of the clock that was asked with. Later than the question.
    pub until_ns: u64,
    /// Whether a request of the other direction may go meanwhile.
    pub other_may_go: bool,
}

impl Wait {
    /// No time will help: who told to wait will say when to ask again.
    pub const UNTIL_TOLD: Wait = Wait { until_ns: u64::MAX, other_may_go: false };
}

/// How late the waiters of a bucket come: the most of the last second and of what is remembered with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lateness {
    /// The most of the present period, which is a second or what is left of one.
    present_ns: u64,
    /// The most of the one before.
    before_ns: u64,
    /// When the present one began.
    since_ns: u64,
}

impl Lateness {
    /// What is allowed for, in nanoseconds.
    fn allowed_ns(&self) -> u64 {
        self.present_ns.max(self.before_ns).max(LATENESS_NS)
    }

    /// Forgets what was longer than a second ago.
    fn pass(&mut self, now_ns: u64) {
        let period_ns = now_ns.saturating_sub(self.since_ns);
        if period_ns >= SECOND_NS {
            let before_ns = if period_ns < 2 * SECOND_NS { self.present_ns } else { 0 };
            *self = Lateness { present_ns: 0, before_ns, since_ns: now_ns };
        }
    }

    /// Takes note of a waiter that came so late.
    fn note(&mut self, late_ns: u128) {
        let late_ns = u64::try_from(late_ns).unwrap_or(u64::MAX).min(MAX_LATENESS_NS);
        self.present_ns = self.present_ns.max(late_ns);
    }
}

/// One limit's water.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meter {
    quantity: Quantity,
    /// Keeps to `max` while a burst lasts, and not to the average.
    is_peak: bool,
    /// Water that leaks in a nanosecond.
    rate: u64,
    /// How far below the brim the water may fall when nobody asks.
    room: i128,
    /// ... and how much further while somebody waits.
    lateness: Lateness,
    /// Water above the brim; below it if negative.
    over: i128,
    /// When it last leaked.
    at_ns: u64,
    /// The last question was refused here.
    refused: bool,
}

impl Meter {
    /// The meters of one limit: of its average, and of its burst. Full to the brim at time zero.
    fn of(quantity: Quantity, limit: Limit) -> impl Iterator<Item = Meter> {
        let meter = move |rate: u64, burst: i128, is_peak| Meter {
            quantity,
            is_peak,
            rate,
            room: (i128::from(rate) * i128::from(QUANTUM_NS)).saturating_add(burst),
            lateness: Lateness::default(),
            over: 0,
            at_ns: 0,
            refused: false,
        };
        // A burst at `max` for so many seconds is what it exceeds the average by meanwhile.
        let excess = i128::from(limit.max.saturating_sub(limit.rate));
        let second = i128::from(SECOND_NS + QUANTUM_NS + LATENESS_NS);
        let burst = excess.saturating_mul(limit.max_length.unwrap_or(1).into()).saturating_mul(second);
        let average = (limit.rate > 0).then(|| meter(limit.rate, burst, false));
        let peak = (limit.rate > 0 && limit.max > 0).then(|| meter(limit.max, 0, true));
        average.into_iter().chain(peak)
    }

    /// Lets the time up to `now_ns` go by. A clock that went back stands still.
    fn leak(&mut self, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.at_ns);
        if passed_ns == 0 {
            return;
        }
        self.at_ns = now_ns;
        self.lateness.pass(now_ns);
        let leaked = i128::from(self.rate).saturating_mul(i128::from(passed_ns));
        self.over = self.over.saturating_sub(leaked);
        let saved = (-self.room).saturating_sub(self.over);
        if saved <= 0 {
            return;
        }
        let late_ns = saved.cast_unsigned() / u128::from(self.rate.max(1));
        let waits = self.refused && late_ns < u128::from(ABSENCE_NS);
        if waits {
            self.lateness.note(late_ns);
        }
        let idle = !waits && passed_ns >= QUANTUM_NS;
        self.over = self.over.max(self.lowest(idle));
    }

    /// How low the water may stand.
    fn lowest(&self, idle: bool) -> i128 {
        let slack = i128::from(self.rate) * i128::from(self.lateness.allowed_ns());
        -self.room.saturating_add(if idle { 0 } else { slack })
    }

    /// The water of one request or byte. A nanosecond leaks `rate`, so it would be 1e9; the rest keeps what the bucket may
    /// be behind out of every second.
    fn unit(&self) -> i128 {
        i128::from(SECOND_NS + QUANTUM_NS + self.lateness.allowed_ns())
    }

    /// When the water will stand at the brim.
    fn ready_ns(&self) -> u64 {
        let over = self.over.max(0).cast_unsigned();
        let wait = over.div_ceil(u128::from(self.rate.max(1)));
        self.at_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    fn cost(&self, request: &Request, iops_size: u64) -> i128 {
        if self.quantity.is_bytes() {
            self.unit().saturating_mul(request.moved.into())
        } else if iops_size > 0 && request.size > iops_size {
            // The remainder is dropped: less than a nanosecond's leak.
            self.unit().saturating_mul(request.size.into()) / i128::from(iops_size)
        } else {
            self.unit()
        }
    }
}

/// The buckets of all limits that a drive has. A request goes when none of those that count it is too full.
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    meters: Vec<Meter>,
    iops_size: u64,
    /// When the last request went.
    went_ns: u64,
}

impl Bucket {
    /// Buckets for `limits`, which were checked, as full as after long idleness.
    pub fn new(limits: &Limits) -> Self {
        Bucket { meters: meters(limits).collect(), iops_size: limits.iops_size, went_ns: 0 }
    }

    /// Whether `request` may go now. If so, it is counted; if not, nothing is, and somebody is taken to wait.
    ///
    /// # Errors
    /// When to ask again. That is no promise: who asks then may be told to wait once more, and may ask earlier.
    #[inline]
    pub fn ask(&mut self, now_ns: u64, request: &Request) -> Result<(), Wait> {
        if self.meters.is_empty() { Ok(()) } else { self.weigh(now_ns, request) }
    }

    fn weigh(&mut self, now_ns: u64, request: &Request) -> Result<(), Wait> {
        // When the limits will let it go that both directions share, and those that are its direction's own.
        let (mut shared_ns, mut own_ns) = (None, None);
        for meter in counting(&mut self.meters, request) {
            meter.leak(now_ns);
            meter.refused = meter.over > 0;
            if meter.refused {
                let ready_ns = if meter.quantity.is_total() { &mut shared_ns } else { &mut own_ns };
                *ready_ns = (*ready_ns).max(Some(meter.ready_ns()));
            }
        }
        // A limit of its own that lasts longer is found when the shared one is over: the other may go then.
        if let Some(ready_ns) = shared_ns.or(own_ns) {
            // What becomes due within a quantum goes together.
            let until_ns = ready_ns.max(self.went_ns.saturating_add(QUANTUM_NS));
            return Err(Wait { until_ns, other_may_go: shared_ns.is_none() });
        }
        for meter in counting(&mut self.meters, request) {
            meter.over = meter.over.saturating_add(meter.cost(request, self.iops_size));
        }
        self.went_ns = self.went_ns.max(now_ns);
        Ok(())
    }

    /// Other limits from `now_ns` on, which were checked. What was used up stays used up, and what was saved stays saved
    /// as far as the new limits let anybody save; a limit that was not there begins with nothing saved.
    pub fn set(&mut self, now_ns: u64, limits: &Limits) {
        let old = std::mem::take(&mut self.meters);
        self.iops_size = limits.iops_size;
        self.meters.extend(meters(limits).map(|meter| {
            match old.iter().find(|old| (old.quantity, old.is_peak) == (meter.quantity, meter.is_peak)) {
                Some(&(mut old)) => {
                    old.leak(now_ns);
                    let Meter { at_ns, refused, lateness, .. } = old;
                    let meter = Meter { at_ns, refused, lateness, ..meter };
                    Meter { over: old.over.max(meter.lowest(false)), ..meter }
                }
                None => Meter { at_ns: now_ns, ..meter },
            }
        }));
    }
}

fn meters(limits: &Limits) -> impl Iterator<Item = Meter> {
    Quantity::ALL.into_iter().flat_map(|quantity| Meter::of(quantity, limits.of(quantity)))
}

/// The meters that count `request`.
fn counting<'m>(meters: &'m mut [Meter], request: &Request) -> impl Iterator<Item = &'m mut Meter> {
    let direction = request.direction;
    meters.iter_mut().filter(move |meter| meter.quantity.includes(direction))
}

/// One bucket for several drives, which take turns: of those that wait, the one that went longest ago is told to ask
/// first.
#[derive(Debug, Default)]
pub struct Group {
    bucket: Bucket,
    /// For each member, the number of the question at which it last went.
    went: Vec<u64>,
    questions: u64,
}

impl Group {
    /// A group without members.
    pub fn new(limits: &Limits) -> Self {
        Group { bucket: Bucket::new(limits), went: Vec::new(), questions: 0 }
    }

    /// A new member's number.
    pub fn join(&mut self) -> usize {
        self.went.push(0);
        self.went.len() - 1
    }

    /// A member is gone: nobody waits behind it any more.
    pub fn leave(&mut self, member: usize) {
        if let Some(went) = self.went.get_mut(member) {
            *went = u64::MAX;
        }
    }

    /// As [`Bucket::ask`], for a member.
    ///
    /// # Errors
    /// When to ask again: in the same nanosecond as the other members but for a place in the row, the longest waiting
    /// first. Whoever comes first takes what there is, so over two wake-ups two members have had the same.
    pub fn ask(&mut self, member: usize, now_ns: u64, request: &Request) -> Result<(), Wait> {
        self.questions += 1;
        match self.bucket.ask(now_ns, request) {
            Ok(()) => {
                if let Some(went) = self.went.get_mut(member) {
                    *went = self.questions;
                }
                Ok(())
            }
            Err(wait) => {
                let mine = self.went.get(member).copied().unwrap_or(0);
                let before = self.went.iter().filter(|&&went| went < mine).count() as u64;
                Err(Wait { until_ns: wait.until_ns.saturating_add(before), ..wait })
            }
        }
    }

    /// As [`Bucket::set`], for all members.
    pub fn set(&mut self, now_ns: u64, limits: &Limits) {
        self.bucket.set(now_ns, limits);
    }
}

#[cfg(test)]
#[path = "qos_test.rs"]
mod tests;
