//! NICs on real taps, each test in a network namespace of its own, made with the monitor and gone with it.

use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup, guest, skipped};
use crate::proc;

/// Becomes the program in a namespace with a tap, whose host has 10.0.0.1.
const NAMESPACE: &str = "set -e
ip link set lo up
ip tuntap add dev tap0 mode tap $TAP
echo 1 >/proc/sys/net/ipv6/conf/tap0/disable_ipv6 || true
ip addr add 10.0.0.1/24 dev tap0
ip link set tap0 mtu ${MTU:-1500} up
exec \"$@\"";

/// Whether a namespace with a tap can be had, and the programs for it; says so if not.
pub fn has_taps() -> bool {
    let tried = Command::new("unshare").args(["-n", "sh", "-c", "ip tuntap add dev t mode tap && ping -V"]).output();
    let good = tried.as_ref().is_ok_and(|output| output.status.success());
    if !good {
        skipped(&format!("a tap in a network namespace, with ping: {tried:?}"));
    }
    good
}

/// A guest with these words in such a namespace; `environment` is put before the script that makes it.
fn setup_with(words: &str, netdev: &str, environment: &str) -> Option<Setup> {
    if !has_taps() {
        return None;
    }
    let script = format!("{environment}\n{NAMESPACE}");
    let setup = Setup::guest(&format!("{words} end=acpi"))?.option("-netdev", &format!("id=n0,netdev=tap0{netdev}"));
    let setup = setup.under(&["unshare", "-n", "sh", "-c", &script, "sh"]);
    Some(setup.stdin(Stdio::piped()))
}

/// The same machine in such a namespace, with a NIC.
pub fn with_nic(setup: Setup) -> Setup {
    setup.option("-netdev", "id=n0,netdev=tap0").under(&["unshare", "-n", "sh", "-c", NAMESPACE, "sh"])
}

fn setup(words: &str, netdev: &str) -> Option<Setup> {
    setup_with(words, netdev, "")
}

/// A machine whose guest has its NIC up.
fn start(setup: Setup) -> Monitor {
    let monitor = setup.start();
    monitor.serial.expect("net: begin");
    monitor
}

/// Runs a command in the machine's namespace.
fn beside(monitor: &Monitor, line: &str) -> Output {
    let pid = monitor.pid().to_string();
    Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", line]).output().unwrap()
}

/// The same, which must go well: what it wrote.
#[track_caller]
fn must(monitor: &Monitor, line: &str) -> String {
    let output = beside(monitor, line);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{line}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// How many answers to its pings the namespace's host has had. What ping says itself is less: it waits for the last
/// answers of a flood no longer than twice its slowest round trip.
fn answers(monitor: &Monitor) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/net/snmp", monitor.pid())).unwrap();
    let mut icmp = text.lines().filter_map(|line| line.strip_prefix("Icmp: ")).map(str::split_whitespace);
    let (names, values) = (icmp.next().unwrap(), icmp.next().unwrap());
    let found = names.zip(values).find(|(name, _)| *name == "InEchoReps").map(|(_, value)| value.parse());
    found.unwrap_or_else(|| panic!("{text}")).unwrap()
}

/// Waits until the host has had so many answers since there were `before`, and no more.
#[track_caller]
fn all_answered(monitor: &Monitor, before: u64, count: u64) {
    let began = std::time::Instant::now();
    while answers(monitor) < before + count && began.elapsed() < PATIENCE {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(answers(monitor) - before, count, "answers to {count} pings");
}

/// A flood of pings of so many bytes in their IP packets; none may be lost or changed.
#[track_caller]
fn flood(monitor: &Monitor, count: u32, bytes: u32) {
    let before = answers(monitor);
    // 28 bytes are the headers of IP and ICMP.
    let told = must(monitor, &format!("ping -f -q -c {count} -s {} 10.0.0.2", bytes - 28));
    assert!(told.contains(&format!("{count} packets transmitted")) && !told.contains("wrong"), "{told}");
    all_answered(monitor, before, count.into());
}

fn stats(client: &mut Client) -> Value {
    client.call("query-netstats")[0].take()
}

#[track_caller]
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// How often a thread has gone to sleep, once it has come to rest.
fn rest(monitor: &Monitor, thread: &str) -> u64 {
    let id = proc::thread(monitor.pid(), thread);
    let pause = || std::thread::sleep(std::time::Duration::from_millis(50));
    let sleeps = || proc::sleeps(monitor.pid(), id);
    let still = (0..200).find_map(|_| {
        let before = sleeps();
        pause();
        (sleeps() == before).then_some(before)
    });
    still.expect("the thread comes to rest")
}

#[test]
fn rules_d1_3_and_d1_8_a_hundred_thousand_pings_come_back_and_the_main_loop_is_not_troubled() {
    let Some(setup) = setup("mode=net-echo", ",iothread=io1,mac=52:54:00:12:34:56") else { return };
    let mut monitor = start(setup.iothread("io1"));
    monitor.serial.expect("mac=52:54:00:12:34:56 mtu=1500 link=1");
    let mut client = monitor.qmp();
    let main = rest(&monitor, "loopvisor");
    flood(&monitor, 100_000, 84);
    let after = rest(&monitor, "loopvisor");
    assert!(after - main < 100, "the main loop went to sleep {} times", after - main);
    let stats = stats(&mut client);
    for way in ["receive", "transmit"] {
        // And the question for the address.
        assert!((100_001..100_100).contains(&number(&stats[way]["packets"])), "{stats}");
        assert_eq!((&stats[way]["dropped"], &stats[way]["errors"]), (&json!(0), &json!(0)), "{stats}");
    }
    let iothreads = client.call("query-iothreads");
    assert!(number(&iothreads[0]["loop"]["events"]) > 1000, "{iothreads}");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn packets_of_every_size_come_back_as_they_were_however_the_guests_buffers_are_cut() {
    for (words, least) in [
        ("buffer=2048", 5),
        ("buffer=128 tx=two", 70),
        ("buffer=70000 buffers=16", 1),
        ("buffer=10000 mrg=off", 1),
        ("buffer=2048 notify=flags tso=off", 5),
    ] {
        let Some(setup) = setup_with(&format!("mode=net-echo {words}"), "", "MTU=9000") else { return };
        let mut monitor = start(setup);
        monitor.serial.expect("mtu=9000");
        for bytes in [64, 65, 127, 128, 129, 576, 1500, 2047, 2048, 2049, 4096, 8999, 9000] {
            flood(&monitor, 300, bytes);
        }
        // Larger than the MTU: in fragments, which the guest does not put together, and must not stumble over.
        assert!(!beside(&monitor, "ping -q -c 2 -i 0.01 -W 1 -s 20000 10.0.0.2").status.success());
        flood(&monitor, 300, 1500);
        monitor.type_in("q");
        monitor.expect_ok();
        let text = monitor.serial.text();
        let most = text.split("most_buffers=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!(most.parse::<u32>().unwrap() >= least, "{words}: {text}");
    }
}

#[test]
fn a_stop_leaves_packets_with_the_host_and_no_packet_is_lost_across_a_thousand_stops() {
    let Some(setup) = setup("mode=net-echo", ",iothread=io1") else { return };
    let mut monitor = start(setup.iothread("io1"));
    let mut client = monitor.qmp();
    flood(&monitor, 10, 84);
    client.call("stop");
    let before = stats(&mut client);
    // Fewer than the tap's own queue has room for.
    let pid = monitor.pid().to_string();
    let line = "ping -q -c 200 -i 0.002 -W 30 10.0.0.2";
    let mut ping =
        Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", line]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(600));
    let sleeps = rest(&monitor, "io1");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(rest(&monitor, "io1"), sleeps, "a stopped machine's loop is woken by packets");
    let stopped = stats(&mut client);
    assert_eq!(stopped["receive"], before["receive"]);
    client.call("cont");
    let told = ping.wait_with_output_text();
    assert!(told.contains("200 packets transmitted, 200 received"), "{told}");
    let (answered, line) = (answers(&monitor), "ping -f -q -c 30000 10.0.0.2");
    ping = Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", line]).stdout(Stdio::piped()).spawn().unwrap();
    let mut rounds = 0;
    while ping.try_wait().unwrap().is_none() {
        client.call("stop");
        client.call("cont");
        rounds += 1;
    }
    let told = ping.wait_with_output_text();
    assert!(told.contains("30000 packets transmitted"), "after {rounds} rounds: {told}");
    all_answered(&monitor, answered, 30000);
    println!("{rounds} rounds of stop and cont");
    monitor.type_in("q");
    monitor.expect_ok();
}

/// What a child wrote, to its end.
trait Text {
    fn wait_with_output_text(&mut self) -> String;
}

impl Text for std::process::Child {
    fn wait_with_output_text(&mut self) -> String {
        let tap = crate::monitor::Tap::on(self.stdout.take().unwrap());
        tap.wait(PATIENCE, |_, ended| ended.then_some(()));
        self.wait().unwrap();
        tap.text()
    }
}

#[test]
fn a_guest_without_buffers_does_not_make_the_loop_spin_and_the_backlog_is_the_kernels() {
    let Some(setup) = setup("mode=net-deaf buffers=4", ",iothread=io1") else { return };
    let mut monitor = start(setup.iothread("io1"));
    // It gives four buffers and never takes them back.
    must(&monitor, "ip neigh replace 10.0.0.2 lladdr 52:54:00:00:00:02 dev tap0");
    beside(&monitor, "ping -q -c 50 -i 0.002 -W 1 10.0.0.2");
    let mut client = monitor.qmp();
    assert_eq!(stats(&mut client)["receive"]["packets"], 4);
    let before = rest(&monitor, "io1");
    // Far more than the tap's queue holds.
    beside(&monitor, "ping -f -q -c 3000 -l 100 -W 1 10.0.0.2");
    assert_eq!(rest(&monitor, "io1"), before, "packets that nobody can take wake the loop");
    assert_eq!(stats(&mut client)["receive"]["packets"], 4);
    // As soon as there are buffers it goes on.
    monitor.type_in("b");
    monitor.serial.expect("net: more");
    assert!((0..1000).any(|_| number(&stats(&mut client)["receive"]["packets"]) == 8), "{}", stats(&mut client));
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_tap_that_is_removed_is_a_link_that_is_down_with_one_line_in_the_log() {
    let Some(setup) = setup("mode=net-echo", ",iothread=io1") else { return };
    let mut monitor = start(setup.iothread("io1"));
    flood(&monitor, 1000, 84);
    let mut client = monitor.qmp();
    must(&monitor, "ip link del tap0");
    monitor.serial.expect("net: link=0");
    let stats = stats(&mut client);
    assert_eq!((&stats["link"], stats.get("tap")), (&json!(false), None), "{stats}");
    let before = rest(&monitor, "io1");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(rest(&monitor, "io1"), before, "a tap that is gone wakes the loop");
    monitor.type_in("q");
    monitor.expect_ok();
    let log = monitor.log.text();
    assert_eq!(log.matches("netdev \"n0\": its tap is gone; the link is down").count(), 1, "{log}");
}

#[test]
fn tap_that_is_set_down_is_one_line_in_the_log_each_time() {
    let Some(setup) = setup("mode=net-send size=64 ms=20000", "") else { return };
    let monitor = setup.start();
    let mut client = monitor.qmp();
    for count in 1..=3 {
        must(&monitor, "ip link set tap0 down");
        let dropped = |client: &mut Client| number(&stats(client)["transmit"]["dropped"]);
        let before = dropped(&mut client);
        assert!((0..100_000).any(|_| dropped(&mut client) > before + 1000), "nothing is dropped");
        must(&monitor, "ip link set tap0 up");
        let told =
            |text: &str| (text.matches("\"n0\": the interface of its tap is up again").count() == count).then_some(());
        assert!(monitor.log.wait(PATIENCE, |text, _| told(text)).is_some(), "{}", monitor.log.text());
    }
    let log = monitor.log.text();
    assert_eq!(log.matches("\"n0\": the interface of its tap is down").count(), 3, "{log}");
    assert_eq!(log.lines().filter(|line| line.contains("n0") && !line.contains("MTU")).count(), 6, "{log}");
}

#[test]
fn set_link_pulls_the_cable_for_both_sides_and_plugs_it_in_again() {
    let Some(setup) = setup("mode=net-echo", "") else { return };
    let mut monitor = start(setup);
    flood(&monitor, 100, 84);
    let mut client = monitor.qmp();
    client.call_with("set_link", &json!({"name": "n0", "up": false}));
    monitor.serial.expect("net: link=0");
    assert_eq!(stats(&mut client)["link"], false);
    assert!(must(&monitor, "ip link show tap0").contains("NO-CARRIER"));
    assert!(!beside(&monitor, "ping -q -c 2 -i 0.01 -W 1 10.0.0.2").status.success());
    client.call_with("set_link", &json!({"name": "n0", "up": true}));
    monitor.serial.expect("net: link=1");
    assert!(!must(&monitor, "ip link show tap0").contains("NO-CARRIER"));
    // The host's own queue kept the two from before, which go first.
    must(&monitor, "ping -q -c 1 10.0.0.2");
    flood(&monitor, 100, 84);
    let (class, _) = client.mistake("{\"execute\":\"set_link\",\"arguments\":{\"name\":\"n9\",\"up\":true}}");
    assert_eq!(class, "DeviceNotFound");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn a_limit_holds_each_way_and_is_changed_while_the_machine_runs() {
    // The guest answers each packet: 500 a second of either limit is 500 answers a second.
    for limit in ["pps-read=500", "pps-write=500", "pps-total=1000", "bps-read=49000", "bps-write=49000"] {
        let Some(setup) = setup("mode=net-echo", &format!(",iothread=io1,throttling.{limit}")) else { return };
        let mut monitor = start(setup.iothread("io1"));
        let mut client = monitor.qmp();
        flood(&monitor, 10, 84);
        let begin = std::time::Instant::now();
        flood(&monitor, 1000, 84);
        let seconds = begin.elapsed().as_secs_f64();
        // No second has more than 500, so a thousand take no less than the time from the first to the last.
        assert!(seconds > 1.95, "{limit}: a thousand took {seconds} s");
        let counters = stats(&mut client);
        let ways = ["receive", "transmit"].map(|way| number(&counters[way]["throttled"]));
        assert!(ways.iter().sum::<u64>() > 100, "{counters}");
        assert_eq!(ways.map(|n| n > 0), [!limit.contains("write"), !limit.contains("read")], "{limit}: {counters}");
        let off = json!({"id": "n0", "bps_rd": 0, "bps_wr": 0, "pps": 0, "pps_rd": 0, "pps_wr": 0});
        client.call_with("netdev_set_throttle", &off);
        let begin = number(&stats(&mut client)["receive"]["throttled"]);
        flood(&monitor, 1000, 84);
        let after = stats(&mut client);
        assert_eq!(number(&after["receive"]["throttled"]), begin, "{after}");
        assert_eq!(after.get("limits"), None);
        client.call_with("netdev_set_throttle", &json!({"id": "n0", "pps_rd": 700}));
        assert_eq!(stats(&mut client)["limits"]["pps_rd"], 700);
        monitor.type_in("q");
        monitor.expect_ok();
    }
}

#[test]
fn a_tap_of_several_queues_gives_one_pair_or_as_many_as_are_asked_for() {
    for netdev in ["", ",queues=4"] {
        let words = "mode=net-echo";
        let Some(setup) = setup_with(words, &format!("{netdev},iothread=io1"), "TAP=multi_queue") else { return };
        let mut monitor = start(setup.iothread("io1"));
        let mut client = monitor.qmp();
        let pairs = if netdev.is_empty() { 1 } else { 4 };
        let stats = stats(&mut client);
        assert_eq!((&stats["queue-pairs"], &stats["active-pairs"]), (&json!(pairs), &json!(1)), "{stats}");
        // All flows reach the one pair that the driver uses.
        for n in 0..8 {
            must(&monitor, &format!("ip addr add 10.0.0.{}/24 dev tap0", 10 + n));
            must(&monitor, &format!("ping -q -c 20 -i 0.002 -I 10.0.0.{} 10.0.0.2", 10 + n));
        }
        monitor.type_in("q");
        monitor.expect_ok();
    }
}

#[test]
fn an_opened_tap_is_taken_over_by_its_descriptor() {
    if !has_taps() {
        return;
    }
    // A shell cannot open a tap; python can.
    let script = "import fcntl, os, struct, sys
fd = os.open('/dev/net/tun', os.O_RDWR)
os.dup2(fd, 9)
fcntl.ioctl(9, 0x400454ca, struct.pack('16sH22x', b'tap0', 0x5002))
os.close(fd)
os.set_inheritable(9, True)
os.execvp(sys.argv[1], sys.argv[1:])";
    let Some(setup) = Setup::guest("mode=net-echo end=acpi") else { return };
    let setup = setup.option("-netdev", "tap,id=n0,fd=9").option("-device", "virtio-net-device,netdev=n0,id=eth");
    let under = ["unshare", "-n", "sh", "-c", NAMESPACE, "sh", "python3", "-c", script];
    let mut monitor = start(setup.under(&under).stdin(Stdio::piped()));
    flood(&monitor, 1000, 84);
    assert_eq!(stats(&mut monitor.qmp())["id"], "eth");
    monitor.type_in("q");
    monitor.expect_ok();
}

/// What the program says, and its exit code, with these words in such a namespace.
fn refused(netdevs: &[&str], before: &str, under: &[&str]) -> String {
    let script = format!("{before}\nexec \"$@\"");
    let setup = Setup::bare().option("-kernel", guest().to_str().unwrap());
    let setup = netdevs.iter().fold(setup, |setup, netdev| setup.option("-netdev", netdev));
    let words: Vec<&str> =
        ["unshare", "-n", "sh", "-c", &script, "sh"].into_iter().chain(under.iter().copied()).collect();
    let (code, told) = setup.under(&words).run();
    assert_eq!(code, 1, "{told}");
    assert_eq!(told.lines().filter(|line| line.starts_with("loopvisor: ")).count(), 1, "{told}");
    told
}

#[test]
fn what_the_host_says_to_a_tap_is_told_with_the_way_out() {
    if !has_taps() {
        return;
    }
    let told = refused(&["id=n0,netdev=tap0"], "", &[]);
    assert!(
        told.contains("netdev \"n0\": tap tap0: there is no such interface; make it with \"ip tuntap add"),
        "{told}"
    );
    let told = refused(&["id=n0,netdev=lo"], "", &[]);
    assert!(told.contains("tap lo: it is no tap; make one with"), "{told}");
    let told = refused(&["id=n0,netdev=tun0"], "ip tuntap add dev tun0 mode tun", &[]);
    assert!(told.contains("tap tun0: it is no tap; make one with"), "{told}");
    let told = refused(&["id=n0,netdev=tap0,queues=2"], "ip tuntap add dev tap0 mode tap", &[]);
    assert!(
        told.contains("no tap of several queues; make it with \"ip tuntap add dev tap0 mode tap multi_queue\""),
        "{told}"
    );
    let told = refused(&["id=n0,fds=7"], "exec 7</dev/null", &[]);
    assert!(told.contains("netdev \"n0\": fds=7 is no open descriptor of a tap"), "{told}");
    let told = refused(&["id=n0,fds=99"], "", &[]);
    assert!(told.contains("Bad file descriptor"), "{told}");
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let told = refused(&["id=n0,netdev=tap0"], "ip tuntap add dev tap0 mode tap user root", &nobody);
    assert!(told.contains("tap tap0: it belongs to somebody else"), "{told}");
}

#[test]
fn a_tap_that_another_program_has_is_named_with_the_way_out() {
    let Some(setup) = setup("mode=net-echo", "") else { return };
    let mut monitor = start(setup);
    let pid = monitor.pid().to_string();
    let other = Setup::bare().option("-kernel", guest().to_str().unwrap()).option("-netdev", "id=n1,netdev=tap0");
    let (code, told) = other.under(&["nsenter", "-t", &pid, "-n"]).run();
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("netdev \"n1\": tap tap0: another program has it; end that program"), "{told}");
    flood(&monitor, 100, 84);
    monitor.type_in("q");
    monitor.expect_ok();
}
