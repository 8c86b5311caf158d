//! The devices of the machine.

pub mod balloon;
pub mod block;
pub mod i8042;
pub mod power;
pub mod rng;
pub mod serial;
