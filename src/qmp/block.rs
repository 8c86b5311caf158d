//! The shapes of the answers about disks: `query-block` and `query-blockstats`, names and members as in QEMU 5.0.

use serde_json::{Map, Value};

use crate::qmp::schema::{Empty, Member, Object, Type, Typed, names, object};

names! {
    /// How the last I/O of a disk ended, as far as the guest was told.
    pub enum BlockDeviceIoStatus {
        /// Nothing failed since the start.
        "ok" => Ok,
        /// A request failed.
        "failed" => Failed,
    }

    /// What becomes of a write of zeroes.
    pub enum BlockdevDetectZeroesOptions {
        /// It is a write like any other.
        "off" => Off,
    }
}

object! {
    /// One disk in `query-block`.
    pub struct BlockInfo {
        /// The id of the device that carries it: the drive's, unless a plug gave another. Empty for an empty slot.
        "device" => device: String,
        /// The same; absent for an empty slot.
        "qdev" => qdev: Option<String>,
        /// Always `unknown`, as QEMU has it.
        "type" => kind: String,
        /// Whether the guest can eject it: always false.
        "removable" => removable: bool,
        /// Whether the guest has locked the tray: always false.
        "locked" => locked: bool,
        /// How the last I/O ended.
        "io-status" => io_status: Option<BlockDeviceIoStatus>,
        /// The slot, as `device_add` takes it. Ours.
        "addr" => addr: String,
        /// What is behind it; absent for an empty slot.
        "inserted" => inserted: Option<BlockDeviceInfo>,
    }

    /// What is behind a disk.
    pub struct BlockDeviceInfo {
        /// The file's name as it was given.
        "file" => file: String,
        /// The node's name: the drive's id.
        "node-name" => node_name: Option<String>,
        /// Whether the guest is refused writes.
        "ro" => ro: bool,
        /// The image format: always `raw`.
        "drv" => drv: String,
        /// Always 0.
        "backing_file_depth" => backing_file_depth: u32,
        /// Always false.
        "encrypted" => encrypted: bool,
        /// Always `off`.
        "detect_zeroes" => detect_zeroes: BlockdevDetectZeroesOptions,
        /// Limit on bytes per second; 0 is none.
        "bps" => bps: u64,
        /// The same of reads.
        "bps_rd" => bps_rd: u64,
        /// The same of writes.
        "bps_wr" => bps_wr: u64,
        /// Limit on requests per second; 0 is none.
        "iops" => iops: u64,
        /// The same of reads.
        "iops_rd" => iops_rd: u64,
        /// The same of writes.
        "iops_wr" => iops_wr: u64,
        /// Bytes per second during a burst; absent where none is allowed.
        "bps_max" => bps_max: Option<u64>,
        /// The same of reads.
        "bps_rd_max" => bps_rd_max: Option<u64>,
        /// The same of writes.
        "bps_wr_max" => bps_wr_max: Option<u64>,
        /// Requests per second during a burst; absent where none is allowed.
        "iops_max" => iops_max: Option<u64>,
        /// The same of reads.
        "iops_rd_max" => iops_rd_max: Option<u64>,
        /// The same of writes.
        "iops_wr_max" => iops_wr_max: Option<u64>,
        /// How long a burst of bytes may last, in seconds; absent where none is allowed.
        "bps_max_length" => bps_max_length: Option<u64>,
        /// The same of reads.
        "bps_rd_max_length" => bps_rd_max_length: Option<u64>,
        /// The same of writes.
        "bps_wr_max_length" => bps_wr_max_length: Option<u64>,
        /// How long a burst of requests may last, in seconds; absent where none is allowed.
        "iops_max_length" => iops_max_length: Option<u64>,
        /// The same of reads.
        "iops_rd_max_length" => iops_rd_max_length: Option<u64>,
        /// The same of writes.
        "iops_wr_max_length" => iops_wr_max_length: Option<u64>,
        /// A request of more bytes counts as several; absent where each counts as one.
        "iops_size" => iops_size: Option<u64>,
        /// The group that shares these limits; absent if it is the drive's own.
        "group" => group: Option<String>,
        /// The image.
        "image" => image: ImageInfo,
        /// How the host caches it.
        "cache" => cache: BlockdevCacheInfo,
        /// Always 0.
        "write_threshold" => write_threshold: u64,
    }

    /// An image.
    pub struct ImageInfo {
        /// The file's name as it was given.
        "filename" => filename: String,
        /// Always `raw`.
        "format" => format: String,
        /// The size the guest sees, in bytes.
        "virtual-size" => virtual_size: u64,
        /// Always false.
        "dirty-flag" => dirty_flag: Option<bool>,
    }

    /// How the host caches an image.
    pub struct BlockdevCacheInfo {
        /// Whether a write may be complete before it is on the medium: always true, the guest flushes.
        "writeback" => writeback: bool,
        /// Whether the host's page cache is left out.
        "direct" => direct: bool,
        /// Whether flushes are ignored: always false.
        "no-flush" => no_flush: bool,
    }

    /// One disk in `query-blockstats`.
    pub struct BlockStats {
        /// The drive's id.
        "device" => device: Option<String>,
        /// The id of the device that carries it.
        "qdev" => qdev: Option<String>,
        /// The node's name: the drive's id.
        "node-name" => node_name: Option<String>,
        /// The counters.
        "stats" => stats: BlockDeviceStats,
    }

    /// What a disk did since the start. Bytes and operations count requests that succeeded.
    pub struct BlockDeviceStats {
        /// Bytes read.
        "rd_bytes" => rd_bytes: u64,
        /// Bytes written.
        "wr_bytes" => wr_bytes: u64,
        /// Bytes discarded.
        "unmap_bytes" => unmap_bytes: u64,
        /// Reads.
        "rd_operations" => rd_operations: u64,
        /// Writes.
        "wr_operations" => wr_operations: u64,
        /// Flushes.
        "flush_operations" => flush_operations: u64,
        /// Discards.
        "unmap_operations" => unmap_operations: u64,
        /// Time in reads, in nanoseconds, summed over requests.
        "rd_total_time_ns" => rd_total_time_ns: u64,
        /// The same of writes.
        "wr_total_time_ns" => wr_total_time_ns: u64,
        /// The same of flushes.
        "flush_total_time_ns" => flush_total_time_ns: u64,
        /// The same of discards.
        "unmap_total_time_ns" => unmap_total_time_ns: u64,
        /// One past the highest byte written: always 0, it is not followed.
        "wr_highest_offset" => wr_highest_offset: u64,
        /// Reads joined to another: always 0.
        "rd_merged" => rd_merged: u64,
        /// Writes joined to another: always 0.
        "wr_merged" => wr_merged: u64,
        /// Discards joined to another: always 0.
        "unmap_merged" => unmap_merged: u64,
        /// Reads that the host failed.
        "failed_rd_operations" => failed_rd_operations: u64,
        /// Writes that the host failed.
        "failed_wr_operations" => failed_wr_operations: u64,
        /// Flushes that the host failed.
        "failed_flush_operations" => failed_flush_operations: u64,
        /// Discards that the host failed.
        "failed_unmap_operations" => failed_unmap_operations: u64,
        /// Reads refused because the guest asked what cannot be.
        "invalid_rd_operations" => invalid_rd_operations: u64,
        /// The same of writes.
        "invalid_wr_operations" => invalid_wr_operations: u64,
        /// The same of flushes.
        "invalid_flush_operations" => invalid_flush_operations: u64,
        /// The same of discards.
        "invalid_unmap_operations" => invalid_unmap_operations: u64,
        /// Whether refused requests count in the times: always false.
        "account_invalid" => account_invalid: bool,
        /// Whether failed requests count in the times: always false.
        "account_failed" => account_failed: bool,
        /// Statistics over intervals: always empty.
        "timed_stats" => timed_stats: Vec<Empty>,
        /// Requests taken from the guest and not yet answered. Ours.
        "in_flight_operations" => in_flight_operations: u64,
        /// Requests that had to wait for the drive's limits. Ours.
        "throttled_operations" => throttled_operations: u64,
        /// How long the first in the row had to wait, in nanoseconds, summed. Ours.
        "throttle_total_time_ns" => throttle_total_time_ns: u64,
        /// The longest of these waits, in nanoseconds. Ours.
        "throttle_longest_time_ns" => throttle_longest_time_ns: u64,
        /// Reads, writes and discards of the last second. Ours.
        "iops_last_second" => iops_last_second: u64,
        /// Their bytes. Ours.
        "bps_last_second" => bps_last_second: u64,
    }
}

/// The arguments of `block_set_io_throttle`, by name. A limit of which nothing is given stays as it is, with its burst; one
/// of which anything is given is replaced by what is given.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct BlockIOThrottle(Map<String, Value>);

impl BlockIOThrottle {
    /// The description of this type: the drive and its group by name, and numbers.
    pub const OBJECT: &'static Object = &Object {
        name: "BlockIOThrottle",
        members: &[
            text("device"),
            text("id"),
            number("bps"),
            number("bps_rd"),
            number("bps_wr"),
            number("iops"),
            number("iops_rd"),
            number("iops_wr"),
            number("bps_max"),
            number("bps_rd_max"),
            number("bps_wr_max"),
            number("iops_max"),
            number("iops_rd_max"),
            number("iops_wr_max"),
            number("bps_max_length"),
            number("bps_rd_max_length"),
            number("bps_wr_max_length"),
            number("iops_max_length"),
            number("iops_rd_max_length"),
            number("iops_wr_max_length"),
            number("iops_size"),
            text("group"),
        ],
        variants: None,
    };

    /// The text of that name, if it was given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// The number of that name, if it was given.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }
}

const fn text(name: &'static str) -> Member {
    Member { name, kind: &Type::Str, optional: true }
}

const fn number(name: &'static str) -> Member {
    Member { name, kind: <u64 as Typed>::TYPE, optional: true }
}
