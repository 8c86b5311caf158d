//! The backings that this host has without modules: file systems on loop devices, and loop devices themselves.

use std::any::Any;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::host::{self, Loop, LoopDevice, Memory, Mount};
use crate::matrix::{ALL, Backing, check};
use crate::monitor::{Folder, skipped};
use crate::stall::Stall;

/// Bytes of each disk.
pub const SIZE: u64 = 8 << 20;
/// The smallest that every mkfs takes.
const FILE_SYSTEM_BYTES: u64 = 512 << 20;

/// Whether this host lets a test mount and make loop devices; says so if not.
pub fn can() -> bool {
    match host::make_mounts_private() {
        Ok(()) if PathBuf::from("/dev/loop-control").exists() => return true,
        Ok(()) => skipped("there is no /dev/loop-control"),
        Err(error) => skipped(&format!("mounts of a test's own are refused: {error}")),
    }
    false
}

/// A new loop device of that size.
pub fn loop_device(memory: &Memory, name: &str, bytes: u64, how: Loop) -> LoopDevice {
    LoopDevice::new(&memory.image(name, bytes), how)
}

fn on_loop(name: &'static str, how: Loop) -> Backing {
    let memory = Memory::new();
    let device = loop_device(&memory, "loop.img", SIZE, how);
    let (path, image) = (device.path.clone(), device.image.clone());
    let (flushed, held, discarded) = (path.clone(), image.clone(), path.clone());
    Backing {
        name,
        path,
        is_block: true,
        direct: true,
        flushes: Some(Box::new(move || host::flushes(&flushed))),
        holds: Box::new(move |offset, bytes| host::holds_at(&held, offset, bytes)),
        used: Some(Box::new(move || host::allocated(&image))),
        discards: Some(Box::new(move || host::discards(&discarded))),
        parts: vec![Box::new(device), Box::new(memory)],
    }
}

/// A file of zeroes on a new file system of that kind, which lies on a loop device.
fn on_file_system(kind: &'static str, make: &[&str]) -> Backing {
    let memory = Memory::new();
    let image = memory.image("fs.img", FILE_SYSTEM_BYTES);
    host::run(&[make, &[image.to_str().unwrap()]].concat());
    let device = LoopDevice::new(&image, Loop::default());
    let mount = Mount::new(kind, &device.path, &memory.path("mnt"), "");
    let path = mount.at().join("disk.img");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    on_file(kind, path, true, device, vec![Box::new(mount)], memory)
}

/// A file on a file system that lies on this loop device.
fn on_file(
    name: &'static str,
    path: PathBuf,
    direct: bool,
    device: LoopDevice,
    mut parts: Vec<Box<dyn Any>>,
    memory: Memory,
) -> Backing {
    let (flushed, held, used) = (device.path.clone(), device.image.clone(), path.clone());
    parts.extend([Box::new(device) as Box<dyn Any>, Box::new(memory)]);
    Backing {
        name,
        path,
        is_block: false,
        direct,
        flushes: Some(Box::new(move || host::flushes(&flushed))),
        holds: Box::new(move |_, bytes| host::holds(&held, bytes)),
        used: Some(Box::new(move || host::allocated(&used))),
        discards: None,
        parts,
    }
}

#[test]
fn every_cell_of_a_loop_device() {
    if can() {
        check(&on_loop("loop", Loop::default()), &ALL);
    }
}

#[test]
fn every_cell_of_a_loop_device_with_direct_io() {
    if can() {
        check(&on_loop("loop, direct", Loop { direct: true, ..Loop::default() }), &ALL);
    }
}

#[test]
fn every_cell_of_a_loop_device_with_4096_byte_sectors() {
    if can() {
        check(&on_loop("loop, 4096", Loop { sector: 4096, ..Loop::default() }), &ALL);
    }
}

#[test]
fn every_cell_of_a_file_on_ext4() {
    if can() {
        check(&on_file_system("ext4", &["mkfs.ext4", "-q"]), &ALL);
    }
}

#[test]
fn every_cell_of_a_file_on_xfs() {
    if can() {
        check(&on_file_system("xfs", &["mkfs.xfs", "-q"]), &ALL);
    }
}

#[test]
fn every_cell_of_a_file_on_btrfs() {
    if can() {
        check(&on_file_system("btrfs", &["mkfs.btrfs", "-q"]), &ALL);
    }
}

#[test]
fn every_cell_of_a_file_on_overlayfs() {
    if !can() {
        return;
    }
    let memory = Memory::new();
    let image = memory.image("fs.img", FILE_SYSTEM_BYTES);
    host::run(&["mkfs.ext4", "-q", image.to_str().unwrap()]);
    let device = LoopDevice::new(&image, Loop::default());
    let below = Mount::new("ext4", &device.path, &memory.path("below"), "");
    let folders = ["lower", "upper", "work"].map(|name| below.at().join(name));
    folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    // The monitor's first write copies it up.
    File::create(folders[0].join("disk.img")).unwrap().set_len(SIZE).unwrap();
    let [lower, upper, work] = folders.each_ref().map(|folder| folder.display());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let above = Mount::new("overlay", Path::new("none"), &memory.path("mnt"), &options);
    let path = above.at().join("disk.img");
    check(&on_file("overlay", path, true, device, vec![Box::new(above), Box::new(below)], memory), &ALL);
}

#[test]
fn every_cell_of_a_file_on_tmpfs() {
    if !can() {
        return;
    }
    let memory = Memory::new();
    let path = memory.image("disk.img", SIZE);
    let (held, used) = (path.clone(), path.clone());
    check(
        &Backing {
            name: "tmpfs",
            path,
            is_block: false,
            // There is no page cache to go round.
            direct: false,
            flushes: None,
            holds: Box::new(move |offset, bytes| host::holds_at(&held, offset, bytes)),
            used: Some(Box::new(move || host::allocated(&used))),
            discards: None,
            parts: vec![Box::new(memory)],
        },
        &ALL,
    );
}

#[test]
fn every_cell_of_a_file_on_fuse() {
    if !can() {
        return;
    }
    let folder = Folder::new();
    let Some(stall) = Stall::new(&folder, SIZE) else { return };
    let mount = Mount::new("fuse", Path::new("none"), stall.path(), &stall.options());
    let stall = Rc::new(stall);
    let (flushed, held, discarded) = (stall.clone(), stall.clone(), stall.clone());
    check(
        &Backing {
            name: "fuse",
            path: stall.path().to_owned(),
            is_block: false,
            direct: true,
            flushes: Some(Box::new(move || flushed.fsyncs())),
            holds: Box::new(move |offset, bytes| held.holds(offset, bytes)),
            used: None,
            discards: Some(Box::new(move || discarded.fallocates())),
            parts: vec![Box::new(mount), Box::new(stall), Box::new(folder)],
        },
        &ALL,
    );
}
