//! The real program with the bare-metal guest on /dev/kvm: what a user sees of a machine, from outside.
//!
//! `monitor` starts the program and ends it, `client` speaks QMP, `stall` is a file that blocks, `pty` a terminal and
//! `terminal` a program on one; the other modules are the tests, a theme each. Where there is no /dev/kvm each test says
//! so and is skipped. Every wait is bounded, and a test that fails prints all that the monitor and its guest said.
//!
//! The guest is built from `tests/guest`, or named by LOOPVISOR_GUEST.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test's own functions need them too")]

mod client;
#[allow(dead_code, reason = "tests/backings uses the rest")]
mod monitor;
mod proc;
mod pty;
#[allow(dead_code, reason = "tests/backings uses the rest")]
mod stall;
mod terminal;

mod balloon;
mod config;
mod console;
mod disk;
mod iothread;
mod kata;
mod lifecycle;
mod limits;
mod log;
mod looptop;
mod machine;
mod net;
mod pause;
mod plug;
mod plug_net;
mod qmp;
mod qmp_hostile;
mod rng;
mod seccomp;
mod shell;
mod signals;
mod vsock;
