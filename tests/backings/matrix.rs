//! The matrix: what each kind of file or device must do with each way of using it.

use std::any::Any;
use std::path::PathBuf;

use crate::typed::{OK, Typed, pattern};

/// A file or device that a drive is given, and what can be seen of it from below.
pub struct Backing {
    pub name: &'static str,
    pub path: PathBuf,
    pub is_block: bool,
    /// Whether a descriptor with `O_DIRECT` is to be had of it.
    pub direct: bool,
    /// How many flushes have come out at the bottom; `None` where there is nothing to flush.
    pub flushes: Option<Box<dyn Fn() -> u64>>,
    /// Whether these bytes, written at this offset of the disk, are where they outlive the host's page cache.
    pub holds: Box<dyn Fn(u64, &[u8]) -> bool>,
    /// How many bytes are used up, where a discard gives them back.
    pub used: Option<Box<dyn Fn() -> u64>>,
    /// What it is made of, dropped in this order.
    pub parts: Vec<Box<dyn Any>>,
}

/// A way of using it.
#[derive(Clone, Copy, Debug)]
struct Cell {
    direct: bool,
    aio: &'static str,
    iothread: bool,
    plugged: bool,
}

fn cells() -> impl Iterator<Item = Cell> {
    (0..16).map(|n| Cell {
        direct: n & 1 != 0,
        aio: if n & 2 != 0 { "threads" } else { "io_uring" },
        iothread: n & 4 != 0,
        plugged: n & 8 != 0,
    })
}

/// Runs every cell. A machine each, which is killed when the guest's flush has been answered.
pub fn check(backing: &Backing) {
    for (seed, cell) in (1..).zip(cells()) {
        let Some(mut typed) = start(backing, cell) else { return };
        check_cell(backing, cell, &mut typed, seed);
    }
    eprintln!("matrix: {}: {} cells", backing.name, cells().count());
}

/// A machine whose disk 0 is the backing.
fn start(backing: &Backing, cell: Cell) -> Option<Typed> {
    let mut setup = Typed::setup()?;
    let home = if cell.iothread { ",iothread=io1" } else { "" };
    if cell.iothread {
        setup = setup.iothread("io1");
    }
    if cell.plugged {
        // A slot belongs to the iothread of the drive that it had at the start.
        let mut typed = Typed::start(setup.disk("first", 1 << 20, &format!("direct=off{home}")));
        typed.unplug("first");
        typed.plug("data", &backing.path, 0, cell.direct, cell.aio);
        Some(typed)
    } else {
        let direct = if cell.direct { "on" } else { "off" };
        Some(Typed::start(setup.drive("data", &backing.path, &format!("direct={direct},aio={}{home}", cell.aio))))
    }
}

fn check_cell(backing: &Backing, cell: Cell, typed: &mut Typed, seed: u64) {
    let name = backing.name;
    assert_eq!(typed.drive("data")["inserted"]["cache"]["direct"], cell.direct, "{name}, {cell:?}: query-block");
    let direct = typed.opened_direct(&backing.path);
    assert_eq!(direct, cell.direct && backing.direct, "{name}, {cell:?}: O_DIRECT of the descriptors");

    let flushes = || backing.flushes.as_ref().map_or(0, |flushes| flushes());
    typed.must(&[&format!("write 0 128 128 {seed}"), &format!("write 0 2048 128 {seed}")]);
    let before = flushes();
    typed.must(&["flush 0"]);
    if backing.flushes.is_some() {
        assert!(flushes() > before, "{name}, {cell:?}: the guest's flush has not reached the bottom");
    }
    let kept = pattern(seed, 128, 128);
    assert!((backing.holds)(128 * 512, &kept), "{name}, {cell:?}: what was flushed is in the page cache only");

    let used = backing.used.as_ref().map(|used| used());
    typed.must(&["discard 0 2048 64", "unmap 0 2112 32", "zeroes 0 2144 32", "flush 0"]);
    if let (Some(used), Some(before)) = (&backing.used, used) {
        assert!(used() < before, "{name}, {cell:?}: {before} bytes were used before the discard, {} are now", used());
    }
    let zeros = typed.ask("read 0 2112 64 0");
    assert_eq!([zeros.status(), zeros.number("zeros")], [OK, 1], "{name}, {cell:?}: write-zeroes");
    if backing.is_block {
        let zeros = (backing.holds)(2112 * 512, &[0; 64 * 512]);
        assert!(zeros, "{name}, {cell:?}: write-zeroes has not reached the bottom");
    }
    let same = typed.ask(&format!("read 0 128 128 {seed}"));
    assert_eq!([same.status(), same.number("same")], [OK, 1], "{name}, {cell:?}: read");
    typed.monitor.kill();
    assert!((backing.holds)(128 * 512, &kept), "{name}, {cell:?}: what was flushed is gone with the monitor");
}
