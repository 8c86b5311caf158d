//! virtio over MMIO, version 2 (virtio 1.2, sections 2 and 4.2).
//!
//! A device is cut where hardware is cut. The [`Front`] decodes register accesses on the vCPU that made them; the
//! [`Worker`] owns the [`Device`], its [`Ring`]s and what it waits for, and lives in exactly one event loop; between
//! them lie a [`Page`] of atomic words and a channel of [`Command`]s. What a guest does wrong is a [`Fault`], answered
//! on the device and never an `Error`. No device is in here: they are one file each in `devices`.

mod command;
mod device;
mod fault;
mod front;
mod interrupt;
mod lent;
mod mmio;
mod page;
mod pieces;
mod ring;
mod worker;

pub use command::{Activation, Command, Exchanged};
pub use device::{Completions, Device, Held, Verdict};
pub use fault::{Fault, FaultLog};
pub use front::{Front, KickMaker};
pub use interrupt::Interrupt;
pub use lent::Lent;
pub use page::Page;
pub use pieces::{pieces, scatter};
pub use ring::{Buffer, Chain, Ring, RingSetup, gather};
pub use worker::{DEVICE_TAG, Worker};

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod exchange_test;
#[cfg(test)]
mod front_test;
#[cfg(test)]
mod lent_test;
#[cfg(test)]
mod throttle_test;
#[cfg(test)]
mod worker_test;
