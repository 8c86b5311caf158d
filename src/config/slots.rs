//! How many slots for disks and NICs a machine has: those that are filled at the start, and empty ones for a later plug.
//!
//! Each virtio device has an interrupt line, of which there are eleven (rule D3.4). Six slots for disks and two for NICs are
//! provided for if nothing is said, and as many of them as there is room for beside what is asked for by name. Pure
//! arithmetic; the main thread, before anything is started.

use super::spec::{MAX_VIRTIO_DEVICES, VmSpec};
use crate::error::{Error, Result};

/// Slots for disks if nothing is said (rule D3.4).
pub const DISK_SLOTS: usize = 6;
/// Slots for NICs if nothing is said (rule D3.4).
pub const NIC_SLOTS: usize = 2;

/// The slots of a machine, filled and empty ones together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// For disks.
    pub disks: usize,
    /// For NICs.
    pub nics: usize,
}

impl VmSpec {
    /// The slots that the machine has. Those that nobody asked for give way to what was asked for: first the empty ones
    /// for disks, of which there are more.
    pub fn slots(&self) -> Slots {
        let room = MAX_VIRTIO_DEVICES.saturating_sub(self.others());
        let least = self.disk_slots.unwrap_or(self.drives.len());
        let spare = NIC_SLOTS.min(room.saturating_sub(least));
        let nics = self.nic_slots.unwrap_or(spare.max(self.nics.len()));
        let spare = DISK_SLOTS.min(room.saturating_sub(nics));
        Slots { disks: self.disk_slots.unwrap_or(spare.max(self.drives.len())), nics }
    }

    /// Refuses slots that what was asked for does not fit in, or that do not fit in the machine (rule D3.4).
    pub(super) fn check_slots(&self) -> Result<()> {
        if let Some(twelfth) = self.virtio_devices().nth(MAX_VIRTIO_DEVICES) {
            let count = self.virtio_devices().count();
            return Err(Error::usage(format!(
                "{twelfth}: one virtio device too many, there are {count}; accepted: at most {MAX_VIRTIO_DEVICES} of all \
                 kinds together, an interrupt line each (rule D3.4)"
            )));
        }
        if let Some(slots) = self.disk_slots
            && let Some(drive) = self.drives.get(slots)
        {
            return Err(too_many(&format!("-drive id={}", drive.id), "disk-slots", slots, self.drives.len()));
        }
        if let Some(slots) = self.nic_slots
            && let Some(nic) = self.nics.get(slots)
        {
            return Err(too_many(&format!("-netdev id={}", nic.id), "nic-slots", slots, self.nics.len()));
        }
        let Slots { disks, nics } = self.slots();
        let others = self.others();
        if disks + nics + others > MAX_VIRTIO_DEVICES {
            let named = [("disk-slots", self.disk_slots), ("nic-slots", self.nic_slots)];
            let named = named.iter().filter_map(|(key, slots)| slots.map(|slots| format!("{key}={slots}")));
            return Err(Error::usage(format!(
                "-machine {}: {disks} slots for disks, {nics} for NICs and {others} other virtio devices are {}; accepted: \
                 at most {MAX_VIRTIO_DEVICES} together, an interrupt line each (rule D3.4)",
                named.collect::<Vec<_>>().join(","),
                disks + nics + others
            )));
        }
        Ok(())
    }

    /// Virtio devices that are neither disks nor NICs.
    fn others(&self) -> usize {
        self.virtio_devices().count() - self.drives.len() - self.nics.len()
    }
}

/// The error for the first device that has no slot.
fn too_many(device: &str, key: &str, slots: usize, devices: usize) -> Error {
    Error::usage(format!(
        "{device}: there is no slot for it, because of -machine {key}={slots}; use {key}={devices} or more, or leave {key} out"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::net::netdev;
    use super::super::spec::{BalloonSpec, DriveSpec};
    use super::*;

    fn spec(drives: usize, balloons: usize) -> VmSpec {
        let drives = (0..drives).map(|n| DriveSpec::new(format!("d{n}"), format!("{n}.img"))).collect();
        VmSpec { drives, balloons: vec![BalloonSpec::default(); balloons], ..VmSpec::new("vmlinux") }
    }

    fn refusal(spec: &VmSpec) -> String {
        let error = spec.check().expect_err("is refused");
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn rule_d3_4_six_disks_and_two_nics_are_provided_for_and_give_way_to_what_is_asked_for() {
        for (drives, balloons, disks, nics) in [
            (0, 0, 6, 2),
            (1, 1, 6, 2),
            (6, 1, 6, 2),
            (7, 1, 7, 2),
            (9, 0, 9, 2),
            (9, 1, 9, 1),
            (10, 1, 10, 0),
            (11, 0, 11, 0),
        ] {
            let spec = spec(drives, balloons);
            spec.check().unwrap();
            assert_eq!(spec.slots(), Slots { disks, nics }, "{drives} drives, {balloons} balloons");
        }
    }

    #[test]
    fn what_is_said_holds_and_the_rest_gives_way() {
        for (disk_slots, nic_slots, disks, nics) in [
            (Some(0), Some(0), 0, 0),
            (Some(0), None, 0, 2),
            (None, Some(0), 6, 0),
            (Some(10), None, 10, 1),
            (Some(11), None, 11, 0),
            (None, Some(8), 3, 8),
            (None, Some(11), 0, 11),
            (Some(3), Some(8), 3, 8),
        ] {
            let spec = VmSpec { disk_slots, nic_slots, ..spec(0, 0) };
            spec.check().unwrap();
            assert_eq!(spec.slots(), Slots { disks, nics }, "{disk_slots:?} {nic_slots:?}");
        }
    }

    #[test]
    fn rule_d3_4_slots_that_do_not_fit_are_refused_with_the_sum() {
        let spec = |disk_slots, nic_slots, balloons| VmSpec { disk_slots, nic_slots, ..spec(1, balloons) };
        assert_eq!(
            refusal(&spec(Some(10), Some(1), 1)),
            "-machine disk-slots=10,nic-slots=1: 10 slots for disks, 1 for NICs and 1 other virtio devices are 12; \
             accepted: at most 11 together, an interrupt line each (rule D3.4)"
        );
        let refused = refusal(&spec(None, Some(11), 0));
        assert!(refused.starts_with("-machine nic-slots=11: 1 slots for disks, 11 for NICs and 0 other"), "{refused}");
        let refused = refusal(&spec(Some(11), None, 1));
        assert!(refused.starts_with("-machine disk-slots=11: 11 slots for disks, 0 for NICs and 1 other"), "{refused}");
    }

    #[test]
    fn more_drives_than_the_slots_that_were_asked_for_are_refused() {
        let told = refusal(&VmSpec { disk_slots: Some(1), ..spec(3, 0) });
        for part in ["-drive id=d1: ", "-machine disk-slots=1;", "use disk-slots=3 or more"] {
            assert!(told.contains(part), "{told}");
        }
    }

    #[test]
    fn more_nics_than_their_slots_are_refused() {
        let two = |nic_slots| {
            let mut spec = VmSpec { nic_slots, ..spec(1, 0) };
            for n in 0..2 {
                netdev(&format!("id=n{n},netdev=tap{n}"), &mut spec).unwrap();
            }
            spec
        };
        for slots in [0, 1] {
            let told = refusal(&two(Some(slots)));
            let first = format!("-netdev id=n{slots}: ");
            for part in [first.as_str(), &format!("-machine nic-slots={slots};"), "use nic-slots=2 or more"] {
                assert!(told.contains(part), "{told}");
            }
        }
        two(Some(2)).check().unwrap();
    }
}
