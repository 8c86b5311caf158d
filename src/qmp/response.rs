//! Writes what the monitor says: each message is one line of JSON, ended by CR LF as QEMU's are.

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind};
use crate::qmp::event::{Event, Notice, Timestamp};
use crate::qmp::reply::version;

/// What stands in for a message that has no JSON form.
const UNWRITABLE: &[u8] = br#"{"error":{"class":"GenericError","desc":"The answer cannot be written as JSON"}}"#;

#[derive(Serialize)]
struct Success<'a, T> {
    #[serde(rename = "return")]
    value: &'a T,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

#[derive(Serialize)]
struct Failure<'a> {
    error: Description,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

#[derive(Serialize)]
struct Description {
    class: &'static str,
    desc: String,
}

/// Appends the line that a client is met with.
pub fn greeting(out: &mut Vec<u8>) {
    line(out, &json!({"QMP": {"version": version(), "capabilities": []}}));
}

/// Appends the answer to a request that succeeded.
pub fn success(out: &mut Vec<u8>, id: Option<&Value>, value: &impl Serialize) {
    line(out, &Success { value, id });
}

/// Appends the answer to a request that failed.
pub fn failure(out: &mut Vec<u8>, id: Option<&Value>, error: &Error) {
    line(out, &Failure { error: Description { class: class(error.kind()), desc: error.to_string() }, id });
}

/// Appends an event.
pub fn event(out: &mut Vec<u8>, event: &Event, timestamp: Timestamp) {
    line(out, &Notice { timestamp, event });
}

/// QEMU's error class for a kind of error.
fn class(kind: Kind) -> &'static str {
    match kind {
        Kind::Usage | Kind::Host => "GenericError",
        Kind::NotFound => "DeviceNotFound",
        Kind::NotActive => "DeviceNotActive",
        Kind::NoCommand => "CommandNotFound",
    }
}

fn line(out: &mut Vec<u8>, message: &impl Serialize) {
    let start = out.len();
    if serde_json::to_writer(&mut *out, message).is_err() {
        out.truncate(start);
        out.extend_from_slice(UNWRITABLE);
    }
    out.extend_from_slice(b"\r\n");
}
