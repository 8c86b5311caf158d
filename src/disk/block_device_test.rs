//! Block devices: real loop devices, with sectors of 512 and of 4096 bytes.
//!
//! Devices that are modules of the kernel (dm, null_blk, scsi_debug) are tested end to end in the nested host: docs/testing.md.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::testing::*;
use super::*;
use crate::config::spec::Cache;

const SIZE: usize = 8 << 20;

/// A loop device on a file of [`SIZE`] bytes, both gone with their test.
struct Loop {
    device: PathBuf,
    file: TestFile,
}

impl Loop {
    /// `None`, with the reason printed, where this user may not set one up.
    fn new(options: &[&str]) -> Option<Loop> {
        let file = TestFile::new(false, &vec![0x5a; SIZE]);
        let output = Command::new("losetup").args(["--show", "-f"]).args(options).arg(&file.0).output().unwrap();
        if !output.status.success() {
            let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
            assert!(!is_root, "losetup: {}", String::from_utf8_lossy(&output.stderr));
            eprintln!("skipped: loop devices need root");
            return None;
        }
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
        if !options.contains(&"-r") {
            // The mark of an earlier BLKROSET outlives the device.
            assert!(Command::new("blockdev").arg("--setrw").arg(&device).status().unwrap().success());
        }
        Some(Loop { device, file })
    }

    /// A number of /sys/block/loopN/stat, counted from 1: 12 discards, 16 flushes.
    fn stat(&self, field: usize) -> u64 {
        let name = self.device.file_name().unwrap().to_str().unwrap();
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        stat.split_whitespace().nth(field - 1).unwrap().parse().unwrap()
    }

    fn set(&self, option: &str) {
        assert!(Command::new("losetup").arg(option).arg(&self.device).status().unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.set("-d");
    }
}

/// Both kinds of cache by both engines.
fn each_way(mut run: impl FnMut(DriveSpec)) {
    for cache in [Cache::Direct, Cache::Buffered] {
        for aio in [Aio::Auto, Aio::Threads] {
            run(DriveSpec { cache, aio, ..DriveSpec::new("vda", "") });
        }
    }
}

fn refusal(spec: &DriveSpec) -> String {
    Disk::open(spec, ram()).err().expect("must be refused").to_string()
}

#[test]
fn flush_of_a_block_device_reaches_the_device() {
    let Some(device) = Loop::new(&[]) else { return };
    each_way(|way| {
        let mut guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way });
        let before = device.stat(16);
        guest.run(Op::Write { offset: 4096, segments: &[segment(0, 4096)] }).unwrap();
        guest.run(Op::Flush).unwrap();
        assert!(device.stat(16) > before, "{:?} {:?}", guest.disk.aio, guest.disk.file.is_direct());
    });
}

#[test]
fn block_device_is_opened_with_the_flags_asked_for() {
    let Some(device) = Loop::new(&[]) else { return };
    each_way(|way| {
        let guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way.clone() });
        let flags = |cached| {
            let fd = guest.disk.file.get(cached).as_raw_fd();
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            i32::from_str_radix(flags, 8).unwrap()
        };
        assert_eq!(flags(false) & libc::O_DIRECT != 0, way.cache == Cache::Direct);
        assert_eq!(flags(true) & libc::O_DIRECT, 0);
    });
}

#[test]
fn writes_to_a_block_device_never_run_on_the_loops_thread() {
    let Some(device) = Loop::new(&[]) else { return };
    each_way(|way| {
        let mut guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way.clone() });
        let write = Op::Write { offset: 0, segments: &[segment(0, 4096)] };
        assert!(matches!(guest.disk.submit(write, 0), Submitted::Queued));
        guest.drain();
        let read = Op::Read { offset: SIZE as u64 - 4096, segments: &[segment(0, 4096)] };
        let queued = matches!(guest.disk.submit(read, 0), Submitted::Queued);
        assert!(queued || way.cache == Cache::Buffered, "in place only from the page cache");
        guest.drain();
    });
}

#[test]
fn single_sectors_are_right_on_a_device_of_4096_byte_sectors() {
    let Some(device) = Loop::new(&["-b", "4096"]) else { return };
    each_way(|way| {
        let mut guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way });
        assert_eq!(guest.disk.topology().logical_block, 512);
        assert_eq!(guest.disk.topology().physical_block, 4096);
        let mut expected = vec![0x11; 4 * 4096];
        guest.put(0, &expected);
        guest.run(Op::Write { offset: 0, segments: &[segment(0, expected.len())] }).unwrap();
        // Neighbours of one block, and a range that shares its ends with others: all in flight at once.
        let parts = [(512, 512, 1), (1024, 512, 2), (0, 512, 3), (3584, 4608, 4), (8704, 1024, 5)];
        for (at, len, byte) in parts {
            let memory = 64 * 1024 + at as u64;
            guest.put(memory, &vec![byte; len]);
            expected[at..at + len].fill(byte);
            guest.disk.submit(Op::Write { offset: at as u64, segments: &[segment(memory, len)] }, 0);
        }
        assert!(guest.drain().iter().all(|(_, result)| result.is_ok()));
        guest.run(Op::Flush).unwrap();
        for at in (0..expected.len()).step_by(512) {
            guest.run(Op::Read { offset: at as u64, segments: &[segment(3, 512)] }).unwrap();
            assert!(guest.take(3, 512) == expected[at..at + 512], "sector {}", at / 512);
        }
        assert!(device.file.content()[..expected.len()] == expected, "what a flush has made durable");
        let zero = Op::WriteZeroes { offset: 512, len: 3072, unmap: true };
        guest.run(zero).unwrap();
        guest.run(Op::Read { offset: 0, segments: &[segment(0, 4096)] }).unwrap();
        expected[512..3584].fill(0);
        assert!(guest.take(0, 4096) == expected[..4096]);
    });
}

#[test]
fn discard_gives_the_space_of_a_block_device_back() {
    let Some(device) = Loop::new(&[]) else { return };
    each_way(|way| {
        let mut guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way });
        guest.put(0, &[7; 65536]);
        guest.run(Op::Write { offset: 65536, segments: &[segment(0, 65536)] }).unwrap();
        // Dirty pages of the page cache must not keep the kernel from it.
        let before = device.stat(12);
        guest.run(Op::Discard { offset: 65536, len: 65536 }).unwrap();
        assert_eq!(device.stat(12), before + 1);
        guest.run(Op::Read { offset: 65536, segments: &[segment(0, 65536)] }).unwrap();
        assert!(guest.take(0, 65536) == [0; 65536]);
        guest.put(0, &[7; 4096]);
        guest.run(Op::Write { offset: 131_072, segments: &[segment(0, 4096)] }).unwrap();
        for unmap in [true, false] {
            guest.run(Op::WriteZeroes { offset: 131_072, len: 4096, unmap }).unwrap();
        }
        guest.run(Op::Flush).unwrap();
        assert!(device.file.content()[131_072..][..4096] == [0; 4096]);
        // A range that no device can discard is ignored, as a hint may be.
        guest.run(Op::Discard { offset: 100, len: 100 }).unwrap();
    });
}

#[test]
fn discards_and_writes_in_flight_together_all_end() {
    let Some(device) = Loop::new(&[]) else { return };
    each_way(|way| {
        let mut guest = Guest::new(&DriveSpec { file: device.device.clone(), ..way });
        for round in 0..100_u32 {
            let offset = u64::from(round) * 8192;
            guest.disk.submit(Op::Discard { offset, len: 4096 }, round);
            guest.disk.submit(Op::Write { offset: offset + 4096, segments: &[segment(0, 4096)] }, 1000 + round);
        }
        let done = guest.drain();
        assert_eq!(done.len(), 200);
        assert!(done.iter().all(|(_, result)| result.is_ok()));
    });
}

#[test]
fn read_only_block_device_is_refused_for_writing() {
    let Some(device) = Loop::new(&["-r"]) else { return };
    let writer = DriveSpec::new("vda", &device.device);
    let text = refusal(&writer);
    assert!(
        text.contains("is a read-only block device: make it writable (blockdev --setrw), or use readonly=on"),
        "{text}"
    );
    Disk::open(&DriveSpec { access: Access::ReadOnly, ..writer }, ram()).unwrap();
}

#[test]
fn mounted_block_device_is_refused_for_writing_with_its_place() {
    let Some(device) = Loop::new(&[]) else { return };
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.device).status().unwrap().success());
    let place = std::env::temp_dir().join(format!("loopvisor-mounted-{}", std::process::id()));
    std::fs::create_dir_all(&place).unwrap();
    let mount = Mount::device("ext4", &device.device, &place).unwrap();
    let writer = DriveSpec::new("vda", &device.device);
    let text = refusal(&writer);
    let wanted = format!("is in use on this host (mounted on {}): release it, or use readonly=on", place.display());
    assert!(text.contains(&wanted), "{text}");
    Disk::open(&DriveSpec { access: Access::ReadOnly, ..writer.clone() }, ram()).unwrap();
    drop(mount);
    std::fs::remove_dir(&place).unwrap();
    Disk::open(&writer, ram()).unwrap();
}

#[test]
fn block_device_of_a_writer_is_refused_under_every_name() {
    let Some(device) = Loop::new(&[]) else { return };
    let writer = DriveSpec::new("vda", &device.device);
    let _first = Disk::open(&writer, ram()).unwrap();
    let text = refusal(&writer);
    assert!(text.contains("is in use by this VM, as its drive \"vda\", which writes it"), "{text}");
    let node = Path::new("/dev").join(format!("loopvisor-node-{}", std::process::id()));
    let number = std::fs::metadata(&device.device).unwrap().rdev();
    let [major, minor] = [libc::major(number), libc::minor(number)].map(|number| number.to_string());
    assert!(Command::new("mknod").arg(&node).args(["b", &major, &minor]).status().unwrap().success());
    let text = refusal(&DriveSpec::new("vdb", &node));
    std::fs::remove_file(&node).unwrap();
    assert!(text.contains("is in use on this host: release it, or use readonly=on"), "{text}");
}

#[test]
fn block_device_grows_only_to_where_it_has_grown() {
    let Some(device) = Loop::new(&[]) else { return };
    let mut guest = Guest::new(&DriveSpec::new("vda", &device.device));
    let backing = guest.disk.backing();
    let (old, new) = (SIZE as u64, SIZE as u64 + 8192);
    assert!(backing.grow(new).unwrap_err().to_string().contains(&format!("the block device has {old} bytes")));
    std::fs::OpenOptions::new().write(true).open(&device.file.0).unwrap().set_len(new).unwrap();
    device.set("-c");
    assert_eq!(backing.grow(new).unwrap(), new);
    guest.put(0, &[9; 512]);
    guest.run(Op::Write { offset: new - 512, segments: &[segment(0, 512)] }).unwrap();
    guest.run(Op::Flush).unwrap();
    assert!(device.file.content()[new as usize - 512..] == [9; 512]);
}

#[test]
fn a_large_logical_block_cuts_the_disk_to_whole_blocks() {
    let file = TestFile::new(false, &[1; 4096 * 3 + 512]);
    let mut spec = spec(&file.0);
    assert_eq!(Disk::open(&spec, ram()).unwrap().sectors(), 25);
    spec.logical_block = Some(4096);
    let disk = Disk::open(&spec, ram()).unwrap();
    assert_eq!((disk.sectors(), disk.topology().physical_block), (24, 4096));
    assert!(disk.backing().grow(4096 * 3 + 1024).unwrap_err().to_string().contains("must be a multiple of 4096"));
    assert_eq!(disk.backing().grow(4096 * 4).unwrap(), 4096 * 4);
}

#[test]
fn short_lock_of_a_block_device_is_waited_for() {
    let Some(device) = Loop::new(&[]) else { return };
    // As udev does, whose lock keeps out a writer while it probes.
    let probe = std::fs::File::open(&device.device).unwrap();
    probe.lock_shared().unwrap();
    let probing = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(probe);
    });
    Disk::open(&DriveSpec::new("vda", &device.device), ram()).unwrap();
    probing.join().unwrap();
}
