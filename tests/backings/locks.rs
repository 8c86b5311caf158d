//! Who may have a block device: one machine that writes, and nothing else on the host beside it.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::host::{self, Loop, LoopDevice, Memory, Mount};
use crate::monitor::Setup;
use crate::native::{SIZE, can, loop_device};
use crate::typed::{OK, Typed};

/// Starts a machine with this drive, which must be refused for these reasons.
#[track_caller]
fn refused(path: &Path, rest: &str, parts: &[&str]) {
    let setup = Setup::guest("mode=hello end=acpi").unwrap().drive("second", path, rest);
    let (code, told) = setup.run();
    assert_eq!(code, 1, "{path:?}, {rest}: {told}");
    for part in [&["\"second\"", path.to_str().unwrap()], parts].concat() {
        assert!(told.contains(part), "{path:?}, {rest}: {part:?} is not in {told}");
    }
}

/// Another node of the device.
#[allow(unsafe_code, reason = "mknod(2) has no safe function")]
fn node(memory: &Memory, device: &Path) -> PathBuf {
    let path = memory.path("node");
    let name = CString::new(path.to_str().unwrap()).unwrap();
    let number = fs::metadata(device).unwrap().rdev();
    // SAFETY: a string that lives through the call.
    assert_eq!(unsafe { libc::mknod(name.as_ptr(), libc::S_IFBLK | 0o600, number) }, 0);
    path
}

#[test]
fn a_block_device_has_one_writer_whatever_it_is_called() {
    if !can() {
        return;
    }
    for direct in ["direct=on", "direct=off"] {
        let memory = Memory::new();
        let device = loop_device(&memory, "loop.img", SIZE, Loop::default());
        let Some(setup) = Typed::setup() else { return };
        let first = Typed::start(setup.drive("data", &device.path, direct));
        let link = memory.path("link");
        symlink(&device.path, &link).unwrap();
        for path in [device.path.clone(), link, node(&memory, &device.path)] {
            for rest in ["direct=on", "direct=off"] {
                refused(&path, rest, &["in use"]);
            }
        }
        first.quit();
        // It is free as soon as the first has ended.
        let mut second = Typed::start(Typed::setup().unwrap().drive("data", &device.path, direct));
        second.must(&["write 0 0 8 1", "flush 0"]);
        second.quit();
    }
}

#[test]
fn a_block_device_with_a_writer_has_no_reader_and_the_reverse() {
    if !can() {
        return;
    }
    let memory = Memory::new();
    let device = loop_device(&memory, "loop.img", SIZE, Loop::default());
    for (first, second) in [("", "readonly=on"), ("readonly=on", "direct=on")] {
        let Some(setup) = Typed::setup() else { return };
        let first = Typed::start(setup.drive("data", &device.path, first));
        refused(&device.path, second, &["in use"]);
        first.quit();
    }
    let readers = Typed::setup().unwrap().drive("a", &device.path, "readonly=on");
    let mut readers = Typed::start(readers.drive("b", &device.path, "readonly=on"));
    assert_eq!(readers.ask("read 0 0 8 0").status(), OK);
    assert_eq!(readers.ask("read 1 0 8 0").status(), OK);
    readers.quit();
}

#[test]
fn a_block_device_that_cannot_be_written_is_refused_for_writing() {
    if !can() {
        return;
    }
    let memory = Memory::new();
    let image = memory.image("loop.img", SIZE);
    let by_losetup = LoopDevice::new(&image, Loop { read_only: true, ..Loop::default() });
    let by_blockdev = loop_device(&memory, "other.img", SIZE, Loop::default());
    host::set_read_only(&by_blockdev.device, true).unwrap();
    for device in [&by_losetup, &by_blockdev] {
        for rest in ["direct=on", "direct=off"] {
            refused(&device.path, rest, &["readonly=on"]);
            let Some(setup) = Typed::setup() else { return };
            let mut typed = Typed::start(setup.drive("data", &device.path, &format!("{rest},readonly=on")));
            assert_eq!(typed.ask("read 0 0 8 0").number("zeros"), 1);
            typed.quit();
        }
    }
}

#[test]
fn a_block_device_that_the_host_has_mounted_is_refused_for_writing() {
    if !can() {
        return;
    }
    let memory = Memory::new();
    let device = loop_device(&memory, "loop.img", SIZE, Loop::default());
    host::run(&["mkfs.ext4", "-q", device.path.to_str().unwrap()]);
    let mount = Mount::new("ext4", &device.path, &memory.path("mnt"), "");
    let Some(setup) = Typed::setup() else { return };
    refused(&device.path, "direct=on", &["in use", "readonly=on"]);
    refused(&node(&memory, &device.path), "direct=off", &["in use"]);
    let mut typed = Typed::start(setup.drive("data", &device.path, "readonly=on"));
    // The same by hot-plug, whose refusal comes as the command's reply.
    typed.unplug("data");
    let file = json!({"driver": "host_device", "filename": device.path.to_str().unwrap()});
    let add = json!({"execute": "blockdev-add", "arguments": {"node-name": "data", "file": file}}).to_string();
    assert!(typed.client.mistake(&add).1.contains("in use"));
    drop(mount);
    typed.plug("data", &device.path, 0, true, "io_uring");
    typed.must(&["write 0 64 8 1", "flush 0"]);
    // Nor can the host mount it now.
    assert!(host::try_mount("ext4", &device.path, &memory.path("mnt"), "").is_err(), "mounted beside the machine");
    typed.quit();
}

#[test]
fn a_drive_on_a_file_that_the_vm_uses_otherwise_is_refused() {
    let memory = Memory::new();
    let guest = crate::monitor::guest();
    for option in ["-D", "-pidfile", "-mem-path", "-kernel", "-initrd"] {
        let path = memory.path("file");
        fs::copy(guest, &path).unwrap();
        if option == "-mem-path" {
            // As large as the guest's memory.
            fs::File::options().write(true).open(&path).unwrap().set_len(256 << 20).unwrap();
        }
        let before = fs::read(&path).unwrap();
        let text = path.to_str().unwrap();
        let setup = Setup::bare().option(option, text);
        let setup = if option == "-kernel" { setup } else { setup.option("-kernel", guest.to_str().unwrap()) };
        let link = memory.path("link");
        let _ = fs::remove_file(&link);
        fs::hard_link(&path, &link).unwrap();
        // By another name, of the same file.
        let setup = setup.option("-append", "mode=hello end=acpi").flag("-no-reboot");
        let (code, told) = setup.drive("vda", &link, "direct=off").run();
        assert_ne!(code, 0, "{option}: {told}");
        // A pid file that exists must hold a process id and nothing else, which no disk does.
        let why = match option {
            "-D" => "-drive id=vda has this file",
            "-pidfile" => "other contents than a process id",
            _ => "in use by this VM",
        };
        assert!(told.contains(why), "{option}: {told}");
        assert!(fs::read(&path).unwrap() == before, "{option}: the file has been changed");
    }
}
