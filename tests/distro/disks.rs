//! Disks that come, grow and go, as udev, swapon, resize2fs and fstrim see them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::json;

use crate::debian::{Debian, PATIENCE, root};
use crate::monitor::{Directory, Qmp};

const MIB: u64 = 1 << 20;

/// A Debian whose disks are plugged, and its operator.
struct Slots {
    debian: Debian,
    qmp: Qmp,
}

impl Slots {
    fn plug(&mut self, name: &str, image: &str, addr: &str) {
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"node-name": name, "file": file, "cache": {"direct": false}, "discard": "unmap"});
        self.qmp.run_with("blockdev-add", &node);
        self.qmp.run_with("device_add", &json!({"id": name, "driver": "virtio-blk-mmio", "addr": addr}));
    }

    fn unplug(&mut self, name: &str) {
        self.qmp.run_with("device_del", &json!({"id": name}));
    }

    /// Waits until udev has made the link, and that it leads to the disk.
    #[track_caller]
    fn expect_link(&mut self, name: &str, disk: &str) {
        let link = self.debian.wait_until(&format!("readlink /dev/disk/by-id/virtio-{name}"));
        assert_eq!(link.lines().last(), Some(format!("../../{disk}").as_str()), "{link}");
    }

    /// Waits until udev has removed the link.
    #[track_caller]
    fn expect_no_link(&mut self, name: &str) {
        self.debian.wait_until(&format!("! test -L /dev/disk/by-id/virtio-{name}"));
    }

    #[track_caller]
    fn assert_no_errors_in_the_log(&mut self) {
        let (_, errors) = self.debian.try_run("dmesg | grep -i -e 'I/O error' -e 'buffer error' -e 'beyond end'");
        assert_eq!(errors, "");
    }
}

/// Bytes that the file takes on its file system.
fn allocated(image: &str) -> u64 {
    fs::metadata(image).unwrap().blocks() * 512
}

#[test]
fn udev_links_follow_plugged_disks() {
    let directory = Directory::new();
    let root = root(&directory);
    let images = ["a.img", "b.img"].map(|name| directory.image(name, 64 * MIB));
    let debian = Debian::start(&root, &[]);
    let qmp = debian.monitor.qmp();
    let mut slots = Slots { debian, qmp };
    slots.debian.log_in();
    slots.debian.assert_up();
    assert_eq!(slots.debian.run("readlink /dev/disk/by-id/virtio-root"), "../../vda");

    // A disk, and another of the same size in its place.
    slots.plug("data", &images[0], "0x2");
    slots.expect_link("data", "vdc");
    slots.unplug("data");
    slots.expect_no_link("data");
    slots.debian.wait_until("[ $(cat /sys/block/vdc/size) = 0 ]");
    slots.plug("data2", &images[1], "0x2");
    slots.expect_link("data2", "vdc");
    // The same at once.
    slots.unplug("data2");
    slots.plug("data3", &images[0], "0x2");
    slots.expect_link("data3", "vdc");
    slots.expect_no_link("data2");
    slots.assert_no_errors_in_the_log();

    // A file system on it grows and gives back what it does not need.
    let disk = "/dev/disk/by-id/virtio-data3";
    slots.debian.run(&format!("mkfs.ext4 -q {disk} && mount {disk} /mnt"));
    let blocks = "stat -f -c %b /mnt";
    let before: u64 = slots.debian.run(blocks).parse().unwrap();
    slots.qmp.run_with("block_resize", &json!({"device": "data3", "size": 192 * MIB}));
    slots.debian.wait_until(&format!("[ $(cat /sys/block/vdc/size) = {} ]", 192 * MIB / 512));
    slots.debian.run(&format!("resize2fs {disk}"));
    assert!(slots.debian.run(blocks).parse::<u64>().unwrap() > before * 2);
    slots.expect_link("data3", "vdc");
    slots.debian.run("dd if=/dev/urandom of=/mnt/noise bs=1M count=48 conv=fsync 2>/dev/null");
    let full = allocated(&images[0]);
    slots.debian.run("rm /mnt/noise && sync -f /mnt && fstrim /mnt");
    let trimmed = allocated(&images[0]);
    assert!(full >= 48 * MIB && trimmed + 40 * MIB < full, "{full} bytes, and {trimmed} after fstrim");
    slots.debian.run("fstrim /");

    // Swap, on a disk in another slot.
    slots.plug("swap", &images[1], "0x5");
    slots.expect_link("swap", "vdf");
    slots.debian.run("mkswap -q /dev/disk/by-id/virtio-swap && swapon /dev/disk/by-id/virtio-swap");
    assert_eq!(
        slots.debian.run("swapon --show=NAME,SIZE --noheadings --bytes | tr -s ' '"),
        format!("/dev/vdf {}", 64 * MIB - 4096)
    );
    // Anonymous memory beyond what there is.
    slots.debian.run("dd if=/dev/zero of=/dev/shm/much bs=1M count=40 2>/dev/null; swapoff /dev/vdf; rm /dev/shm/much");
    slots.unplug("swap");
    slots.expect_no_link("swap");
    slots.debian.run("umount /mnt");
    slots.unplug("data3");
    slots.expect_no_link("data3");
    slots.assert_no_errors_in_the_log();
    slots.debian.assert_up();
    slots.debian.monitor.type_line("systemctl poweroff");
    assert_eq!(slots.debian.monitor.wait(), 0, "within {PATIENCE:?}");
    slots.debian.assert_no_trouble();
}
