//! Hot-plug as an operator and a guest see it: disks come into slots, are used, grow, and go.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup};
use crate::stall::Stall;

const SIZE: u64 = 8 << 20;

/// A running guest that drives every disk slot.
fn guest(words: &str, more: impl FnOnce(Setup) -> Setup) -> Option<(Monitor, Client)> {
    let setup = Setup::guest(&format!("mode=blk-plug end=acpi {words}"))?.stdin(Stdio::piped());
    let monitor = more(setup).start();
    monitor.serial.expect("plug: begin");
    let client = monitor.qmp();
    Some((monitor, client))
}

/// A file of zeroes in the test's folder.
fn image(monitor: &Monitor, name: &str, bytes: u64) -> PathBuf {
    let path = monitor.folder.path(name);
    fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn node(name: &str, file: &Path) -> Value {
    let file = json!({"driver": "file", "filename": file.to_str().unwrap()});
    json!({"node-name": name, "file": file, "cache": {"direct": false}})
}

#[track_caller]
fn plug(client: &mut Client, name: &str, file: &Path, addr: &str) {
    client.call_with("blockdev-add", &node(name, file));
    client.call_with("device_add", &json!({"id": name, "driver": "virtio-blk-mmio", "addr": addr}));
}

#[track_caller]
fn unplug(client: &mut Client, name: &str) {
    client.call_with("device_del", &json!({"id": name}));
    let event = client.await_event("DEVICE_DELETED");
    assert_eq!(event["data"], json!({"device": name, "path": name}));
}

#[test]
fn a_disk_comes_is_used_and_goes_and_the_guest_hears_of_each_by_an_interrupt() {
    let Some((mut monitor, mut client)) = guest("", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    plug(&mut client, "data", &file, "0x1");
    monitor.serial.expect(&format!("plug: disk=1 sectors={} id=data get_id=0 write=0 read=0 same=1", SIZE / 512));
    unplug(&mut client, "data");
    monitor.serial.expect("plug: disk=1 sectors=0 read=1");
    let mark = (SIZE / 512) ^ 0x706c_7567;
    assert_eq!(fs::read(&file).unwrap()[SIZE as usize - 4096..][..8], mark.to_le_bytes());
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_plug_and_an_unplug_are_told_in_two_steps() {
    let Some((mut monitor, mut client)) = guest("", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    let expect = |monitor: &Monitor, lines: &[String]| {
        let is_there = |text: &str| {
            let whole = &text[..=text.rfind('\n')?];
            let told: Vec<_> = whole.lines().filter(|line| line.contains("disk=1 ")).collect();
            (told.len() == lines.len()).then(|| told.iter().zip(lines).all(|(told, line)| told.starts_with(line)))
        };
        assert_eq!(monitor.serial.wait(PATIENCE, |text, _| is_there(text)), Some(true), "{}", monitor.serial.text());
    };
    let whole = |bytes: u64| format!("plug: disk=1 sectors={} id=data ", bytes / 512);
    let mut lines = Vec::new();
    for _ in 0..2 {
        plug(&mut client, "data", &file, "0x1");
        lines.extend(["plug: step disk=1 id=data get_id=0".to_string(), whole(SIZE)]);
        expect(&monitor, &lines);
        unplug(&mut client, "data");
        lines.extend(["plug: step disk=1 id= get_id=0".to_string(), "plug: disk=1 sectors=0 read=1".to_string()]);
        expect(&monitor, &lines);
    }
    // Growing is one step.
    plug(&mut client, "data", &file, "0x1");
    lines.extend(["plug: step disk=1 id=data get_id=0".to_string(), whole(SIZE)]);
    expect(&monitor, &lines);
    client.call_with("block_resize", &json!({"device": "data", "size": 2 * SIZE}));
    lines.push(whole(2 * SIZE));
    expect(&monitor, &lines);
    monitor.type_in("q");
    monitor.expect_ok();
}

/// What is wrong with a command: class and text.
#[track_caller]
fn refusal(client: &mut Client, command: &str, arguments: &Value) -> (String, String) {
    client.mistake(&json!({"execute": command, "arguments": arguments}).to_string())
}

/// How many descriptors a process has open, when those of others are not just being opened or closed.
fn descriptors(monitor: &Monitor) -> usize {
    fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().count()
}

/// The first numbers of the blocks of a file that the guest's load has marked.
fn marked(file: &Path) -> Vec<u64> {
    let bytes = fs::read(file).unwrap();
    bytes.chunks(4096).map(|block| u64::from_le_bytes(block[..8].try_into().unwrap())).collect()
}

/// The numbers behind `ok=` and `errors=` in the last line about the end of a load.
fn load_ended(monitor: &Monitor) -> [u64; 2] {
    let ended = monitor.serial.wait(PATIENCE, |text, _| {
        // The first: a disk that comes later may have had its load too by now.
        let (_, line) = text.split_once("load ended ok=")?;
        let (ok, rest) = line.split_once(" errors=")?;
        let (errors, _) = rest.split_once('\n')?;
        Some([ok.parse().ok()?, errors.parse().ok()?])
    });
    ended.expect("the load ends")
}

#[test]
fn a_drive_of_the_command_line_goes_too_and_its_slot_and_its_iothread_serve_the_next() {
    let setup = |setup: Setup| setup.iothread("io1").disk("vda", SIZE, "direct=off,iothread=io1");
    let Some((mut monitor, mut client)) = guest("", setup) else { return };
    let [first, second] = [monitor.folder.path("vda.img"), image(&monitor, "b.img", 2 * SIZE)];
    unplug(&mut client, "vda");
    monitor.serial.expect("plug: disk=0 sectors=0 read=1");
    // Its file is anybody's.
    let other = Setup::guest("mode=blk-check end=acpi").unwrap().drive("vda", &first, "direct=off");
    other.start().expect_ok();
    let events = |client: &mut Client| client.call("query-iothreads")[0]["loop"]["events"].as_u64().unwrap();
    let before = events(&mut client);
    plug(&mut client, "b", &second, "0x0");
    monitor.serial.expect(&format!("plug: disk=0 sectors={} id=b get_id=0 write=0 read=0 same=1", 2 * SIZE / 512));
    assert!(events(&mut client) > before, "rule D1.5 is about what is asked for: the slot stays where it is");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn what_was_written_before_an_unplug_is_on_the_disk_and_what_was_on_its_way_ends_in_an_error() {
    for (cache, aio) in [(false, "native"), (true, "native"), (false, "threads"), (true, "threads")] {
        let Some((mut monitor, mut client)) = guest("load=on depth=32", |setup| setup) else { return };
        let file = image(&monitor, "data.img", 4 * SIZE);
        let mut node = node("data", &file);
        (node["cache"]["direct"], node["aio"]) = (json!(cache), json!(aio));
        client.call_with("blockdev-add", &node);
        client.call_with("device_add", &json!({"id": "data", "driver": "virtio-blk-device", "lun": 1}));
        monitor.serial.expect("plug: disk=2 sectors=");
        let written = |client: &mut Client| client.call("query-blockstats")[0]["stats"]["wr_operations"].as_u64();
        let until = Instant::now() + PATIENCE;
        // One of them is the guest's trial, before the load.
        while written(&mut client) < Some(201) {
            assert!(Instant::now() < until, "the load stands still");
        }
        unplug(&mut client, "data");
        let [ok, errors] = load_ended(&monitor);
        assert!(ok >= 200 && (1..=32).contains(&errors), "ok {ok}, errors {errors}");
        let blocks = 4 * SIZE / 4096;
        for (number, mark) in (0..ok.min(blocks - 1)).zip(marked(&file)) {
            assert_eq!(mark, number + 1, "direct {cache}, {aio}");
        }
        monitor.type_in("q");
        monitor.expect_ok();
    }
}

#[test]
fn a_request_to_a_disk_that_was_pulled_never_reaches_the_one_that_is_plugged_next() {
    let Some((mut monitor, mut client)) = guest("load=on depth=32 count=32", |setup| setup) else { return };
    let [first, second] = [("a.img", SIZE), ("b.img", 2 * SIZE)].map(|(name, bytes)| image(&monitor, name, bytes));
    // Requests lie in the ring when the machine stands: a second's worth is two.
    client.call("stop");
    plug(&mut client, "a", &first, "0x0");
    client.call_with("block_set_io_throttle", &json!({"device": "a", "iops": 2}));
    client.call("cont");
    let waiting = |client: &mut Client| client.call("query-blockstats")[0]["stats"]["throttled_operations"].as_u64();
    let until = Instant::now() + PATIENCE;
    while waiting(&mut client) < Some(30) {
        assert!(Instant::now() < until, "the guest stands still");
    }
    client.call("stop");
    unplug(&mut client, "a");
    plug(&mut client, "b", &second, "0x0");
    assert_eq!(client.call("query-block")[0]["device"], "b");
    let writes = client.call("query-blockstats")[0]["stats"]["wr_operations"].take();
    client.call("cont");
    let [_, errors] = load_ended(&monitor);
    assert_eq!(writes, 0);
    assert!((20..=32).contains(&errors), "of the 32 in the ring {errors} failed, and the rest went to the other disk");
    monitor.serial.expect("sectors=32768 id=b get_id=0 write=0 read=0 same=1");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn rules_d1_5_and_d2_5_and_every_other_mistake_is_told_and_leaves_nothing_behind() {
    let Some((monitor, mut client)) = guest("", |setup| setup.disk("root", SIZE, "direct=off")) else { return };
    let [data, spare] = ["data.img", "spare.img"].map(|name| image(&monitor, name, SIZE));
    let root = monitor.folder.path("root.img");
    plug(&mut client, "data", &data, "0x2");
    client.call_with("blockdev-add", &node("spare", &spare));
    // The guest has tried it, so it has all that it needs.
    monitor.serial.expect("plug: disk=2 sectors=16384 id=data get_id=0 write=0 read=0 same=1");
    let before = (descriptors(&monitor), client.call("query-block"));
    let with = |mut node: Value, name: &str, value: Value| {
        node[name] = value;
        node
    };
    let device = |id: &str, addr: &str| json!({"id": id, "driver": "virtio-blk-mmio", "addr": addr});
    let cases: Vec<(&str, Value, &str, &[&str])> = vec![
        ("blockdev-add", node("x", "/no/such/file".as_ref()), "GenericError", &["\"x\"", "No such file"]),
        ("blockdev-add", node("x", &root), "GenericError", &["root.img", "by this VM, as its drive \"root\", which"]),
        ("blockdev-add", node("x", &data), "GenericError", &["data.img", "by this VM, as its drive \"data\", which"]),
        ("blockdev-add", node("x", monitor.folder.path("").as_ref()), "GenericError", &["Is a directory"]),
        ("blockdev-add", node("x", "/dev/null".as_ref()), "GenericError", &["neither a regular file nor a block"]),
        ("blockdev-add", node("spare", &spare), "GenericError", &["'spare'", "already"]),
        ("blockdev-add", node("root", &spare), "GenericError", &["'root'", "already"]),
        ("blockdev-add", node("", &spare), "GenericError", &["node-name", "255"]),
        ("blockdev-add", node("x", "".as_ref()), "GenericError", &["filename", "4095"]),
        ("blockdev-add", with(node("x", &spare), "iothread", json!("io1")), "GenericError", &["rule D1.5", "-drive"]),
        ("blockdev-add", with(node("x", &spare), "iops", json!(5)), "GenericError", &["rule D2.5", "block_set_io"]),
        ("blockdev-add", with(node("x", &spare), "cache", json!({"no-flush": true})), "GenericError", &["no-flush"]),
        ("device_add", with(device("spare", "0x1"), "iothread", json!("io1")), "GenericError", &["rule D1.5"]),
        ("device_add", with(device("spare", "0x1"), "throttling.iops-total", json!(5)), "GenericError", &["rule D2.5"]),
        (
            "device_add",
            with(device("spare", "0x1"), "logical_block_size", json!(4096)),
            "GenericError",
            &["'4096'", "use -drive ...,logical_block_size=4096"],
        ),
        (
            "device_add",
            with(device("spare", "0x1"), "num-queues", json!(2)),
            "GenericError",
            &["'num-queues'", "1 only"],
        ),
        ("device_add", with(device("spare", "0x1"), "netdev", json!("x")), "GenericError", &["'netdev'", "'drive'"]),
        ("device_add", with(device("spare", "0x1"), "queue-size", json!(64)), "GenericError", &["'queue-size'", "256"]),
        ("device_add", with(device("spare", "0x1"), "serial", json!("x".repeat(21))), "GenericError", &["at most 20"]),
        (
            "device_add",
            with(device("spare", "0x1"), "romfile", json!([])),
            "GenericError",
            &["'romfile'", "without effect"],
        ),
        ("device_add", device("spare", "0xzz"), "GenericError", &["'addr'", "'0xzz'", "free: 0x1, 0x3"]),
        ("device_add", device("spare", "-1"), "GenericError", &["'addr'", "'-1'"]),
        ("device_add", device("spare", ""), "GenericError", &["'addr'"]),
        ("device_add", device("spare", "0x6"), "GenericError", &["no disk slot 0x6", "0x1"]),
        ("device_add", device("spare", "0x0"), "GenericError", &["slot 0x0 has device 'root'", "free: 0x1"]),
        ("device_add", device("spare", "0x2"), "GenericError", &["slot 0x2", "'data'"]),
        ("device_add", with(device("spare", "0x2"), "lun", json!(3)), "GenericError", &["0x2 and 0x4"]),
        ("device_add", device("nobody", "0x1"), "DeviceNotFound", &["'nobody'", "blockdev-add"]),
        ("device_add", device("root", "0x1"), "GenericError", &["'root'", "already"]),
        ("device_add", with(device("x", "0x1"), "drive", json!("data")), "GenericError", &["in use by device 'data'"]),
        ("device_add", json!({"id": "spare", "driver": "virtio-gpu"}), "GenericError", &["'virtio-gpu'", "blk", "net"]),
        ("device_del", json!({"id": "spare"}), "DeviceNotFound", &["'spare'"]),
        ("blockdev-del", json!({"node-name": "data"}), "GenericError", &["device 'data'", "device_del"]),
        ("blockdev-del", json!({"node-name": "nobody"}), "DeviceNotFound", &["'nobody'"]),
        ("block_resize", json!({"device": "spare", "size": SIZE}), "DeviceNotFound", &["'spare'"]),
        ("block_resize", json!({"size": SIZE}), "GenericError", &["'device'", "'node-name'"]),
    ];
    for (command, arguments, class, parts) in cases {
        let (told_class, told) = refusal(&mut client, command, &arguments);
        assert_eq!(told_class, class, "{arguments}: {told}");
        for part in parts {
            assert!(told.contains(part), "{part:?} is not in {told}, for {arguments}");
        }
    }
    assert_eq!((descriptors(&monitor), client.call("query-block")), before);
    // What was refused is possible afterwards.
    let sizes = with(device("spare", "0x1"), "logical_block_size", json!(512));
    client.call_with("device_add", &with(sizes, "physical_block_size", json!(4096)));
    assert_eq!(client.call("query-block")[1]["device"], "spare");
}

#[test]
fn rule_d3_4_as_many_disks_are_plugged_as_there_are_slots() {
    let Some((monitor, mut client)) = guest("", |setup| setup) else { return };
    for n in 0..6 {
        let file = image(&monitor, &format!("{n}.img"), SIZE);
        client.call_with("blockdev-add", &node(&format!("d{n}"), &file));
        client.call_with("device_add", &json!({"id": format!("d{n}"), "driver": "virtio-blk-mmio"}));
        monitor.serial.expect(&format!("plug: disk={n} sectors={} id=d{n} ", SIZE / 512));
    }
    client.call_with("blockdev-add", &node("more", &image(&monitor, "more.img", SIZE)));
    let (_, told) = refusal(&mut client, "device_add", &json!({"id": "more", "driver": "virtio-blk-mmio"}));
    assert_eq!(told, "All 6 disk slots are in use; use device_del first (rule D3.4)");
    let (_, told) =
        refusal(&mut client, "device_add", &json!({"id": "more", "driver": "virtio-blk-mmio", "addr": "0x6"}));
    assert!(told.starts_with("There is no disk slot 0x6; accepted: none of the 6, which all are in use"), "{told}");

    let bare = |setup: Setup| setup.option("-machine", "microvm,disk-slots=0,nic-slots=0");
    let (monitor, mut client) = guest("", bare).unwrap();
    monitor.serial.expect("plug: begin disks=0");
    client.call_with("blockdev-add", &node("more", &image(&monitor, "more.img", SIZE)));
    let (_, told) = refusal(&mut client, "device_add", &json!({"id": "more", "driver": "virtio-blk-mmio"}));
    assert!(told.contains("disk-slots=N"), "{told}");
    assert_eq!(client.call("query-block"), json!([]));
}

#[test]
fn rule_d2_5_a_plugged_disk_is_described_counted_and_limited_like_any_other() {
    let Some((monitor, mut client)) = guest("load=on count=40 depth=4", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    client.call("stop");
    plug(&mut client, "data", &file, "0x3");
    client.call_with("block_set_io_throttle", &json!({"device": "data", "iops": 100}));
    client.call("cont");
    assert_eq!(load_ended(&monitor), [40, 0]);
    let stats = client.call("query-blockstats");
    assert_eq!((&stats[0]["device"], stats.as_array().unwrap().len()), (&json!("data"), 1));
    assert!(stats[0]["stats"]["throttled_operations"].as_u64() > Some(0), "{stats}");
    let block = client.call("query-block");
    let empty = json!({"device": "", "type": "unknown", "removable": true, "locked": false, "addr": "0x4"});
    assert_eq!((&block[3]["addr"], &block[3]["inserted"]["iops"], &block[4]), (&json!("0x3"), &json!(100), &empty));
    assert_eq!(block[3]["inserted"]["file"], file.to_str().unwrap());
    assert_eq!(block.as_array().unwrap().len(), 6);
}

#[test]
fn a_disk_that_grows_is_as_large_for_the_guest_and_none_becomes_smaller() {
    let Some((mut monitor, mut client)) = guest("", |setup| setup.disk("vda", SIZE, "direct=on")) else { return };
    let file = image(&monitor, "data.img", SIZE);
    plug(&mut client, "data", &file, "0x1");
    for (name, disk, path) in [("vda", 0, monitor.folder.path("vda.img")), ("data", 1, file)] {
        client.call_with("block_resize", &json!({"device": name, "size": 3 * SIZE}));
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * SIZE);
        // The guest writes to the last block that there is now.
        let sectors = 3 * SIZE / 512;
        monitor.serial.expect(&format!("plug: disk={disk} sectors={sectors} id={name} get_id=0 write=0 read=0 same=1"));
        assert_eq!(client.call("query-block")[disk]["inserted"]["image"]["virtual-size"], 3 * SIZE);
        for (size, part) in [(SIZE, "smaller"), (3 * SIZE + 1, "multiple of 512")] {
            let (_, told) = refusal(&mut client, "block_resize", &json!({"node-name": name, "size": size}));
            assert!(told.contains(part), "{told}");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * SIZE);
    }
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_read_only_disk_that_is_plugged_answers_writes_with_an_error_and_does_not_grow() {
    let Some((monitor, mut client)) = guest("", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    let mut node = node("data", &file);
    node["read-only"] = json!(true);
    client.call_with("blockdev-add", &node);
    client.call_with("device_add", &json!({"id": "data", "driver": "virtio-blk-mmio"}));
    monitor.serial.expect("plug: disk=0 sectors=16384 id=data get_id=0 write=1 read=0 same=0");
    assert!(fs::read(&file).unwrap().iter().all(|&byte| byte == 0));
    let (_, told) = refusal(&mut client, "block_resize", &json!({"device": "data", "size": 2 * SIZE}));
    assert!(told.contains("read-only"), "{told}");
    unplug(&mut client, "data");
}

#[test]
fn a_drive_that_is_named_by_the_plug_outlives_its_device_and_one_that_is_not_goes_with_it() {
    let Some((monitor, mut client)) = guest("", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    client.call_with("blockdev-add", &node("node1", &file));
    for addr in ["0x0", "0x5"] {
        let device = json!({"id": "dev1", "driver": "virtio-blk-mmio", "addr": addr, "drive": "node1"});
        client.call_with("device_add", &device);
        let slot = usize::from(addr == "0x5") * 5;
        let block = client.call("query-block")[slot].take();
        assert_eq!((&block["qdev"], &block["inserted"]["node-name"]), (&json!("dev1"), &json!("node1")));
        monitor.serial.expect(&format!("plug: disk={slot} sectors={} id=node1 ", SIZE / 512));
        unplug(&mut client, "dev1");
    }
    client.call_with("blockdev-del", &json!({"node-name": "node1"}));
    assert_eq!(refusal(&mut client, "blockdev-del", &json!({"node-name": "node1"})).0, "DeviceNotFound");
    // As in the system we replace: what went with its device may be deleted once more, and once.
    plug(&mut client, "node1", &file, "0x0");
    unplug(&mut client, "node1");
    client.call_with("blockdev-del", &json!({"node-name": "node1"}));
    assert_eq!(refusal(&mut client, "blockdev-del", &json!({"node-name": "node1"})).0, "DeviceNotFound");
}

#[test]
fn device_add_gives_a_disk_its_serial_number() {
    let Some((monitor, mut client)) = guest("", |setup| setup) else { return };
    let file = image(&monitor, "data.img", SIZE);
    client.call_with("blockdev-add", &node("node1", &file));
    // All that StratoVirt's device_add takes and that has no effect here.
    let device = json!({
        "id": "dev1", "driver": "virtio-blk-mmio", "addr": "1", "drive": "node1", "serial": "S-1", "num-queues": 1,
        "queue-size": 256, "romfile": "", "mq": "on", "vectors": "4", "multifunction": true, "bootindex": 1, "boot_index": 1,
        "share-rw": "on", "disable-modern": "true", "bus": "mmio",
    });
    client.call_with("device_add", &device);
    monitor.serial.expect("plug: disk=1 sectors=16384 id=S-1 get_id=0 write=0 read=0 same=1");
    unplug(&mut client, "dev1");
    monitor.serial.expect("plug: disk=1 sectors=0 read=1");
    // The number was the device's: the next one reads the node's name again.
    client
        .call_with("device_add", &json!({"id": "dev2", "driver": "virtio-blk-mmio", "addr": "0x2", "drive": "node1"}));
    monitor.serial.expect("plug: disk=2 sectors=16384 id=node1 ");
}

#[test]
fn a_client_keeps_descriptors_by_name_and_they_are_closed_with_its_session() {
    let Some((monitor, mut other)) = guest("", |setup| setup) else { return };
    let before = descriptors(&monitor);
    let mut client = monitor.qmp();
    let connected = descriptors(&monitor);
    let file = fs::File::open("/dev/null").unwrap();
    for name in ["tap0", "tap1", "tap1"] {
        client.send_with("getfd", &json!({"fdname": name}), &file);
    }
    assert_eq!(descriptors(&monitor), connected + 2);
    let told = refusal(&mut client, "getfd", &json!({"fdname": "tap2"})).1;
    assert!(told.contains("SCM_RIGHTS"), "{told}");
    assert_eq!(
        refusal(&mut other, "closefd", &json!({"fdname": "tap0"})).0,
        "DeviceNotFound",
        "names are a client's own"
    );
    client.call_with("closefd", &json!({"fdname": "tap0"}));
    assert_eq!(descriptors(&monitor), connected + 1);
    drop(client);
    assert!((0..10_000).any(|_| descriptors(&monitor) == before), "the session is gone, and what it kept is not");
}

#[test]
fn a_file_that_blocks_holds_up_its_own_plug_and_unplug_and_nobody_elses() {
    let Some(setup) = Setup::guest("mode=blk-plug end=acpi load=on depth=4") else { return };
    let Some(new) = Stall::new(&setup.folder, SIZE) else { return };
    let (mounting, device) = new.mounting();
    let monitor = setup.under(&mounting).stdin(device).start();
    // The file comes last and so is dropped first: who waits for it could not be ended.
    let stall = new;
    monitor.serial.expect("plug: begin");
    let [mut client, mut other] = [(); 2].map(|()| monitor.qmp());
    plug(&mut client, "slow", stall.path(), "0x0");
    monitor.serial.expect("plug: disk=0 sectors=");
    let read = |other: &mut Client| other.call("query-blockstats")[0]["stats"]["in_flight_operations"].as_u64();
    stall.stall();
    stall.await_held(1);
    let id = client.ask_with("device_del", &json!({"id": "slow"}));
    // Meanwhile a whole life of another disk, and what is under way is told.
    let file = image(&monitor, "good.img", SIZE);
    plug(&mut other, "good", &file, "0x1");
    monitor.serial.expect("plug: disk=1 sectors=");
    unplug(&mut other, "good");
    assert!(read(&mut other) > Some(0));
    assert_eq!(refusal(&mut other, "device_del", &json!({"id": "slow"})).0, "DeviceNotActive");
    assert_eq!(client.events_kept(), 0);
    stall.release();
    assert_eq!(client.answer()["id"], id);
}

/// Rounds of the leak test: a minute of them; in the nested host, which is slower, enough to see one of a descriptor, a
/// thread or a page.
fn rounds() -> u64 {
    let nested = std::env::var("LOOPVISOR_HOST").is_ok_and(|host| host == "nested");
    let rounds = std::env::var("LOOPVISOR_PLUGS").ok().and_then(|rounds| rounds.parse().ok());
    rounds.unwrap_or(if nested { 500 } else { 10_000 })
}

/// A number of the monitor's memory that is its own, in KiB.
fn own_memory_kib(monitor: &Monitor) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", monitor.pid())).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn ten_thousand_plugs_leave_nothing_behind() {
    let Some((mut monitor, mut client)) = guest("load=on depth=4", |setup| setup) else { return };
    let files = ["a.img", "b.img"].map(|name| image(&monitor, name, SIZE));
    let mut round = |monitor: &Monitor, n: u64| {
        let (slot, file) = (n % 6, &files[n as usize % 2]);
        let name = format!("disk{}", n % 100);
        // Of a size of its own, for a guest that looks now and then sees only that.
        let bytes = SIZE + n % 4096 * 4096;
        fs::File::options().write(true).open(file).unwrap().set_len(bytes).unwrap();
        let mut node = node(&name, file);
        // An engine of each kind, and a drive that outlives its device now and then.
        node["aio"] = json!(if n % 8 == 7 { "threads" } else { "native" });
        node["cache"]["direct"] = json!(n.is_multiple_of(3));
        client.call_with("blockdev-add", &node);
        let mut device = json!({"id": name, "driver": "virtio-blk-mmio", "addr": format!("{slot:#x}")});
        if n.is_multiple_of(5) {
            device["drive"] = json!(name);
        }
        client.call_with("device_add", &device);
        if n.is_multiple_of(16) {
            // Under load, and not just there and gone.
            monitor.serial.expect(&format!("plug: disk={slot} sectors={}", bytes / 512));
        }
        unplug(&mut client, &name);
        client.call_with("blockdev-del", &json!({"node-name": name}));
    };
    // Descriptors and threads, when those of the last round have ended.
    let state = |monitor: &Monitor| {
        let looks = (0..200).map(|_| {
            thread::sleep(Duration::from_millis(1));
            [descriptors(monitor), crate::proc::threads(monitor.pid()).len()]
        });
        looks.reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1])]).unwrap()
    };
    (0..100).for_each(|n| round(&monitor, n));
    let (before, memory) = (state(&monitor), own_memory_kib(&monitor));
    (100..100 + rounds()).for_each(|n| round(&monitor, n));
    assert_eq!(state(&monitor), before);
    let grown = own_memory_kib(&monitor).saturating_sub(memory);
    assert!(grown < 128, "{grown} KiB more than before {} rounds", rounds());
    monitor.type_in("q");
    monitor.expect_ok();
}
