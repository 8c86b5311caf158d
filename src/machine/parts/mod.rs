//! The devices of a machine, a file each: from what its user asked for to a thing that can be plugged in.
//!
//! What a device does is in `devices`; in which order they are plugged is `builder`'s. Main thread.

pub mod balloon;
pub mod console;
pub mod drive;
pub mod nic;
pub mod rng;
pub mod vsock;
