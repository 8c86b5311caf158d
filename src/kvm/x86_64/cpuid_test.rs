//! The topology as an operating system reads it.

use super::*;

/// A host's leaves, as KVM gives them: features and caches, and a topology that is not the guest's.
fn host(vendor: &[u8; 12]) -> CpuId {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        index,
        flags: if matches!(function, 4 | 0xB | 0x8000_001D) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    CpuId::from_entries(&[
        leaf(0, 0, 0x1F, word(0), word(8), word(4)),
        leaf(1, 0, 0x00A1_0F11, 0x3700_0800 | 7 << 16, 1, 0x0789_FBFF | HTT),
        leaf(4, 0, 0xFC00_4121, 0, 63, 0),
        leaf(4, 1, 0xFC00_4143, 0, 1023, 0),
        leaf(4, 2, 0xFC0F_C163, 0, 2047, 0),
        leaf(4, 3, 0, 0, 0, 0),
        leaf(0xB, 0, 1, 2, 0x100, 55),
        leaf(0xB, 1, 7, 128, 0x201, 55),
        leaf(0x1F, 0, 1, 2, 0x100, 55),
        leaf(0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
        leaf(0x8000_0001, 0, 0, 0, 1 << 22 | CMP_LEGACY, 0),
        leaf(0x8000_0008, 0, 0x3030, 0, 0x707f, 0),
        leaf(0x8000_001D, 2, 0x001F_C163, 0, 0, 0),
        leaf(0x8000_001E, 0, 55, 0x0137, 0x0300, 0),
    ])
    .unwrap()
}

#[test]
fn hidden_performance_counters_are_in_no_leaf() {
    let mut cpuid = CpuId::from_entries(&[
        kvm_cpuid_entry2 { function: 1, ecx: PDCM | X2APIC, ..Default::default() },
        kvm_cpuid_entry2 { function: 0xA, eax: 0x0730_0402, edx: 3, ..Default::default() },
        kvm_cpuid_entry2 { function: 0x8000_0001, ecx: PERF_CORE | CMP_LEGACY, ..Default::default() },
        kvm_cpuid_entry2 { function: 0x8000_0022, eax: 1, ebx: 6, ..Default::default() },
    ])
    .unwrap();
    hide_pmu(&mut cpuid);
    let left: Vec<_> = cpuid.as_slice().iter().map(|leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)).collect();
    assert_eq!(left, [(0, 0, X2APIC, 0), (0, 0, 0, 0), (0, 0, CMP_LEGACY, 0), (0, 0, 0, 0)]);
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut found = cpuid.as_slice().iter().filter(|leaf| (leaf.function, leaf.index) == (function, index));
    let leaf = *found.next().expect("the leaf is there");
    assert!(found.next().is_none(), "leaf {function:#x} is there once");
    leaf
}

#[test]
fn the_apic_id_is_the_index_in_every_leaf_that_tells_it() {
    for index in [0, 3, 253] {
        let cpuid = of_vcpu(&host(AMD), index, 254, true).unwrap();
        let id = u32::from(index);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, id);
        for level in 0..=2 {
            assert_eq!(leaf(&cpuid, 0xB, level).edx, id);
        }
        assert_eq!(leaf(&cpuid, 0x8000_001E, 0).eax, id);
        assert_eq!(leaf(&cpuid, 0x8000_001E, 0).ebx, id, "its own core, one thread");
    }
}

#[test]
fn extended_topology_is_one_thread_a_core_and_all_cores_in_one_package() {
    for (count, shift) in [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (254, 8)] {
        let cpuid = of_vcpu(&host(INTEL), 0, count, true).unwrap();
        let threads = leaf(&cpuid, 0xB, 0);
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
        let cores = leaf(&cpuid, 0xB, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (shift, count.into(), 0x201));
        assert_eq!(leaf(&cpuid, 0xB, 2).ecx, 2, "the list ends");
        assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0x1F), "nothing contradicts it");
        // Every id fits the width that is told.
        assert!(u32::from(count - 1) >> shift == 0);
    }
}

#[test]
fn leaf_1_counts_the_ids_of_the_package_and_saturates() {
    for (count, ids, htt) in [(1, 1, 0), (2, 2, HTT), (5, 8, HTT), (254, 255, HTT)] {
        let one = leaf(&of_vcpu(&host(INTEL), 0, count, true).unwrap(), 1, 0);
        assert_eq!((one.ebx >> 16 & 0xff, one.edx & HTT), (ids, htt), "{count}");
        assert_eq!(one.ebx & 0xffff, 0x0800, "the cache line stays");
    }
}

#[test]
fn the_first_two_caches_are_a_cores_own_and_the_third_is_everybodys() {
    let cpuid = of_vcpu(&host(INTEL), 1, 6, true).unwrap();
    let sharing = |index| (leaf(&cpuid, 4, index).eax >> 14 & 0xfff) + 1;
    assert_eq!([sharing(0), sharing(1), sharing(2)], [1, 1, 8]);
    let cores = |index| (leaf(&cpuid, 4, index).eax >> 26) + 1;
    assert_eq!([cores(0), cores(1), cores(2)], [8, 8, 8]);
    assert_eq!(leaf(&cpuid, 4, 2).eax & 0x3fff, 0x163, "kind and level stay");
    assert_eq!(leaf(&cpuid, 4, 3).eax, 0, "the list ends");
    assert_eq!((leaf(&of_vcpu(&host(AMD), 1, 6, true).unwrap(), 0x8000_001D, 2).eax >> 14) + 1, 8);
}

#[test]
fn amd_counts_cores_and_intel_keeps_those_bits_clear_of_it() {
    let amd = of_vcpu(&host(AMD), 0, 6, true).unwrap();
    assert_eq!(leaf(&amd, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    assert_ne!(leaf(&amd, 0x8000_0001, 0).ecx & CMP_LEGACY, 0);
    let alone = of_vcpu(&host(AMD), 0, 1, true).unwrap();
    assert_eq!(leaf(&alone, 0x8000_0008, 0).ecx, 0);
    assert_eq!(leaf(&alone, 0x8000_0001, 0).ecx & CMP_LEGACY, 0);
    assert_eq!(leaf(&of_vcpu(&host(INTEL), 0, 6, true).unwrap(), 0x8000_0008, 0).ecx, 0x707f, "not ours to fill");
}

#[test]
fn the_guest_knows_that_it_is_one_and_has_a_deadline_timer_only_where_kvm_has() {
    for deadline in [false, true] {
        let cpuid = of_vcpu(&host(AMD), 0, 1, deadline).unwrap();
        let features = leaf(&cpuid, 1, 0).ecx;
        assert_eq!(features & (HYPERVISOR | X2APIC), HYPERVISOR | X2APIC);
        assert_eq!(features & TSC_DEADLINE != 0, deadline);
        assert_eq!(features & 1, 1, "the host's features stay");
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0), leaf(&host(AMD), 0x4000_0000, 0), "and KVM's own leaves");
    }
}
