//! Power cuts: Linux writes records to ext4 on two disks and reports each when fsync(2) has returned; then the log of all
//! that the disks were given is replayed up to many points, and each time the file systems must be clean and every record
//! that was reported by then must be there.
//!
//! One disk is a block device, the other an image file on an ext4 of the host's. Both lie on dm-log-writes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::dm::Dm;
use crate::host::{Loop, LoopDevice, Memory, Mount};
use crate::modules;
use crate::monitor::{Monitor, PATIENCE, Setup};
use crate::replay::{Entry, Log};

/// Bytes that a log may have. Only those that are written take memory.
const LOG_BYTES: u64 = 512 << 20;
/// How many points of each log are looked at, besides those after each flush in the long form.
const POINTS: usize = 10;
const LONG_POINTS: usize = 200;

/// A disk whose writes are logged.
struct Logged {
    /// What it held at first.
    base: Vec<u8>,
    log: PathBuf,
    dm: Option<Dm>,
}

impl Logged {
    fn new(memory: &Memory, name: &str, base: &str) -> Logged {
        let image = memory.path(name);
        fs::copy(base, &image).unwrap();
        let base = fs::read(&image).unwrap();
        let log = memory.image(&format!("{name}.log"), LOG_BYTES);
        let [below, beside] = [&image, &log].map(|file| LoopDevice::new(file, Loop::default()));
        let devices = format!("{} {}", below.path.display(), beside.path.display());
        let dm = Dm::new(name, base.len() as u64 / 512, "log-writes", &devices);
        Logged { base, log, dm: Some(dm) }
    }

    fn dm(&self) -> &Dm {
        self.dm.as_ref().unwrap()
    }
}

/// A device that has a partition table of 512-byte sectors: one partition, of 100 from the third on.
pub fn partitioned(memory: &Memory, how: Loop) -> LoopDevice {
    let image = memory.image("partitioned.img", 1 << 20);
    // The boot record: four partitions from 446 on, of 16 bytes each, and its magic number.
    let partition = [&[0, 0, 0, 0, 0x83, 0, 0, 0], &3_u32.to_le_bytes()[..], &100_u32.to_le_bytes()].concat();
    let record = [&[0; 446], &partition[..], &[0; 48], &[0x55, 0xaa]].concat();
    File::options().write(true).open(&image).unwrap().write_all_at(&record, 0).unwrap();
    LoopDevice::new(&image, how)
}

/// Boots Linux with the two disks, and marks in the logs which records it has reported. Returns how many those are.
///
/// A third disk costs no boot of its own: its partitions must be found.
fn write_records(block: &Logged, outer: &Logged, image: &Path, seconds: u32) -> usize {
    let memory = Memory::new();
    let third = partitioned(&memory, Loop { sector: 4096, ..Loop::default() });
    let linux = PathBuf::from(std::env::var_os("LOOPVISOR_LINUX").expect("LOOPVISOR_LINUX, see docs/testing.md"));
    let file = |name: &str| linux.join(name).to_str().unwrap().to_owned();
    let words = format!("console=ttyS0 panic=-1 loopvisor.script=records loopvisor.seconds={seconds}");
    let setup = Setup::bare().option("-kernel", &file("vmlinuz")).option("-initrd", &file("initramfs.cpio"));
    let setup = setup.option("-append", &words).option("-serial", "stdio").flag("-no-reboot");
    let setup = setup.drive("vda", &block.dm().path, "direct=off").drive("vdb", image, "direct=off");
    let setup = setup.drive("vdc", &third.path, "direct=on");
    let mut monitor = setup.start();
    let (mut lines, mut records) = (0, 0);
    while let Some(line) = next_line(&monitor, lines) {
        lines += 1;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            // Whatever was reported before the mark must be there at the mark.
            ["record", "vda", number] => block.dm().message(&format!("mark {number}")),
            ["record", "vdb", number] => outer.dm().message(&format!("mark {number}")),
            ["records:", _, "written"] => break,
            _ => continue,
        }
        records += 1;
    }
    assert!(monitor.serial.text().contains(" written"), "Linux has not written its records");
    let found = monitor.serial.text().contains("partition vdc1 3 100");
    assert!(found, "a device of 4096-byte sectors loses its partition table of 512-byte sectors");
    monitor.kill();
    records
}

/// The line of that number of what the guest says.
fn next_line(monitor: &Monitor, number: usize) -> Option<String> {
    let line =
        |text: &str| text.split_inclusive('\n').nth(number).filter(|line| line.ends_with('\n')).map(str::to_owned);
    // Under emulation Linux says nothing for half a minute of its boot.
    monitor.serial.wait(2 * PATIENCE, |text, _| line(text))
}

/// Which points of the log are looked at: numbers of entries, in order.
fn points(log: &Log, seed: u64, long: bool) -> Vec<usize> {
    let mut state = seed;
    let mut random = |most: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % most as u64) as usize
    };
    let flushes = log.flushes();
    let mut points: Vec<usize> = if long {
        flushes.iter().copied().chain((0..LONG_POINTS).map(|_| random(log.entries.len()))).collect()
    } else {
        let some =
            (0..POINTS / 2).filter_map(|_| flushes.get(random(flushes.len().max(1))).copied()).collect::<Vec<_>>();
        some.into_iter().chain((0..POINTS / 2).map(|_| random(log.entries.len()))).collect()
    };
    // The end, where all records are reported.
    points.push(log.entries.len());
    points.sort_unstable();
    points.dedup();
    points
}

/// Replays the disk's log, and looks at what it then holds.
fn cut(disk: &Logged, name: &str, seed: u64, long: bool, look: impl Fn(&Path, Option<u64>) -> Result<(), String>) {
    let memory = Memory::new();
    let log = Log::read(&disk.log);
    let points = points(&log, seed, long);
    let (mut content, mut applied, mut reported) = (disk.base.clone(), 0, None);
    let mut wrong = Vec::new();
    for &point in &points {
        for entry in &log.entries[applied..point] {
            log.apply(entry, &mut content);
            if let Entry::Mark(number) = entry {
                reported = number.parse().ok().or(reported);
            }
        }
        applied = point;
        let image = memory.path("cut.img");
        fs::write(&image, &content).unwrap();
        if let Err(why) = look(&image, reported) {
            wrong.push(format!("after {point} of {} entries, {reported:?} reported: {why}", log.entries.len()));
        }
    }
    let flushes = log.flushes().len();
    eprintln!(
        "powercut: {name}: {} points of {} entries with {flushes} flushes, record {reported:?} is the last",
        points.len(),
        log.entries.len()
    );
    assert!(wrong.is_empty(), "{name}, seed {seed}: {} of {} points:\n{}", wrong.len(), points.len(), wrong.join("\n"));
    assert!(flushes > 10, "the log has {flushes} flushes");
}

/// Mounts the ext4 on this device, which replays its journal, looks at it, and has e2fsck find nothing wrong afterwards.
fn look_at(image: &Path, at: &Path, look: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    let device = LoopDevice::new(image, Loop::default());
    let mount = Mount::new("ext4", &device.path, at, "");
    let looked = look(at);
    drop(mount);
    let output = Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&device.path).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    looked.and(if output.status.success() { Ok(()) } else { Err(told) })
}

/// That every record up to this one is there, and whole.
fn records_are_in(folder: &Path, last: Option<u64>) -> Result<(), String> {
    for number in 0..last.map_or(0, |last| last + 1) {
        let wanted = format!("record {number}\n").into_bytes().into_iter().cycle().take(4096);
        let found = fs::read(folder.join(number.to_string())).map_err(|e| format!("record {number}: {e}"))?;
        if !found.iter().copied().eq(wanted) {
            return Err(format!("record {number} has {} bytes that are not its own", found.len()));
        }
    }
    Ok(())
}

#[test]
fn a_power_cut_loses_no_reported_record() {
    if !modules::ready() {
        return;
    }
    let long = std::env::var("LOOPVISOR_POWERCUT").is_ok_and(|form| form == "long");
    let memory = Memory::new();
    let mut block = Logged::new(&memory, "block", "inner.img");
    let mut outer = Logged::new(&memory, "outer", "outer.img");
    let mount = Mount::new("ext4", &outer.dm().path, &memory.path("mnt"), "");
    let image = mount.at().join("inner.img");
    let records = write_records(&block, &outer, &image, if long { 30 } else { 8 });
    assert!(records > 10, "{records} records");
    drop(mount);
    // A log is complete when its device is gone.
    (block.dm, outer.dm) = (None, None);
    let seed = std::process::id() as u64 ^ 0x2545_f491_4f6c_dd1d;
    let [first, second] = ["first", "second"].map(|name| memory.path(name));
    cut(&block, "block device", seed, long, |image, last| look_at(image, &first, |at| records_are_in(at, last)));
    cut(&outer, "image file on ext4", seed, long, |image, last| {
        look_at(image, &first, |at| look_at(&at.join("inner.img"), &second, |at| records_are_in(at, last)))
    });
}
