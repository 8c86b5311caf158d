//! The machine: where everything lies, how a kernel is loaded, and the tables that describe the machine to it.

pub mod acpi;
pub mod boot;
mod kernel;
pub mod layout;
pub mod mptable;
#[cfg(test)]
mod testing;
