//! `-device virtio-blk-device`: the later spelling of a disk, which parts the host's file (`-drive`) from the guest's device.
//!
//! Both end as one `DriveSpec`. A `-drive` that no device names is a disk by itself, as in the early spelling. Main
//! thread, before anything is started.

use super::keyvalue::{KeyValues, decimal};
use super::options::{block_sizes, serial_number, short_text};
use super::spec::VmSpec;
use crate::error::Result;

/// Descriptors of a disk's queue, which is the only one.
const QUEUE_SIZE: &str = "256";

/// `-device virtio-blk-device,drive=NAME[,id=NAME][,iothread=NAME][,serial=TEXT][,logical_block_size=N]...`: the disk of that
/// `-drive`, which is placed after the drives that no device has named yet.
///
/// # Errors
/// A mistake of the user's, by its key; a drive that is not there, or is another device's.
pub fn device(text: &str, spec: &mut VmSpec, named: &mut Vec<String>) -> Result<()> {
    let keys = [
        "driver",
        "drive",
        "id",
        "iothread",
        "serial",
        "logical_block_size",
        "physical_block_size",
        "num-queues",
        "queue-size",
        "bootindex",
    ];
    let pairs = KeyValues::read("-device", text, &keys, |place, item| (place == 0).then_some(("driver", item)))?;
    let name = pairs.require("drive", "the id of a -drive", short_text)?;
    if named.contains(&name) {
        return Err(pairs.mistake(format!("another device has drive {name:?}; accepted: a -drive of its own")));
    }
    let Some(place) = spec.drives.iter().position(|drive| drive.id == name) else {
        let ids: Vec<&str> = spec.drives.iter().map(|drive| drive.id.as_str()).collect();
        let accepted = if ids.is_empty() { format!("with -drive id={name},file=FILE") } else { ids.join(", ") };
        return Err(pairs.mistake(format!("there is no drive {name:?}; accepted: {accepted}")));
    };
    let mut drive = spec.drives[place].clone();
    let iothread = pairs.get("iothread", "the id of an iothread", short_text)?;
    let serial = pairs.get("serial", "text of at most 20 bytes", serial_number)?;
    let (logical, physical) = block_sizes(&pairs)?;
    for (key, twice) in [
        ("iothread", iothread.is_some() && drive.iothread.is_some()),
        ("serial", serial.is_some() && drive.serial.is_some()),
        ("logical_block_size", logical.is_some() && drive.logical_block.is_some()),
        ("physical_block_size", physical.is_some() && drive.physical_block.is_some()),
    ] {
        if twice {
            return Err(pairs.mistake(format!("drive {name:?} has its {key:?} already; accepted: one of the two")));
        }
    }
    drive.iothread = iothread.or(drive.iothread);
    drive.serial = serial.or(drive.serial);
    drive.logical_block = logical.or(drive.logical_block);
    drive.physical_block = physical.or(drive.physical_block);
    // What is so anyway; there is no firmware that would boot from a disk.
    pairs.get("num-queues", "1", |count| (count == "1").then_some(()))?;
    pairs.get("queue-size", QUEUE_SIZE, |size| (size == QUEUE_SIZE).then_some(()))?;
    pairs.get("bootindex", "a number", decimal)?;
    if let Some(id) = pairs.get("id", "NAME (1 to 255 characters)", short_text)? {
        drive.id = id;
    }
    named.extend([name, drive.id.clone()]);
    spec.drives.remove(place);
    spec.drives.push(drive);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::spec::DriveSpec;
    use super::*;

    fn spec() -> VmSpec {
        let drives = ["a", "b", "c"].map(|id| DriveSpec::new(id, format!("{id}.img")));
        VmSpec { drives: drives.into(), ..VmSpec::new("k") }
    }

    #[track_caller]
    fn refusal(spec: &mut VmSpec, named: &mut Vec<String>, text: &str) -> String {
        let error = device(text, spec, named).expect_err("is refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn a_device_gives_its_drive_a_name_a_thread_a_serial_number_and_its_place() {
        let (mut spec, mut named) = (spec(), Vec::new());
        device("virtio-blk-device,drive=b,id=disk,iothread=io,serial=s,num-queues=1", &mut spec, &mut named).unwrap();
        device("virtio-blk-device,drive=a,bootindex=1", &mut spec, &mut named).unwrap();
        let b = DriveSpec { iothread: Some("io".into()), serial: Some("s".into()), ..DriveSpec::new("disk", "b.img") };
        assert_eq!(spec.drives, [DriveSpec::new("c", "c.img"), b, DriveSpec::new("a", "a.img")]);
    }

    #[test]
    fn a_drive_that_is_not_there_or_is_anothers_is_refused_and_so_is_what_is_said_twice() {
        let (mut spec, mut named) = (spec(), Vec::new());
        spec.drives[0].iothread = Some("io".into());
        let refused = refusal(&mut spec, &mut named, "virtio-blk-device,drive=x");
        assert_eq!(refused, "-device virtio-blk-device,drive=x: there is no drive \"x\"; accepted: a, b, c");
        let refused = refusal(&mut spec, &mut named, "virtio-blk-device,drive=a,iothread=io2");
        assert!(refused.ends_with("drive \"a\" has its \"iothread\" already; accepted: one of the two"), "{refused}");
        device("virtio-blk-device,drive=b,id=d", &mut spec, &mut named).unwrap();
        for again in ["b", "d"] {
            let refused = refusal(&mut spec, &mut named, &format!("virtio-blk-device,drive={again}"));
            assert!(refused.contains(&format!("another device has drive {again:?}")), "{refused}");
        }
        assert!(refusal(&mut spec, &mut named, "virtio-blk-device,drive=c,num-queues=2").ends_with("accepted: 1"));
        assert!(refusal(&mut VmSpec::new("k"), &mut named, "virtio-blk-device").contains("key \"drive\" is missing"));
        let none = refusal(&mut VmSpec::new("k"), &mut Vec::new(), "virtio-blk-device,drive=x");
        assert!(none.ends_with("accepted: with -drive id=x,file=FILE"), "{none}");
    }
}
