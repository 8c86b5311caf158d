//! What goes wrong below a disk: a file that fails, a file system that is full; and a device that grows.
//!
//! A device that does not answer is tested in the nested host: a process that waits for one cannot be ended.

use std::fs::File;
use std::path::Path;

use serde_json::json;

use crate::host::{self, Loop, LoopDevice, Memory, Mount};
use crate::monitor::Folder;
use crate::native::{SIZE, can, loop_device};
use crate::stall::Stall;
use crate::typed::{IOERR, Typed, pattern};

/// Sends this until it fails, and checks what the guest and the operator are told; then the machine must still work.
fn fails(mut typed: Typed, mut lines: impl Iterator<Item = String>, operation: &str, no_space: bool) {
    let failed = lines.find(|line| typed.ask(line).status() == IOERR).expect("a request fails");
    typed.check_failure(&failed, operation, no_space);
    assert_eq!(typed.drive("slow")["io-status"], "failed");
    typed.quit();
}

#[test]
fn eio_of_a_file_reaches_the_guest_and_the_machine_lives() {
    if !can() {
        return;
    }
    for (rest, operation) in [
        ("direct=on,aio=io_uring", "write"),
        ("direct=on,aio=threads", "read"),
        ("direct=off,aio=io_uring", "read"),
        ("direct=off,aio=threads", "write"),
    ] {
        let (folder, memory) = (Folder::new(), Memory::new());
        let Some(stall) = Stall::new(&folder, SIZE) else { return };
        let _mount = Mount::new("fuse", Path::new("none"), stall.path(), &stall.options());
        let Some(mut typed) = Typed::beside_another(&memory, stall.path(), rest, true) else { return };
        typed.must(&["write 0 0 8 1", "flush 0"]);
        stall.fail(libc::EIO);
        fails(typed, [format!("{operation} 0 64 8 1")].into_iter(), operation, false);
    }
}

/// Writes all over disk 0, a flush after each.
fn writes() -> impl Iterator<Item = String> {
    (0..SIZE / 512 / 128).flat_map(|n| [format!("write 0 {} 128 1", 128 * n), "flush 0".to_owned()])
}

#[test]
fn a_full_file_system_reaches_the_guest_and_the_machine_lives() {
    if !can() {
        return;
    }
    for (kind, rest) in
        [("ext4", "direct=on"), ("ext4", "direct=off"), ("ext4", "direct=on,aio=threads"), ("tmpfs", "direct=off")]
    {
        let memory = Memory::new();
        let mnt = memory.path("mnt");
        let (_device, mount) = if kind == "tmpfs" {
            (None, Mount::new("tmpfs", Path::new("none"), &mnt, "size=1M"))
        } else {
            let image = memory.image("fs.img", 2 << 20);
            host::run(&["mkfs.ext4", "-q", "-b", "1024", "-O", "^has_journal", image.to_str().unwrap()]);
            let device = LoopDevice::new(&image, Loop::default());
            let mount = Mount::new("ext4", &device.path, &mnt, "");
            (Some(device), mount)
        };
        let path = mount.at().join("disk.img");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        let Some(typed) = Typed::beside_another(&memory, &path, rest, true) else { return };
        fails(typed, writes(), "write", true);
    }
}

#[test]
fn a_full_file_system_under_a_block_device_reaches_the_guest() {
    if !can() {
        return;
    }
    // The page cache takes every write; its flush fails, and the host's kernel does not say why.
    for (rest, no_space) in [("direct=on", true), ("direct=off", false)] {
        let memory = Memory::new();
        let mount = Mount::new("tmpfs", Path::new("none"), &memory.path("mnt"), "size=1M");
        let image = mount.at().join("loop.img");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let device = LoopDevice::new(&image, Loop { direct: true, ..Loop::default() });
        let Some(typed) = Typed::beside_another(&memory, &device.path, rest, true) else { return };
        fails(typed, writes(), "write", no_space);
    }
}

#[test]
fn block_resize_follows_a_block_device_that_has_grown() {
    if !can() {
        return;
    }
    for direct in ["on", "off"] {
        let memory = Memory::new();
        let device = loop_device(&memory, "loop.img", SIZE, Loop::default());
        let Some(setup) = Typed::setup() else { return };
        let mut typed = Typed::start(setup.drive("data", &device.path, &format!("direct={direct}")));
        assert_eq!(typed.ask("tell 0").number("sectors"), SIZE / 512);
        let resize = json!({"execute": "block_resize", "arguments": {"device": "data", "size": 2 * SIZE}}).to_string();
        let (_, refused) = typed.client.mistake(&resize);
        assert!(refused.contains(&SIZE.to_string()), "the size it has: {refused}");
        File::options().write(true).open(&device.image).unwrap().set_len(2 * SIZE).unwrap();
        device.grow();
        typed.client.call_with("block_resize", &json!({"device": "data", "size": 2 * SIZE}));
        assert_eq!(typed.ask("tell 0").number("sectors"), 2 * SIZE / 512);
        let last = 2 * SIZE / 512 - 8;
        typed.must(&[&format!("write 0 {last} 8 9"), "flush 0"]);
        assert!(host::holds_at(&device.image, last * 512, &pattern(9, last, 8)), "direct={direct}");
        typed.quit();
    }
}
