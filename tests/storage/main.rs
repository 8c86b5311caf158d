//! Disks on the block devices that are modules of the kernel, and power cuts: in the nested host, whose kernel has them
//! (`storage_modules` of `tools/linux-image`). `make test` runs it there; elsewhere each test says so and is skipped.
//!
//! The harness is that of `tests/backings`; `dm` makes devices of the device mapper, `modules` loads what is needed.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test's own functions need them too")]
#![allow(dead_code, reason = "the harness is shared, and not all of it is used here")]

#[path = "../vm/client.rs"]
mod client;
#[path = "../backings/host.rs"]
mod host;
#[path = "../backings/matrix.rs"]
mod matrix;
#[path = "../vm/monitor.rs"]
mod monitor;
#[path = "../backings/typed.rs"]
mod typed;

mod devices;
mod dm;
mod faults;
mod modules;
mod powercut;
mod replay;
