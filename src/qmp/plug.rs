//! The shapes around hot-plug: what the commands take, and what is told when a device is gone.
//!
//! Names and members are QEMU's, as far as the system we replace has them. What is refused at a plug with a rule of its own
//! is refused here, by name, whatever its value. What a command does is `control::plug`'s.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::qmp::schema::{Alternate, Type, Typed, names, object};

names! {
    /// What a node is.
    pub enum BlockdevDriver {
        /// Raw bytes.
        "raw" => Raw,
        /// The same: a file.
        "file" => File,
        /// The same: a block device.
        "host_device" => HostDevice,
    }

    /// What is behind a node: which of the two is seen by looking.
    pub enum BlockdevFileDriver {
        /// A regular file.
        "file" => File,
        /// A block device.
        "host_device" => HostDevice,
    }

    /// How requests reach the file.
    pub enum BlockdevAioOptions {
        /// A pool of threads.
        "threads" => Threads,
        /// io_uring where the host has it, threads elsewhere.
        "native" => Native,
        /// io_uring or an error.
        "io_uring" => IoUring,
    }

    /// What is behind a NIC.
    pub enum NetClientDriver {
        /// A tap of the host.
        "tap" => Tap,
    }

    /// What becomes of a discard: it is always done where the file can, so both mean the same.
    pub enum BlockdevDiscardOptions {
        /// Done all the same.
        "ignore" => Ignore,
        /// Done.
        "unmap" => Unmap,
    }
}

/// A member of `device_add` that has no effect here. Clients of StratoVirt and QEMU write some switches and numbers as text.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct NoEffect(Value);

impl Typed for NoEffect {
    const TYPE: &'static Type = &Type::Alternate(&Alternate {
        name: "NoEffect",
        choices: &[&Type::Str, &Type::Bool, <u32 as Typed>::TYPE],
        accepted: "a string, a boolean or an integer, without effect",
    });
}

object! {
    /// The arguments of `blockdev-add`.
    pub struct BlockdevAdd {
        /// What the drive is called.
        "node-name" => node_name: String,
        /// The file.
        "file" => file: BlockdevFile,
        /// `raw`, which is what it is anyway.
        "driver" => driver: Option<BlockdevDriver>,
        /// How the host caches it.
        "cache" => cache: Option<BlockdevCacheOptions>,
        /// Whether the guest is refused writes; false if absent.
        "read-only" => read_only: Option<bool>,
        /// Whether it becomes read-only when the file cannot be written; false if absent.
        "auto-read-only" => auto_read_only: Option<bool>,
        /// Of no consequence.
        "discard" => discard: Option<BlockdevDiscardOptions>,
        /// The same as in `file`.
        "aio" => aio: Option<BlockdevAioOptions>,
    }

    /// The file of a node.
    pub struct BlockdevFile {
        /// Of no consequence.
        "driver" => driver: Option<BlockdevFileDriver>,
        /// The path.
        "filename" => filename: String,
        /// How requests reach it; `native` if absent.
        "aio" => aio: Option<BlockdevAioOptions>,
    }

    /// How the host caches a node.
    pub struct BlockdevCacheOptions {
        /// Whether the page cache is left out; true if absent.
        "direct" => direct: Option<bool>,
        /// Whether flushes are ignored: only false is accepted.
        "no-flush" => no_flush: Option<bool>,
    }

    /// The arguments of `blockdev-del`.
    pub struct BlockdevDel {
        /// The node.
        "node-name" => node_name: String,
    }

    /// The arguments of `netdev_add`.
    pub struct NetdevAdd {
        /// What the tap is called among netdevs.
        "id" => id: String,
        /// `tap`, which is what it is anyway.
        "type" => kind: Option<NetClientDriver>,
        /// The tap's name on the host.
        "ifname" => ifname: Option<String>,
        /// Or the name that `getfd` gave to a descriptor of it.
        "fd" => fd: Option<String>,
        /// The same; what stands before a colon is of no consequence.
        "fds" => fds: Option<String>,
        /// Pairs of queues: only 1 is accepted.
        "queues" => queues: Option<u32>,
        /// Whether the kernel moves the packets: only false is accepted.
        "vhost" => vhost: Option<bool>,
    }

    /// The arguments of `netdev_del`.
    pub struct NetdevDel {
        /// The netdev.
        "id" => id: String,
    }

    /// The arguments of `device_add`.
    pub struct DeviceAdd {
        /// What the device is called; the node too, if `drive` is absent.
        "id" => id: String,
        /// What it is: a name with `blk` or `net` in it.
        "driver" => driver: String,
        /// The slot: `0x0` is the first disk, or the first NIC.
        "addr" => addr: Option<String>,
        /// The same in another form: 0 is the second disk.
        "lun" => lun: Option<u32>,
        /// The node, which then outlives the device, unless both have the same name.
        "drive" => drive: Option<String>,
        /// The netdev, which then outlives the device, unless both have the same name.
        "netdev" => netdev: Option<String>,
        /// What the guest reads as the disk's serial number; the node's name if absent.
        "serial" => serial: Option<String>,
        /// Queues of a disk: only 1, which the slot has.
        "num-queues" => num_queues: Option<u16>,
        /// Descriptors of a queue: only 256, which the slot has.
        "queue-size" => queue_size: Option<u16>,
        /// No effect: there is one bus.
        "bus" => bus: Option<NoEffect>,
        /// No effect: the lock of a file decides whether it may be shared.
        "share-rw" => share_rw: Option<NoEffect>,
        /// Bytes of the unit of requests: only 512, which the driver of an empty slot has read.
        "logical_block_size" => logical_block_size: Option<u32>,
        /// No effect: the driver has already read the slot's.
        "physical_block_size" => physical_block_size: Option<u32>,
        /// No effect: all devices are modern ones.
        "disable-modern" => disable_modern: Option<NoEffect>,
        /// No effect: there is no firmware.
        "romfile" => romfile: Option<NoEffect>,
        /// No effect: there is no firmware.
        "bootindex" => bootindex: Option<NoEffect>,
        /// No effect: StratoVirt's spelling of `bootindex`.
        "boot_index" => boot_index: Option<NoEffect>,
        /// No effect: the slot has its queues.
        "mq" => mq: Option<NoEffect>,
        /// No effect: a device has one interrupt line.
        "vectors" => vectors: Option<NoEffect>,
        /// No effect: there is no PCI.
        "multifunction" => multifunction: Option<NoEffect>,
    }

    /// The arguments of `device_del`.
    pub struct DeviceDel {
        /// The device.
        "id" => id: String,
    }

    /// The arguments of `block_resize`.
    pub struct BlockResize {
        /// The device.
        "device" => device: Option<String>,
        /// Or its node.
        "node-name" => node_name: Option<String>,
        /// The size that it shall have, in bytes.
        "size" => size: u64,
    }

    /// The arguments of `getfd`.
    pub struct Getfd {
        /// What the descriptor is called from here on.
        "fdname" => fdname: String,
    }

    /// The arguments of `closefd`.
    pub struct Closefd {
        /// The descriptor's name.
        "fdname" => fdname: String,
    }

    /// The data of `DEVICE_DELETED`.
    pub struct DeviceDeleted {
        /// The device.
        "device" => device: Option<String>,
        /// The same, as in the system we replace.
        "path" => path: String,
    }
}

/// Refuses what a command of that name cannot be given because it is about a device that is being plugged.
///
/// # Errors
/// The argument, the rule, and what to do instead.
pub fn refuse(command: &str, arguments: &Map<String, Value>) -> Result<()> {
    let disk = ["blockdev-add", "device_add"].contains(&command);
    if !disk && command != "netdev_add" {
        return Ok(());
    }
    for name in arguments.keys() {
        if name == "iothread" {
            let option = if disk { "-drive" } else { "-netdev" };
            return Err(Error::usage(format!(
                "Parameter '{name}': a hot-plugged device cannot be given an iothread (rule D1.5); leave it out, or give the \
                 device at the start: {option} ...,iothread=NAME"
            )));
        }
        if name == "mac" {
            return Err(Error::usage(
                "Parameter 'mac': a driver asks a NIC's address once, so it stays with the slot; leave it out, and see \
                 query-netstats; a NIC of the command line has what -netdev ...,mac= says",
            ));
        }
        let limits = ["iops", "bps", "throttling", "throttle"];
        if command == "netdev_add" && limits.iter().any(|limit| name.starts_with(limit)) {
            return Err(Error::usage(format!(
                "Parameter '{name}': a hot-plugged NIC cannot be given limits at the plug; leave it out, and limit the NIC when \
                 it is plugged: netdev_set_throttle"
            )));
        }
        if disk && limits.iter().any(|limit| name.starts_with(limit)) {
            return Err(Error::usage(format!(
                "Parameter '{name}': a hot-plugged disk cannot be given limits at the plug (rule D2.5); leave it out, and \
                 limit the disk when it is plugged: block_set_io_throttle"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(command: &str, arguments: &Value) -> Option<String> {
        refuse(command, arguments.as_object().expect("an object")).err().map(|error| error.to_string())
    }

    #[test]
    fn rule_d1_5_an_iothread_at_the_plug_is_refused_with_the_way_out_whatever_its_value() {
        for (command, option) in [("blockdev-add", "-drive"), ("device_add", "-drive"), ("netdev_add", "-netdev")] {
            for value in [json!("io1"), json!(5), json!(null)] {
                let told = told(command, &json!({"id": "a", "iothread": value})).expect("is refused");
                assert!(told.starts_with("Parameter 'iothread': ") && told.contains("(rule D1.5)"), "{told}");
                assert!(told.ends_with(&format!("{option} ...,iothread=NAME")), "{told}");
            }
        }
        for command in ["device_add", "netdev_add"] {
            assert!(told(command, &json!({"mac": 1})).expect("is refused").starts_with("Parameter 'mac': "));
        }
        let limits = told("netdev_add", &json!({"bps": 1})).expect("is refused");
        assert!(limits.ends_with("netdev_set_throttle"), "{limits}");
        assert_eq!(told("query-status", &json!({"iothread": 1})), None);
    }

    #[test]
    fn rule_d2_5_limits_at_the_plug_are_refused_with_the_way_out() {
        for name in ["iops", "iops-total", "bps_rd", "throttling.iops-total", "throttling-group"] {
            for command in ["blockdev-add", "device_add"] {
                let told = told(command, &json!({name: 200})).expect("is refused");
                assert!(told.starts_with(&format!("Parameter '{name}': ")) && told.contains("(rule D2.5)"), "{told}");
                assert!(told.ends_with("block_set_io_throttle"), "{told}");
            }
        }
        assert_eq!(told("device_add", &json!({"id": "a", "driver": "virtio-blk-mmio", "addr": "0x1"})), None);
    }
}
