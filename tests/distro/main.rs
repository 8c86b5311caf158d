//! A distribution as people run it: Debian 12 with systemd and udev, from its own initrd, on a root file system on /dev/vda.
//!
//! `make test-distro` runs it in the nested host, with the image of `tools/distro-image`; it is no part of `make test`. Most of what
//! happens in the guest is typed at the shell of its serial port (`debian`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "the lints' exception for tests")]
#![allow(unsafe_code, reason = "a signal to the monitor has no safe function")]
#![allow(dead_code, reason = "the harness is shared, and not all of it is used here")]
#![allow(missing_docs, reason = "the names say it")]

#[path = "../linux/monitor.rs"]
mod monitor;

mod debian;
mod disks;
mod kernels;
mod network;
mod power;
