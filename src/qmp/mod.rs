//! The management protocol (QMP) as pure functions over bytes: no descriptor, no thread, no clock of its own.
//!
//! Bytes go into a [`session::Session`]; commands and lines to write come out. `scanner` cuts the bytes into JSON
//! values, `request` reads one, `command` is the table of what can be asked, `event` of what is told unasked,
//! `reply`, `block`, `balloon`, `chardev` and `plug` are the answers' shapes, `response` writes a line. `schema` is how a
//! shape is described, and
//! `introspect` turns the tables into the answer of `query-qmp-schema`. What a command *does* is no matter of this
//! floor: `control` does it. Runs on the main thread.

pub mod balloon;
pub mod block;
pub mod chardev;
pub mod command;
pub mod event;
pub mod introspect;
pub mod net;
pub mod plug;
pub mod reply;
pub mod request;
pub mod response;
pub mod scanner;
pub mod schema;
pub mod session;
pub mod vsock;
