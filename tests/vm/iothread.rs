//! iothreads: threads of the host that serve drives (rules D1.1 to D1.8).

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::client::Client;
use crate::monitor::{Setup, guest, skipped};
use crate::proc;

/// One iothread in the answer of `query-iothreads`.
fn iothread<'a>(all: &'a Value, id: &str) -> &'a Value {
    all.as_array().unwrap().iter().find(|one| one["id"] == id).expect("the iothread is listed")
}

fn events(client: &mut Client, id: &str) -> u64 {
    iothread(&client.call("query-iothreads"), id)["loop"]["events"].as_u64().unwrap()
}

#[test]
fn rules_d1_1_and_d1_7_the_host_shows_a_thread_for_each_iothread_by_its_name() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    // Linux keeps 15 bytes of a thread's name.
    let setup = setup.iothread("io1").iothread("disk.loop-2").iothread("a-name-of-more-than-15-bytes");
    let monitor = setup.disk("vda", 1 << 20, "direct=off,iothread=io1").start();
    let all = monitor.qmp().call("query-iothreads");
    let ids: Vec<&str> = all.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["io1", "disk.loop-2", "a-name-of-more-than-15-bytes"]);
    for (id, name) in
        [("io1", "io1"), ("disk.loop-2", "disk.loop-2"), ("a-name-of-more-than-15-bytes", "a-name-of-more-")]
    {
        let thread = u64::from(proc::thread(monitor.pid(), name));
        assert_eq!(iothread(&all, id)["thread-id"].as_u64(), Some(thread), "{id}");
    }
    assert_ne!(iothread(&all, "io1")["thread-id"].as_u64(), Some(monitor.pid().into()), "not the main thread");
}

#[test]
fn rules_d1_1_and_d1_6_eight_iothreads_serve_eight_drives_each_its_own() {
    let Some(mut setup) = Setup::guest("mode=blk-load op=mixed depth=8 count=500 end=acpi") else { return };
    for n in 1..=8 {
        setup = setup.iothread(&format!("io{n}"));
        setup = setup.disk(&format!("d{n}"), 1 << 20, &format!("direct=off,iothread=io{n}"));
    }
    let mut monitor = setup.flag("-S").start();
    let mut client = monitor.qmp();
    let before: Vec<u64> = (1..=8).map(|n| events(&mut client, &format!("io{n}"))).collect();
    client.call("cont");
    monitor.serial.expect("load: begin");
    let grown = |client: &mut Client| (1..=8).all(|n| events(client, &format!("io{n}")) > before[n - 1]);
    assert!((0..10_000).any(|_| grown(&mut client)), "an iothread stands still");
    monitor.expect_ok();
    assert_eq!(monitor.serial.text().matches("errors=0").count(), 8);
}

#[test]
fn rule_d1_6_several_drives_share_an_iothread() {
    let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
    let setup = setup.iothread("io1");
    let setup = ["vda", "vdb", "vdc"].into_iter().fold(setup, |s, id| s.disk(id, 1 << 20, "direct=off,iothread=io1"));
    let mut monitor = setup.start();
    monitor.expect_ok();
    for disk in 0..3 {
        assert!(monitor.serial.text().contains(&format!("disk={disk} step=flush status=0")));
    }
}

/// What `events=` of the main loop stands at, from the dump.
fn main_events(dump: &str) -> u64 {
    let line = dump.lines().find(|line| line.contains("loop main")).expect("the main loop is in the dump");
    let number = line.split("events: ").nth(1).and_then(|rest| rest.split(',').next());
    number.and_then(|number| number.parse().ok()).expect("its events")
}

#[test]
fn rules_d1_1_and_d1_8_a_drive_on_an_iothread_costs_the_main_loop_and_the_vcpu_nothing_per_request() {
    const REQUESTS: u64 = 5000;
    let words = format!("mode=blk-load depth=4 kick=each notify=flags count={REQUESTS} end=hang");
    let Some(setup) = Setup::guest(&words) else { return };
    let monitor = setup.iothread("io1").disk("vda", 8 << 20, "direct=off,iothread=io1").flag("-S").start();
    let mut client = monitor.qmp();
    let loop_before = events(&mut client, "io1");
    let main_before = main_events(&monitor.dump(1));
    let vcpu = proc::thread(monitor.pid(), "CPU 0/KVM");
    let trace = monitor.folder.path("trace");
    let mut strace = Command::new("strace");
    strace.args(["-c", "-o", trace.to_str().unwrap(), "-p", &vcpu.to_string()]).stderr(Stdio::piped());
    let mut tracer = match strace.spawn() {
        Ok(mut tracer) => {
            let said = crate::monitor::Tap::on(tracer.stderr.take().unwrap());
            said.expect("attached");
            Some(tracer)
        }
        Err(error) => {
            skipped(&format!("the vCPU's part: strace: {error}"));
            None
        }
    };
    client.call("cont");
    monitor.serial.expect("guest: ok");
    if let Some(tracer) = &mut tracer {
        let command = format!("kill -INT {}", tracer.id());
        Command::new("sh").args(["-c", &command]).status().unwrap();
        tracer.wait().unwrap();
        let table = fs::read_to_string(&trace).unwrap();
        // KVM_RUN returns for the set-up of the device and each byte of text, about a thousand times, and no more.
        let calls: u64 = table
            .lines()
            .filter(|line| line.ends_with("ioctl"))
            .filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok())
            .sum();
        assert!(calls > 0 && calls < REQUESTS / 2, "{calls} exits to user space:\n{table}");
    }
    let main = main_events(&monitor.dump(1)) - main_before;
    assert!(main < REQUESTS / 10, "the main loop was called {main} times");
    // One call serves as many requests as have come by then.
    assert!(events(&mut client, "io1") > loop_before);
    let stats = client.call("query-blockstats");
    assert_eq!(stats[0]["stats"]["rd_operations"], REQUESTS);
}

#[test]
fn rules_d1_2_and_d1_6_a_wrong_iothread_is_refused_with_2_before_anything_is_started() {
    let cases: [(&[&str], &[&str]); 5] = [
        (&["id=io0"; 2], &["io0"]),
        (&["id="], &["id"]),
        (&["id=a", "id=b", "id=c", "id=d", "id=e", "id=f", "id=g", "id=h", "id=i"], &["rule D1.2"]),
        (&[""], &["-iothread"]),
        (&["name=io0"], &["name", "id"]),
    ];
    for (iothreads, parts) in cases {
        let setup = Setup::bare().option("-kernel", guest().to_str().unwrap());
        let setup = iothreads.iter().fold(setup, |setup, value| setup.option("-iothread", value));
        let socket = setup.folder.path("qmp");
        let (code, told) = setup.option("-qmp", &format!("unix:{},server", socket.display())).run();
        assert_eq!(code, 2, "{told}");
        assert!(parts.iter().all(|part| told.contains(part)), "{told}");
    }
    let unknown = Setup::bare().option("-kernel", guest().to_str().unwrap()).iothread("io0");
    let (code, told) = unknown.disk("vda", 1 << 20, "iothread=io9").run();
    assert_eq!(code, 2, "{told}");
    assert!(told.contains("io9") && told.contains("io0"), "{told}");
}
