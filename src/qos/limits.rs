//! What may be asked for: the limits of a drive as plain numbers, how they are called, and which contradict each other.
//!
//! The command line and QMP both end here. How a limit is kept is the bucket's business. Main thread.

use super::Direction;

/// The most requests a second that can be asked for (rule D2.3).
pub const MAX_IOPS: u64 = 1_000_000;
/// The most bytes a second that can be asked for: a petabyte, as in QEMU.
pub const MAX_BPS: u64 = 1_000_000_000_000_000;
/// The longest burst, in seconds: a day.
pub const MAX_BURST_SECONDS: u64 = 86_400;

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
    pub(super) fn includes(self, direction: Direction) -> bool {
        match self {
            Quantity::Iops | Quantity::Bps => true,
            Quantity::IopsRead | Quantity::BpsRead => direction == Direction::Read,
            Quantity::IopsWrite | Quantity::BpsWrite => direction == Direction::Write,
        }
    }

    pub(super) fn is_total(self) -> bool {
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
    /// `throttling.pps-total-max-length`: a NIC's requests are packets.
    NicCommandLine,
    /// `pps_max_length`
    NicQmp,
    /// `throttling.iops_total_max_length`, in a configuration file
    File,
    /// `throttling.pps_total_max_length`
    NicFile,
}

impl Spelling {
    /// The name of a limit's rate.
    pub fn rate(self, quantity: Quantity) -> String {
        let [option, argument] = quantity.names();
        match self {
            Spelling::CommandLine => format!("throttling.{option}"),
            Spelling::Qmp => argument.to_owned(),
            Spelling::NicCommandLine => format!("throttling.{}", option.replace("iops", "pps")),
            Spelling::NicQmp => argument.replace("iops", "pps"),
            Spelling::File => format!("throttling.{}", option.replace('-', "_")),
            Spelling::NicFile => format!("throttling.{}", option.replace("iops", "pps").replace('-', "_")),
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

    /// The name of [`Limits::iops_size`], which only a drive has.
    pub fn iops_size(self) -> &'static str {
        match self {
            Spelling::File | Spelling::NicFile => "throttling.iops_size",
            _ => self.pick(["throttling.iops-size", "iops_size"]),
        }
    }

    fn pick(self, [option, other]: [&'static str; 2]) -> &'static str {
        match self {
            Spelling::CommandLine | Spelling::NicCommandLine => option,
            Spelling::Qmp | Spelling::NicQmp | Spelling::File | Spelling::NicFile => other,
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
