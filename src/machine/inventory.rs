//! What a built machine consists of, as far as the control plane must reach or describe it.
//!
//! Handles and plain data; the things themselves live in their loops and threads. Main thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::hardware::Hardware;
use super::parts::drive::DriveMaker;
use crate::config::net::Mac;
use crate::config::spec::{BalloonSpec, DriveSpec};
use crate::config::vsock::VsockSpec;
use crate::devices::balloon::{BalloonCounters, BalloonNews, Order};
use crate::devices::block::{BlockCounters, IoFailure, Order as BlockOrder};
use crate::devices::chardev::ChardevState;
use crate::devices::console;
use crate::devices::net::{self, NetCounters};
use crate::devices::pvpanic::GuestPanic;
use crate::devices::vsock::VsockCounters;
use crate::disk::Backing;
use crate::event::{Remote, Sender};
use crate::kvm::vcpu::{VcpuEvent, VcpuHandle};
use crate::qos::Limits;
use crate::virtio::Command;

/// What the machine's threads have to say to the control plane.
pub enum Notice {
    /// A vCPU has something to say.
    Vcpu(VcpuEvent),
    /// The guest has switched itself off (ACPI S5).
    PowerOff,
    /// The guest has asked for a reset (the keyboard controller's line).
    Reset,
    /// The guest's kernel has panicked.
    Panic(GuestPanic),
    /// The drive of that id could not do on the host what the guest asked.
    IoFailure(String, IoFailure),
    /// The balloon has something to say.
    Balloon(BalloonNews),
}

/// The parts of one machine.
pub struct Inventory {
    /// `-name`; empty if none was given.
    pub name: String,
    /// In order of their index. Main keeps them too: it alone joins their threads, after its loop (invariant I2).
    pub vcpus: Arc<[VcpuHandle]>,
    /// The workers of all virtio devices, to be paused and resumed.
    pub workers: Vec<Sender<Command>>,
    /// What a reset resets beside them and the vCPUs.
    pub hardware: Hardware,
    /// The slots for disks, by number.
    pub disks: Vec<DiskSlot>,
    /// In the order of the command line.
    pub consoles: Vec<Console>,
    /// The slots for NICs, by number.
    pub nics: Vec<NicSlot>,
    /// One at most.
    pub vsocks: Vec<Vsock>,
    /// Id and loop of each iothread, in the order of the command line.
    pub iothreads: Vec<(String, Remote)>,
    /// The main loop.
    pub main: Remote,
    /// What makes further drives.
    pub maker: DriveMaker,
}

/// A vsock as the control plane knows it.
pub struct Vsock {
    /// What its user asked for.
    pub spec: VsockSpec,
    /// What it has done; none where the host's kernel does it, which does not count.
    pub counters: Option<Arc<VsockCounters>>,
}

/// The balloon as the control plane knows it.
pub struct Balloon {
    /// What its user asked for.
    pub spec: BalloonSpec,
    /// The memory that the guest was started with, in bytes.
    pub memory_bytes: u64,
    /// What is in it.
    pub counters: Arc<BalloonCounters>,
    /// The way to tell it what is wanted.
    pub orders: Sender<Order>,
}

/// A console as the control plane knows it.
pub struct Console {
    /// The id of its chardev.
    pub chardev: String,
    /// Where clients come; none if nowhere.
    pub path: Option<PathBuf>,
    /// Whether one is there.
    pub state: Arc<ChardevState>,
    /// Whether the guest's driver has it.
    pub open: Arc<AtomicBool>,
    /// The way to tell it what is wanted.
    pub orders: Sender<console::Order>,
}

/// A slot for a disk as the control plane knows it.
pub struct DiskSlot {
    /// The way to its worker, whatever it serves.
    pub worker: Sender<Command>,
    /// What is in it; none if it is vacant.
    pub drive: Option<Drive>,
    /// Something is on its way into it or out of it.
    pub busy: bool,
}

/// A drive as the control plane knows it.
pub struct Drive {
    /// The id of the device that carries it: that of the drive itself, unless a plug gave another.
    pub device: String,
    /// What its user asked for.
    pub spec: DriveSpec,
    /// The size the guest sees, in bytes.
    pub size_bytes: u64,
    /// What it has done.
    pub counters: Arc<BlockCounters>,
    /// What limits it now: its own limits, or those of its group.
    pub limits: Limits,
    /// The way to change it.
    pub orders: Sender<BlockOrder>,
    /// Its file.
    pub backing: Backing,
    /// Whether it is there without the device: `blockdev-del` ends it, and not the unplug.
    pub outlives_device: bool,
}

/// A slot for a NIC as the control plane knows it.
pub struct NicSlot {
    /// Its address, which stays with the slot: a driver asks once.
    pub mac: Mac,
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// The way to tell it what is wanted.
    pub orders: Sender<net::Order>,
    /// What it is plugged into; none if nothing.
    pub nic: Option<Nic>,
    /// Something is on its way into it or out of it.
    pub busy: bool,
}

/// A NIC as the control plane knows it.
pub struct Nic {
    /// The id of the device: that of the netdev, unless a plug gave another.
    pub device: String,
    /// The id of the tap among netdevs.
    pub netdev: String,
    /// The name of its tap.
    pub tap: Option<String>,
    /// What limits it now.
    pub limits: Limits,
    /// What it has done.
    pub counters: Arc<NetCounters>,
    /// Whether the netdev is there without the device: `netdev_del` ends it, and not the unplug.
    pub outlives_device: bool,
}
