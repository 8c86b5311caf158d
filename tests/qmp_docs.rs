//! Holds every example in `docs/qmp.md` against the tables of commands and events.

#![allow(clippy::expect_used, clippy::panic, reason = "a test's own functions are not in the lint's exception")]

use loopvisor::qmp::command::{COMMANDS, Entry};
use loopvisor::qmp::event::EVENTS;
use serde_json::Value;

/// The example lines of the page: who speaks, and what.
fn examples(page: &str) -> impl Iterator<Item = (&str, Value)> {
    let spoken = page.lines().filter_map(|line| line.split_once(' '));
    spoken.filter(|(arrow, _)| ["->", "<-"].contains(arrow)).map(|(arrow, text)| {
        let value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        (arrow, value)
    })
}

fn check_event(event: &Value) {
    let (name, data) = EVENTS.iter().find(|(name, _)| event["event"] == *name).expect("an event of the table");
    let shown = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
    assert_eq!(data.check(&shown, name), Ok(()));
}

#[test]
fn the_examples_of_the_page_are_what_the_schema_says_and_every_command_and_event_is_named() {
    let page = include_str!("../docs/qmp.md");
    let mut asked: Option<(&Entry, Value)> = None;
    let mut seen = 0;
    for (arrow, value) in examples(page) {
        seen += 1;
        if arrow == "->" {
            assert!(asked.is_none(), "{value} follows a request without an answer");
            let entry = COMMANDS.iter().find(|entry| value["execute"] == entry.name).expect("a command of the table");
            asked = Some((entry, value));
        } else if value.get("event").is_some() {
            check_event(&value);
        } else if value.get("QMP").is_none() {
            let (entry, request) = asked.take().expect("an answer follows a request");
            assert_eq!(value.get("id"), request.get("id"));
            match value.get("return") {
                Some(shown) => assert_eq!(entry.returns.check(shown, entry.name), Ok(())),
                None => assert!(value["error"]["class"].is_string()),
            }
        }
    }
    assert!(seen > 30);
    for name in COMMANDS.iter().map(|entry| entry.name).chain(EVENTS.iter().map(|(name, _)| *name)) {
        assert!(
            page.contains(&format!("`{name}`")) || page.contains(&format!("\"{name}\"")),
            "{name} is not on the page"
        );
    }
}
