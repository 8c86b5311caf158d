//! The machine: where everything lies, how a kernel is loaded, the tables that describe the machine to it, and the
//! building of it all.

pub mod acpi;
mod board;
pub mod boot;
mod builder;
mod hardware;
mod inventory;
mod kernel;
pub mod layout;
pub mod mptable;
mod parts;
#[cfg(test)]
mod testing;

pub use builder::{Machine, Threads};
pub use hardware::Hardware;
pub use inventory::{Balloon, Console, DiskSlot, Drive, Inventory, Nic, NicSlot, Notice, Vsock};
pub use parts::balloon::suits as balloon_suits;
pub use parts::drive::DriveMaker;
pub use parts::nic::{cable, vacant_id};
