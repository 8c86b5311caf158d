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
//! - no second has more than `n` (a second that is closed at its beginning and open at its end, anywhere in time), and
//!   no window of `w` seconds more than `n * (w + 0.00075) + 1`;
//! - after idleness at most `n * 0.0005 + 1` go at once;
//! - in the long run it is `n / 1.00075` a second, as long as there are requests and nobody who was told to ask at a
//!   certain time asks later than [`LATENESS_NS`] after it.
//!
//! The three quarters of a per mille are what "no second has more" costs: a bucket that can be 0.75 ms behind, and
//! catches up, must be that much slower for no second to notice.

/// The least distance between two wake-ups that a bucket asks for: what has become due meanwhile goes together, so the
/// timer costs the same at every rate. It is also the time for which an idle bucket saves credit. In nanoseconds.
pub const QUANTUM_NS: u64 = 500_000;
/// How much later than it was told to ask a waiter may come without losing credit, in nanoseconds.
pub const LATENESS_NS: u64 = 250_000;
/// The most requests a second that can be asked for (rule D2.3).
pub const MAX_IOPS: u64 = 1_000_000;
/// The most bytes a second that can be asked for: a petabyte, as in QEMU.
pub const MAX_BPS: u64 = 1_000_000_000_000_000;
/// The longest burst, in seconds: a day.
pub const MAX_BURST_SECONDS: u64 = 86_400;

const SECOND_NS: u64 = 1_000_000_000;
/// The water of one request or byte. The bucket leaks `rate` in a nanosecond, so it would be 1e9; the rest keeps the
/// tolerance out of every second.
const UNIT: i128 = (SECOND_NS + QUANTUM_NS + LATENESS_NS) as i128;

/// What a limit counts. The order is that of [`Limits::each`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Requests a second.
    Iops,
    /// Reads a second.
    IopsRead,
    /// Writes a second.
    IopsWrite,
    /// Bytes a second.
    Bps,
    /// Bytes read a second.
    BpsRead,
    /// Bytes written a second.
    BpsWrite,
}

impl Quantity {
    /// All of them, each at its place.
    pub const ALL: [Quantity; 6] =
        [Quantity::Iops, Quantity::IopsRead, Quantity::IopsWrite, Quantity::Bps, Quantity::BpsRead, Quantity::BpsWrite];

    /// The option's name behind `throttling.`, and the argument's of `block_set_io_throttle`, as QEMU spells them.
    fn names(self) -> [&'static str; 2] {
        match self {
            Quantity::Iops => ["iops-total", "iops"],
            Quantity::IopsRead => ["iops-read", "iops_rd"],
            Quantity::IopsWrite => ["iops-write", "iops_wr"],
            Quantity::Bps => ["bps-total", "bps"],
            Quantity::BpsRead => ["bps-read", "bps_rd"],
            Quantity::BpsWrite => ["bps-write", "bps_wr"],
        }
    }

    /// The greatest rate.
    pub fn most(self) -> u64 {
        if self.is_bytes() { MAX_BPS } else { MAX_IOPS }
    }

    /// Whether bytes are counted, and not requests.
    pub fn is_bytes(self) -> bool {
        matches!(self, Quantity::Bps | Quantity::BpsRead | Quantity::BpsWrite)
    }

    /// Whether requests of this direction count.
    fn includes(self, direction: Direction) -> bool {
        match self {
            Quantity::Iops | Quantity::Bps => true,
            Quantity::IopsRead | Quantity::BpsRead => direction == Direction::Read,
            Quantity::IopsWrite | Quantity::BpsWrite => direction == Direction::Write,
        }
    }

    fn is_total(self) -> bool {
        matches!(self, Quantity::Iops | Quantity::Bps)
    }
}

/// One limit. Zero is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// The rate that holds on average, a second.
    pub rate: u64,
    /// The rate that holds while a burst lasts, a second; without one no burst is allowed.
    pub max: u64,
    /// How long a burst at `max` may last, in seconds; one if nothing is said.
    pub max_length: Option<u64>,
}

/// Everything that limits one drive, or the drives of a group together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// One a [`Quantity`], in its order.
    pub each: [Limit; 6],
    /// A request of more bytes than this counts as so many requests as it is longer; zero: every request is one.
    pub iops_size: u64,
}

/// Whose words a limit is named in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// `throttling.iops-total-max-length`
    CommandLine,
    /// `iops_max_length`
    Qmp,
}

impl Spelling {
    /// The name of a limit's rate.
    pub fn rate(self, quantity: Quantity) -> String {
        let [option, argument] = quantity.names();
        match self {
            Spelling::CommandLine => format!("throttling.{option}"),
            Spelling::Qmp => argument.to_owned(),
        }
    }

    /// The name of its rate in a burst.
    pub fn max(self, quantity: Quantity) -> String {
        self.rate(quantity) + self.pick(["-max", "_max"])
    }

    /// The name of the length of its burst.
    pub fn max_length(self, quantity: Quantity) -> String {
        self.rate(quantity) + self.pick(["-max-length", "_max_length"])
    }

    /// The name of [`Limits::iops_size`].
    pub fn iops_size(self) -> &'static str {
        self.pick(["throttling.iops-size", "iops_size"])
    }

    fn pick(self, [option, argument]: [&'static str; 2]) -> &'static str {
        match self {
            Spelling::CommandLine => option,
            Spelling::Qmp => argument,
        }
    }
}

impl Limits {
    /// So many requests a second and nothing else; zero is no limit (rule D2.6).
    pub fn iops(rate: u64) -> Self {
        let mut limits = Limits::default();
        limits.each[0].rate = rate;
        limits
    }

    /// The limit of one quantity.
    pub fn of(&self, quantity: Quantity) -> Limit {
        self.each[quantity as usize]
    }

    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.each.iter().all(|limit| limit.rate == 0)
    }

    /// Refuses what contradicts itself or cannot be kept.
    ///
    /// # Errors
    /// A sentence about the first contradiction in the given words, with what would do.
    pub fn check(&self, spelling: Spelling) -> Result<(), String> {
        for quantity in Quantity::ALL {
            self.check_one(quantity, spelling)?;
        }
        let iops_size = spelling.iops_size();
        if self.iops_size > MAX_BPS {
            return Err(format!("{iops_size} is {}; accepted: 0 to {MAX_BPS}", self.iops_size));
        }
        if self.iops_size > 0 && self.each[..3].iter().all(|limit| limit.rate == 0) {
            let names = Quantity::ALL.map(|quantity| spelling.rate(quantity));
            return Err(format!(
                "{iops_size} says how many requests a large one is, and none are limited; accepted: with {}, {} or {}",
                names[0], names[1], names[2]
            ));
        }
        Ok(())
    }

    fn check_one(&self, quantity: Quantity, spelling: Spelling) -> Result<(), String> {
        let Limit { rate, max, max_length } = self.of(quantity);
        let (name, most) = (spelling.rate(quantity), quantity.most());
        let (name_max, name_length) = (spelling.max(quantity), spelling.max_length(quantity));
        for (name, value) in [(&name, rate), (&name_max, max)] {
            if value > most {
                return Err(format!("{name} is {value}; accepted: 0 to {most}"));
            }
        }
        if max > 0 && rate == 0 {
            return Err(format!(
                "{name_max} allows a burst over {name}, which is not limited; accepted: both, or neither"
            ));
        }
        if max > 0 && max < rate {
            return Err(format!(
                "{name_max} is {max} and lower than {name}, which is {rate}; accepted: at least {rate}"
            ));
        }
        match max_length {
            Some(_) if max == 0 => Err(format!(
                "{name_length} says how long a burst lasts, and {name_max} allows none; accepted: both, or neither"
            )),
            Some(length) if !(1..=MAX_BURST_SECONDS).contains(&length) => {
                Err(format!("{name_length} is {length}; accepted: 1 to {MAX_BURST_SECONDS} seconds"))
            }
            _ => Ok(()),
        }
    }
}

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
    slack: i128,
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
            slack: i128::from(rate) * i128::from(LATENESS_NS),
            over: 0,
            at_ns: 0,
            refused: false,
        };
        // A burst at `max` for so many seconds is what it exceeds the average by meanwhile.
        let excess = i128::from(limit.max.saturating_sub(limit.rate));
        let burst = excess.saturating_mul(limit.max_length.unwrap_or(1).into()).saturating_mul(UNIT);
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
        let idle = !self.refused && passed_ns >= QUANTUM_NS;
        let leaked = i128::from(self.rate).saturating_mul(i128::from(passed_ns));
        self.over = self.over.saturating_sub(leaked).max(self.lowest(idle));
    }

    /// How low the water may stand.
    fn lowest(&self, idle: bool) -> i128 {
        -self.room.saturating_add(if idle { 0 } else { self.slack })
    }

    /// When the water will stand at the brim.
    fn ready_ns(&self) -> u64 {
        let over = self.over.max(0).cast_unsigned();
        let wait = over.div_ceil(u128::from(self.rate.max(1)));
        self.at_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    fn cost(&self, request: &Request, iops_size: u64) -> i128 {
        if self.quantity.is_bytes() {
            UNIT.saturating_mul(request.moved.into())
        } else if iops_size > 0 && request.size > iops_size {
            // The remainder is dropped: less than a nanosecond's leak.
            UNIT.saturating_mul(request.size.into()) / i128::from(iops_size)
        } else {
            UNIT
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
                    Meter { over: old.over.max(meter.lowest(false)), at_ns: old.at_ns, refused: old.refused, ..meter }
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
