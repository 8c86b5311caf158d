//! Disks on each kind of file and block device of the host: the matrix of backings, faults, sector sizes and locks.
//!
//! Everything runs with the real program and the bare-metal guest on /dev/kvm; it takes root and loop devices, as CI has
//! them. Kinds of block devices that are modules of the kernel are tested in the nested host (`tests/storage`).

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test's own functions need them too")]
#![allow(dead_code, reason = "the harness is shared, and not all of it is used here")]

#[path = "../vm/client.rs"]
mod client;
#[path = "../vm/monitor.rs"]
mod monitor;
#[path = "../vm/stall.rs"]
mod stall;

mod faults;
mod geometry;
mod host;
mod locks;
mod matrix;
mod native;
mod typed;
