//! What the running machine consists of, as far as Control must reach or describe it.
//!
//! Handles and plain data; the things themselves live in their loops and threads. Filled by the machine's builder,
//! owned by Control, main thread.

use std::sync::Arc;

use crate::config::spec::DriveSpec;
use crate::devices::block::BlockCounters;
use crate::event::{Remote, Sender};
use crate::kvm::vcpu::VcpuHandle;
use crate::virtio::Command;

/// The parts of one machine.
pub struct Inventory {
    /// `-name`; empty if none was given.
    pub name: String,
    /// In order of their index.
    pub vcpus: Vec<VcpuHandle>,
    /// The workers of all virtio devices, to be paused and resumed.
    pub workers: Vec<Sender<Command>>,
    /// In the order of the command line.
    pub drives: Vec<Drive>,
    /// Id and loop of each iothread, in the order of the command line.
    pub iothreads: Vec<(String, Remote)>,
    /// The main loop.
    pub main: Remote,
}

/// A drive as Control knows it.
pub struct Drive {
    /// What its user asked for.
    pub spec: DriveSpec,
    /// The size the guest sees, in bytes.
    pub size_bytes: u64,
    /// What it has done.
    pub counters: Arc<BlockCounters>,
}
