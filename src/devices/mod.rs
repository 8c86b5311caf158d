//! The devices of the machine.

pub mod balloon;
pub mod block;
pub mod chardev;
pub mod console;
pub mod counters;
pub mod i8042;
pub mod net;
pub mod power;
pub mod pvpanic;
pub mod reset;
pub mod rng;
pub mod serial;
pub mod vhost_vsock;
pub mod vsock;
