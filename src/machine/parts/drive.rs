//! From a drive's specification to its device: what limits it, and where it tells of failures. Main thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::spec::DriveSpec;
use crate::devices::block::{Block, IoFailure, Throttle};
use crate::disk::Disk;
use crate::event::Sender;
use crate::machine::Notice;
use crate::memory::GuestRam;
use crate::qos::{Bucket, Group, Limits};

/// What limits a drive: a bucket of its own, or its group's, which the first of the group makes.
pub fn throttle(drive: &DriveSpec, limits: &Limits, groups: &mut HashMap<String, Arc<Mutex<Group>>>) -> Throttle {
    let Some(name) = &drive.group else { return Throttle::Own(Bucket::new(limits)) };
    let group = groups.entry(name.clone()).or_insert_with(|| Arc::new(Mutex::new(Group::new(limits)))).clone();
    let member = group.lock().unwrap_or_else(PoisonError::into_inner).join();
    Throttle::Shared(group, member)
}

/// The device of one drive.
pub fn block(
    drive: &DriveSpec,
    disk: Disk,
    throttle: Throttle,
    ram: &Arc<GuestRam>,
    notices: &Sender<Notice>,
) -> Block {
    let notices = notices.clone();
    let id = drive.id.clone();
    let report = Box::new(move |failure: IoFailure| {
        // The control plane lives as long as the main loop.
        let _ = notices.send(Notice::IoFailure(id.clone(), failure));
    });
    let serial = drive.serial.as_deref().unwrap_or(&drive.id);
    Block::new(&drive.id, serial, disk, throttle, ram.clone(), report)
}
