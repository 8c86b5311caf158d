//! How a machine lives: resets, which start it anew in the same process with nothing of the old life in it and nothing lost
//! on its disks; the power button; a kernel's panic.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::balloon::HugePages;
use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup, guest, skipped};
use crate::proc;

const MIB: u64 = 1 << 20;

/// How often the guest has booted.
fn boots(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.starts_with("reboot: boot=")).collect()
}

/// Waits for the guest to have booted so often.
#[track_caller]
fn await_boots(monitor: &Monitor, count: usize) {
    let failed = |text: &str| text.contains("FAILED");
    let seen =
        monitor.serial.wait(PATIENCE, |text, _| (boots(text).len() >= count || failed(text)).then(|| failed(text)));
    assert_eq!(seen, Some(false), "{}", monitor.serial.text());
}

/// A guest that works on its disk, and waits for others to reset it.
fn working(drive: &str) -> Option<Monitor> {
    let setup = Setup::guest_that_reboots("mode=reboot how=wait cpus=2 end=acpi")?.stdin(Stdio::piped());
    let monitor = setup.iothread("io1").disk("vda", MIB, drive).option("-smp", "2").start();
    await_boots(&monitor, 1);
    Some(monitor)
}

/// The next lines: an event's name, or an answer's `return`.
#[track_caller]
fn lines(client: &mut Client, count: usize) -> Vec<Value> {
    let short = |line: Value| line.get("event").or(line.get("return")).cloned().unwrap_or(line);
    (0..count).map(|_| short(client.line())).collect()
}

/// What a process must not have more of from life to life.
fn descriptors(monitor: &Monitor) -> usize {
    fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().count()
}

#[test]
fn a_guest_that_resets_itself_fifty_times_in_the_middle_of_its_work_finds_everything_as_it_must_be() {
    for (how, cpus, drive) in [
        ("i8042", 1, "direct=off"),
        ("triple", 1, "direct=on,iothread=io1"),
        ("i8042", 4, "direct=off,aio=threads,iothread=io1"),
        ("triple", 4, "direct=off,iothread=io1,iops=5000"),
    ] {
        let words = format!("mode=reboot how={how} count=50 cpus={cpus} end=acpi");
        let Some(setup) = Setup::guest_that_reboots(&words) else { return };
        let setup = setup.iothread("io1").disk("vda", MIB, drive).option("-smp", &cpus.to_string()).flag("-S");
        let mut monitor = setup.start();
        let mut client = monitor.qmp();
        let (threads, open) = (proc::threads(monitor.pid()).len(), descriptors(&monitor));
        client.call("cont");
        let begun = Instant::now();
        // One by one, for each has the patience of one.
        (1..50).for_each(|count| await_boots(&monitor, count));
        // The kicks and threads of a disk come with its driver, and go with it.
        assert!(descriptors(&monitor) <= open + 4, "{open} descriptors have become {}", descriptors(&monitor));
        assert!(proc::threads(monitor.pid()).len() <= threads + 8);
        monitor.expect_ok();
        let expected: Vec<String> = (1..=50).map(|n| format!("reboot: boot={n} round={} memory=zero", n - 1)).collect();
        assert_eq!(boots(&monitor.serial.text()), expected, "{how}, {cpus} vCPUs, {drive}");
        let resets: Vec<Value> = (0..50).map(|_| client.event()).filter(|event| event["event"] == "RESET").collect();
        assert_eq!(resets.len(), 49);
        assert!(resets.iter().all(|event| event["data"] == json!({"guest": true, "reason": "guest-reset"})));
        assert_eq!(client.event()["data"], json!({"guest": true, "reason": "guest-shutdown"}));
        // Ten lines in five seconds, and no more, however long it took.
        let told = monitor.log.text().matches("the guest resets the machine by ").count() as u64;
        assert!((1..=10 * (1 + begun.elapsed().as_secs() / 5)).contains(&told), "{told}");
    }
}

#[test]
fn every_way_in_which_a_guest_restarts_itself_is_a_reset() {
    let ways = ["i8042", "pulse", "output", "cf9-hard", "cf9-soft", "port92", "triple", "bios", "init", "nmi"];
    for (cpus, by) in [(1, ""), (4, ""), (2, " by=other")] {
        // In real mode only another processor begins.
        let ways: Vec<_> = ways.into_iter().filter(|way| cpus > 1 || *way != "bios").collect();
        // Each twice, so that none leaves anything that hinders another.
        let ways = if cpus == 1 { [&ways[..], &ways[..]].concat() } else { ways };
        let words = format!("mode=reboot how=each count={} cpus={cpus} end=acpi{by}", ways.len() + 1);
        let Some(setup) = Setup::guest_that_reboots(&words) else { return };
        let setup = setup.disk("vda", MIB, "direct=off").option("-smp", &cpus.to_string()).flag("-S");
        let mut monitor = setup.start();
        let mut client = monitor.qmp();
        client.call("cont");
        assert_eq!(client.event()["event"], "RESUME");
        for way in &ways {
            let reset = client.event();
            assert_eq!(
                (&reset["event"], &reset["data"]["reason"]),
                (&json!("RESET"), &json!("guest-reset")),
                "{way}: {words}"
            );
        }
        assert_eq!(client.event()["data"], json!({"guest": true, "reason": "guest-shutdown"}), "{words}");
        monitor.expect_ok();
        let text = monitor.serial.text();
        let told: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("reboot: by ")).collect();
        assert_eq!(told, ways, "{words}");
    }
}

#[test]
fn every_way_in_which_a_guest_restarts_itself_is_the_end_without_reboots() {
    for how in ["i8042", "cf9-hard", "port92", "triple", "bios", "init"] {
        let Some(setup) = Setup::guest(&format!("mode=reboot how={how} count=3 cpus=2 end=acpi")) else { return };
        let mut monitor = setup.disk("vda", MIB, "direct=off").option("-smp", "2").flag("-S").start();
        let mut client = monitor.qmp();
        client.call("cont");
        assert_eq!(client.event()["event"], "RESUME");
        assert_eq!(client.event()["data"], json!({"guest": true, "reason": "guest-reset"}), "{how}");
        client.expect_end();
        assert_eq!(monitor.exit_code(), 0);
        let log = monitor.log.text();
        assert_eq!(log.matches("which ends it (-no-reboot or reboot=off)").count(), 1, "{how}: {log}");
    }
}

#[test]
fn two_hundred_resets_from_outside_under_disk_load_lose_nothing_on_the_disk_and_grow_nothing() {
    let Some(mut monitor) = working("direct=off,iothread=io1") else { return };
    let mut client = monitor.qmp();
    let (threads, open) = (proc::threads(monitor.pid()).len(), descriptors(&monitor));
    let mut last = 0;
    for round in 0..200 {
        client.ask("system_reset");
        let event = client.line();
        assert_eq!(event["event"], "RESET");
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-system-reset"}));
        assert_eq!(client.line()["return"], json!({}));
        if round % 4 == 0 {
            // The other times it is wherever its start has come to.
            let seen = boots(&monitor.serial.text()).len();
            await_boots(&monitor, seen + 1);
            // The first write of a life counts its boot.
            let until = Instant::now() + PATIENCE;
            let before = last;
            while last < before + 2 {
                assert!(Instant::now() < until, "{seen} boots, {last} writes");
                last = client.call("query-blockstats")[0]["stats"]["wr_operations"].as_u64().unwrap();
            }
        }
    }
    let seen = boots(&monitor.serial.text()).len();
    await_boots(&monitor, seen + 1);
    assert!(seen >= 51, "{seen} boots, {last} writes");
    assert_eq!((proc::threads(monitor.pid()).len(), descriptors(&monitor)), (threads, open));
    assert_eq!(client.call("query-status")["status"], "running");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_reset_of_a_stopped_machine_leaves_it_stopped_before_its_first_instruction() {
    let Some(mut monitor) = working("direct=off") else { return };
    let mut client = monitor.qmp();
    client.ask("stop");
    assert_eq!(lines(&mut client, 2), [json!("STOP"), json!({})]);
    for _ in 0..3 {
        client.ask("system_reset");
        assert_eq!(lines(&mut client, 2), [json!("RESET"), json!({})]);
        let status = client.call("query-status");
        assert_eq!(status, json!({"running": false, "singlestep": false, "status": "prelaunch"}));
    }
    client.call("stop");
    assert_eq!((client.events_kept(), boots(&monitor.serial.text()).len()), (0, 1));
    client.ask("cont");
    assert_eq!(lines(&mut client, 2), [json!("RESUME"), json!({})]);
    await_boots(&monitor, 2);
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_machine_that_was_never_started_can_be_reset_too() {
    let Some(setup) = Setup::guest_that_reboots("mode=hello end=acpi") else { return };
    let mut monitor = setup.flag("-S").option("-smp", "2").start();
    let mut client = monitor.qmp();
    client.call("system_reset");
    assert_eq!(client.call("query-status")["status"], "prelaunch");
    client.call("cont");
    monitor.expect_ok();
}

#[test]
fn without_reboots_a_reset_from_outside_ends_the_machine() {
    for stopped in [false, true] {
        let Some(setup) = Setup::guest("mode=idle") else { return };
        let mut monitor = setup.start();
        let mut client = monitor.qmp();
        if stopped {
            client.call("stop");
            assert_eq!(client.event()["event"], "STOP");
        }
        client.call("system_reset");
        let event = client.event();
        assert_eq!(event["event"], "SHUTDOWN");
        assert_eq!(event["data"], json!({"guest": false, "reason": "host-qmp-system-reset"}));
        client.expect_end();
        assert_eq!(monitor.exit_code(), 0);
        let log = monitor.log.text();
        assert!(log.contains("the machine ends: host-qmp-system-reset"), "{log}");
    }
}

#[test]
fn stops_conts_and_resets_of_several_clients_and_the_guest_at_once_are_all_answered_and_in_turn() {
    let Some(setup) = Setup::guest_that_reboots("mode=reboot how=i8042 count=1000000 cpus=2 end=acpi") else { return };
    let setup = setup.iothread("io1").disk("vda", MIB, "direct=off,iothread=io1").option("-smp", "2");
    let mut monitor = setup.start();
    await_boots(&monitor, 1);
    let mut witness = monitor.qmp();
    thread::scope(|scope| {
        for order in
            [["stop", "system_reset", "cont"], ["system_reset", "stop", "cont"], ["cont", "stop", "system_reset"]]
        {
            let mut client = monitor.qmp();
            scope.spawn(move || {
                for _ in 0..15 {
                    // Sent ahead, each while the one before is going on.
                    order.iter().for_each(|command| client.send(&format!("{{\"execute\":\"{command}\"}}")));
                    (0..3).for_each(|_| assert_eq!(client.answer()["return"], json!({})));
                }
            });
        }
    });
    witness.call("cont");
    let seen = boots(&monitor.serial.text()).len();
    await_boots(&monitor, seen + 3);
    // Of the resets some were the guest's, and the machine stopped and went on by turns.
    let told: Vec<Value> = (0..witness.events_kept()).map(|_| witness.event()).collect();
    let resets: Vec<&Value> = told.iter().filter(|event| event["event"] == "RESET").collect();
    let by_the_guest = resets.iter().filter(|event| event["data"]["guest"] == true).count();
    assert_eq!(resets.len() - by_the_guest, 45);
    let names: Vec<&str> = told.iter().filter_map(|event| event["event"].as_str()).collect();
    let turns: Vec<&&str> = names.iter().filter(|&&name| name != "RESET").collect();
    // A reset turns a machine that has stopped into one that has not begun: either goes on by one RESUME.
    assert!(turns.chunks(2).all(|pair| pair == [&"STOP", &"RESUME"]), "{names:?}");
    witness.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!monitor.serial.text().contains("FAILED"), "{}", monitor.serial.text());
}

#[test]
fn a_machine_ends_at_once_in_the_middle_of_a_reset() {
    for _ in 0..20 {
        let Some(mut monitor) = working("direct=off,iothread=io1") else { return };
        let [mut one, mut two] = [(); 2].map(|()| monitor.qmp());
        one.ask("system_reset");
        two.call("quit");
        assert_eq!(one.answer()["return"], json!({}));
        assert_eq!(one.await_event("SHUTDOWN")["data"]["reason"], "host-qmp-quit");
        assert_eq!(monitor.exit_code(), 0);
    }
}

#[test]
fn pages_in_the_balloon_are_the_guests_again_after_a_reset_and_its_target_stays() {
    let Some(setup) = Setup::guest_that_reboots("mode=balloon end=acpi") else { return };
    let setup = setup.option("-m", "256M").flag("-balloon").stdin(Stdio::piped());
    let mut monitor = setup.start();
    monitor.serial.expect("balloon: begin");
    let mut client = monitor.qmp();
    let actual = |client: &mut Client| client.call("query-balloon")["actual"].as_u64();
    client.call_with("balloon", &json!({"value": 128 * MIB}));
    while actual(&mut client) != Some(128 * MIB) {}
    client.call("stop");
    let before = proc::anonymous_kib(monitor.pid());
    client.call("system_reset");
    let (class, _) = client.mistake("{\"execute\":\"query-balloon\"}");
    assert_eq!(class, "DeviceNotActive", "no driver has it");
    // The guest had written to half of its memory, and the host has it back.
    let after = proc::anonymous_kib(monitor.pid());
    assert!(before > 100 << 10 && after < 16 << 10, "{before} KiB have become {after}");
    client.call("cont");
    let asleep = "{\"execute\":\"query-balloon\"}";
    while {
        client.send(asleep);
        client.answer()["return"]["actual"] != 128 * MIB
    } {}
    assert_eq!(client.call("query-balloon-detail")["target"], 128 * MIB);
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn the_kernel_that_was_started_is_started_again_whatever_has_become_of_its_name_and_one_cut_short_is_told() {
    let Some(setup) = Setup::guest_that_reboots("mode=reboot how=wait end=acpi") else { return };
    let [kernel, link] = ["kernel", "link"].map(|name| setup.folder.path(name));
    fs::copy(guest(), &kernel).unwrap();
    symlink("kernel", &link).unwrap();
    let setup = setup.disk("vda", MIB, "direct=off").option("-name", "x");
    let mut monitor = setup.replace(guest().to_str().unwrap(), link.to_str().unwrap()).start();
    await_boots(&monitor, 1);
    let mut client = monitor.qmp();
    fs::rename(&kernel, kernel.with_extension("old")).unwrap();
    fs::write(&kernel, "another").unwrap();
    client.call("system_reset");
    await_boots(&monitor, 2);
    fs::OpenOptions::new().write(true).open(kernel.with_extension("old")).unwrap().set_len(5000).unwrap();
    client.ask("system_reset");
    let event = client.await_event("SHUTDOWN");
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-error"}));
    let error = client.answer()["error"].take();
    assert_eq!(error["class"], "GenericError");
    assert!(error["desc"].as_str().unwrap().contains("cut short"), "{error}");
    assert_eq!(monitor.exit_code(), 1);
    let told = monitor.log.text();
    let last = told.lines().last().unwrap();
    assert!(last.contains("reset: kernel") && last.contains("cut short"), "{told}");
}

#[test]
fn huge_pages_keep_what_is_in_them_and_the_guest_starts_all_the_same() {
    let _pages = match HugePages::reserve(40) {
        Ok(pages) => pages,
        Err(e) => return skipped(&format!("huge pages: {e}")),
    };
    const MOUNT: &str = "mount -t hugetlbfs none \"$0\" && exec \"$@\"";
    let probe = Command::new("unshare").args(["-m", "mount", "-t", "hugetlbfs", "none", "/mnt"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("hugetlbfs in a private mount: {probe:?}"));
    }
    let Some(setup) = Setup::guest_that_reboots("mode=reboot count=3 memory=kept end=acpi") else { return };
    let folder = setup.folder.path("huge");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap().to_owned();
    let setup = setup.option("-mem-path", &folder).option("-m", "64M").disk("vda", MIB, "direct=off");
    let mut monitor = setup.under(&["unshare", "-m", "sh", "-c", MOUNT, &folder]).start();
    monitor.expect_ok();
    let text = monitor.serial.text();
    assert_eq!(boots(&text)[1..], ["reboot: boot=2 round=1 memory=kept", "reboot: boot=3 round=2 memory=kept"]);
    assert_eq!(monitor.log.text().matches("guest memory keeps what is in it").count(), 1);
}

#[test]
fn a_kernel_finds_zeros_behind_its_file_in_memory_that_a_file_has_filled() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let path = setup.folder.path("memory");
    fs::write(&path, vec![0xaa; 32 << 20]).unwrap();
    setup.option("-mem-path", path.to_str().unwrap()).option("-m", "32M").start().expect_ok();
}

#[test]
fn a_reset_leaves_no_byte_of_a_private_file_in_memory() {
    // The guest marks its memory, and looks after each reset that it is zero.
    let Some(setup) = Setup::guest_that_reboots("mode=reboot count=3 memory=filled end=acpi") else { return };
    let path = setup.folder.path("memory");
    fs::write(&path, vec![0xaa; 64 << 20]).unwrap();
    let setup = setup.option("-mem-path", path.to_str().unwrap()).option("-m", "64M");
    let mut monitor = setup.disk("vda", MIB, "direct=off").start();
    monitor.expect_ok();
    let found = ["boot=1 round=0 memory=filled", "boot=2 round=1 memory=zero", "boot=3 round=2 memory=zero"];
    assert_eq!(boots(&monitor.serial.text()), found.map(|line| format!("reboot: {line}")));
}

#[test]
fn the_power_button_is_an_interrupt_that_the_guest_may_act_on_also_after_a_pause_and_a_reset() {
    let Some(setup) = Setup::guest_that_reboots("mode=power count=3 end=acpi") else { return };
    let mut monitor = setup.start();
    let mut client = monitor.qmp();
    monitor.serial.expect("power: begin");
    client.ask("system_powerdown");
    let mut told = lines(&mut client, 2);
    told.sort_by_key(Value::is_object);
    assert_eq!(told, [json!("POWERDOWN"), json!({})]);
    monitor.serial.expect("power: pressed 1");
    client.call("system_reset");
    assert_eq!(client.event()["event"], "RESET");
    let begun = |text: &str| (text.matches("power: begin").count() == 2).then_some(());
    assert!(monitor.serial.wait(PATIENCE, |text, _| begun(text)).is_some());
    let pressed = |text: &str, press: u32| text.matches(&format!("power: pressed {press}")).count();
    client.call("stop");
    client.call("system_powerdown");
    assert_eq!(client.call("query-status")["status"], "paused");
    client.call("cont");
    assert!(monitor.serial.wait(PATIENCE, |text, _| (pressed(text, 1) == 2).then_some(())).is_some());
    for press in [2, 3] {
        client.call("system_powerdown");
        monitor.serial.expect(&format!("power: pressed {press}"));
    }
    monitor.expect_ok();
}

#[test]
fn a_guest_that_takes_no_notice_of_the_power_button_goes_on() {
    let Some(setup) = Setup::guest("mode=idle end=acpi") else { return };
    let mut monitor = setup.stdin(Stdio::piped()).start();
    monitor.serial.expect("idle: begin");
    let mut client = monitor.qmp();
    (0..100).for_each(|_| _ = client.call("system_powerdown"));
    assert_eq!(client.call("query-status")["status"], "running");
    monitor.type_in("x");
    monitor.expect_ok();
}

#[test]
fn a_kernel_that_panics_is_told_of_and_is_the_end_with_and_without_reboots() {
    for setup in [Setup::guest, Setup::guest_that_reboots] {
        let Some(setup) = setup("mode=hello end=panic") else { return };
        let mut monitor = setup.flag("-S").start();
        let mut client = monitor.qmp();
        client.call("cont");
        assert_eq!(client.event()["event"], "RESUME");
        let panicked = client.event();
        assert_eq!((&panicked["event"], &panicked["data"]), (&json!("GUEST_PANICKED"), &json!({"action": "poweroff"})));
        let shutdown = client.event();
        assert_eq!(shutdown["data"], json!({"guest": true, "reason": "guest-panic"}));
        client.expect_end();
        monitor.expect_ok();
        assert!(monitor.log.text().contains("the guest's kernel has panicked"));
    }
}

#[test]
fn a_crash_kernel_that_takes_over_is_told_of_once_in_a_life_and_the_guest_goes_on() {
    let Some(setup) = Setup::guest("mode=crash count=1000 end=acpi") else { return };
    let mut monitor = setup.flag("-S").start();
    let mut client = monitor.qmp();
    client.call("cont");
    let told: Vec<Value> = (0..3).map(|_| client.event()["event"].take()).collect();
    assert_eq!(told, ["RESUME", "GUEST_CRASHLOADED", "SHUTDOWN"]);
    client.expect_end();
    monitor.serial.expect("crash: events=3");
    monitor.expect_ok();

    let mut monitor = Setup::guest_that_reboots("mode=crash count=1000 end=i8042").unwrap().flag("-S").start();
    let mut client = monitor.qmp();
    client.call("cont");
    let told: Vec<Value> = (0..7).map(|_| client.event()["event"].take()).collect();
    assert_eq!(told[1..], ["GUEST_CRASHLOADED", "RESET"].repeat(3));
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
}
