//! The matrix: what each kind of file or device must do with each way of using it.

use std::any::Any;
use std::path::PathBuf;

use crate::typed::{OK, Typed, pattern};

/// A number that is asked for again and again.
pub type Count = Box<dyn Fn() -> u64>;
/// Whether these bytes, written at this offset of the disk, are there.
pub type Holds = Box<dyn Fn(u64, &[u8]) -> bool>;

/// A file or device that a drive is given, and what can be seen of it from below.
pub struct Backing {
    pub name: &'static str,
    pub path: PathBuf,
    pub is_block: bool,
    /// Whether a descriptor with `O_DIRECT` is to be had of it.
    pub direct: bool,
    /// How many flushes have come out at the bottom; `None` where there is nothing to flush.
    pub flushes: Option<Count>,
    /// Whether these bytes, written at this offset of the disk, are where they outlive the host's page cache.
    pub holds: Holds,
    /// How many bytes are used up, where a discard gives them back.
    pub used: Option<Count>,
    /// How many discards have come out at the bottom; `None` where it takes none, or where `used` says it.
    pub discards: Option<Count>,
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

fn cell(n: u32) -> Cell {
    Cell {
        direct: n & 1 != 0,
        aio: if n & 2 != 0 { "threads" } else { "io_uring" },
        iothread: n & 4 != 0,
        plugged: n & 8 != 0,
    }
}

/// Every combination.
pub const ALL: [u32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Runs these cells. A machine each, which is killed when the guest's flush has been answered.
pub fn check(backing: &Backing, cells: &[u32]) {
    for &n in cells {
        let Some(mut typed) = start(backing, cell(n)) else { return };
        check_cell(backing, cell(n), &mut typed, u64::from(n) + 1);
    }
    eprintln!("matrix: {}: {} cells", backing.name, cells.len());
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

    let count = |counter: &Option<Count>| counter.as_ref().map(|counter| counter());
    typed.must(&[&format!("write 0 128 128 {seed}"), &format!("write 0 2048 128 {seed}")]);
    let before = count(&backing.flushes);
    typed.must(&["flush 0"]);
    let after = count(&backing.flushes);
    assert!(before.is_none() || after > before, "{name}, {cell:?}: the guest's flush has not reached the bottom");

    let before = [&backing.used, &backing.discards].map(count);
    typed.must(&["discard 0 2048 64", "flush 0"]);
    let after = [&backing.used, &backing.discards].map(count);
    assert!(
        before[0].is_none() || after[0] < before[0],
        "{name}, {cell:?}: used before the discard, after: {before:?}, {after:?}"
    );
    assert!(before[1].is_none() || after[1] > before[1], "{name}, {cell:?}: the discard has not reached the bottom");
    typed.must(&["unmap 0 2112 32", "zeroes 0 2144 32", "flush 0"]);
    let zeros = typed.ask("read 0 2112 64 0");
    assert_eq!([zeros.status(), zeros.number("zeros")], [OK, 1], "{name}, {cell:?}: write-zeroes");
    let same = typed.ask(&format!("read 0 128 128 {seed}"));
    assert_eq!([same.status(), same.number("same")], [OK, 1], "{name}, {cell:?}: read");

    typed.monitor.kill();
    let kept = (backing.holds)(128 * 512, &pattern(seed, 128, 128));
    assert!(kept, "{name}, {cell:?}: what was flushed is in the page cache only");
    let zeros = !backing.is_block || (backing.holds)(2112 * 512, &[0; 64 * 512]);
    assert!(zeros, "{name}, {cell:?}: write-zeroes has not reached the bottom");
}
