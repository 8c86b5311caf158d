//! `Irq`: an interrupt line into the guest.
//!
//! An eventfd that KVM turns into an edge on one input of the in-kernel interrupt controllers (irqfd), exactly while
//! the `Irq` lives (invariant I5). Raising it is one write and no exit of any vCPU to user space. Any thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::vm::Vm;
use crate::error::{Context, Result};

/// An edge-triggered interrupt line.
#[derive(Debug)]
pub struct Irq {
    vm: Arc<Vm>,
    fd: Arc<EventFd>,
    gsi: u32,
}

impl Irq {
    /// Connects a new line to input `gsi` of the interrupt controllers.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left, or KVM knows no such input.
    pub fn new(vm: &Arc<Vm>, gsi: u32) -> Result<Irq> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context(|| "interrupt: make an eventfd")?;
        vm.fd().register_irqfd(&fd, gsi).context(|| format!("interrupt {gsi}: hand its eventfd to KVM"))?;
        Ok(Irq { vm: vm.clone(), fd: Arc::new(fd), gsi })
    }

    /// The descriptor, for whoever raises the interrupt without owning the line. It does nothing once the line is gone.
    pub fn eventfd(&self) -> Arc<EventFd> {
        self.fd.clone()
    }

    /// Raises the interrupt once. Several raises before the guest looks are one.
    pub fn trigger(&self) {
        // KVM takes the count at each write, so it never grows to where a write would block.
        let _ = self.fd.write(1);
    }
}

impl AsRawFd for Irq {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Irq {
    fn drop(&mut self) {
        // It is registered, so KVM finds it; and there is nobody left to tell otherwise.
        let _ = self.vm.fd().unregister_irqfd(&self.fd, self.gsi);
    }
}
