//! `stop` and `cont`: in which order all hear of them, what stands still, and that nothing is lost or done twice.

use std::process::Stdio;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::Setup;

/// The next lines: the event's name, or the answer's `return`.
#[track_caller]
fn lines(client: &mut Client, count: usize) -> Vec<Value> {
    let short = |line: Value| line.get("event").or(line.get("return")).cloned().unwrap_or(line);
    (0..count).map(|_| short(client.line())).collect()
}

#[test]
fn stop_and_cont_tell_their_event_before_their_answer_and_quit_after() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let mut monitor = setup.disk("vda", 1 << 20, "direct=off").start();
    let [mut client, mut other] = [(); 2].map(|()| monitor.qmp());
    client.ask("stop");
    assert_eq!(lines(&mut client, 2), [json!("STOP"), json!({})]);
    client.ask("cont");
    assert_eq!(lines(&mut client, 2), [json!("RESUME"), json!({})]);
    client.ask("quit");
    assert_eq!(lines(&mut client, 1), [json!({})]);
    let shutdown = client.line();
    assert_eq!(shutdown["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    client.expect_end();
    // Another client hears of all of it.
    assert_eq!(lines(&mut other, 3), [json!("STOP"), json!("RESUME"), json!("SHUTDOWN")]);
    other.expect_end();
    assert_eq!(monitor.exit_code(), 0);
    assert!(!monitor.socket().exists());
}

#[test]
fn stop_of_a_stopped_machine_and_cont_of_a_running_one_answer_and_tell_nothing() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let monitor = setup.start();
    let mut client = monitor.qmp();
    for (command, event, status) in
        [("cont", None, "running"), ("stop", Some("STOP"), "paused"), ("stop", None, "paused")]
    {
        client.call(command);
        assert_eq!(client.events_kept(), usize::from(event.is_some()), "{command}");
        if let Some(event) = event {
            assert_eq!(client.event()["event"], event);
        }
        assert_eq!(client.call("query-status")["status"], status);
    }
    assert_eq!(client.call("query-status")["running"], false);
}

#[test]
fn a_frozen_machine_takes_stop_for_done_and_goes_on_with_cont() {
    let Some(setup) = Setup::guest("mode=hello end=acpi") else { return };
    let mut monitor = setup.option("-smp", "2").flag("-S").start();
    let mut client = monitor.qmp();
    client.call("stop");
    assert_eq!(client.call("query-status")["status"], "prelaunch");
    assert_eq!(client.events_kept(), 0);
    client.ask("cont");
    assert_eq!(lines(&mut client, 2), [json!("RESUME"), json!({})]);
    client.await_event("SHUTDOWN");
    monitor.expect_ok();
}

#[test]
fn stops_and_conts_of_several_clients_at_once_are_all_answered_and_in_turn() {
    let Some(setup) = Setup::guest("mode=blk-verify end=acpi") else { return };
    let setup = setup.iothread("io1").disk("vda", 16 << 20, "direct=off,iothread=io1").option("-smp", "2");
    let mut monitor = setup.stdin(Stdio::piped()).start();
    monitor.serial.expect("verify: begin");
    let mut witness = monitor.qmp();
    thread::scope(|scope| {
        for _ in 0..4 {
            let mut client = monitor.qmp();
            scope.spawn(move || {
                for _ in 0..25 {
                    // Sent ahead, the second while the first is going on.
                    client.send("{\"execute\":\"stop\"}{\"execute\":\"stop\"}{\"execute\":\"cont\"}");
                    (0..3).for_each(|_| assert_eq!(client.answer()["return"], json!({})));
                }
            });
        }
    });
    witness.call("cont");
    // Each change is told once: STOP and RESUME by turns, as many of the one as of the other.
    let told: Vec<Value> = (0..witness.events_kept()).map(|_| witness.event()["event"].clone()).collect();
    assert!(told.len() >= 50 && told.len().is_multiple_of(2), "{}", told.len());
    assert!(told.chunks(2).all(|pair| pair == ["STOP", "RESUME"]), "{told:?}");
    monitor.type_in("q");
    monitor.expect_ok();
}

#[test]
fn the_answers_of_two_stops_at_once_come_when_the_machine_stands() {
    let Some(setup) = Setup::guest("mode=spin ms=600000") else { return };
    let monitor = setup.start();
    monitor.serial.expect("spin: begin");
    let [mut one, mut two] = [(); 2].map(|()| monitor.qmp());
    one.ask("stop");
    two.ask("stop");
    for client in [&mut one, &mut two] {
        assert_eq!(client.answer()["return"], json!({}));
        assert_eq!(client.call("query-status")["status"], "paused");
        assert_eq!(client.event()["event"], "STOP");
        assert_eq!(client.events_kept(), 0);
    }
}

/// What the disk still has to do, and what it has done. The rates of the last second go on while the disk stands.
fn standing(client: &mut Client) -> (Value, Value) {
    let mut stats = client.call("query-blockstats")[0]["stats"].take();
    for rate in ["iops_last_second", "bps_last_second"] {
        stats.as_object_mut().unwrap().remove(rate).expect("a rate");
    }
    (stats["in_flight_operations"].take(), stats)
}

/// Rounds of stop and cont, or LOOPVISOR_ROUNDS. A thousand take three seconds on an idle host.
fn rounds() -> u32 {
    std::env::var("LOOPVISOR_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1000)
}

#[test]
fn rounds_of_stop_and_cont_under_disk_load_lose_and_double_nothing() {
    for home in ["direct=off,iothread=io1", "direct=on,iothread=io1", "direct=off,aio=threads"] {
        let Some(setup) = Setup::guest("mode=blk-verify depth=32 end=acpi") else { return };
        let mut monitor = setup.iothread("io1").disk("vda", 16 << 20, home).stdin(Stdio::piped()).start();
        monitor.serial.expect("verify: begin");
        let mut client = monitor.qmp();
        let begin = Instant::now();
        let mut last = Value::Null;
        for round in 0..rounds() {
            if round % 2 == 1 {
                // The other rounds stop at once, where the load may not have come to anything yet.
                assert!((0..1_000_000).any(|_| standing(&mut client).1 != last), "the load stands still");
            }
            client.ask("stop");
            assert_eq!(lines(&mut client, 2)[0], "STOP");
            // Nothing is in flight, and nothing moves until the machine goes on.
            let (in_flight, done) = standing(&mut client);
            assert_eq!(in_flight, 0);
            assert_eq!(standing(&mut client), (json!(0), done.clone()));
            last = done;
            client.ask("cont");
            assert_eq!(lines(&mut client, 2), [json!("RESUME"), json!({})]);
        }
        println!("{home}: {} rounds took {:?}", rounds(), begin.elapsed());
        monitor.type_in("q");
        monitor.expect_ok();
    }
}

#[test]
fn a_machine_that_is_stopped_ends_by_quit_and_one_that_is_stopping_too() {
    let Some(setup) = Setup::guest("mode=blk-verify end=acpi") else { return };
    let mut monitor = setup.disk("vda", 16 << 20, "direct=off").start();
    monitor.serial.expect("verify: begin");
    let mut client = monitor.qmp();
    client.call("stop");
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);

    let setup = Setup::guest("mode=blk-verify end=acpi").unwrap();
    let mut monitor = setup.disk("vda", 16 << 20, "direct=off").start();
    monitor.serial.expect("verify: begin");
    let [mut one, mut two] = [(); 2].map(|()| monitor.qmp());
    one.ask("stop");
    two.call("quit");
    assert_eq!(one.answer()["return"], json!({}));
    one.await_event("SHUTDOWN");
    assert_eq!(monitor.exit_code(), 0);
}
