//! `Vm`: the virtual machine as KVM knows it: its memory and its interrupt controllers.
//!
//! It is made once, by the main thread, before any vCPU; everything that KVM is told later goes through it. The
//! vCPUs, kicks and interrupt lines hold it, and it holds guest memory, so KVM never keeps an address that is
//! unmapped.
//!
//! There is no emulated 8254 timer. A guest does not need one: KVM's clock tells it the TSC's frequency and the local
//! APIC timer runs in TSC-deadline mode, so there is nothing left to calibrate against; and without it a start is
//! shorter and no host thread is made.

#![allow(unsafe_code)] // Handing memory to KVM is a promise that the mapping stays.

use std::io;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, kvm_irqchip, kvm_msr_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::x86_64::{cpuid, rom, state};
use crate::error::{Context, Error, Result};

use crate::memory::{GuestRam, PAGE_BYTES};

/// One page that KVM takes, on Intel processors, for an identity map while the guest is in real mode.
pub const IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages that KVM takes, on Intel processors, for a task state segment while the guest is in real mode.
pub const TSS: u64 = 0xFFFB_D000;

/// What we cannot do without, and how the kernel calls it.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The interrupt controllers of the machine, in the order in which they are written. The slave comes first: KVM raises the
/// master's cascade input on each write as long as the slave has a request pending.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_IOAPIC];
/// The interrupt mask of an 8259: all eight inputs are masked.
const ALL_MASKED: u8 = 0xff;

/// A virtual machine without vCPUs.
#[derive(Debug)]
pub struct Vm {
    // Dropped in this order: KVM lets go of the memory before it is unmapped.
    fd: VmFd,
    ram: Arc<GuestRam>,
    cpuid: CpuId,
    tsc_deadline: bool,
    /// The power-on state of [`IRQCHIPS`], in that order.
    irqchips: Vec<kvm_irqchip>,
    /// The MSRs that KVM keeps for a vCPU, and their values before its first instruction.
    msr_indices: Vec<u32>,
    msrs: OnceLock<Vec<kvm_msr_entry>>,
}

impl Vm {
    /// A machine with this memory and with interrupt controllers (two 8259, an I/O APIC, a local APIC a vCPU).
    ///
    /// # Errors
    ///
    /// There is no /dev/kvm, we may not open it, or it lacks something we cannot do without: the sentence says which
    /// and what to do.
    pub fn new(ram: Arc<GuestRam>) -> Result<Vm> {
        let kvm = open()?;
        let fd = create(&kvm)?;
        // Memory before the interrupt controllers: each change of the memory map after them waits for a grace period
        // of the host's kernel, which is several milliseconds.
        for region in memory_slots(&ram) {
            // SAFETY: each mapping is that long. `ram` keeps its own for as long as this machine lives, and the ROM is static.
            unsafe { fd.set_user_memory_region(region) }.context(|| "KVM: hand over guest memory")?;
        }
        fd.set_identity_map_address(IDENTITY_MAP).context(|| "KVM: place the identity map")?;
        fd.set_tss_address(TSS as usize).context(|| "KVM: place the task state segment")?;
        fd.create_irq_chip().context(|| "KVM: make the interrupt controllers")?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context(|| "KVM: ask for the processor's features")?;
        let mut irqchips = Vec::with_capacity(IRQCHIPS.len());
        for chip_id in IRQCHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip).context(|| "KVM: read the interrupt controllers")?;
            if chip_id != KVM_IRQCHIP_IOAPIC {
                // KVM makes the 8259s unmasked; firmware leaves them masked. A kernel with hardware-reduced ACPI never
                // programs them, and takes an interrupt of theirs for an exception (their vector base is 0).
                chip.chip.pic.imr = ALL_MASKED;
            }
            irqchips.push(chip);
        }
        let msr_indices = kvm.get_msr_index_list().context(|| "KVM: ask for the MSRs it keeps")?.as_slice().to_vec();
        let vm = Vm {
            fd,
            ram,
            cpuid,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            irqchips,
            msr_indices,
            msrs: OnceLock::new(),
        };
        // The first life of a guest starts with the same controllers as the later ones.
        vm.reset_irqchips()?;
        Ok(vm)
    }

    /// The machine's descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What KVM on this host can show a guest of the processor; not yet made fit for one vCPU.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Hides the performance counters from vCPUs that are made later.
    pub fn hide_pmu(&mut self) {
        cpuid::hide_pmu(&mut self.cpuid);
    }

    /// Writes the power-on state of the interrupt controllers: the 8259s masked, nothing pending. No vCPU may be running.
    ///
    /// KVM may still inject an edge that a device raised just before, because it does so on a thread of its own. It finds
    /// every input masked: the I/O APIC drops it, and an 8259 latches it until the guest initialises the chip.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn reset_irqchips(&self) -> Result<()> {
        self.irqchips
            .iter()
            .try_for_each(|chip| self.fd.set_irqchip(chip))
            .context(|| "KVM: reset the interrupt controllers")
    }

    /// The MSRs of a vCPU before its first instruction. They are read of `vcpu`, which has not run, if nobody has asked
    /// before: all vCPUs are made alike.
    ///
    /// # Errors
    ///
    /// KVM refuses to tell.
    pub fn initial_msrs(&self, vcpu: &VcpuFd) -> Result<&[kvm_msr_entry]> {
        if let Some(msrs) = self.msrs.get() {
            return Ok(msrs);
        }
        let msrs = state::initial_msrs(vcpu, &self.msr_indices)?;
        Ok(self.msrs.get_or_init(|| msrs))
    }

    /// Whether a vCPU's local APIC timer can run in TSC-deadline mode.
    pub fn has_tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }
}

/// The memory slots for KVM: RAM with a hole for the ROM below 1 MiB, and the ROM there and below 4 GiB.
fn memory_slots(ram: &GuestRam) -> Vec<kvm_userspace_memory_region> {
    let mut pieces = Vec::new();
    for region in ram.iter() {
        let (start, len, host) = (region.start_addr().raw_value(), region.len(), region.as_ptr() as u64);
        let hole = rom::LOW.saturating_sub(start).min(len);
        pieces.push((start, hole, host, 0));
        let rest = if start <= rom::LOW { (hole + PAGE_BYTES).min(len) } else { 0 };
        pieces.push((start + rest, len - rest, host + rest, 0));
    }
    pieces.extend([rom::LOW, rom::HIGH].map(|at| (at, PAGE_BYTES, rom::host_address(), KVM_MEM_READONLY)));
    pieces.retain(|&(_, len, ..)| len > 0);
    let slot = |(slot, (guest_phys_addr, memory_size, userspace_addr, flags))| kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr,
        memory_size,
        userspace_addr,
    };
    (0..).zip(pieces).map(slot).collect()
}

/// Opens /dev/kvm and checks that it is what we were written for.
fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|errno| {
        let sentence = match errno.errno() {
            libc::ENOENT => {
                "/dev/kvm: there is none; load the module kvm_intel or kvm_amd, and where there is nothing to load \
                 it for, switch virtualisation on in the firmware (or nested virtualisation in the host above)"
            }
            libc::EACCES | libc::EPERM => {
                "/dev/kvm: this user may not open it; join the group that owns it (usually: usermod -aG kvm USER, \
                 then log in again) or run as root"
            }
            _ => "/dev/kvm: open",
        };
        Error::host(sentence).because(errno)
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(Error::host(format!("/dev/kvm: API version {version}, and we speak {KVM_API_VERSION} only")));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(Error::host(format!("/dev/kvm: this host's KVM lacks {name}; a newer kernel has it")));
        }
    }
    Ok(kvm)
}

/// Makes the machine; the kernel gives up on a signal, which is no reason for us to.
fn create(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(errno) if errno.errno() == libc::EINTR => {}
            made => return made.map_err(io::Error::from).context(|| "KVM: create a virtual machine"),
        }
    }
}

#[cfg(test)]
#[path = "vm_test.rs"]
#[allow(unsafe_code)]
mod tests;
