//! Disks as a guest and an operator see them: every kind of request, bad hosts, bad guests, a file that blocks.

use std::fs;
use std::process::Command;

use serde_json::json;

use crate::monitor::{Monitor, Setup, skipped};
use crate::stall::Stall;

const SIZE: u64 = 8 << 20;

#[test]
fn every_request_works_with_and_without_the_page_cache_on_each_engine() {
    for rest in [
        "direct=off,aio=io_uring",
        "direct=on,aio=io_uring",
        "direct=off,aio=threads",
        "direct=on,aio=threads",
        "direct=on,aio=native",
    ] {
        let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
        let mut monitor = setup.disk("vda", SIZE, rest).start();
        monitor.expect_ok();
        assert!(!monitor.serial.text().contains("WRONG"), "{rest}");
    }
}

#[test]
fn what_the_guest_wrote_is_in_the_file_and_what_is_in_the_file_is_read() {
    for rest in ["direct=off", "direct=on"] {
        let Some(setup) = Setup::guest("mode=blk-verify count=2000 region=1M end=acpi") else { return };
        let mut monitor = setup.disk("vda", SIZE, rest).start();
        monitor.expect_ok();
        let file = fs::read(monitor.folder.path("vda.img")).unwrap();
        assert_eq!(file.len() as u64, SIZE);
        // The guest marks each sector it writes with the sector's number.
        let marked = |n: usize| file[n * 512..][..8] == (n as u64).to_le_bytes();
        assert!((1..2048).filter(|&n| marked(n)).count() > 1000, "{rest}");
        assert!(file[1 << 20..].iter().all(|&byte| byte == 0), "{rest}: beyond the region");
    }
}

#[test]
fn a_read_only_drive_is_read_and_not_written() {
    let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
    let path = setup.folder.path("ro.img");
    fs::write(&path, vec![0x11; SIZE as usize]).unwrap();
    let setup = setup.drive("vda", &path, "readonly=on,direct=off").drive("vdb", &path, "readonly=on");
    let mut monitor = setup.start();
    monitor.expect_ok();
    assert!(monitor.serial.text().contains("step=write-to-read-only status=1"));
    assert!(fs::read(&path).unwrap().iter().all(|&byte| byte == 0x11));
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_down_and_the_log_says_so() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let mut monitor = setup.disk("vda", SIZE + 511, "direct=off").start();
    monitor.expect_ok();
    assert!(monitor.serial.text().contains(&format!("sectors={} ", SIZE / 512)));
    let log = monitor.log.text();
    assert!(log.contains("\"vda\"") && log.contains("511 bytes"), "{log}");
}

#[test]
fn a_file_that_another_machine_writes_is_refused_and_its_holder_named() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let holder = setup.disk("vda", SIZE, "direct=off").start();
    let _ready = holder.qmp();
    let path = holder.folder.path("vda.img");
    for rest in ["direct=off", "direct=off,readonly=on"] {
        let (code, told) = Setup::guest("mode=hello").unwrap().drive("vdx", &path, rest).run();
        assert_eq!(code, 1);
        let who = format!("process {} (loopvisor)", holder.pid());
        for part in ["\"vdx\"", "vda.img", "in use by", &who] {
            assert!(told.contains(part), "{part:?} is not in {told}");
        }
    }
    drop(holder);
}

#[test]
fn a_file_of_the_vm_cannot_be_its_writable_drive_too() {
    for (option, is_kernel) in [("-D", false), ("-mem-path", false), ("-initrd", false), ("-kernel", true)] {
        for check in [false, true] {
            let Some(setup) = Setup::guest("mode=hello") else { return };
            // Its folder outlives the run.
            let owner = Setup::bare();
            let path = owner.folder.path("both.img");
            match is_kernel {
                true => fs::copy(crate::monitor::guest(), &path).map(drop).unwrap(),
                false => fs::write(&path, vec![0x5a; 64 << 20]).unwrap(),
            }
            let before = fs::read(&path).unwrap();
            let setup = if is_kernel { Setup::bare() } else { setup };
            let setup = setup.option(option, path.to_str().unwrap()).drive("vda", &path, "direct=off");
            let setup = setup.option("-m", "64M").option("-machine", "mem-share=on");
            let (code, told) = if check { setup.flag("-check") } else { setup }.run();
            let (exit, wanted) = match option {
                "-D" => (2, "-drive id=vda has this file: name another"),
                "-mem-path" => (1, "is in use by this VM, as its memory"),
                _ => (1, "is in use by this VM, as its drive \"vda\", which writes it"),
            };
            assert_eq!(code, exit, "{option}: {told}");
            assert!(told.contains("both.img") && told.contains(wanted), "{option}: {told}");
            assert!(fs::read(&path).unwrap() == before, "{option} changed the file");
        }
    }
}

#[test]
fn a_log_goes_to_no_block_device_and_no_file_that_the_vm_reads() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let device = setup.folder.path("device");
    let made = Command::new("mknod").arg(&device).args(["b", "7", "0"]).status().is_ok_and(|status| status.success());
    if made {
        let (code, told) = setup.option("-D", device.to_str().unwrap()).run();
        assert_eq!(code, 1, "{told}");
        assert!(told.contains("a block device cannot be the log"), "{told}");
    } else {
        skipped("this user may not make a device node");
    }
    for check in [false, true] {
        let owner = Setup::bare();
        let image = owner.folder.path("image");
        fs::write(&image, vec![0x5a; 4096]).unwrap();
        let setup = Setup::guest("mode=hello").unwrap().drive("vda", &image, "direct=off,readonly=on");
        let setup = setup.option("-D", image.to_str().unwrap());
        let (code, told) = if check { setup.flag("-check") } else { setup }.run();
        assert_eq!(code, 2, "{told}");
        assert!(told.contains("-drive id=vda has this file: name another"), "{told}");
        assert_eq!(fs::read(&image).unwrap(), [0x5a; 4096]);
    }
}

#[test]
fn two_machines_read_one_file() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let first = setup.disk("vda", SIZE, "direct=off,readonly=on").start();
    let _ready = first.qmp();
    let second = Setup::guest("mode=blk-check end=acpi").unwrap();
    second.drive("vda", &first.folder.path("vda.img"), "direct=off,readonly=on").start().expect_ok();
}

/// The shell's words that mount a file system of one MiB at the folder $0, with a file of 16 MiB in it that has no
/// place there, and become "$@".
const SMALL: &str = "mount -t tmpfs -o size=1M none \"$0\" && truncate -s 16M \"$0/d.img\" && exec \"$@\"";

#[test]
fn a_write_without_space_on_the_host_is_an_io_error_and_an_event_and_the_guest_goes_on() {
    let Some(setup) = Setup::guest("mode=blk-load op=write depth=4 count=2000 end=hang") else { return };
    let probe = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("a private mount is refused: {probe:?}"));
    }
    let small = setup.folder.path("small");
    fs::create_dir(&small).unwrap();
    let setup = setup.iothread("io1").drive("vda", &small.join("d.img"), "direct=off,iothread=io1").flag("-S");
    let monitor = setup.under(&["unshare", "-m", "sh", "-c", SMALL, small.to_str().unwrap()]).start();
    let mut client = monitor.qmp();
    assert_eq!(client.call("query-block")[0]["io-status"], "ok");
    client.call("cont");
    let event = client.await_event("BLOCK_IO_ERROR");
    assert_eq!(
        event["data"],
        json!({"qom-path": "/machine/peripheral/vda", "device": "vda", "node-name": "vda", "operation": "write",
               "action": "report", "nospace": true, "reason": "No space left on device (os error 28)"})
    );
    // The guest counts its errors and gets an answer to every request.
    monitor.serial.expect("requests ended with an error");
    assert_eq!(client.call("query-block")[0]["io-status"], "failed");
    let stats = client.call("query-blockstats")[0]["stats"].take();
    let number = |name: &str| stats[name].as_u64().unwrap();
    assert_eq!(number("wr_operations") + number("failed_wr_operations"), 2000);
    assert!(number("failed_wr_operations") > 1000);
    assert_eq!(client.call("query-status")["status"], "running");
    // Thousands of failures, and a log that is read by people.
    assert!(monitor.log.text().lines().count() < 100, "{}", monitor.log.text());
}

#[test]
fn a_reset_with_requests_in_flight_leaves_nothing_behind() {
    for rest in ["direct=off,aio=io_uring", "direct=on,aio=io_uring", "direct=on,aio=threads"] {
        let Some(setup) = Setup::guest("mode=blk-reset count=50 op=mixed end=acpi") else { return };
        let mut monitor = setup.iothread("io1").disk("vda", SIZE, &format!("{rest},iothread=io1")).start();
        monitor.expect_ok();
    }
}

#[test]
fn a_hostile_guest_harms_itself_alone_and_the_log_stays_short() {
    let Some(setup) = Setup::guest("mode=blk-hostile wait_ms=5 end=hang") else { return };
    let monitor = setup.iothread("io1").disk("vda", SIZE, "direct=off,iothread=io1").start();
    let mut client = monitor.qmp();
    monitor.serial.expect("guest: ok");
    assert!(monitor.serial.text().matches("hostile: case=").count() > 70);
    assert_eq!(client.call("query-status")["status"], "running");
    assert!(client.call("query-iothreads")[0]["loop"]["failed"] == 0);
    let log = monitor.log.text();
    assert!(log.lines().count() < 200 && log.len() < 40_000, "{} lines", log.lines().count());
}

/// A machine with a disk that blocks and a good one on the same loop. The file comes last and so is dropped first: who waits
/// for it could not be ended.
pub fn with_a_stalling_disk(words: &str, home: &str) -> Option<(Monitor, Stall)> {
    let setup = Setup::guest(words)?;
    let stall = Stall::new(&setup.folder, SIZE)?;
    let (mounting, device) = stall.mounting();
    let setup = if home.is_empty() { setup } else { setup.iothread("io1") };
    let setup = setup.drive("slow", stall.path(), &format!("direct=off{home}")).disk(
        "good",
        SIZE,
        &format!("direct=off{home}"),
    );
    let monitor = setup.under(&mounting).stdin(device).flag("-S").start();
    let _ready = monitor.qmp();
    Some((monitor, stall))
}

#[test]
fn a_stalled_disk_delays_neither_another_disk_on_its_loop_nor_qmp() {
    for home in ["", ",iothread=io1"] {
        // The guest has requests in flight on both disks; the good one ends its thousand, the slow one none.
        let words = "mode=blk-load depth=4 count=1000 end=acpi";
        let Some((mut monitor, stall)) = with_a_stalling_disk(words, home) else { return };
        let mut client = monitor.qmp();
        stall.stall();
        client.call("cont");
        stall.await_held(1);
        let done = |client: &mut crate::client::Client| {
            let stats = client.call("query-blockstats");
            [0, 1].map(|disk: usize| stats[disk]["stats"]["rd_operations"].as_u64().unwrap())
        };
        assert!((0..100_000).any(|_| done(&mut client)[1] == 1000), "the good disk waits");
        assert_eq!(done(&mut client)[0], 0);
        for command in ["query-status", "query-block", "query-blockstats", "query-iothreads", "query-cpus-fast"] {
            client.call(command);
        }
        stall.release();
        monitor.expect_ok();
    }
}

#[test]
fn stop_waits_for_a_stalled_request_and_other_commands_do_not() {
    let words = "mode=blk-load depth=4 count=1000 end=acpi";
    let Some((mut monitor, stall)) = with_a_stalling_disk(words, ",iothread=io1") else { return };
    let [mut client, mut other] = [(); 2].map(|()| monitor.qmp());
    stall.stall();
    client.call("cont");
    stall.await_held(1);
    client.ask("stop");
    // Until the last request is back the machine has not stopped.
    for _ in 0..100 {
        assert_eq!(other.call("query-status")["status"], "running");
    }
    assert_ne!(other.call("query-blockstats")[0]["stats"]["in_flight_operations"], 0);
    assert_eq!(other.events_kept(), 1, "RESUME and no STOP");
    stall.release();
    assert_eq!(client.event()["event"], "RESUME");
    assert_eq!(client.event()["event"], "STOP");
    assert_eq!(client.answer()["return"], json!({}));
    assert_eq!(other.call("query-blockstats")[0]["stats"]["in_flight_operations"], 0);
    client.call("cont");
    monitor.expect_ok();
}

#[test]
fn quit_with_a_stalled_request_ends_when_the_file_goes_on() {
    let words = "mode=blk-load depth=4 count=1000 end=acpi";
    let Some((mut monitor, stall)) = with_a_stalling_disk(words, ",iothread=io1") else { return };
    let mut client = monitor.qmp();
    stall.stall();
    client.call("cont");
    stall.await_held(1);
    client.call("quit");
    client.await_event("SHUTDOWN");
    stall.release();
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn direct_disk_works_where_statx_is_forbidden() {
    let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
    if !Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success()) {
        return skipped("strace is not installed");
    }
    let calls = setup.folder.path("calls");
    // As older container run times do.
    let strace = ["strace", "-f", "-o", calls.to_str().unwrap(), "-e", "inject=statx:error=EPERM"].map(str::to_owned);
    let setup = setup.disk("vda", SIZE, "direct=on").under(&strace.each_ref().map(String::as_str));
    setup.start().expect_ok();
}

#[test]
fn get_id_tells_the_serial_number_and_without_one_the_id() {
    let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
    let setup = setup.disk("vda", SIZE, "direct=off,serial=SN-0123456789-ABCDEF").disk("vdb", SIZE, "direct=off");
    let mut monitor = setup.start();
    monitor.expect_ok();
    let text = monitor.serial.text();
    assert!(text.contains("disk=0 id=SN-0123456789-ABCDEF\r\n") || text.contains("disk=0 id=SN-0123456789-ABCDEF\n"));
    assert!(text.contains("disk=1 id=vdb"));
    assert!(!monitor.log.text().contains("serial"), "{}", monitor.log.text());
}

#[test]
fn an_id_that_is_cut_to_a_serial_number_is_warned_of() {
    let id = "36-bytes-0123456789-0123456789-01234";
    let Some(setup) = Setup::guest("mode=blk-plug end=acpi") else { return };
    let monitor = setup.disk(id, SIZE, "direct=off").start();
    monitor.serial.expect("disk=0 sectors=16384 id=36-bytes-0123456789- ");
    let warning =
        |id: &str| format!("drive \"{id}\": the guest reads the first 20 bytes of the id as the serial number");
    monitor.log.expect(&warning(id));
    // The same of a node, unless the device has a serial number.
    let mut client = monitor.qmp();
    for (name, serial) in [("node-with-a-long-name-a", false), ("node-with-a-long-name-b", true)] {
        let file = monitor.folder.path(name);
        fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        client.call_with("blockdev-add", &json!({"node-name": name, "file": {"filename": file.to_str().unwrap()}}));
        let mut device = json!({"id": name, "driver": "virtio-blk-mmio"});
        if serial {
            device["serial"] = json!("own");
        }
        client.call_with("device_add", &device);
        if serial {
            monitor.serial.expect(" id=own ");
            assert!(!monitor.log.text().contains(&warning(name)), "{}", monitor.log.text());
        } else {
            monitor.log.expect(&warning(name));
        }
    }
}

#[test]
fn eleven_drives_work_and_the_twelfth_is_refused_by_rule_d3_4() {
    let drives = |count: usize| {
        let setup = Setup::guest("mode=blk-load op=mixed depth=2 count=50 end=acpi")?;
        Some((0..count).fold(setup, |setup, n| setup.disk(&format!("d{n}"), 1 << 20, "direct=off")))
    };
    let Some(setup) = drives(11) else { return };
    setup.start().expect_ok();
    let (code, told) = drives(12).unwrap().run();
    assert_eq!(code, 2, "{told}");
    assert!(told.contains("rule D3.4"), "{told}");
}
