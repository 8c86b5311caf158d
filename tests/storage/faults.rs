//! What the device mapper makes of a device: one that does not answer or answers late, that fails, that is full, that grows,
//! that is held.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::devices::{SECTORS, SIZE, Thin, loop_device};
use crate::dm::{self, Dm};
use crate::host::{self, Loop, LoopDevice, Memory};
use crate::modules;
use crate::monitor::{PATIENCE, Setup};
use crate::powercut::partitioned;
use crate::typed::{IOERR, Typed, pattern};

/// That disk 1 and QMP go on while a request of disk 0 is pending.
fn others_go_on(typed: &mut Typed, what: &str) {
    for n in 0..20 {
        typed.must(&[&format!("write 1 {n} 1 {n}"), &format!("read 1 {n} 1 {n}")]);
        assert_eq!(typed.client.call("query-status")["status"], "running");
    }
    typed.must(&["flush 1"]);
    let stats = typed.client.call("query-blockstats");
    assert_eq!(stats[0]["stats"]["in_flight_operations"], 1, "{what}: the request has been answered meanwhile");
    assert_eq!(stats[1]["stats"]["wr_operations"], 20);
}

#[test]
fn a_device_that_does_not_answer_delays_no_other_disk() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "below.img", SIZE);
    let dm = Dm::new("slow", SECTORS, "linear", &format!("{} 0", below.path.display()));
    for (rest, iothread, lines) in [
        ("direct=on,aio=io_uring", true, &["begin read 0 1024 8 1"][..]),
        ("direct=on,aio=threads", false, &["begin write 0 1024 8 1"]),
        ("direct=off,aio=io_uring", false, &["begin read 0 2048 8 1"]),
        ("direct=off,aio=io_uring", false, &["write 0 2048 8 1", "begin flush 0"]),
        ("direct=on,aio=io_uring", false, &["begin discard 0 2048 8"]),
        ("direct=off,aio=threads", true, &["begin read 0 4096 8 1"]),
    ] {
        let Some(mut typed) = Typed::beside_another(&memory, &dm.path, rest, iothread) else { return };
        let _resumed = Resumed(&dm);
        dm.suspend();
        for line in lines {
            let number = typed.send(line);
            typed.reply(number);
        }
        others_go_on(&mut typed, &format!("{rest}, {lines:?}"));
        dm.resume();
        typed.must(&["end 0"]);
        typed.quit();
    }
}

/// A read of the page cache starts a read-ahead, and the kernel waits for room in the queue of the device before it returns.
/// And more requests wait for the device than io_uring has workers by itself, which all disks of a loop share.
#[test]
fn a_stalled_device_with_a_full_queue_stops_neither_its_loop_nor_another_disk() {
    // More than the 128 requests that a loop device takes.
    const DEPTH: u64 = 200;
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let bytes = 64 * SIZE;
    let below = loop_device(&memory, "below.img", bytes);
    let dm = Dm::new("slow", 64 * SECTORS, "linear", &format!("{} 0", below.path.display()));
    let queue = LoopDevice::new(&dm.path, Loop::default());
    let words = format!("mode=blk-load op=mixed depth={DEPTH} indirect=on ms=3600000 end=acpi");
    let Some(setup) = Setup::guest(&words) else { return };
    let other = loop_device(&memory, "other.img", SIZE);
    let setup = setup.drive("slow", &queue.path, "direct=off");
    let mut monitor = setup.drive("other", &other.path, "direct=off").start();
    let mut client = monitor.qmp();
    monitor.serial.expect("load: begin");
    let _resumed = Resumed(&dm);
    dm.suspend();
    let until = Instant::now() + PATIENCE;
    while client.call("query-blockstats")[0]["stats"]["in_flight_operations"] != DEPTH {
        assert!(Instant::now() < until, "the queue does not fill");
    }
    let mut written = || {
        let stats = client.call("query-blockstats");
        assert_eq!(stats[0]["stats"]["in_flight_operations"], DEPTH, "the device has answered");
        stats[1]["stats"]["wr_operations"].as_u64().unwrap()
    };
    let before = written();
    let until = Instant::now() + PATIENCE;
    while written() < before + 100 {
        assert!(Instant::now() < until, "the other disk has no worker");
    }
    dm.resume();
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
}

/// Resumes the device also when the test has failed: nothing that waits for it could be ended.
struct Resumed<'a>(&'a Dm);

impl Drop for Resumed<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

#[test]
fn a_device_that_answers_five_seconds_late_delays_no_other_disk() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "below.img", SIZE);
    let dm = Dm::new("slow", SECTORS, "linear", &format!("{} 0", below.path.display()));
    let Some(mut typed) = Typed::beside_another(&memory, &dm.path, "direct=on", false) else { return };
    // Not from the start: the monitor looks at the device when it opens it.
    dm.load(SECTORS, "delay", &format!("{} 0 5000", below.path.display()));
    let began = Instant::now();
    let number = typed.send("begin write 0 1024 8 1");
    typed.reply(number);
    others_go_on(&mut typed, "dm-delay");
    typed.must(&["end 0"]);
    assert!(began.elapsed() >= Duration::from_secs(5), "the device was not slow");
    assert!(host::holds_at(&below.image, 1024 * 512, &pattern(1, 1024, 8)));
    typed.quit();
}

/// What the guest and the operator are told of a request of disk 0 that fails; then the machine must still work.
fn fails(typed: &mut Typed, line: &str, operation: &str, no_space: bool) {
    assert_eq!(typed.ask(line).status(), IOERR, "{line}");
    typed.check_failure(line, operation, no_space);
}

#[test]
fn eio_of_the_device_mapper_reaches_the_guest_and_the_machine_lives() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "below.img", SIZE);
    let linear = format!("{} 0", below.path.display());
    let dm = Dm::new("slow", SECTORS, "linear", &linear);
    // Of each minute none is up: all fails, or writes do.
    let [flakey, writes] = ["", " 1 error_writes"].map(|features| format!("{linear} 0 60{features}"));
    for (rest, target, parameters, lines) in [
        ("direct=on,aio=io_uring", "error", "", ["read 0 64 8 1", "write 0 64 8 1"]),
        ("direct=on,aio=threads", "flakey", &flakey, ["read 0 64 8 1", "write 0 64 8 1"]),
        ("direct=on,aio=io_uring", "flakey", &writes, ["write 0 64 8 1", "write 0 3 1 1"]),
        // What the page cache has taken fails when it is flushed.
        ("direct=off,aio=io_uring", "flakey", &writes, ["flush 0", "flush 0"]),
    ] {
        let Some(mut typed) = Typed::beside_another(&memory, &dm.path, rest, true) else { return };
        dm.load(SECTORS, target, parameters);
        for line in lines {
            if line == "flush 0" {
                typed.must(&["write 0 64 8 1"]);
            }
            fails(&mut typed, line, if line.starts_with("read") { "read" } else { "write" }, false);
        }
        // It recovers, and so does the disk.
        dm.load(SECTORS, "linear", &linear);
        typed.must(&["write 0 64 8 2", "flush 0"]);
        assert!(host::holds_at(&below.image, 64 * 512, &pattern(2, 64, 8)), "{rest}, {target}");
        typed.quit();
    }
}

#[test]
fn a_medium_error_of_a_scsi_disk_reaches_the_guest() {
    if !modules::ready() {
        return;
    }
    const OPTS: &str = "/sys/bus/pseudo/drivers/scsi_debug/opts";
    /// Where scsi_debug has its bad sectors.
    const BAD: u64 = 0x1234;
    let memory = Memory::new();
    let Some(mut typed) = Typed::beside_another(&memory, Path::new("/dev/sda"), "direct=on", true) else { return };
    std::fs::write(OPTS, "2").unwrap();
    fails(&mut typed, &format!("read 0 {BAD} 1 1"), "read", false);
    typed.must(&["write 0 64 8 1"]);
    std::fs::write(OPTS, "0").unwrap();
    typed.must(&[&format!("write 0 {BAD} 1 1")]);
    typed.quit();
}

#[test]
fn a_full_thin_pool_reaches_the_guest_and_a_discard_makes_room() {
    if !modules::ready() {
        return;
    }
    for direct in ["on", "off"] {
        let memory = Memory::new();
        // Sixteen blocks of 64 KiB for a volume of 128.
        let thin = Thin::new(&memory, 1 << 20, SIZE, "1 error_if_no_space");
        let Some(mut typed) = Typed::beside_another(&memory, &thin.thin.path, &format!("direct={direct}"), true) else {
            return;
        };
        let block = |n: u64| 128 * n;
        for n in 0..16 {
            typed.must(&[&format!("write 0 {} 128 1", block(n)), "flush 0"]);
        }
        assert_eq!(thin.used_blocks(), 16);
        if direct == "on" {
            fails(&mut typed, &format!("write 0 {} 128 1", block(16)), "write", true);
        } else {
            // The page cache takes it; its flush fails, and the host's kernel does not say why.
            typed.must(&[&format!("write 0 {} 128 1", block(16))]);
            fails(&mut typed, "flush 0", "write", false);
        }
        typed.must(&["discard 0 0 128", &format!("discard 0 {} 128", block(1))]);
        // A pool that was full refuses flushes too, until it sees within a second that it has space again.
        let until = Instant::now() + PATIENCE;
        while thin.used_blocks() > 14 || thin.pool.status().contains("out_of_data_space") {
            assert!(Instant::now() < until, "the discard gives no blocks back: {}", thin.pool.status());
        }
        typed.must(&[&format!("write 0 {} 128 2", block(20)), "flush 0"]);
        assert_eq!(thin.used_blocks(), 15);
        typed.quit();
    }
}

#[test]
fn block_resize_follows_a_mapped_device_that_has_grown() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "below.img", 2 * SIZE);
    let linear = format!("{} 0", below.path.display());
    let dm = Dm::new("grows", SECTORS, "linear", &linear);
    let Some(setup) = Typed::setup() else { return };
    let mut typed = Typed::start(setup.drive("data", &dm.path, "direct=on"));
    dm.load(2 * SECTORS, "linear", &linear);
    typed.client.call_with("block_resize", &json!({"device": "data", "size": 2 * SIZE}));
    assert_eq!(typed.ask("tell 0").number("sectors"), 2 * SECTORS);
    typed.must(&[&format!("write 0 {} 8 1", 2 * SECTORS - 8)]);
    typed.quit();
}

#[test]
fn a_device_that_the_device_mapper_holds_is_refused_for_writing() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let below = loop_device(&memory, "below.img", SIZE);
    let dm = Dm::new("holder", SECTORS, "linear", &format!("{} 0", below.path.display()));
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let (code, told) = setup.drive("vda", &below.path, "direct=on").run();
    assert_eq!(code, 1, "{told}");
    for part in ["\"vda\"", below.path.to_str().unwrap(), "in use", "readonly=on"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    // The one on top is free, and its machine keeps others off.
    let mut typed = Typed::start(Typed::setup().unwrap().drive("vda", &dm.path, "direct=on"));
    typed.must(&["write 0 0 8 1", "flush 0"]);
    let (code, told) = Setup::guest("mode=hello").unwrap().drive("vdb", &dm.path, "").run();
    assert_eq!(code, 1, "{told}");
    typed.quit();
}

#[test]
fn a_disk_whose_partition_is_in_use_is_refused_and_names_it() {
    if !modules::ready() {
        return;
    }
    let memory = Memory::new();
    let disk = partitioned(&memory, Loop { partitions: true, ..Loop::default() });
    let partition = PathBuf::from(format!("{}p1", disk.path.display()));
    let _user = Dm::new("user", dm::sectors(&partition), "linear", &format!("{} 0", partition.display()));
    let (code, told) = Setup::guest("mode=hello").unwrap().drive("vda", &disk.path, "direct=on").run();
    let name = partition.file_name().unwrap().to_str().unwrap();
    let wanted = format!("in use on this host (partition {name} is part of /dev/mapper/user)");
    assert!(code == 1 && told.contains(&wanted), "{told}");
}

#[test]
fn the_guest_is_told_the_topology_of_a_scsi_disk() {
    if !modules::ready() {
        return;
    }
    for direct in ["on", "off"] {
        let Some(setup) = Typed::setup() else { return };
        let mut typed = Typed::start(setup.drive("data", Path::new("/dev/sda"), &format!("direct={direct}")));
        typed.check_topology(0, Path::new("/dev/sda"), 512);
        let told = typed.ask("tell 0");
        // What scsi_debug was loaded with.
        assert_eq!([told.number("physical_exp"), told.number("opt_io")], [3, 1024]);
        typed.quit();
    }
}
