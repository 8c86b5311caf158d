//! From a drive's specification to its device: what limits it, and where it tells of failures; and what stands in for a
//! drive that is not there. Main thread, but for [`DriveMaker::open`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::spec::DriveSpec;
use crate::devices::block::{Block, IoFailure, Throttle, Vacant};
use crate::disk::Disk;
use crate::error::Result;
use crate::event::Sender;
use crate::machine::{Drive, Notice};
use crate::memory::GuestRam;
use crate::qos::{Bucket, Group, Limits};
use crate::virtio::Device;

/// What limits a drive: a bucket of its own, or its group's, which the first of the group makes.
pub fn throttle(drive: &DriveSpec, limits: &Limits, groups: &mut HashMap<String, Arc<Mutex<Group>>>) -> Throttle {
    let Some(name) = &drive.group else { return Throttle::Own(Bucket::new(limits)) };
    let group = groups.entry(name.clone()).or_insert_with(|| Arc::new(Mutex::new(Group::new(limits)))).clone();
    let member = group.lock().unwrap_or_else(PoisonError::into_inner).join();
    Throttle::Shared(group, member)
}

/// What the drives of a machine have in common: its memory, and where they tell of failures.
#[derive(Clone)]
pub struct DriveMaker {
    ram: Arc<GuestRam>,
    notices: Sender<Notice>,
}

impl DriveMaker {
    /// For drives in `ram`, which speak through `notices`.
    pub fn new(ram: Arc<GuestRam>, notices: Sender<Notice>) -> Self {
        DriveMaker { ram, notices }
    }

    /// What stands in for the disk that is not in disk slot `slot`.
    pub fn vacant(&self, slot: usize) -> Box<dyn Device> {
        Box::new(Vacant::new(slot, self.ram.clone()))
    }

    /// Opens a drive for a later plug: without limits and without a group (rule D2.5). It may wait for the file, so it is
    /// called on a thread of its own.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open(&self, spec: &DriveSpec) -> Result<(Box<dyn Device>, Drive)> {
        let disk = Disk::open(spec, self.ram.clone())?;
        Ok(self.make(spec, disk, Throttle::Own(Bucket::new(&Limits::default())), Limits::default()))
    }

    /// The device of one drive, and what the control plane knows of it.
    pub fn make(&self, spec: &DriveSpec, disk: Disk, throttle: Throttle, limits: Limits) -> (Box<dyn Device>, Drive) {
        let (size_bytes, backing) = (disk.sectors() * 512, disk.backing());
        let (notices, id) = (self.notices.clone(), spec.id.clone());
        let report = Box::new(move |failure: IoFailure| {
            // The control plane lives as long as the main loop.
            let _ = notices.send(Notice::IoFailure(id.clone(), failure));
        });
        let serial = spec.serial.as_deref().unwrap_or(&spec.id);
        let block = Block::new(&spec.id, serial, disk, throttle, self.ram.clone(), report);
        let (counters, orders) = (block.counters(), block.orders());
        let device = spec.id.clone();
        let outlives_device = false;
        let spec = spec.clone();
        (Box::new(block), Drive { device, spec, size_bytes, counters, limits, orders, backing, outlives_device })
    }
}
