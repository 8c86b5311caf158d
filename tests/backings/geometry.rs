//! Sector sizes: a guest's sectors are 512 bytes unless the user wants others, whatever the host's device has; what the
//! device prefers is told as topology.

use crate::host::{self, Loop, Memory};
use crate::monitor::Setup;
use crate::native::{SIZE, can, loop_device};
use crate::typed::{OK, Typed, pattern};

const DIRECT: [&str; 4] =
    ["direct=on,aio=io_uring", "direct=on,aio=threads", "direct=off,aio=io_uring", "direct=off,aio=threads"];
const SECTORS_4096: Loop = Loop { sector: 4096, direct: false, read_only: false, partitions: false };

#[test]
fn sectors_of_512_bytes_work_on_a_device_with_4096() {
    if !can() {
        return;
    }
    for rest in DIRECT {
        let memory = Memory::new();
        let device = loop_device(&memory, "loop.img", SIZE, SECTORS_4096);
        let Some(setup) = Typed::setup() else { return };
        let mut typed = Typed::start(setup.drive("data", &device.path, rest));
        assert_eq!(typed.ask("tell 0").number("blk_size"), 512, "{rest}");
        typed.must(&["write 0 0 32 1", "write 0 3 1 2", "zeroes 0 5 1", "unmap 0 10 1", "write 0 15 2 3", "flush 0"]);
        let expected = [
            (0, 3, 1, "same"),
            (3, 1, 2, "same"),
            (4, 1, 1, "same"),
            (5, 1, 0, "zeros"),
            (6, 4, 1, "same"),
            (10, 1, 0, "zeros"),
            (11, 4, 1, "same"),
            (15, 2, 3, "same"),
            (17, 15, 1, "same"),
        ];
        for (sector, count, seed, what) in expected {
            let reply = typed.ask(&format!("read 0 {sector} {count} {seed}"));
            assert_eq!([reply.status(), reply.number(what)], [OK, 1], "{rest}: {count} sectors at {sector}");
            let bytes = if seed == 0 { vec![0; 512] } else { pattern(seed, sector, count) };
            assert!(host::holds_at(&device.image, sector * 512, &bytes), "{rest}: sector {sector} at the bottom");
        }
        // The last of them, and one that is not there.
        let end = SIZE / 512;
        typed.must(&[&format!("write 0 {} 1 4", end - 1)]);
        assert_eq!(typed.ask(&format!("read 0 {} 1 4", end - 1)).number("same"), 1, "{rest}");
        assert_ne!(typed.ask(&format!("read 0 {end} 1 4")).status(), OK, "{rest}");
        typed.quit();
    }
}

#[test]
fn neighbouring_sectors_may_be_written_at_once_on_a_device_with_4096() {
    if !can() {
        return;
    }
    for rest in DIRECT {
        let memory = Memory::new();
        let device = loop_device(&memory, "loop.img", SIZE, SECTORS_4096);
        // Each request is a sector of a few blocks, so most of those in flight share a block.
        let words = "mode=blk-verify depth=32 bs=512 region=64K count=1000 end=acpi";
        let Some(setup) = Setup::guest(words) else { return };
        setup.iothread("io1").drive("data", &device.path, &format!("{rest},iothread=io1")).start().expect_ok();
    }
}

#[test]
fn the_guest_is_told_what_the_host_says_of_its_device() {
    if !can() {
        return;
    }
    for sector in [512, 4096] {
        let memory = Memory::new();
        let device = loop_device(&memory, "loop.img", SIZE, Loop { sector, ..Loop::default() });
        for rest in ["direct=on", "direct=off"] {
            let Some(setup) = Typed::setup() else { return };
            let mut typed = Typed::start(setup.drive("data", &device.path, rest));
            typed.check_topology(0, &device.path, 512);
            // The same of a disk that is plugged, in a slot that had none.
            let other = loop_device(&memory, "other.img", SIZE, Loop { sector, ..Loop::default() });
            typed.plug("plugged", &other.path, 1, rest == "direct=on", "io_uring");
            typed.check_topology(1, &other.path, 512);
            typed.quit();
        }
    }
}

#[test]
fn the_user_may_choose_both_block_sizes() {
    let memory = Memory::new();
    let file = memory.image("disk.img", SIZE);
    for (rest, block, physical_exp) in [
        ("", 512, 0),
        (",logical_block_size=512,physical_block_size=4096", 512, 3),
        (",logical_block_size=4096,physical_block_size=4096", 4096, 0),
        (",logical_block_size=4096,physical_block_size=16384", 4096, 2),
        (",physical_block_size=65536", 512, 7),
    ] {
        let Some(setup) = Typed::setup() else { return };
        let mut typed = Typed::start(setup.drive("data", &file, &format!("direct=off{rest}")));
        let told = typed.ask("tell 0");
        assert_eq!([told.number("blk_size"), told.number("physical_exp")], [block, physical_exp], "{rest}");
        // The guest of a disk with large blocks counts in sectors of 512 bytes all the same.
        assert_eq!(told.number("sectors"), SIZE / 512);
        typed.must(&["write 0 8 8 1", "flush 0"]);
        typed.quit();
    }
    for rest in [
        "logical_block_size=1024",
        "logical_block_size=0",
        "logical_block_size=x",
        "physical_block_size=1000",
        "logical_block_size=4096,physical_block_size=512",
        "physical_block_size=4194304",
    ] {
        let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
        let (code, told) = setup.drive("data", &file, rest).run();
        assert_eq!(code, 2, "{rest}: {told}");
        assert!(told.contains("block_size"), "{rest}: {told}");
    }
}
