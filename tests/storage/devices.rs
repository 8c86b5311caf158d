//! The matrix for block devices that are modules of the kernel.

use std::any::Any;
use std::fs::{self, File};
use std::path::Path;

use crate::dm::{self, Dm};
use crate::host::{self, Loop, LoopDevice, Memory, Mount};
use crate::matrix::{ALL, Backing, Count, check};
use crate::modules;

/// Bytes of each disk.
pub const SIZE: u64 = 8 << 20;
pub const SECTORS: u64 = SIZE / 512;

/// Whether the device holds this below its page cache, which a mapping of it has no part in. The device must be nobody's.
fn holds_below(device: &Path, offset: u64, bytes: &[u8]) -> bool {
    let below = Dm::new("below", dm::sectors(device), "linear", &format!("{} 0", device.display()));
    host::read_direct(&below.path, offset, bytes.len()) == bytes
}

/// A device as it is. It is held open: its last descriptor that is closed would flush the page cache.
fn on_device(
    name: &'static str,
    path: &Path,
    has_cache: bool,
    discards: bool,
    mut parts: Vec<Box<dyn Any>>,
) -> Backing {
    let [flushed, held, discarded] = [path.to_owned(), path.to_owned(), path.to_owned()];
    parts.insert(0, Box::new(File::open(path).unwrap()));
    Backing {
        name,
        path: path.to_owned(),
        is_block: true,
        direct: true,
        flushes: has_cache.then(|| Box::new(move || host::flushes(&flushed)) as Count),
        holds: Box::new(move |offset, bytes| holds_below(&held, offset, bytes)),
        used: None,
        discards: discards.then(|| Box::new(move || host::discards(&discarded)) as Count),
        parts,
    }
}

/// A loop device in memory.
pub fn loop_device(memory: &Memory, name: &str, bytes: u64) -> LoopDevice {
    LoopDevice::new(&memory.image(name, bytes), Loop::default())
}

#[test]
fn every_cell_on_brd() {
    if modules::ready() {
        check(&on_device("brd", Path::new("/dev/ram0"), false, false, vec![]), &ALL);
    }
}

#[test]
fn every_cell_on_zram() {
    if modules::ready() {
        let _ = fs::write("/sys/block/zram0/disksize", SIZE.to_string());
        let mut backing = on_device("zram", Path::new("/dev/zram0"), false, false, vec![]);
        // It counts no discards; its first number is what the data in it would take uncompressed.
        backing.used = Some(Box::new(|| {
            let told = fs::read_to_string("/sys/block/zram0/mm_stat").unwrap();
            told.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap()
        }));
        check(&backing, &ALL);
    }
}

#[test]
fn every_cell_on_scsi_debug_with_a_write_cache() {
    if modules::ready() {
        check(&on_device("scsi_debug", Path::new("/dev/sda"), true, true, vec![]), &ALL);
    }
}

#[test]
fn every_cell_on_null_blk_with_a_write_cache() {
    if !modules::ready() {
        return;
    }
    let config = Mount::new("configfs", Path::new("none"), Path::new("/sys/kernel/config"), "");
    let folder = config.at().join("nullb/nullb0");
    fs::create_dir(&folder).unwrap();
    for (file, value) in
        [("memory_backed", "1"), ("size", "8"), ("cache_size", "1"), ("discard", "1"), ("index", "0"), ("power", "1")]
    {
        fs::write(folder.join(file), value).unwrap();
    }
    check(&on_device("null_blk", Path::new("/dev/nullb0"), true, true, vec![]), &ALL);
    fs::remove_dir(&folder).unwrap();
}

#[test]
fn every_cell_on_dm_linear() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "linear.img", SIZE);
    let linear = Dm::new("linear", SECTORS, "linear", &format!("{} 0", below.path.display()));
    let (flushed, image) = (below.path.clone(), below.image.clone());
    let path = linear.path.clone();
    let mut backing =
        on_device("dm-linear", &path, true, true, vec![Box::new(linear), Box::new(below), Box::new(memory)]);
    backing.flushes = Some(Box::new(move || host::flushes(&flushed)));
    backing.holds = Box::new(move |offset, bytes| host::holds_at(&image, offset, bytes));
    check(&backing, &ALL);
}

/// A thin volume, and its pool of that many bytes.
pub struct Thin {
    pub thin: Dm,
    pub pool: Dm,
    pub data: LoopDevice,
    metadata: LoopDevice,
}

impl Thin {
    /// `features` is what the pool does without space, with their number: `0`, it waits, or `1 error_if_no_space`.
    pub fn new(memory: &Memory, bytes: u64, volume: u64, features: &str) -> Thin {
        let [data, metadata] =
            [("data.img", bytes), ("metadata.img", 2 << 20)].map(|(name, bytes)| loop_device(memory, name, bytes));
        let (on, under) = (metadata.path.display(), data.path.display());
        // Blocks of 64 KiB.
        let pool = Dm::new("pool", bytes / 512, "thin-pool", &format!("{on} {under} 128 0 {features}"));
        pool.message("create_thin 0");
        let thin = Dm::new("thin", volume / 512, "thin", &format!("{} 0", pool.path.display()));
        Thin { thin, pool, data, metadata }
    }

    /// How many blocks of its data the pool has given out.
    #[track_caller]
    pub fn used_blocks(&self) -> u64 {
        let status = self.pool.status();
        let used = status.split(' ').nth(2).and_then(|used| used.split('/').next()?.parse().ok());
        used.unwrap_or_else(|| panic!("the pool says {status}"))
    }
}

#[test]
fn every_cell_on_dm_thin() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let Thin { thin, pool, data, metadata } = Thin::new(&memory, SIZE, SIZE, "0");
    let (flushed, path) = (data.path.clone(), thin.path.clone());
    let parts: Vec<Box<dyn Any>> =
        vec![Box::new(thin), Box::new(pool), Box::new(data), Box::new(metadata), Box::new(memory)];
    let mut backing = on_device("dm-thin", &path, true, true, parts);
    backing.flushes = Some(Box::new(move || host::flushes(&flushed)));
    check(&backing, &ALL);
}
