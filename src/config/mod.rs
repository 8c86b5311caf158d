//! What the user asked for, as plain data.
//!
//! `spec` is the whole of a virtual machine's description; `keyvalue` reads the `key=value,...` text of an option,
//! `options` gives each option's text its meaning, `net` those of NICs, `device` and `object` those of `-device` and
//! `-object`, `check` holds the rules between the parts of a machine, `slots` counts its slots. `json` and `file` read the
//! file of `-config`, and `dump` writes one. Nothing here opens another file or makes a system call: what the words mean for the host is found out when the machine
//! is built. A drive's limits are those of `qos`. Runs on the main thread before anything else is started.

pub mod chardev;
mod check;
pub mod device;
mod disk;
pub mod dump;
pub mod file;
pub mod json;
pub mod keyvalue;
pub mod net;
pub mod object;
pub mod options;
pub mod rng;
mod slots;
pub mod spec;
pub mod vsock;
