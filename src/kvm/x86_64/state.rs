//! What a vCPU is at power-on, and back to it: the reset of a processor.
//!
//! KVM has no call for it. So the state is read when the vCPU has been made and written back when it stands at its gate.
//! The floating-point state is not kept, for the processor has an initial one by itself. The time-stamp counter goes on
//! counting, and so does IA32_TSC_ADJUST, which says by how much the guest has moved it: a kernel that finds it moved sets
//! both right. Written on the vCPU's own thread.

#![allow(unsafe_code)] // KVM_SET_XSAVE may read more than the structure that it is given; the TSC's offset has no safe call.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, Msrs, kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_nested_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, nested::KvmNestedStateBuffer,
};
use kvm_ioctls::VcpuFd;

use crate::error::{Context, Error, Result};

/// Not written back: see above.
const TSC: [u32; 2] = [0x10, 0x3b];
/// The registers of Hyper-V's interface, which the guest is not shown: KVM makes room for them when one is read.
const HYPERV: std::ops::Range<u32> = 0x4000_0000..0x4000_1000;

/// Where an XSAVE image has the control words of the x87 and of SSE, in words of 32 bits, and what they are after an
/// initialisation; and which parts are in the image: these two (SDM volume 1, 13.4.1, 13.4.2 and 13.6).
const FCW: (usize, u32) = (0, 0x37f);
const MXCSR: (usize, u32) = (6, 0x1f80);
const XSTATE_BV: (usize, u32) = (128, 3);

/// The MSRs of a vCPU that has not run: those that can be read, of `indices`.
///
/// They are the same for all vCPUs of a machine.
///
/// # Errors
///
/// KVM refuses the list as a whole.
pub fn initial_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let wanted = indices.iter().filter(|index| !TSC.contains(index) && !HYPERV.contains(index));
    let entries = wanted.map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    read(vcpu, entries)
}

/// Reads as many of `entries` as can be read.
fn read(vcpu: &VcpuFd, mut entries: Vec<kvm_msr_entry>) -> Result<Vec<kvm_msr_entry>> {
    let mut known = Vec::with_capacity(entries.len());
    while !entries.is_empty() {
        let mut msrs = Msrs::from_entries(&entries).context(|| "KVM: a list of MSRs")?;
        let got = vcpu.get_msrs(&mut msrs).context(|| "KVM: read MSRs")?;
        known.extend_from_slice(&msrs.as_slice()[..got]);
        // It stops in front of the first that it refuses.
        entries.drain(..(got + 1).min(entries.len()));
    }
    Ok(known)
}

/// The state of one vCPU before its first instruction.
#[derive(Debug)]
pub struct Initial {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    /// None where this host's processor, or its KVM, has none.
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
}

impl Initial {
    /// Reads it of a vCPU that has not run.
    ///
    /// # Errors
    ///
    /// KVM refuses to tell a part that every processor has.
    pub fn of(vcpu: &VcpuFd) -> Result<Initial> {
        let what = |what: &'static str| move || format!("KVM: read a vCPU's {what}");
        Ok(Initial {
            regs: vcpu.get_regs().context(what("registers"))?,
            sregs: vcpu.get_sregs().context(what("segments"))?,
            lapic: vcpu.get_lapic().context(what("local APIC"))?,
            events: vcpu.get_vcpu_events().context(what("pending events"))?,
            mp_state: vcpu.get_mp_state().context(what("run state"))?,
            // On a processor without XSAVE KVM returns no register, and refuses to write an empty set.
            xcrs: vcpu.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
            debug: vcpu.get_debug_regs().ok(),
        })
    }

    /// Puts the vCPU back into it; `msrs` are those of [`initial_msrs`]. It must not be running, and neither must any
    /// other that could send it an interrupt.
    ///
    /// # Errors
    ///
    /// KVM refuses a part. An MSR that it refuses is none if its value is the initial one anyway.
    pub fn restore(&self, vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
        let what = |what: &'static str| move || format!("KVM: reset a vCPU's {what}");
        // An INIT or a SIPI on its way is taken when the run state is asked for, and so it is of the old life.
        vcpu.get_mp_state().context(what("run state"))?;
        leave_nested_guest(vcpu);
        write_tsc_offset(vcpu);
        let mut xsave = kvm_xsave::default();
        // Parts that are not in the image are initialised.
        for (word, value) in [FCW, MXCSR, XSTATE_BV] {
            xsave.region[word] = value;
        }
        // SAFETY: KVM reads the 4096 bytes of the structure, and more only where a process has asked for more state than
        // fits by arch_prctl(2), which this one does not.
        unsafe { vcpu.set_xsave(&xsave) }.context(what("floating-point state"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).context(what("extended control registers"))?;
        }
        vcpu.set_sregs(&self.sregs).context(what("segments"))?;
        vcpu.set_regs(&self.regs).context(what("registers"))?;
        // Before the local APIC: the TSC deadline is one, and means something only as long as the timer is in that mode.
        write_changed(vcpu, msrs)?;
        vcpu.set_lapic(&self.lapic).context(what("local APIC"))?;
        vcpu.set_vcpu_events(&self.events).context(what("pending events"))?;
        if let Some(debug) = &self.debug {
            vcpu.set_debug_regs(debug).context(what("debug registers"))?;
        }
        vcpu.set_mp_state(self.mp_state).context(what("run state"))
    }
}

/// Writes those of `msrs` that have another value now. They include those by which KVM writes into guest memory by itself
/// (its clock, stolen time, asynchronous page faults, the end of interrupts), which are off afterwards.
fn write_changed(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let now = read(vcpu, msrs.to_vec())?;
    let changed = |msr: &&kvm_msr_entry| !now.iter().any(|now| (now.index, now.data) == (msr.index, msr.data));
    let changed: Vec<_> = msrs.iter().filter(changed).copied().collect();
    let list = Msrs::from_entries(&changed).context(|| "KVM: a list of MSRs")?;
    let set = vcpu.set_msrs(&list).context(|| "KVM: set MSRs")?;
    match changed.get(set) {
        None => Ok(()),
        Some(refused) => {
            Err(Error::host(format!("KVM: reset MSR {:#x} to {:#x}: refused", refused.index, refused.data)))
        }
    }
}

/// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR, which kvm-ioctls has for other processors only.
const SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// Writes the offset of the vCPU's time-stamp counter as KVM knows it. On AMD processors KVM clears it in the hardware's
/// control block when a triple fault ends the vCPU, and goes on to count with it: the next life's counter would be ahead of
/// the one by which KVM sets its timer, which would be late by as long as the host had been up. Refused before Linux 5.16,
/// where nothing can be done.
fn write_tsc_offset(vcpu: &VcpuFd) {
    let mut offset = 0u64;
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: &raw mut offset as u64,
        flags: 0,
    };
    let fd = vcpu.as_raw_fd();
    // SAFETY: KVM writes the eight bytes of `offset`, and then reads them.
    unsafe {
        if libc::ioctl(fd, GET_DEVICE_ATTR as _, &raw const attribute) == 0 {
            libc::ioctl(fd, SET_DEVICE_ATTR as _, &raw const attribute);
        }
    }
}

/// Takes the vCPU out of a guest that the guest runs itself, if it does: the segments are those of the inner one until
/// then. Where KVM refuses there are no such guests, or the segments will be refused too.
fn leave_nested_guest(vcpu: &VcpuFd) {
    let mut state = KvmNestedStateBuffer::empty();
    if vcpu.nested_state(&mut state).is_err() {
        return;
    }
    let mut outside = KvmNestedStateBuffer::empty();
    outside.size = size_of::<kvm_nested_state>() as u32;
    outside.format = state.format;
    match u32::from(state.format) {
        KVM_STATE_NESTED_FORMAT_SVM => outside.flags = KVM_STATE_NESTED_GIF_SET as u16,
        KVM_STATE_NESTED_FORMAT_VMX => {
            outside.hdr.vmx.vmxon_pa = u64::MAX;
            outside.hdr.vmx.vmcs12_pa = u64::MAX;
        }
        _ => return,
    }
    let _ = vcpu.set_nested_state(&outside);
}

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
