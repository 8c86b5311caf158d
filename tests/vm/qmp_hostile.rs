//! Clients that misbehave harm only themselves: framing, floods, silence.

use std::io::{ErrorKind, Write};
use std::thread;

use serde_json::json;

use crate::client::Client;
use crate::monitor::{Monitor, Setup};
use crate::proc;

fn machine() -> Option<Monitor> {
    let monitor = Setup::guest("mode=idle")?.start();
    monitor.serial.expect("idle: begin");
    Some(monitor)
}

#[test]
fn a_request_may_come_byte_by_byte_and_several_at_once() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    let request = json!({"execute": "query-status", "id": "ä\\\"{"}).to_string();
    for byte in request.bytes() {
        client.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(client.answer()["id"], "ä\\\"{");
    let names = ["query-name", "query-kvm", "query-status", "nope", "query-version"];
    let ahead: String = names.map(|name| json!({"execute": name, "id": name}).to_string()).concat();
    client.send(&ahead);
    for name in names {
        assert_eq!(client.answer()["id"], name);
    }
    // No line feed anywhere above; any white space is taken as well.
    client.send(" \r\n\t{\n\"execute\"\r:\t\"query-name\" }\n\n");
    assert_eq!(client.answer()["return"], json!({}));
    // A thousand ahead, answered in order.
    let ahead: String = (0..1000).map(|n| format!("{{\"execute\":\"query-name\",\"id\":{n}}}")).collect();
    client.send(&ahead);
    (0..1000).for_each(|n| assert_eq!(client.answer()["id"], n));
}

#[test]
fn after_garbage_the_conversation_goes_on() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    for garbage in [
        "what is this?",
        "{\"execute\": query-status}",
        "\"a string\"",
        "[1, 2]",
        "{\"execute\":\"sto\np\"}",
        "}\n",
        "true\n",
        "\u{0}\n",
        &format!("{}\n", "[".repeat(100_000)),
    ] {
        assert_eq!(client.mistake(garbage).0, "GenericError", "{garbage:.40}");
        // The way out that the manual names.
        client.stream.write_all(b"\xff\n{\"execute\":\"query-status\",\"id\":\"found\"}").unwrap();
        let mut answer = client.answer();
        while answer.get("id").is_none() {
            assert_eq!(answer["error"]["class"], "GenericError", "{garbage:.40}");
            answer = client.answer();
        }
        assert_eq!((&answer["id"], &answer["return"]["running"]), (&json!("found"), &json!(true)), "{garbage:.40}");
    }
    let long = format!("{{\"execute\":\"query-status\",\"id\":\"{}\"}}", "x".repeat(2 << 20));
    assert!(client.mistake(&long).1.contains("longer than"));
    client.call("query-status");
}

#[test]
fn a_hundred_megabytes_of_garbage_harm_neither_another_client_nor_memory() {
    let Some(monitor) = machine() else { return };
    let mut good = monitor.qmp();
    let pid = monitor.pid();
    let before = proc::anonymous_kib(pid);
    // A text without end, requests without end, and nesting without end.
    for (start, piece) in [("", "garbage "), ("{\"id\":\"", "x"), ("{\"id\":[", "1,"), ("\"", "\\\\"), ("", "[")] {
        let mut bad = monitor.qmp();
        bad.send(start);
        let mut reader = bad.stream.try_clone().unwrap();
        let sink = thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        let piece = piece.repeat((1 << 20) / piece.len());
        for megabyte in 0..20 {
            bad.stream.write_all(piece.as_bytes()).unwrap();
            if megabyte % 5 == 0 {
                assert_eq!(good.call("query-status")["status"], "running");
                let grown = proc::anonymous_kib(pid).saturating_sub(before);
                assert!(grown < 4096, "{grown} KiB more");
            }
        }
        bad.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let _ = sink.join().unwrap();
    }
    good.call("query-status");
    let grown = proc::anonymous_kib(pid).saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB more");
}

#[test]
fn half_a_request_and_then_the_end_is_no_trouble() {
    let Some(monitor) = machine() else { return };
    let mut good = monitor.qmp();
    for half in ["", "{", "{\"exec", "{\"execute\":\"stop\"", "{\"execute\":\"stop\",\"id\":\"", "\\"] {
        let mut bad = monitor.qmp();
        bad.send(half);
        drop(bad);
        // And the polite way: the end of the requests, and an ear for the answers.
        let mut bad = monitor.qmp();
        bad.send(half);
        bad.stream.shutdown(std::net::Shutdown::Write).unwrap();
        while bad.next_line().is_some() {}
        assert_eq!(good.call("query-status")["status"], "running", "{half}");
    }
}

#[test]
fn requests_before_the_end_of_the_connection_are_served() {
    let Some(mut monitor) = machine() else { return };
    let mut client = monitor.qmp();
    client.send("{\"execute\":\"query-name\",\"id\":1}{\"execute\":\"query-name\",\"id\":2}");
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.answer()["id"], 1);
    assert_eq!(client.answer()["id"], 2);
    client.expect_end();
    // As of `echo ... | nc -U`, which hangs up at once.
    let mut client = monitor.connect();
    client.send("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}");
    drop(client);
    assert_eq!(monitor.exit_code(), 0);
}

/// Fills the way to the monitor with requests until it takes no more. How many bytes it took.
fn flood(client: &mut Client) -> usize {
    client.stream.set_nonblocking(true).unwrap();
    let requests = "{\"execute\":\"query-qmp-schema\"}".repeat(1000);
    let mut taken = 0;
    let mut refusals = 0;
    while refusals < 100 {
        match client.stream.write(&requests.as_bytes()[taken % 30..]) {
            Ok(count) => {
                taken += count;
                refusals = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refusals += 1;
                thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
        assert!(taken < 16 << 20, "the monitor takes requests without end from a client that does not read");
    }
    client.stream.set_nonblocking(false).unwrap();
    taken
}

#[test]
fn a_client_that_never_reads_delays_nobody_and_costs_bounded_memory() {
    let Some(mut monitor) = machine() else { return };
    let mut good = monitor.qmp();
    let before = proc::anonymous_kib(monitor.pid());
    let mut deaf: Vec<Client> = (0..4).map(|_| monitor.qmp()).collect();
    deaf.iter_mut().for_each(|client| _ = flood(client));
    for _ in 0..500 {
        good.call("stop");
        good.call("cont");
    }
    let grown = proc::anonymous_kib(monitor.pid()).saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB more");
    // One that begins to read gets whole lines: its answers, and the events that it did not miss.
    let answers = (0..200).filter(|_| deaf[0].line().get("return").is_some()).count();
    assert!(answers > 0);
    good.call("quit");
    assert_eq!(monitor.exit_code(), 0, "those who do not read keep nobody from leaving");
}

#[test]
fn a_client_that_read_no_events_is_told_how_many_it_missed() {
    let Some(monitor) = machine() else { return };
    let [mut good, mut deaf] = [(); 2].map(|()| monitor.qmp());
    const ROUNDS: u64 = 4000;
    for _ in 0..ROUNDS {
        good.send("{\"execute\":\"stop\"}{\"execute\":\"cont\"}");
        good.answer();
        good.answer();
    }
    let mut heard = 0;
    let missed = loop {
        let event = deaf.event();
        match event["event"].as_str() {
            Some("EVENTS_LOST") => break event["data"]["count"].as_u64().unwrap(),
            _ => heard += 1,
        }
    };
    assert_eq!(heard + missed, 2 * ROUNDS);
    assert_eq!(deaf.call("query-status")["status"], "running");
}

#[test]
fn more_clients_than_a_socket_takes_are_let_go_and_those_who_are_there_stay() {
    let Some(monitor) = machine() else { return };
    let mut clients: Vec<Client> = (0..32).map(|_| monitor.qmp()).collect();
    for _ in 0..100 {
        let mut surplus = monitor.connect();
        let told = surplus.line();
        assert_eq!(told["error"]["class"], "GenericError");
        assert!(told["error"]["desc"].as_str().unwrap().starts_with("32 clients are connected"), "{told}");
        surplus.expect_end();
    }
    monitor.log.expect("another was refused");
    clients.iter_mut().for_each(|client| _ = client.call("query-status"));
    clients.pop();
    // Its place is free when the monitor has seen it go.
    let next = (0..1000).find_map(|_| {
        let mut next = monitor.connect();
        next.line().get("QMP").is_some().then_some(next)
    });
    next.expect("the free place is given").call("qmp_capabilities");
    let lines = monitor.log.text().matches("another was refused").count();
    assert!(lines <= 20, "{lines} lines of log for more than 100 clients");
}

#[test]
fn clients_that_never_negotiate_make_room_for_the_next() {
    let Some(monitor) = machine() else { return };
    let mut operator = monitor.qmp();
    let mut leaked: Vec<Client> = (0..31).map(|_| monitor.connect()).collect();
    leaked.iter_mut().for_each(|client| assert!(client.line()["QMP"].is_object()));
    // The first says something, though not what it should, so the second has been silent for the longest.
    assert_eq!(leaked[0].mistake(r#"{"execute":"query-status"}"#).0, "CommandNotFound");
    monitor.qmp().call("query-status");
    let told = leaked[1].line();
    assert!(told["error"]["desc"].as_str().unwrap().starts_with("32 clients are connected"), "{told}");
    leaked[1].expect_end();
    // Those that have negotiated stay, however silent; the first goes last.
    let mut others: Vec<Client> = (0..30).map(|_| monitor.qmp()).collect();
    assert_eq!(leaked[0].mistake(r#"{"execute":"query-status"}"#).0, "CommandNotFound");
    others.push(monitor.qmp());
    assert!(leaked[0].line().get("error").is_some());
    leaked[0].expect_end();
    others.iter_mut().for_each(|client| _ = client.call("query-status"));
    operator.call("query-status");
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let Some(monitor) = machine() else { return };
    let _constant = monitor.qmp();
    let come_and_go = |times: u32| (0..times).for_each(|_| _ = monitor.connect().line());
    come_and_go(100);
    let before = proc::anonymous_kib(monitor.pid());
    come_and_go(10_000);
    let grown = proc::anonymous_kib(monitor.pid()).saturating_sub(before);
    assert!(grown < 256, "{grown} KiB more");
}

#[test]
fn when_descriptors_ran_out_and_there_are_some_again_clients_are_served_again() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let setup = setup.option("-machine", "microvm,disk-slots=0,nic-slots=0");
    let monitor = setup.under(&["sh", "-c", "ulimit -n 40 && exec \"$@\"", "sh"]).start();
    let clients: Vec<Client> = (0..32).map(|_| monitor.connect()).collect();
    monitor.log.expect("Too many open files");
    drop(clients);
    // Those for whom the descriptors were too few are let go; they end a second of rest each.
    let next = (0..32).find_map(|_| {
        let mut next = monitor.connect();
        next.next_line().map(|_| next)
    });
    next.expect("a client is served").call("qmp_capabilities");
    assert!(monitor.log.text().lines().count() < 20, "{}", monitor.log.text());
}
