//! A QMP client: blocking, with the standard library alone. Every answer and event is held against the tables of
//! commands and events.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use loopvisor::qmp::command::COMMANDS;
use loopvisor::qmp::event::EVENTS;
use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::monitor::PATIENCE;

pub struct Client {
    pub stream: UnixStream,
    input: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
}

impl Client {
    pub fn connect(path: &Path) -> io::Result<Client> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client { stream, input: Vec::new(), events: VecDeque::new(), next_id: 0 })
    }

    /// Reads the greeting and ends the negotiation.
    #[track_caller]
    pub fn negotiate(&mut self) {
        let greeting = self.line();
        assert!(greeting["QMP"]["version"].is_object(), "{greeting}");
        self.call("qmp_capabilities");
    }

    pub fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the monitor takes what is sent");
    }

    /// The next line; `None` at the end of the connection.
    #[track_caller]
    pub fn next_line(&mut self) -> Option<Value> {
        let end = loop {
            if let Some(at) = self.input.iter().position(|&byte| byte == b'\n') {
                break at + 1;
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    assert!(self.input.is_empty(), "half a line: {:?}", String::from_utf8_lossy(&self.input));
                    return None;
                }
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                // A read with a time limit is not taken up again by itself after a signal that was none of ours.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What the monitor had not read of ours when it ended.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("nothing comes from the monitor: {error}"),
            }
        };
        let line: Vec<u8> = self.input.drain(..end).collect();
        assert!(line.ends_with(b"\r\n"));
        let value: Value = serde_json::from_slice(&line).expect("a line is JSON");
        if value.get("event").is_some() {
            check_event(&value);
        }
        Some(value)
    }

    /// The next line, be it answer or event.
    #[track_caller]
    pub fn line(&mut self) -> Value {
        self.next_line().expect("a line, not the end")
    }

    /// The next answer; events before it are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push_back(line);
        }
    }

    /// The next event.
    #[track_caller]
    pub fn event(&mut self) -> Value {
        self.events.pop_front().unwrap_or_else(|| self.line())
    }

    /// The next event of that name; others before it are dropped.
    #[track_caller]
    pub fn await_event(&mut self, name: &str) -> Value {
        loop {
            let event = self.event();
            if event["event"] == name {
                return event;
            }
        }
    }

    /// How many events have come and were not asked for.
    pub fn events_kept(&self) -> usize {
        self.events.len()
    }

    /// Sends a command, without waiting.
    pub fn ask(&mut self, command: &str) -> u64 {
        self.ask_with(command, &json!({}))
    }

    /// The same of a command with arguments.
    pub fn ask_with(&mut self, command: &str, arguments: &Value) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.send(&json!({"execute": command, "arguments": arguments, "id": id}).to_string());
        id
    }

    /// What the command returns, in the shape that the table says.
    #[track_caller]
    pub fn call(&mut self, command: &str) -> Value {
        self.call_with(command, &json!({}))
    }

    /// The same of a command with arguments.
    #[track_caller]
    pub fn call_with(&mut self, command: &str, arguments: &Value) -> Value {
        let id = self.ask_with(command, arguments);
        let mut answer = self.answer();
        assert_eq!(answer["id"], id, "{command}: {answer}");
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        let value = answer["return"].take();
        let entry = COMMANDS.iter().find(|entry| entry.name == command).expect("a command of the table");
        assert_eq!(entry.returns.check(&value, command), Ok(()), "{value}");
        value
    }

    /// The same, with a descriptor beside the bytes.
    #[track_caller]
    pub fn send_with(&mut self, command: &str, arguments: &Value, file: &File) -> Value {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        let sent = self.stream.send_with_fd(text.as_bytes(), file.as_raw_fd()).expect("the monitor takes what is sent");
        assert_eq!(sent, text.len());
        let mut answer = self.answer();
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// The class and text of the error that this text brings about.
    #[track_caller]
    pub fn mistake(&mut self, text: &str) -> (String, String) {
        self.send(text);
        let answer = self.answer();
        let part = |name: &str| answer["error"][name].as_str().unwrap_or_else(|| panic!("{text}: {answer}")).to_owned();
        (part("class"), part("desc"))
    }

    /// Nothing follows but the end.
    #[track_caller]
    pub fn expect_end(&mut self) {
        assert_eq!(self.next_line(), None);
    }

    /// For the report on a failure: what the monitor says about its state, if it says something soon.
    pub fn ask_status(mut self) -> Option<String> {
        self.stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let asked =
            b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-status\"}{\"execute\":\"query-blockstats\"}";
        self.stream.write_all(asked).ok()?;
        let mut text = Vec::new();
        while text.iter().filter(|&&byte| byte == b'\n').count() < 4 {
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(count) if count > 0 => text.extend_from_slice(&bytes[..count]),
                _ => break,
            }
        }
        Some(String::from_utf8_lossy(&text).into_owned())
    }
}

/// The event's name, shape and timestamp.
#[track_caller]
fn check_event(event: &Value) {
    let (name, data) = EVENTS.iter().find(|(name, _)| event["event"] == *name).expect("an event of the table");
    let told = event.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
    assert_eq!(data.check(&told, name), Ok(()), "{event}");
    let microseconds = event["timestamp"]["microseconds"].as_u64();
    assert!(microseconds.is_some_and(|n| n < 1_000_000), "{event}");
    // Later than this project, and no clock of the host's uptime.
    assert!(event["timestamp"]["seconds"].as_u64().is_some_and(|n| n > 1_700_000_000), "{event}");
}
