//! CPUID: what one vCPU says of the processor.
//!
//! The host's features as far as KVM can show them, with the topology of the guest in place of the host's: one
//! socket, one core a vCPU, one thread a core, the APIC id equal to the vCPU's index. The leaves are described in
//! the Intel SDM volume 2 (CPUID) and the AMD manual volume 3, appendix E. Main thread.
//!
//! KVM's own leaves (0x40000000 on) stay as KVM gives them: from its clock Linux learns the TSC's frequency, and the
//! TSC-deadline timer needs no calibration either, so leaves 0x15 and 0x40000010 need no filling in.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::{Context, Result};

/// Leaf 1, ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has several logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 1, ECX: IA32_PERF_CAPABILITIES.
const PDCM: u32 = 1 << 15;
/// Leaf 0x80000001, ECX (AMD): more than the four counters that every processor has.
const PERF_CORE: u32 = 1 << 23;
/// Leaf 0x80000001, ECX (AMD): those are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;

/// The features of vCPU `index` of `count`.
///
/// # Errors
///
/// The list would be longer than KVM allows.
pub fn of_vcpu(supported: &CpuId, index: u8, count: u8, tsc_deadline: bool) -> Result<CpuId> {
    let mut cpuid = supported.clone();
    let id = u32::from(index);
    let cores = u32::from(count);
    // How many APIC ids the package has room for: the next power of two.
    let id_bits = cores.next_power_of_two().trailing_zeros();
    let ids = 1 << id_bits;
    let amd = cpuid.as_slice().iter().any(|leaf| leaf.function == 0 && is_amd(leaf));

    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            0 => leaf.eax = leaf.eax.max(0xB),
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | ids.min(255) << 16 | id << 24;
                leaf.ecx |= HYPERVISOR | X2APIC;
                set(&mut leaf.ecx, TSC_DEADLINE, tsc_deadline);
                set(&mut leaf.edx, HTT, cores > 1);
            }
            // Caches: the first two levels are a core's own, the third is everybody's.
            4 | 0x8000_001D if leaf.eax & 0x1f != 0 => {
                let sharing = if leaf.eax >> 5 & 7 >= 3 { ids } else { 1 };
                leaf.eax = leaf.eax & 0x3fff | (sharing - 1) << 14;
                if leaf.function == 4 {
                    leaf.eax |= (ids - 1).min(0x3f) << 26;
                }
            }
            0x8000_0001 if amd => set(&mut leaf.ecx, CMP_LEGACY, cores > 1),
            0x8000_0008 if amd => leaf.ecx = id_bits << 12 | (cores - 1),
            0x8000_001E => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
            _ => {}
        }
    }
    // Leaf 0x1F says the same as 0xB with more levels than we have; kernels take 0xB where it is missing.
    cpuid.retain(|leaf| !matches!(leaf.function, 0xB | 0x1F));
    let level = |index: u32, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    // Kinds: 1 is the threads of a core, 2 the cores of the package, 0 ends the list.
    for leaf in [level(0, 0, 1, 1), level(1, id_bits, cores, 2), level(2, 0, 0, 0)] {
        cpuid.push(leaf).context(|| "KVM: too many CPUID leaves")?;
    }
    Ok(cpuid)
}

/// Hides the performance counters: Intel's leaf 0xA and the capabilities in leaf 1, and AMD's extensions.
pub fn hide_pmu(cpuid: &mut CpuId) {
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => set(&mut leaf.ecx, PDCM, false),
            0xA | 0x8000_0022 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            0x8000_0001 => set(&mut leaf.ecx, PERF_CORE, false),
            _ => {}
        }
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Whether leaf 0 spells AuthenticAMD or HygonGenuine.
fn is_amd(leaf: &kvm_cpuid_entry2) -> bool {
    [*b"Auth", *b"Hygo"].contains(&leaf.ebx.to_le_bytes())
}

#[cfg(test)]
#[path = "cpuid_test.rs"]
mod tests;
