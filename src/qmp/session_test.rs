//! Tests of a session: what a client sends, and what it reads.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::qmp::scanner::MESSAGE_MAX_BYTES;

const AT: Timestamp = Timestamp { seconds: 7, microseconds: 9 };

/// Everything the client has to read, taken from the session; each line must be JSON.
fn read(session: &mut Session) -> Vec<Value> {
    let bytes = session.output().to_vec();
    session.sent(bytes.len());
    if bytes.is_empty() {
        return Vec::new();
    }
    let text = std::str::from_utf8(&bytes).expect("the output is UTF-8");
    let lines = text.strip_suffix("\r\n").expect("the output ends with a line end").split("\r\n");
    lines.map(|line| serde_json::from_str(line).expect("a line is a JSON value")).collect()
}

/// Sends `text`; gives the commands' answers as `{}` and returns what comes back.
fn talk(session: &mut Session, text: &str) -> Vec<Value> {
    session.receive(text.as_bytes());
    while session.next_command().is_some() {
        session.answer(Ok(Empty {}));
    }
    read(session)
}

/// A session whose client has read the greeting and negotiated.
fn ready() -> Session {
    let mut session = Session::new();
    talk(&mut session, r#"{"execute":"qmp_capabilities"}"#);
    session
}

#[test]
fn the_greeting_comes_first_with_the_version_and_no_capability() {
    let package = concat!("loopvisor ", env!("CARGO_PKG_VERSION"));
    let version = json!({"qemu": {"major": 5, "minor": 0, "micro": 1}, "package": package});
    assert_eq!(read(&mut Session::new()), [json!({"QMP": {"version": version, "capabilities": []}})]);
}

#[test]
fn nothing_but_the_negotiation_is_served_before_it() {
    let mut session = Session::new();
    read(&mut session);
    let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
    for name in ["query-status", "nope", "query-version"] {
        let told = talk(&mut session, &json!({"execute": name, "id": 1}).to_string());
        assert_eq!(told, [json!({"error": {"class": "CommandNotFound", "desc": desc}, "id": 1})]);
    }
    assert_eq!(talk(&mut session, r#"{"execute":"qmp_capabilities","id":[]}"#), [json!({"return": {}, "id": []})]);
    let desc = "Capabilities negotiation is already complete, command ignored";
    let told = talk(&mut session, r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(told, [json!({"error": {"class": "CommandNotFound", "desc": desc}})]);
    assert_eq!(talk(&mut session, r#"{"execute":"stop"}"#), [json!({"return": {}})]);
}

#[test]
fn a_capability_that_is_not_offered_leaves_the_negotiation_open() {
    let mut session = Session::new();
    read(&mut session);
    let told = talk(&mut session, r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    assert_eq!(told[0]["error"]["class"], "GenericError");
    let told = talk(&mut session, r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#);
    assert_eq!(told, [json!({"return": {}})]);
}

#[test]
fn the_next_request_waits_for_the_answer_to_the_last() {
    let mut session = ready();
    session.receive(br#"{"execute":"stop","id":1}{"execute":"nope","id":2}{"execute":"cont","id":3}"#);
    assert_eq!(session.next_command(), Some(Command::Stop));
    assert_eq!(session.next_command(), None);
    assert!(!session.wants_input() && session.output().is_empty());
    session.answer(Ok(Empty {}));
    assert_eq!(session.next_command(), Some(Command::Cont));
    session.answer::<Empty>(Err(Error::new(Kind::NotActive, "no")));
    assert_eq!(session.next_command(), None);
    assert!(session.wants_input() && !session.is_idle());
    let ids: Vec<Value> = read(&mut session).iter().map(|answer| answer["id"].clone()).collect();
    assert_eq!(ids, [1, 2, 3]);
    assert!(session.is_idle());
}

#[test]
fn the_kind_of_an_error_becomes_its_class() {
    let classes = [
        (Kind::Usage, "GenericError"),
        (Kind::Host, "GenericError"),
        (Kind::NotFound, "DeviceNotFound"),
        (Kind::NotActive, "DeviceNotActive"),
        (Kind::NoCommand, "CommandNotFound"),
    ];
    for (kind, class) in classes {
        let mut session = ready();
        session.receive(br#"{"execute":"stop"}"#);
        assert!(session.next_command().is_some());
        session.answer::<Empty>(Err(Error::new(kind, "why")));
        assert_eq!(read(&mut session), [json!({"error": {"class": class, "desc": "why"}})]);
    }
}

#[test]
fn an_answer_that_nobody_asked_for_is_not_sent() {
    let mut session = ready();
    session.answer(Ok(Empty {}));
    assert!(session.output().is_empty());
}

#[test]
fn an_answer_without_a_json_form_is_still_one_line_of_json() {
    let mut session = ready();
    session.receive(br#"{"execute":"stop"}"#);
    assert!(session.next_command().is_some());
    session.answer(Ok(std::collections::BTreeMap::from([((1, 2), 3)])));
    assert_eq!(read(&mut session)[0]["error"]["class"], "GenericError");
}

#[test]
fn an_event_is_sent_to_a_client_that_has_negotiated() {
    let mut session = Session::new();
    read(&mut session);
    session.tell(&Event::Stop, AT);
    assert!(session.output().is_empty());
    let mut session = ready();
    session.tell(&Event::Stop, AT);
    assert_eq!(read(&mut session), [json!({"timestamp": {"seconds": 7, "microseconds": 9}, "event": "STOP"})]);
}

#[test]
fn the_protocol_answers_for_itself_as_its_schema_says() {
    let mut session = ready();
    for entry in COMMANDS.iter().filter(|entry| entry.name.starts_with("query-")) {
        session.receive(json!({"execute": entry.name}).to_string().as_bytes());
        if session.next_command().is_none() {
            let answer = read(&mut session).remove(0);
            assert_eq!(entry.returns.check(&answer["return"], entry.name), Ok(()));
        } else {
            session.answer(Ok(Empty {}));
            read(&mut session);
        }
    }
    let commands = talk(&mut session, r#"{"execute":"query-commands"}"#);
    assert_eq!(commands[0]["return"].as_array().map(Vec::len), Some(COMMANDS.len()));
}

#[test]
fn a_client_that_does_not_read_is_not_served_further_and_loses_only_events() {
    let mut session = ready();
    let mut rounds = 0;
    while session.wants_input() {
        session.receive(br#"{"execute":"query-qmp-schema"}"#);
        assert_eq!(session.next_command(), None);
        rounds += 1;
        assert!(rounds < 100, "a client that does not read is served for ever");
    }
    for _ in 0..10_000 {
        session.tell(&Event::Stop, AT);
    }
    assert!(session.output().len() < OUTPUT_MAX_BYTES + 100);
    let told = read(&mut session);
    let events = u64::try_from(told.iter().filter(|line| line["event"] == "STOP").count()).unwrap();
    assert_eq!(told.len() as u64, rounds + events);
    assert!(events > 0 && events < 10_000);
    let lost = read(&mut session);
    assert_eq!(lost[0]["event"], "EVENTS_LOST");
    assert_eq!(lost[0]["data"]["count"], 10_000 - events);
    assert!(session.wants_input());
    session.tell(&Event::Resume, AT);
    assert_eq!(read(&mut session)[0]["event"], "RESUME");
}

#[test]
fn a_request_that_waited_for_the_client_to_read_is_served_then() {
    let mut session = ready();
    session.receive(&br#"{"execute":"query-qmp-schema"}"#.repeat(20));
    assert_eq!(session.next_command(), None);
    let mut answers = 0;
    while !session.output().is_empty() {
        assert!(session.output().len() < OUTPUT_MARK_BYTES + MESSAGE_MAX_BYTES);
        answers += read(&mut session).len();
        assert_eq!(session.next_command(), None);
    }
    assert_eq!(answers, 20);
}

#[test]
fn output_that_is_written_in_small_pieces_arrives_whole() {
    let mut session = ready();
    let mut expected = Vec::new();
    let mut written = Vec::new();
    for round in 0..200 {
        session.receive(json!({"execute": "nope", "id": round}).to_string().as_bytes());
        assert_eq!(session.next_command(), None);
        let error = Error::new(Kind::NoCommand, "The command nope has not been found");
        response::failure(&mut expected, Some(&json!(round)), &error);
        let count = (round % 7 * 30).min(session.output().len());
        written.extend_from_slice(&session.output()[..count]);
        session.sent(count);
    }
    written.extend_from_slice(session.output());
    assert_eq!(written, expected);
}

#[test]
fn a_session_at_rest_keeps_little_memory() {
    let mut session = ready();
    session.receive(json!({"execute": "x".repeat(100_000)}).to_string().as_bytes());
    assert_eq!(session.next_command(), None);
    assert_eq!(read(&mut session).len(), 1);
    session.receive(b"\n");
    assert_eq!(session.next_command(), None);
    assert!(session.input.capacity() + session.output.capacity() + session.scanner.held_bytes() <= 3 * IDLE_BYTES);
}

/// What a client may send: requests, their halves, and anything.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let text = prop::sample::select(vec![
        "{\"execute\":\"qmp_capabilities\"}",
        "{\"execute\":\"stop\",\"id\":{\"a\":[\"\\u0000\u{2028}\"]}}\n",
        "{\"execute\":\"query-commands\"}",
        "{\"execute\":\"\\n\\ud800\"}",
        "{\"execute\":\"a\\r\\nb\",\"id\":\"\\r\\n\"}",
        "{\"execute\":",
        "}",
        "\n",
        "[",
        "5",
    ]);
    prop_oneof![4 => text.prop_map(|text| text.as_bytes().to_vec()), 1 => prop::collection::vec(any::<u8>(), 0..40)]
}

proptest! {
    #[test]
    fn whatever_is_sent_every_answer_is_one_line_of_json_and_there_is_one_for_each_command(
        pieces in prop::collection::vec((piece(), any::<bool>()), 0..60),
    ) {
        let mut session = Session::new();
        read(&mut session);
        for (piece, told) in pieces {
            session.receive(&piece);
            while session.next_command().is_some() {
                let before = session.output().len();
                session.answer(Ok(Empty {}));
                prop_assert!(session.output().len() > before);
            }
            if told {
                session.tell(&Event::Resume, AT);
            }
            for line in read(&mut session) {
                let kinds = ["return", "error", "event"].iter().filter(|kind| line.get(kind).is_some()).count();
                prop_assert_eq!(kinds, 1);
            }
            prop_assert!(session.wants_input());
        }
    }
}
