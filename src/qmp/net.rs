//! The shapes of what is said about NICs: `query-netstats`, `netdev_set_throttle` and `set_link`. The last is QEMU's; the
//! others are ours, in the words of those for disks.

use serde_json::{Map, Value};

use crate::qmp::schema::{Member, Object, Type, Typed, object};

object! {
    /// One NIC in `query-netstats`. Directions are the guest's.
    pub struct NetdevStats {
        /// The NIC's id.
        "id" => id: String,
        /// The tap that it is on; absent if there is none.
        "tap" => tap: Option<String>,
        /// Its address.
        "mac" => mac: String,
        /// Whether the link is up.
        "link" => link: bool,
        /// Pairs of queues that it has.
        "queue-pairs" => queue_pairs: u32,
        /// Pairs that the guest's driver uses; zero without a driver.
        "active-pairs" => active_pairs: u64,
        /// What the guest received.
        "receive" => receive: NetdevCounters,
        /// What the guest sent.
        "transmit" => transmit: NetdevCounters,
        /// Its limits; absent without any.
        "limits" => limits: Option<NetdevLimits>,
    }

    /// What went one way since the start.
    pub struct NetdevCounters {
        /// Packets that reached the other side.
        "packets" => packets: u64,
        /// Their bytes, from the Ethernet header on.
        "bytes" => bytes: u64,
        /// Packets lost though nothing was wrong with them.
        "dropped" => dropped: u64,
        /// Packets and buffers of the guest's that made no sense.
        "errors" => errors: u64,
        /// How often the limits held back the packet that was next.
        "throttled" => throttled: u64,
        /// For how long, in nanoseconds, summed.
        "throttle-total-time-ns" => throttle_total_time_ns: u64,
        /// The longest of these waits, in nanoseconds.
        "throttle-longest-time-ns" => throttle_longest_time_ns: u64,
    }

    /// Limits of a NIC; 0 is none.
    pub struct NetdevLimits {
        /// Bytes per second, both ways together.
        "bps" => bps: u64,
        /// The same of what the guest receives.
        "bps_rd" => bps_rd: u64,
        /// The same of what it sends.
        "bps_wr" => bps_wr: u64,
        /// Packets per second, both ways together.
        "pps" => pps: u64,
        /// The same of what the guest receives.
        "pps_rd" => pps_rd: u64,
        /// The same of what it sends.
        "pps_wr" => pps_wr: u64,
    }

    /// The arguments of `set_link`.
    pub struct SetLink {
        /// The NIC's id.
        "name" => name: String,
        /// Whether the cable is plugged in.
        "up" => up: bool,
    }
}

/// The arguments of `netdev_set_throttle`, by name. A limit of which nothing is given stays as it is, with its burst; one of
/// which anything is given is replaced by what is given.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct NetdevThrottle(Map<String, Value>);

impl NetdevThrottle {
    /// The description of this type: the NIC by its id, and numbers.
    pub const OBJECT: &'static Object = &Object {
        name: "NetdevThrottle",
        members: &[
            Member { name: "id", kind: &Type::Str, optional: false },
            number("bps"),
            number("bps_rd"),
            number("bps_wr"),
            number("pps"),
            number("pps_rd"),
            number("pps_wr"),
            number("bps_max"),
            number("bps_rd_max"),
            number("bps_wr_max"),
            number("pps_max"),
            number("pps_rd_max"),
            number("pps_wr_max"),
            number("bps_max_length"),
            number("bps_rd_max_length"),
            number("bps_wr_max_length"),
            number("pps_max_length"),
            number("pps_rd_max_length"),
            number("pps_wr_max_length"),
        ],
        variants: None,
    };

    /// The NIC.
    pub fn id(&self) -> &str {
        self.0.get("id").and_then(Value::as_str).unwrap_or_default()
    }

    /// The number of that name, if it was given.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }
}

const fn number(name: &'static str) -> Member {
    Member { name, kind: <u64 as Typed>::TYPE, optional: true }
}
