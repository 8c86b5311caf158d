//! The balloon (rules D3.1 to D3.11): memory that the guest gives away is the host's, what is said of it is true, and
//! nothing that the guest does or does not do keeps anybody waiting.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{io, thread};

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Folder, Monitor, PATIENCE, Setup, skipped};
use crate::proc;

const MIB: u64 = 1 << 20;

/// A guest whose driver is up, with so much memory.
#[track_caller]
fn start(mib: u64, words: &str, balloon: &str, more: impl FnOnce(Setup) -> Setup) -> Option<(Monitor, Client)> {
    let setup = Setup::guest(&format!("mode=balloon end=acpi {words}"))?.option("-m", &format!("{mib}M"));
    let setup = if balloon.is_empty() { setup.flag("-balloon") } else { setup.option("-balloon", balloon) };
    let monitor = more(setup.stdin(Stdio::piped())).start();
    monitor.serial.expect("balloon: begin");
    let client = monitor.qmp();
    Some((monitor, client))
}

fn actual(client: &mut Client) -> u64 {
    client.call("query-balloon")["actual"].as_u64().unwrap()
}

fn detail(client: &mut Client, member: &str) -> Value {
    client.call("query-balloon-detail")[member].take()
}

fn bytes(client: &mut Client, member: &str) -> u64 {
    detail(client, member).as_u64().unwrap()
}

#[track_caller]
fn set(client: &mut Client, value: u64) {
    assert_eq!(client.call_with("balloon", &json!({"value": value})), json!({}));
}

/// Waits until `found` finds something in what the client says.
#[track_caller]
fn until<T>(client: &mut Client, mut found: impl FnMut(&mut Client) -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(it) = found(client) {
            return it;
        }
        assert!(Instant::now() < end, "it does not come: {}", client.call("query-balloon-detail"));
        thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
fn await_actual(client: &mut Client, value: u64) {
    until(client, |client| (actual(client) == value).then_some(()));
}

/// Ends the guest, which looks at all the memory that it has.
#[track_caller]
fn finish(mut monitor: Monitor) {
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn rule_d3_1_a_gigabyte_of_two_goes_back_to_the_host_and_comes_again_and_the_loop_serves_others_meanwhile() {
    let Some((monitor, mut client)) = start(2048, "depth=16 order=random", "", |setup| setup) else { return };
    let before = proc::anonymous_kib(monitor.pid());
    assert_eq!(actual(&mut client), 2048 * MIB);
    set(&mut client, 1024 * MIB);
    // Each answer came between two pieces of the balloon's work.
    let mut seen = BTreeSet::new();
    let mut asked = 0;
    until(&mut client, |client| {
        client.call("query-status");
        asked += 1;
        let actual = actual(client);
        seen.insert(actual);
        (actual == 1024 * MIB).then_some(())
    });
    assert!(seen.len() >= 5, "of {asked} answers: {seen:?}");
    let fallen = before - proc::anonymous_kib(monitor.pid());
    assert!(fallen * 100 >= 99 * (1 << 20), "{fallen} KiB of {}", 1 << 20);
    let reclaimed = bytes(&mut client, "reclaimed-bytes");
    assert!(reclaimed >= 1024 * MIB * 99 / 100, "{reclaimed}");
    assert_eq!((detail(&mut client, "residual-bytes"), detail(&mut client, "stuck-since")), (json!(0), json!(null)));
    let resident = bytes(&mut client, "resident-bytes");
    assert!(resident > 1000 * MIB && resident < 1100 * MIB, "{resident}");
    set(&mut client, 1536 * MIB);
    await_actual(&mut client, 1536 * MIB);
    // The guest finds what came back as zeros, and the rest as it left it.
    finish(monitor);
}

#[test]
fn a_target_may_change_on_the_way_and_the_events_tell_the_last_value_at_most_once_a_second() {
    let Some((monitor, mut client)) = start(512, "depth=4 order=random", "", |setup| setup) else { return };
    let begin = Instant::now();
    set(&mut client, 64 * MIB);
    until(&mut client, |client| (actual(client) < 500 * MIB).then_some(()));
    set(&mut client, 400 * MIB);
    await_actual(&mut client, 400 * MIB);
    set(&mut client, 100 * MIB);
    until(&mut client, |client| (actual(client) < 390 * MIB).then_some(()));
    // More than it was started with counts as that; a string of digits is a number (rule D3.8).
    assert_eq!(client.call_with("balloon", &json!({"value": "99999999999999999999"})), json!({}));
    assert_eq!(bytes(&mut client, "target"), 512 * MIB);
    await_actual(&mut client, 512 * MIB);
    set(&mut client, 300 * MIB);
    await_actual(&mut client, 300 * MIB);
    let mut told = Vec::new();
    while told.last() != Some(&(300 * MIB)) {
        let (first, second) = (client.event(), client.event());
        assert_eq!([&first["event"], &second["event"]], ["BALLOON_CHANGED", "BALLOON_CHANGE"]);
        assert_eq!(first["data"], second["data"]);
        told.push(first["data"]["actual"].as_u64().unwrap());
    }
    let seconds = begin.elapsed().as_secs() as usize + 2;
    assert!(told.len() <= seconds, "{} pairs in less than {seconds} s: {told:?}", told.len());
    finish(monitor);
}

#[test]
fn a_thousand_targets_are_reached_or_left_half_way_and_no_page_is_lost() {
    let Some((monitor, mut client)) = start(48, "depth=4 pages=64 order=random", "", |setup| setup) else { return };
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state >> 33
    };
    let mut left = 0;
    for round in 0..1000 {
        let value = 32 * MIB + random() % (16 * MIB);
        set(&mut client, value);
        let target = bytes(&mut client, "target");
        assert!(target - value < 4096, "{target} for {value}");
        if random() % 2 == 0 {
            left += usize::from(actual(&mut client) != target);
        } else {
            until(&mut client, |client| (actual(client) == target).then_some(()));
            assert_eq!(bytes(&mut client, "residual-bytes"), 0, "round {round}");
        }
    }
    assert!(left > 10, "{left} were left half-way");
    finish(monitor);
}

#[test]
fn without_a_balloon_and_before_its_driver_is_up_it_is_not_active() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let monitor = setup.start();
    let mut client = monitor.qmp();
    let commands = [
        "{\"execute\":\"balloon\",\"arguments\":{\"value\":67108864}}",
        "{\"execute\":\"query-balloon\"}",
        "{\"execute\":\"query-balloon-detail\"}",
        "{\"execute\":\"query-balloon-stats\"}",
    ];
    let not_active = |text: &str| ("DeviceNotActive".to_owned(), text.to_owned());
    for command in commands {
        assert_eq!(client.mistake(command), not_active("No balloon device has been activated"));
    }
    let interval = "{\"execute\":\"balloon-stats-interval\",\"arguments\":{\"seconds\":1}}";
    assert_eq!(client.mistake(interval), not_active("No balloon device has been activated"));
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let monitor = setup.flag("-balloon").start();
    let mut client = monitor.qmp();
    for command in commands {
        let (class, told) = client.mistake(command);
        assert!(
            class == "DeviceNotActive" && told.starts_with("The guest's balloon driver is not up"),
            "{class} {told}"
        );
    }
    // What is wrong in itself is told first.
    let (class, told) = client.mistake("{\"execute\":\"balloon\",\"arguments\":{\"value\":-5}}");
    assert!(class == "GenericError" && told.contains("33554432 (32 MiB) up"), "{class} {told}");
}

#[test]
fn a_driver_that_breaks_every_rule_harms_nobody_and_works_after_a_reset() {
    let Some((monitor, mut client)) = start(256, "hostile=on", "", |setup| setup.disk("vda", MIB, "direct=off")) else {
        return;
    };
    let lines = monitor.log.text().lines().filter(|line| line.contains("balloon: ")).count();
    assert!((1..=60).contains(&lines), "{lines} lines of some thousand faults:\n{}", monitor.log.text());
    assert_eq!(actual(&mut client), 256 * MIB);
    set(&mut client, 128 * MIB);
    await_actual(&mut client, 128 * MIB);
    set(&mut client, 256 * MIB);
    await_actual(&mut client, 256 * MIB);
    finish(monitor);
}

#[test]
fn statistics_come_when_they_are_asked_for_and_a_silent_guest_keeps_nobody_waiting() {
    let Some((mut monitor, mut client)) = start(256, "used=50M", "", |setup| setup) else { return };
    let stats = client.call("query-balloon-stats");
    assert!(stats["stats"]["stat-total-memory"].as_u64().is_some_and(|total| total > 200 * MIB), "{stats}");
    assert_eq!(stats["interval"], 0);
    // Each query asks for the next.
    let number = |stats: &Value| stats["others"][0]["value"].as_u64().unwrap();
    assert_eq!(stats["others"][0]["tag"], 4242);
    let first = number(&stats);
    until(&mut client, |client| (number(&client.call("query-balloon-stats")) >= first + 3).then_some(()));
    client.call_with("balloon-stats-interval", &json!({"seconds": 1}));
    let before = client.call("query-balloon-stats");
    until(&mut client, |client| {
        let stats = client.call("query-balloon-stats");
        assert_eq!(stats["interval"], 1);
        (number(&stats) >= number(&before) + 2).then_some(())
    });
    set(&mut client, 200 * MIB);
    await_actual(&mut client, 200 * MIB);
    let (total, seen) = until(&mut client, |client| {
        let stats = client.call("query-balloon-stats")["stats"].take();
        let value = |name: &str| stats[name].as_u64().unwrap();
        let total = value("stat-total-memory");
        (total < 200 * MIB).then(|| (total, value("stat-available-memory")))
    });
    assert_eq!(total - seen, 50 * MIB);
    monitor.type_in("s");
    monitor.serial.expect("balloon: asleep");
    // It has stood still for long, but at its target: it is stuck from the new one on.
    thread::sleep(Duration::from_secs(4));
    assert_eq!(detail(&mut client, "stuck-since"), json!(null));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    set(&mut client, 100 * MIB);
    let since = until(&mut client, |client| detail(client, "stuck-since").as_u64());
    assert!((now - 1..now + 5).contains(&since), "{since}, and it is {now}");
    assert_eq!(bytes(&mut client, "residual-bytes"), 100 * MIB);
    assert!(client.call("query-balloon-stats")["last-update"].as_u64().unwrap() >= since - 60);
    client.call("quit");
}

#[test]
fn a_stopped_machine_keeps_its_pages_and_goes_on_with_cont() {
    let Some((monitor, mut client)) = start(512, "depth=16 order=random", "", |setup| setup) else { return };
    for target in [64, 512, 100] {
        let before = actual(&mut client);
        set(&mut client, target * MIB);
        until(&mut client, |client| (actual(client) != before).then_some(()));
        client.call("stop");
        let stopped = actual(&mut client);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(actual(&mut client), stopped);
        client.call("cont");
        await_actual(&mut client, target * MIB);
    }
    finish(monitor);
}

#[test]
fn pages_that_the_guest_reports_as_free_are_the_hosts_and_come_back_as_zeros() {
    for (balloon, reports) in [("", true), ("free-page-reporting=off", false)] {
        let Some((mut monitor, mut client)) = start(256, "", balloon, |setup| setup) else { return };
        assert_eq!(detail(&mut client, "free-page-reporting"), reports);
        if !reports {
            finish(monitor);
            continue;
        }
        let before = proc::anonymous_kib(monitor.pid());
        monitor.type_in("f");
        monitor.serial.expect("balloon: reported=");
        let [reported, reclaimed] = ["reported-bytes", "reclaimed-bytes"].map(|name| bytes(&mut client, name));
        assert!(reported > 200 * MIB && reclaimed >= reported * 99 / 100, "{reported} {reclaimed}");
        let fallen = (before - proc::anonymous_kib(monitor.pid())) * 1024;
        assert!(fallen >= reported * 99 / 100, "{fallen} of {reported}");
        assert_eq!(actual(&mut client), 256 * MIB, "nothing is missing from the guest");
        monitor.type_in("x");
        finish(monitor);
    }
}

#[test]
fn a_balloon_in_a_shared_file_makes_holes_in_the_file() {
    let ram = PathBuf::from(format!("/dev/shm/loopvisor-test-{}", std::process::id()));
    let path = ram.to_str().unwrap().to_owned();
    let started =
        start(256, "", "", |setup| setup.option("-mem-path", &path).option("-machine", "microvm,mem-share=on"));
    let Some((monitor, mut client)) = started else { return };
    let blocks = || fs::metadata(&ram).unwrap().blocks() * 512;
    let before = blocks();
    set(&mut client, 128 * MIB);
    await_actual(&mut client, 128 * MIB);
    let fallen = before - blocks();
    assert!(fallen >= 128 * MIB * 99 / 100, "{fallen}");
    set(&mut client, 256 * MIB);
    await_actual(&mut client, 256 * MIB);
    finish(monitor);
    assert_eq!(fs::metadata(&ram).unwrap().len(), 256 * MIB);
    fs::remove_file(&ram).unwrap();
}

#[test]
fn a_balloon_in_a_nameless_file_frees_what_it_says() {
    // Private without `mem-share=on`, which must not cost each page twice.
    let started = start(256, "", "", |setup| setup.option("-mem-path", "/dev/shm"));
    let Some((monitor, mut client)) = started else { return };
    let blocks = || {
        let files =
            fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().filter_map(|entry| Some(entry.ok()?.path()));
        let memory = files
            .filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("/loopvisor-memory-")));
        memory.map(|path| fs::metadata(path).unwrap().blocks() * 512).sum::<u64>()
    };
    let before = blocks();
    assert!(proc::anonymous_kib(monitor.pid()) < 64 << 10, "the guest's pages are those of the file");
    set(&mut client, 128 * MIB);
    await_actual(&mut client, 128 * MIB);
    let (fallen, told) = (before - blocks(), bytes(&mut client, "reclaimed-bytes"));
    assert!(fallen >= 128 * MIB * 99 / 100 && told.abs_diff(fallen) < MIB, "{fallen}, told {told}");
    finish(monitor);
}

#[test]
fn memory_of_a_private_file_comes_back_as_zeros() {
    let Some((mut monitor, mut client)) = start(64, "", "", |setup| {
        let path = setup.folder.path("ram");
        fs::write(&path, vec![0xaa; 64 << 20]).unwrap();
        setup.option("-mem-path", path.to_str().unwrap())
    }) else {
        return;
    };
    assert_eq!(detail(&mut client, "free-page-reporting"), true);
    // The guest looks that each page that comes back is zero, and so is each that it has reported.
    set(&mut client, 40 * MIB);
    await_actual(&mut client, 40 * MIB);
    set(&mut client, 64 * MIB);
    await_actual(&mut client, 64 * MIB);
    monitor.type_in("f");
    monitor.serial.expect("balloon: reported=");
    assert!(bytes(&mut client, "reported-bytes") > 40 * MIB);
    monitor.type_in("x");
    finish(monitor);
}

#[test]
fn a_full_file_system_refuses_a_start_and_stops_a_guest() {
    let probe = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("tmpfs in a private mount: {probe:?}"));
    }
    const MOUNT: &str = "mount -t tmpfs -o size=100m none \"$0\" && exec \"$@\"";
    let mut place = PathBuf::new();
    let started = start(64, "", "", |setup| {
        place = setup.folder.path("small");
        fs::create_dir(&place).unwrap();
        let folder = place.to_str().unwrap().to_owned();
        setup.option("-mem-path", &folder).under(&["unshare", "-m", "sh", "-c", MOUNT, &folder])
    });
    let Some((monitor, mut client)) = started else { return };
    let pid = monitor.pid().to_string();
    // The other VM sees the same file system, where all of the first one's memory is taken, touched or not.
    let folder = place.to_str().unwrap();
    let other = Setup::guest("mode=hello end=acpi").unwrap().option("-m", "64").option("-mem-path", folder);
    let (code, told) = other.under(&["nsenter", "-t", &pid, "-m"]).run();
    assert!(code == 1 && told.contains(folder) && told.contains("MiB free"), "{code}: {told}");
    // What the balloon has given back another file takes, and the guest wants it again.
    set(&mut client, 40 * MIB);
    await_actual(&mut client, 40 * MIB);
    let filler = PathBuf::from(format!("/proc/{pid}/root{folder}/filler"));
    let mut file = File::create(&filler).unwrap();
    let full = loop {
        if let Err(error) = io::Write::write_all(&mut file, &[1; 4096]) {
            break error;
        }
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    set(&mut client, 64 * MIB);
    let event = client.await_event("GUEST_MEMORY_FULL");
    let reason = event["data"]["reason"].as_str().unwrap();
    assert!(reason.contains("is full") && reason.contains(folder), "{reason}");
    client.await_event("STOP");
    assert_eq!(client.call("query-status")["status"], "paused");
    monitor.log.expect("the machine stops: ");
    // Without room it stops again, and with room it goes on as if nothing had been.
    client.call("cont");
    client.await_event("STOP");
    fs::remove_file(&filler).unwrap();
    drop(file);
    client.call("cont");
    await_actual(&mut client, 64 * MIB);
    finish(monitor);
}

/// Huge pages that the host has for a test, until it is over.
pub struct HugePages(String);

impl HugePages {
    const NUMBER: &'static str = "/proc/sys/vm/nr_hugepages";

    pub fn reserve(count: u64) -> io::Result<HugePages> {
        let before = fs::read_to_string(Self::NUMBER)?;
        let wanted = before.trim().parse().unwrap_or(0) + count;
        fs::write(Self::NUMBER, wanted.to_string())?;
        let reserved = HugePages(before);
        let now: u64 = fs::read_to_string(Self::NUMBER)?.trim().parse().unwrap_or(0);
        if now < wanted { Err(io::Error::other("the host has no memory for huge pages")) } else { Ok(reserved) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::NUMBER, &self.0);
    }
}

#[test]
fn rule_d3_3_memory_of_huge_pages_runs_a_guest_and_excludes_the_balloon() {
    let pages = match HugePages::reserve(40) {
        Ok(pages) => pages,
        Err(e) => return skipped(&format!("huge pages: {e}")),
    };
    const MOUNT: &str = "mount -t hugetlbfs none \"$0\" && exec \"$@\"";
    let probe = Command::new("unshare").args(["-m", "mount", "-t", "hugetlbfs", "none", "/mnt"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("hugetlbfs in a private mount: {probe:?}"));
    }
    let guest = |mib: u64, balloon: bool| {
        let setup = Setup::guest("mode=hello end=acpi")?;
        let folder = setup.folder.path("huge");
        fs::create_dir(&folder).unwrap();
        let folder = folder.to_str().unwrap().to_owned();
        let setup = setup.option("-mem-path", &folder).option("-m", &format!("{mib}M"));
        let setup = if balloon { setup.flag("-balloon") } else { setup };
        Some(setup.under(&["unshare", "-m", "sh", "-c", MOUNT, &folder]))
    };
    let Some(setup) = guest(64, false) else { return };
    setup.start().expect_ok();
    let (code, told) = guest(64, true).unwrap().run();
    assert!(code == 2 && told.contains("pages of 2048 KiB") && told.contains("D3.3"), "{code}: {told}");
    let (code, told) = guest(63, false).unwrap().run();
    assert!(code == 1 && told.contains("not whole huge pages of 2 MiB"), "{code}: {told}");
    // More than any host has.
    let (code, told) = guest(512 << 10, false).unwrap().run();
    assert!(code == 1 && told.contains("huge pages of 2 MiB; /proc/meminfo says how many are free"), "{code}: {told}");
    drop(pages);
}

/// Writes what a kernel would of its memory pressure, and lets it grow while it is on.
struct Pressure {
    path: PathBuf,
    high: AtomicBool,
    over: AtomicBool,
}

impl Pressure {
    fn run(&self) {
        let mut total = 5;
        while !self.over.load(Relaxed) {
            if self.high.load(Relaxed) {
                total += 100_000;
                let text = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n");
                let other = self.path.with_extension("new");
                fs::write(&other, text).unwrap();
                fs::copy(other, &self.path).unwrap();
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

#[test]
fn an_automatic_balloon_takes_under_pressure_what_is_to_spare_and_gives_what_is_needed() {
    let folder = Folder::new();
    let path = folder.path("pressure");
    fs::write(&path, "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n").unwrap();
    let balloon = format!("auto=on,floor=64M,pressure={}", path.display());
    let Some((mut monitor, mut client)) = start(256, "used=100M", &balloon, |setup| setup) else { return };
    let pressure = Pressure { path, high: AtomicBool::new(false), over: AtomicBool::new(false) };
    thread::scope(|scope| {
        scope.spawn(|| pressure.run());
        let auto = |client: &mut Client| detail(client, "auto");
        let calm = json!({"enabled": true, "floor": 64 * MIB, "pressed": false, "source": "file"});
        let asked = client.call("query-balloon-stats")["others"][0]["value"].as_u64();
        until(&mut client, |client| {
            let now = client.call("query-balloon-stats")["others"][0]["value"].as_u64();
            (now.unwrap() >= asked.unwrap() + 3).then_some(())
        });
        assert_eq!((auto(&mut client), actual(&mut client)), (calm, 256 * MIB), "without pressure nothing moves");
        pressure.high.store(true, Relaxed);
        // Of 256 MiB 100 are used: at rest 25 to 30 % are left, so it has 134 to 146, a bit less with the guest's own.
        let rest = until(&mut client, |client| {
            let now = actual(client);
            (now <= 150 * MIB && now == bytes(client, "target")).then_some(now)
        });
        let moved = auto(&mut client);
        assert_eq!((&moved["pressed"], &moved["last-move"]["reason"]), (&json!(true), &json!("host-pressed")));
        let step = moved["last-move"]["from"].as_u64().unwrap() - moved["last-move"]["to"].as_u64().unwrap();
        assert!(step <= 16 * MIB && rest >= 120 * MIB, "{step} {rest}");
        pressure.high.store(false, Relaxed);
        until(&mut client, |client| (auto(client)["pressed"] == false).then_some(()));
        // The guest needs 200 MiB.
        monitor.type_in("u");
        until(&mut client, |client| (actual(client) >= 240 * MIB).then_some(()));
        assert_eq!(auto(&mut client)["last-move"]["reason"], "guest-needs");
        let told = monitor.log.text();
        assert!(told.contains("the host is pressed") && told.contains("the guest is short"), "{told}");
        let (_, refused) = client.mistake("{\"execute\":\"balloon-stats-interval\",\"arguments\":{\"seconds\":60}}");
        assert!(refused.contains("accepted: 1"), "{refused}");
        pressure.over.store(true, Relaxed);
    });
    finish(monitor);
}

/// Processes that stand still for want of memory: they read a file that does not fit the little they may have.
struct Thrash {
    group: PathBuf,
    readers: Vec<Child>,
    _folder: Folder,
}

impl Thrash {
    fn begin() -> io::Result<Thrash> {
        let folder = Folder::new();
        let file = folder.path("long");
        let group = PathBuf::from(format!("/sys/fs/cgroup/memory/loopvisor-test-{}", std::process::id()));
        let (group, limit, members) = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            (group.parent().unwrap().with_file_name(group.file_name().unwrap()), "memory.max", "cgroup.procs")
        } else {
            (group, "memory.limit_in_bytes", "tasks")
        };
        fs::create_dir(&group)?;
        let mut thrash = Thrash { group: group.clone(), readers: Vec::new(), _folder: folder };
        fs::write(group.join(limit), "16M")?;
        // On the disk and out of the cache: what is in there is not theirs.
        let bytes = File::create(&file)?;
        io::copy(&mut io::Read::take(File::open("/dev/urandom")?, 128 * MIB), &mut &bytes)?;
        bytes.sync_all()?;
        let script = format!(
            "echo $$ > {}; while :; do dd if={1} iflag=nocache count=0 status=none; cat {1} {1} > /dev/null; done",
            group.join(members).display(),
            file.display()
        );
        for _ in 0..4 {
            thrash.readers.push(Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).spawn()?);
        }
        Ok(thrash)
    }
}

impl Drop for Thrash {
    fn drop(&mut self) {
        for reader in &mut self.readers {
            let _ = reader.kill();
            let _ = reader.wait();
        }
        // The last `cat` of a reader ends by itself.
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.group).is_err() && self.group.exists() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn the_pressure_of_the_real_host_moves_an_automatic_balloon() {
    if !Path::new("/proc/pressure/memory").exists() {
        return skipped("the host has no /proc/pressure/memory");
    }
    let Some((monitor, mut client)) = start(256, "used=64M", "auto=on,floor=128M", |setup| setup) else { return };
    let source = detail(&mut client, "auto")["source"].take();
    let total = || fs::read_to_string("/proc/pressure/memory").unwrap();
    let before = total();
    let _thrash = match Thrash::begin() {
        Ok(thrash) => thrash,
        Err(e) => return skipped(&format!("a control group with little memory: {e}")),
    };
    let begin = Instant::now();
    while total() == before {
        if begin.elapsed() > Duration::from_secs(10) {
            return skipped("the host's pressure does not rise, whatever is done");
        }
        thread::sleep(Duration::from_millis(100));
    }
    let moved = until(&mut client, |client| {
        let moved = detail(client, "auto")["last-move"].take();
        (!moved.is_null()).then_some(moved)
    });
    assert_eq!(moved["reason"], "host-pressed", "{moved} by {source}");
    until(&mut client, |client| (actual(client) < 256 * MIB).then_some(()));
    finish(monitor);
}

#[test]
fn a_pressure_that_cannot_be_read_is_an_error_at_the_start() {
    let Some(setup) = Setup::guest("mode=hello") else { return };
    let (code, told) = setup.option("-balloon", "auto=on,floor=64M,pressure=/nowhere/pressure").run();
    assert!(code == 1 && told.contains("-balloon pressure=/nowhere/pressure: No such file"), "{code}: {told}");
}
