//! The shapes around the balloon: what `balloon` takes, and what is told of it.
//!
//! Names and members are QEMU's where QEMU has them; what is marked *ours* is not.

use serde::{Deserialize, Deserializer, Serialize};

use crate::config::spec::MIN_BALLOON_BYTES;
use crate::qmp::schema::{Alternate, Type, Typed, names, object};

/// A number of bytes that the guest is to have: an integer, or a string of digits (rule D3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MemorySize(pub u64);

impl MemorySize {
    /// What is accepted, for the error.
    const ACCEPTED: &'static str = "the memory that the guest shall have, in bytes: a number without fraction from \
                                    33554432 (32 MiB) up, or a string of its digits";
}

impl Typed for MemorySize {
    const TYPE: &'static Type = &Type::Alternate(&Alternate {
        name: "MemorySize",
        choices: &[&Type::Int { min: MIN_BALLOON_BYTES as i64, max: u64::MAX }, &Type::Str],
        accepted: MemorySize::ACCEPTED,
    });
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Digits(String),
        }
        let bytes = match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Some(bytes),
            Written::Digits(text) => digits(&text),
        };
        let bytes = bytes.filter(|bytes| *bytes >= MIN_BALLOON_BYTES);
        bytes.map(MemorySize).ok_or_else(|| serde::de::Error::custom(format!("'value' takes {}", Self::ACCEPTED)))
    }
}

/// A number in decimal digits; one that is too large for 64 bits is larger than any memory.
fn digits(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

/// A time in whole seconds since 1970-01-01 00:00 UTC, or `null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecondsOrNull(pub Option<u64>);

impl Typed for SecondsOrNull {
    const TYPE: &'static Type = &Type::Alternate(&Alternate {
        name: "SecondsOrNull",
        choices: &[u64::TYPE, <()>::TYPE],
        accepted: "seconds since 1970-01-01 00:00 UTC, or null",
    });
}

names! {
    /// Why the automatic balloon moved its target.
    pub enum BalloonMoveReason {
        /// The host is short of memory, and the guest has some to spare.
        "host-pressed" => HostPressed,
        /// The guest is short of memory.
        "guest-needs" => GuestNeeds,
    }
}

object! {
    /// The arguments of `balloon`.
    pub struct BalloonArguments {
        /// The memory that the guest shall have, in bytes.
        "value" => value: MemorySize,
    }

    /// `query-balloon`, and the data of `BALLOON_CHANGE` and `BALLOON_CHANGED`.
    pub struct BalloonInfo {
        /// The memory that the guest has, in bytes: what it was started with, less what is in the balloon.
        "actual" => actual: u64,
    }

    /// `query-balloon-detail`. Ours.
    pub struct BalloonDetail {
        /// The memory that the guest is to have, in bytes.
        "target" => target: u64,
        /// The memory that it has, in bytes.
        "actual" => actual: u64,
        /// How far the two are apart.
        "residual-bytes" => residual_bytes: u64,
        /// Since when nothing has moved although they are; null while it moves, and at the target.
        "stuck-since" => stuck_since: SecondsOrNull,
        /// Bytes that were in the host's memory and went back to it, by the balloon and by reports, since the start.
        "reclaimed-bytes" => reclaimed_bytes: u64,
        /// Bytes that the guest has reported as free, since the start, each time it did.
        "reported-bytes" => reported_bytes: u64,
        /// Bytes of the monitor and its guest that are in the host's memory now.
        "resident-bytes" => resident_bytes: u64,
        /// Whether the guest may take memory back by itself.
        "deflate-on-oom" => deflate_on_oom: bool,
        /// Whether the guest may report free pages.
        "free-page-reporting" => free_page_reporting: bool,
        /// What the monitor does by itself.
        "auto" => auto: BalloonAuto,
    }

    /// The automatic balloon.
    pub struct BalloonAuto {
        /// Whether it is on; the other members are there only then.
        "enabled" => enabled: bool,
        /// The guest is left so many bytes.
        "floor" => floor: Option<u64>,
        /// Whether the host is short of memory now.
        "pressed" => pressed: Option<bool>,
        /// How that is found out: by a trigger of the kernel, or by reading the file each second.
        "source" => source: Option<PressureSource>,
        /// What it did last; absent if it has done nothing.
        "last-move" => last_move: Option<BalloonMove>,
    }

    /// One change of the target by the monitor.
    pub struct BalloonMove {
        /// When, in seconds since 1970-01-01 00:00 UTC.
        "at" => at: u64,
        /// The target before, in bytes.
        "from" => from: u64,
        /// The target since, in bytes.
        "to" => to: u64,
        /// Why.
        "reason" => reason: BalloonMoveReason,
    }

    /// `query-balloon-stats`. Ours; QEMU has the members `stats` and `last-update` under `guest-stats`.
    pub struct BalloonStats {
        /// What the guest said last; a member is there if the guest sent it.
        "stats" => stats: BalloonStatValues,
        /// What it said that has no name here.
        "others" => others: Vec<BalloonStat>,
        /// When, in seconds since 1970-01-01 00:00 UTC; 0 is never.
        "last-update" => last_update: u64,
        /// How often the guest is asked, in seconds; 0 is at each query.
        "interval" => interval: u64,
    }

    /// A statistic by its number.
    pub struct BalloonStat {
        /// The tag.
        "tag" => tag: u32,
        /// The value.
        "value" => value: u64,
    }

    /// The arguments of `balloon-stats-interval`.
    pub struct BalloonStatsInterval {
        /// How often the guest is asked, in seconds; 0 is at each query.
        "seconds" => seconds: u32,
    }
}

names! {
    /// How the host's pressure is found out.
    pub enum PressureSource {
        /// The kernel wakes the monitor.
        "trigger" => Trigger,
        /// The file is read each second.
        "file" => File,
    }
}

/// Makes [`BalloonStatValues`] of the tags of virtio 1.2, section 5.5.6.4, and of those that Linux has added.
macro_rules! statistics {
    ($($(#[$doc:meta])* $tag:literal $wire:literal => $member:ident),* $(,)?) => {
        object! {
            /// The statistics that have a name. Memory is in bytes.
            pub struct BalloonStatValues {
                $($(#[$doc])* $wire => $member: Option<u64>,)*
            }
        }

        impl BalloonStatValues {
            /// The tags with names of `values`, and the others.
            pub fn split(values: &[(u16, u64)]) -> (Self, Vec<BalloonStat>) {
                let mut named = BalloonStatValues { $($member: None),* };
                let mut others = Vec::new();
                for &(tag, value) in values {
                    match tag {
                        $($tag => named.$member = Some(value),)*
                        _ => others.push(BalloonStat { tag: tag.into(), value }),
                    }
                }
                (named, others)
            }
        }
    };
}

statistics! {
    /// Swapped in since the guest's start.
    0 "stat-swap-in" => swap_in,
    /// Swapped out since the guest's start.
    1 "stat-swap-out" => swap_out,
    /// Page faults that needed a disk.
    2 "stat-major-faults" => major_faults,
    /// Page faults that did not.
    3 "stat-minor-faults" => minor_faults,
    /// Used for nothing at all.
    4 "stat-free-memory" => free_memory,
    /// What the guest's kernel manages, without what is in the balloon.
    5 "stat-total-memory" => total_memory,
    /// What programs could have without swapping.
    6 "stat-available-memory" => available_memory,
    /// What disks have left in memory, and what could be read again.
    7 "stat-disk-caches" => disk_caches,
    /// Huge pages that could be had.
    8 "stat-htlb-pgalloc" => htlb_pgalloc,
    /// Huge pages that could not.
    9 "stat-htlb-pgfail" => htlb_pgfail,
    /// Programs ended for want of memory.
    10 "stat-oom-kills" => oom_kills,
    /// How often a program had to wait for memory.
    11 "stat-alloc-stalls" => alloc_stalls,
    /// Memory looked through in the background.
    12 "stat-async-scans" => async_scans,
    /// Memory looked through by who needed it.
    13 "stat-direct-scans" => direct_scans,
    /// Memory freed in the background.
    14 "stat-async-reclaims" => async_reclaims,
    /// Memory freed by who needed it.
    15 "stat-direct-reclaims" => direct_reclaims,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::qmp::command::{self, Asked, Command};
    use crate::qmp::request::Call;

    fn ask(arguments: &Value) -> Result<u64, String> {
        let call = Call { name: "balloon".into(), arguments: arguments.as_object().unwrap().clone() };
        match command::parse(call) {
            Ok(Asked::Command(Command::Balloon(arguments))) => Ok(arguments.value.0),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn rule_d3_8_a_value_is_a_number_or_a_string_of_digits() {
        for (value, bytes) in [
            (json!(2_147_483_648_u64), 2 << 30),
            (json!("2147483648"), 2 << 30),
            (json!(33_554_432), 32 << 20),
            (json!("033554432"), 32 << 20),
            (json!(u64::MAX), u64::MAX),
            (json!("99999999999999999999999999"), u64::MAX),
        ] {
            assert_eq!(ask(&json!({"value": value})), Ok(bytes), "{value}");
        }
    }

    #[test]
    fn any_other_value_is_refused_with_what_is_accepted() {
        for value in [
            json!(-1),
            json!(33_554_431),
            json!(0),
            json!(1e9),
            json!(536_870_912.5),
            json!("33554431"),
            json!(""),
            json!("-1"),
            json!("+536870912"),
            json!("512M"),
            json!("536870912.0"),
            json!(" 536870912"),
            json!(true),
            json!(null),
            json!([536_870_912]),
        ] {
            let told = ask(&json!({"value": value})).expect_err("is refused");
            assert!(told.contains("in bytes: a number without fraction from 33554432 (32 MiB) up"), "{value}: {told}");
        }
        assert_eq!(ask(&json!({})), Err("Parameter 'value' is missing".into()));
    }

    #[test]
    fn statistics_have_the_names_of_their_tags_and_unknown_ones_their_numbers() {
        let (named, others) = BalloonStatValues::split(&[(4, 7), (99, 8), (0, 1), (4, 9), (15, 3), (u16::MAX, 0)]);
        let named = serde_json::to_value(&named).unwrap();
        assert_eq!(named, json!({"stat-swap-in": 1, "stat-free-memory": 9, "stat-direct-reclaims": 3}));
        assert_eq!(others, [BalloonStat { tag: 99, value: 8 }, BalloonStat { tag: 65535, value: 0 }]);
    }

    #[test]
    fn a_time_that_is_none_is_null_and_not_absent() {
        for (time, written) in [(None, json!(null)), (Some(5), json!(5))] {
            let value = serde_json::to_value(SecondsOrNull(time)).unwrap();
            assert_eq!((SecondsOrNull::TYPE.check(&value, "t"), value), (Ok(()), written));
        }
    }
}
