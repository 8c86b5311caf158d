//! `RunPage`: the page that a vCPU shares with KVM, mapped a second time.
//!
//! The vCPU's thread has its own mapping inside `VcpuFd`, borrowed while an exit is looked at. This one is for what
//! must be reached from elsewhere: any thread may ask the vCPU to leave the guest, and the vCPU's own thread reads
//! here what `VcpuExit` leaves out.

#![allow(unsafe_code)] // The page is a C union that another thread and the kernel write to.

use std::ptr::addr_of;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{KvmRunWrapper, VcpuFd};

use crate::error::{Context, Result};

/// A second view of one vCPU's `struct kvm_run`.
#[derive(Debug)]
pub struct RunPage(KvmRunWrapper);

impl RunPage {
    /// Maps the page of `vcpu`; `size` is what KVM says of its length.
    pub fn map(vcpu: &VcpuFd, size: usize) -> Result<RunPage> {
        KvmRunWrapper::mmap_from_fd(vcpu, size).map(RunPage).context(|| "KVM: map a vCPU's run page")
    }

    /// Whether the next KVM_RUN, once it has completed the access that the last exit was for, returns EINTR instead
    /// of entering the guest. Any thread.
    ///
    /// Sequentially consistent, and so must be the request that is published before it: the vCPU clears this and
    /// then looks for a request, so one of the two sees the other's store.
    pub fn set_immediate_exit(&self, exit: bool) {
        let flag = addr_of!(self.page().immediate_exit).cast_mut();
        // SAFETY: the byte lies in a mapping that lives as long as `self`; user space only ever writes it here, as
        // an atomic, and the kernel only reads it.
        unsafe { AtomicU8::from_ptr(flag) }.store(exit.into(), Ordering::SeqCst);
    }

    /// How many bytes one access of the last port I/O exit has: a string instruction makes many accesses in one exit.
    /// Only the vCPU's thread, after such an exit.
    pub fn io_size(&self) -> usize {
        // SAFETY: every bit pattern is a valid number; the kernel writes only during KVM_RUN, on this thread.
        usize::from(unsafe { self.page().__bindgen_anon_1.io.size }).max(1)
    }

    /// Why KVM gave up at the last internal error (KVM_INTERNAL_ERROR_*). Only the vCPU's thread, after such an exit.
    pub fn suberror(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.page().__bindgen_anon_1.internal.suberror }
    }

    fn page(&self) -> &kvm_run {
        self.0.as_ref()
    }
}
