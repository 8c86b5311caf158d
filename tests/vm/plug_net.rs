//! Hot-plug of NICs, in a network namespace of the monitor's own: taps come into slots and go.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup, skipped};
use crate::proc;

/// Becomes the program in a namespace with two taps, whose host has 10.0.0.1 and 10.0.1.1.
const NAMESPACE: &str = "set -e
ip link set lo up
for n in 0 1; do
    ip tuntap add dev tap$n mode tap
    echo 1 >/proc/sys/net/ipv6/conf/tap$n/disable_ipv6 || true
    ip addr add 10.0.$n.1/24 dev tap$n
    ip link set tap$n up
done
exec \"$@\"";

/// A guest without a NIC on its command line, whose first slot's driver answers pings as 10.0.0.2.
fn guest(words: &str) -> Option<(Monitor, Client)> {
    let tried = Command::new("unshare").args(["-n", "sh", "-c", "ip tuntap add dev t mode tap && ping -V"]).output();
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        skipped(&format!("a tap in a network namespace, with ping: {tried:?}"));
        return None;
    }
    let setup = Setup::guest(&format!("mode=net-echo end=acpi {words}"))?.stdin(Stdio::piped());
    let monitor = setup.under(&["unshare", "-n", "sh", "-c", NAMESPACE, "sh"]).start();
    monitor.serial.expect("mtu=1500 link=0");
    let client = monitor.qmp();
    Some((monitor, client))
}

/// Runs a command in the machine's namespace.
fn beside(monitor: &Monitor, words: &[&str]) -> Output {
    let pid = monitor.pid().to_string();
    Command::new("nsenter").args(["-t", &pid, "-n"]).args(words).output().unwrap()
}

#[track_caller]
fn ping(monitor: &Monitor, address: &str) {
    let output = beside(monitor, &["ping", "-q", "-c", "3", "-i", "0.2", "-W", "10", address]);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("3 packets transmitted, 3 received"), "{told}");
}

/// The number of times that the guest has said that its link is so.
fn links(monitor: &Monitor, state: u8, count: usize) {
    let line = format!("net: link={state}\n");
    let seen = monitor.serial.wait(PATIENCE, |text, _| (text.matches(&line).count() >= count).then_some(()));
    assert!(seen.is_some(), "link {state}, {count} times");
}

fn device(id: &str, addr: &str) -> Value {
    json!({"id": id, "driver": "virtio-net-mmio", "addr": addr})
}

#[track_caller]
fn unplug(client: &mut Client, name: &str) {
    client.call_with("device_del", &json!({"id": name}));
    assert_eq!(client.await_event("DEVICE_DELETED")["data"], json!({"device": name, "path": name}));
}

#[test]
fn a_nic_gets_a_link_pings_loses_it_and_gets_another() {
    let Some((mut monitor, mut client)) = guest("") else { return };
    assert_eq!(client.call("query-netstats"), json!([]));
    client.call_with("netdev_add", &json!({"type": "tap", "id": "net0", "ifname": "tap0"}));
    client.call_with("device_add", &device("net0", "0x0"));
    links(&monitor, 1, 1);
    ping(&monitor, "10.0.0.2");
    let stats = client.call("query-netstats");
    assert_eq!((&stats[0]["id"], &stats[0]["tap"], &stats[0]["link"]), (&json!("net0"), &json!("tap0"), &json!(true)));
    assert!(stats[0]["transmit"]["packets"].as_u64() >= Some(4) && stats[0]["limits"].is_null(), "{stats}");
    client.call_with("netdev_set_throttle", &json!({"id": "net0", "pps": 100}));
    client.call_with("set_link", &json!({"name": "net0", "up": false}));
    links(&monitor, 0, 1);
    unplug(&mut client, "net0");
    assert_eq!(client.call("query-netstats"), json!([]));
    // The tap is anybody's: even the same slot's once more, where neither limit nor pulled cable is left.
    client.call_with("netdev_add", &json!({"id": "again", "ifname": "tap0"}));
    client.call_with("device_add", &device("again", "0x0"));
    links(&monitor, 1, 2);
    ping(&monitor, "10.0.0.2");
    let stats = client.call("query-netstats");
    assert!(stats[0]["limits"].is_null() && stats[0]["receive"]["throttled"] == 0, "{stats}");
    unplug(&mut client, "again");
    links(&monitor, 0, 2);
    client.call_with("netdev_del", &json!({"id": "again"}));
    monitor.type_in("q");
    monitor.expect_ok();
}

/// Opens tap1 in the namespace and hands it over: `getfd` and `netdev_add` of one session.
const HAND_OVER: &str = "import array, fcntl, json, socket, struct, sys
tun = open('/dev/net/tun', 'r+b', buffering=0)
# TUNSETIFF with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR
fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'tap1', 0x0002 | 0x1000 | 0x4000))
qmp = socket.socket(socket.AF_UNIX)
qmp.connect(sys.argv[1])
lines = qmp.makefile()
def ask(command, arguments={}, fds=[]):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
    qmp.sendmsg([json.dumps({'execute': command, 'arguments': arguments}).encode()], rights)
    answer = json.loads(lines.readline())
    assert 'return' in answer, answer
lines.readline()
ask('qmp_capabilities')
ask('getfd', {'fdname': 'tap'}, [tun.fileno()])
ask('netdev_add', {'type': 'tap', 'id': 'net1', 'fds': '7:tap'})
ask('device_add', {'id': 'net1', 'driver': 'virtio-net-mmio', 'addr': '0x1'})
";

#[test]
fn a_tap_that_a_client_hands_over_works_and_outlives_the_client() {
    let Some((mut monitor, mut client)) = guest("nic=1 ip=10.0.1.2") else { return };
    let python = std::env::var("LOOPVISOR_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !Command::new(&python).arg("-V").output().is_ok_and(|output| output.status.success()) {
        return skipped("there is no Python to send a descriptor with");
    }
    let output = beside(&monitor, &[&python, "-c", HAND_OVER, monitor.socket().to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    links(&monitor, 1, 1);
    ping(&monitor, "10.0.1.2");
    assert_eq!(client.call("query-netstats")[0]["tap"], "tap1");
    unplug(&mut client, "net1");
    links(&monitor, 0, 1);
    monitor.type_in("q");
    monitor.expect_ok();
}

/// How many descriptors a process has open.
fn descriptors(monitor: &Monitor) -> usize {
    std::fs::read_dir(Path::new("/proc").join(monitor.pid().to_string()).join("fd")).unwrap().count()
}

#[test]
fn every_mistake_about_a_nic_is_told_and_leaves_nothing_behind() {
    let Some((monitor, mut client)) = guest("") else { return };
    client.call_with("netdev_add", &json!({"id": "net0", "ifname": "tap0"}));
    client.call_with("device_add", &device("net0", "0x0"));
    client.call_with("netdev_add", &json!({"id": "spare", "ifname": "tap1"}));
    let with = |mut value: Value, name: &str, argument: Value| {
        value[name] = argument;
        value
    };
    let tap = |id: &str, name: &str| json!({"id": id, "ifname": name});
    let before = (descriptors(&monitor), client.call("query-netstats")[0]["tap"].take());
    let cases: Vec<(&str, Value, &str, &[&str])> = vec![
        ("netdev_add", tap("x", "tap9"), "GenericError", &["tap9", "no such interface"]),
        ("netdev_add", tap("x", "lo"), "GenericError", &["lo", "it is no tap"]),
        ("netdev_add", tap("x", "tap0"), "GenericError", &["tap0", "another program has it"]),
        ("netdev_add", tap("x", "a-name-much-too-long"), "GenericError", &["ifname", "15"]),
        ("netdev_add", tap("net0", "tap1"), "GenericError", &["'net0'", "already"]),
        ("netdev_add", json!({"id": "x"}), "GenericError", &["'ifname'", "'fd'"]),
        ("netdev_add", json!({"id": "x", "fd": "nobody"}), "DeviceNotFound", &["'nobody'", "getfd"]),
        ("netdev_add", json!({"id": "x", "fds": "5"}), "GenericError", &["'5'", "getfd"]),
        ("netdev_add", with(tap("x", "tap1"), "iothread", json!("io1")), "GenericError", &["rule D1.5", "-netdev"]),
        ("netdev_add", with(tap("x", "tap1"), "mac", json!("a")), "GenericError", &["'mac'", "slot"]),
        ("netdev_add", with(tap("x", "tap1"), "vhost", json!(true)), "GenericError", &["vhost"]),
        ("netdev_add", with(tap("x", "tap1"), "queues", json!(2)), "GenericError", &["queues"]),
        ("device_add", device("spare", "0x0"), "GenericError", &["NIC slot 0x0 has device 'net0'", "free: 0x1"]),
        ("device_add", device("spare", "0x2"), "GenericError", &["no NIC slot 0x2"]),
        ("device_add", device("spare", "eth1"), "GenericError", &["'addr'", "'eth1'"]),
        ("device_add", with(device("spare", "0x1"), "lun", json!(0)), "GenericError", &["'lun'"]),
        (
            "device_add",
            with(device("spare", "0x1"), "physical_block_size", json!(512)),
            "GenericError",
            &["'physical_block_size'", "disks"],
        ),
        ("device_add", with(device("spare", "0x1"), "iothread", json!("a")), "GenericError", &["rule D1.5"]),
        ("device_add", device("nobody", "0x1"), "DeviceNotFound", &["'nobody'", "netdev_add"]),
        ("device_add", with(device("x", "0x1"), "netdev", json!("net0")), "GenericError", &["in use by device 'net0'"]),
        ("netdev_del", json!({"id": "net0"}), "GenericError", &["device 'net0'", "device_del"]),
        ("netdev_del", json!({"id": "nobody"}), "DeviceNotFound", &["'nobody'"]),
        ("device_del", json!({"id": "spare"}), "DeviceNotFound", &["'spare'"]),
    ];
    for (command, arguments, class, parts) in cases {
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        let (told_class, told) = client.mistake(&request);
        assert_eq!(told_class, class, "{request}: {told}");
        for part in parts {
            assert!(told.contains(part), "{part:?} is not in {told}, for {request}");
        }
    }
    // A descriptor that is no tap is taken, and closed.
    client.send_with("getfd", &json!({"fdname": "null"}), &std::fs::File::open("/dev/null").unwrap());
    let (_, told) = client.mistake("{\"execute\":\"netdev_add\",\"arguments\":{\"id\":\"x\",\"fd\":\"null\"}}");
    assert!(told.contains("none of a tap"), "{told}");
    assert_eq!((descriptors(&monitor), client.call("query-netstats")[0]["tap"].take()), before);
    client.call_with("netdev_del", &json!({"id": "spare"}));
}

#[test]
fn many_plugs_of_nics_leave_nothing_behind() {
    let Some((mut monitor, mut client)) = guest("") else { return };
    let mut round = |n: u32| {
        let (name, slot) = (format!("net{}", n % 10), format!("{:#x}", n % 2));
        client.call_with("netdev_add", &json!({"id": name, "ifname": "tap0"}));
        let mut device = device(&name, &slot);
        if n.is_multiple_of(3) {
            device["netdev"] = json!(name);
        }
        client.call_with("device_add", &device);
        unplug(&mut client, &name);
        client.call_with("netdev_del", &json!({"id": name}));
    };
    // When the threads of the last round have ended.
    let state = |monitor: &Monitor| {
        let looks = (0..200).map(|_| {
            thread::sleep(Duration::from_millis(1));
            [descriptors(monitor), proc::threads(monitor.pid()).len()]
        });
        looks.reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1])]).unwrap()
    };
    (0..20).for_each(&mut round);
    let (before, memory) = (state(&monitor), proc::anonymous_kib(monitor.pid()));
    let until = Instant::now() + PATIENCE;
    (20..220).take_while(|_| Instant::now() < until).for_each(&mut round);
    assert_eq!(state(&monitor), before);
    assert!(proc::anonymous_kib(monitor.pid()) < memory + 128, "memory has grown");
    client.call_with("netdev_add", &json!({"id": "last", "ifname": "tap0"}));
    client.call_with("device_add", &device("last", "0x0"));
    links(&monitor, 1, 1);
    ping(&monitor, "10.0.0.2");
    monitor.type_in("q");
    monitor.expect_ok();
}
