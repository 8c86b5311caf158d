//! The only home of raw libc: each file wraps one kernel interface that no crate of ours covers well enough.
//!
//! Nothing here knows of guests or devices. Any thread.
#![allow(unsafe_code)]

pub mod block_device;
pub mod clock;
pub mod daemon;
pub mod deadline;
pub mod io;
pub mod lock;
pub mod own_file;
pub mod pieces;
pub mod poll;
pub mod progress;
pub mod rights;
pub mod signalfd;
pub mod sink;
pub mod socket;
pub mod stdio;
pub mod stream;
pub mod tap;
pub mod terminal;
mod thread;
pub mod timerfd;
pub mod tune;
pub mod vhost;

pub use thread::gettid;
