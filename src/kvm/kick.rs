//! `Kick`: the guest's knock on one virtqueue.
//!
//! An eventfd that KVM counts up when the guest writes one certain value to one certain address (ioeventfd), without
//! an exit to user space. KVM knows it exactly while the `Kick` lives (invariant I5). It is *not* a `Source`: the loop
//! wraps it. Made by a vCPU thread, owned and read by the loop of the device.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::vm::Vm;
use crate::error::{Context, Result};

/// A non-blocking eventfd that the guest writes to by a 32-bit store.
#[derive(Debug)]
pub struct Kick {
    vm: Arc<Vm>,
    fd: EventFd,
    address: u64,
    queue: u32,
}

impl Kick {
    /// Counts each 32-bit write of `queue` to `address` (virtio 1.3, 4.2.2: QueueNotify takes the queue's index).
    ///
    /// # Errors
    ///
    /// The host has no descriptor left, or KVM already has such a pair of address and value.
    pub fn new(vm: &Arc<Vm>, address: u64, queue: u32) -> Result<Kick> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context(|| "kick: make an eventfd")?;
        vm.fd()
            .register_ioevent(&fd, &IoEventAddress::Mmio(address), queue)
            .context(|| format!("kick of queue {queue} at {address:#x}: hand its eventfd to KVM"))?;
        Ok(Kick { vm: vm.clone(), fd, address, queue })
    }

    /// Takes the count, which otherwise the loop does that owns this.
    #[cfg(test)]
    pub fn take(&self) -> u64 {
        self.fd.read().unwrap_or(0)
    }
}

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // It is registered, so KVM finds it; and there is nobody left to tell otherwise.
        let _ = self.vm.fd().unregister_ioevent(&self.fd, &IoEventAddress::Mmio(self.address), self.queue);
    }
}
