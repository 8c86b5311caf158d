//! The devices of the machine.

pub mod balloon;
pub mod block;
pub mod chardev;
pub mod console;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod rng;
pub mod serial;
pub mod vsock;
