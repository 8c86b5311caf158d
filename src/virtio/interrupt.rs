//! `Interrupt`: how a device half reaches the driver: a status bit in the [`Page`], then the irqfd.
//!
//! The bit goes first: the driver reads the status when the interrupt arrives. One decision and one write a batch. The
//! irqfd itself belongs to KVM's side (`kvm::irq`); this shares its descriptor. Worker's and vCPU's threads.

use std::sync::Arc;

use log::error;
use vmm_sys_util::eventfd::EventFd;

use super::page::{INTERRUPT_CONFIG, INTERRUPT_USED, Page};

/// One device's interrupt line.
pub struct Interrupt {
    page: Arc<Page>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// The interrupt of the device that `page` belongs to, raised through `line`.
    pub fn new(page: Arc<Page>, line: impl Into<Arc<EventFd>>) -> Self {
        Interrupt { page, line: line.into() }
    }

    /// A used ring has moved.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED);
    }

    /// The configuration or the device status has changed.
    pub fn config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn raise(&self, bits: u32) {
        self.page.raise(bits);
        if let Err(e) = self.line.write(1) {
            error!("raise an interrupt: {e}");
        }
    }
}
