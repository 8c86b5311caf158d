//! A vCPU that was changed in every part, and put back.

use std::io::Write;
use std::sync::Arc;

use super::*;
use crate::kvm::vm::Vm;
use crate::memory;

/// LSTAR; KVM's clock, stolen time and end of interrupts, each with its address and its switch; the memory types.
const CHANGED: [(u32, u64); 5] =
    [(0xc000_0082, 0xffff), (0x4b56_4d01, 0x5001), (0x4b56_4d03, 0x6001), (0x4b56_4d04, 0x7001), (0x2ff, 0)];

fn vcpu() -> Option<(Arc<Vm>, VcpuFd)> {
    match Vm::new(memory::allocate(16 << 20, false, true).unwrap()) {
        Ok(vm) => {
            let fd = vm.fd().create_vcpu(0).unwrap();
            fd.set_cpuid2(vm.supported_cpuid()).unwrap();
            crate::kvm::x86_64::msr::set(&fd).unwrap();
            Some((Arc::new(vm), fd))
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "skipped, no guest runs here: {error}");
            None
        }
    }
}

/// Of these MSRs the values now; those that this host does not have are left out.
fn values(vcpu: &VcpuFd, indices: &[u32]) -> Vec<(u32, u64)> {
    let entries = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    read(vcpu, entries).unwrap().iter().map(|msr| (msr.index, msr.data)).collect()
}

#[test]
fn every_part_of_a_vcpu_is_after_a_reset_what_it_was_when_it_was_made() {
    let Some((vm, vcpu)) = vcpu() else { return };
    let initial = Initial::of(&vcpu).unwrap();
    let msrs = vm.initial_msrs(&vcpu).unwrap();
    let lapic = |vcpu: &VcpuFd| vcpu.get_lapic().unwrap().regs;
    let events = |vcpu: &VcpuFd| {
        let events = vcpu.get_vcpu_events().unwrap();
        let nmi = (events.nmi.pending, events.nmi.masked, events.nmi.injected);
        (
            nmi,
            events.interrupt.injected,
            events.interrupt.shadow,
            events.exception.injected,
            events.smi,
            events.sipi_vector,
        )
    };
    let all = |vcpu: &VcpuFd| {
        let indices: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
        let (fpu, debug) = (vcpu.get_fpu().unwrap(), vcpu.get_debug_regs().unwrap());
        let floating = (fpu.fcw, fpu.fsw, fpu.fpr, fpu.xmm, fpu.mxcsr);
        let parts = (lapic(vcpu), events(vcpu), vcpu.get_mp_state().unwrap(), floating, debug.db, debug.dr7);
        (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap(), parts, values(vcpu, &indices))
    };
    let before = all(&vcpu);

    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cr0, sregs.cr2, sregs.cs.selector, sregs.gdt.base) = (sregs.cr0 | 1, 0x1234, 8, 0x500);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rax: 1, rip: 0x10_0000, rflags: 2, ..Default::default() }).unwrap();
    let mut fpu = vcpu.get_fpu().unwrap();
    (fpu.fcw, fpu.mxcsr, fpu.xmm[3][5]) = (0x27f, 0x1f00, 7);
    vcpu.set_fpu(&fpu).unwrap();
    let mut apic = vcpu.get_lapic().unwrap();
    // Spurious vector register: on. A vector that is waiting to be delivered, and one that is being served. The timer
    // periodic, and running.
    (apic.regs[0xf1], apic.regs[0x200 + 4], apic.regs[0x100 + 4]) = (1, 1, 2);
    (apic.regs[0x320], apic.regs[0x322], apic.regs[0x383]) = (0x40, 2, 1);
    vcpu.set_lapic(&apic).unwrap();
    let mut pending = vcpu.get_vcpu_events().unwrap();
    (pending.nmi.pending, pending.nmi.masked, pending.interrupt.shadow) = (1, 1, 1);
    vcpu.set_vcpu_events(&pending).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db[0] = 0x1000;
    vcpu.set_debug_regs(&debug).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_HALTED }).unwrap();
    let known: Vec<u32> = values(&vcpu, &CHANGED.map(|(index, _)| index)).iter().map(|(index, _)| *index).collect();
    let changed: Vec<_> = CHANGED
        .iter()
        .filter(|(index, _)| known.contains(index))
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    assert!(changed.len() > 2, "{known:x?}");
    assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&changed).unwrap()).unwrap(), changed.len());
    assert!(all(&vcpu) != before);

    for _ in 0..2 {
        initial.restore(&vcpu, msrs).unwrap();
        let after = all(&vcpu);
        assert_eq!((&after.0, &after.1, &after.3), (&before.0, &before.1, &before.3));
        assert!(after.2 == before.2, "local APIC, events, run state, floating point, debug registers");
    }
}

#[test]
fn the_switches_by_which_kvm_writes_into_guest_memory_are_among_the_msrs_that_are_put_back() {
    let Some((vm, vcpu)) = vcpu() else { return };
    let msrs = vm.initial_msrs(&vcpu).unwrap();
    let known = values(&vcpu, &[0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04]);
    assert!(known.len() > 1 && known.iter().all(|(_, value)| *value == 0), "{known:x?}");
    for (index, _) in known {
        assert!(msrs.iter().any(|msr| msr.index == index), "{index:#x}");
    }
    assert!(!msrs.iter().any(|msr| TSC.contains(&msr.index) || HYPERV.contains(&msr.index)));
}

#[test]
fn a_tsc_deadline_of_the_old_life_is_gone() {
    const DEADLINE: u32 = 0x6e0;
    let Some((vm, vcpu)) = vcpu() else { return };
    let features = crate::kvm::x86_64::cpuid::of_vcpu(vm.supported_cpuid(), 0, 1, vm.has_tsc_deadline()).unwrap();
    vcpu.set_cpuid2(&features).unwrap();
    if !vm.has_tsc_deadline() {
        let _ = writeln!(std::io::stderr(), "skipped: this host's KVM has no TSC deadline");
        return;
    }
    let initial = Initial::of(&vcpu).unwrap();
    let deadline_mode = |vcpu: &VcpuFd| {
        let mut apic = vcpu.get_lapic().unwrap();
        // The spurious vector register's switch, and the timer in deadline mode with vector 0x40.
        (apic.regs[0xf1], apic.regs[0x320], apic.regs[0x322]) = (1, 0x40, 4);
        vcpu.set_lapic(&apic).unwrap();
    };
    deadline_mode(&vcpu);
    let far = kvm_msr_entry { index: DEADLINE, data: u64::MAX >> 1, ..Default::default() };
    assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&[far]).unwrap()).unwrap(), 1);
    assert_eq!(values(&vcpu, &[DEADLINE]), [(DEADLINE, far.data)]);
    initial.restore(&vcpu, vm.initial_msrs(&vcpu).unwrap()).unwrap();
    assert_eq!(vcpu.get_lapic().unwrap().regs[0x320..0x323], initial.lapic.regs[0x320..0x323]);
    // Only in this mode can it be read.
    deadline_mode(&vcpu);
    assert_eq!(values(&vcpu, &[DEADLINE]), [(DEADLINE, 0)]);
}
