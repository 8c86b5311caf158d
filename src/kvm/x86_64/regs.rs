//! The boot vCPU's registers and the tables they point to: the state in which a kernel is entered.
//!
//! Two states exist: 64-bit mode with paging on (Linux x86 boot protocol, "64-bit boot protocol"), and 32-bit
//! protected mode without paging (PVH). Every other vCPU starts as KVM's reset leaves it and waits for the guest to
//! wake it. Main thread, before the vCPU's own thread exists.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Context, Result};
use crate::memory::GuestRam;

/// The state in which the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode; the first GiB is mapped to itself by the three page tables that start at this address (a multiple
    /// of 4096), in 2 MiB pages.
    Long {
        /// Where the three tables are written: PML4, PDPT and page directory, a page each.
        page_tables: u64,
    },
    /// 32-bit protected mode, paging off.
    Protected,
}

/// Where and how the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The processor's mode.
    pub mode: Mode,
    /// The first instruction.
    pub rip: u64,
    /// The stack, which grows down from here.
    pub rsp: u64,
    /// `rbx`: the start information of a PVH entry.
    pub rbx: u64,
    /// `rsi`: the zero page of a 64-bit entry.
    pub rsi: u64,
    /// Where the segment descriptors are written: [`GDT_BYTES`] of them.
    pub gdt: u64,
}

/// How long the table of segment descriptors is.
pub const GDT_BYTES: u64 = 5 * 8;

/// The selectors that the Linux boot protocol asks for: __BOOT_CS, __BOOT_DS; and a task segment, without which
/// Intel processors refuse to enter the guest.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

const PAGE: u64 = 4096;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;

impl Entry {
    /// Writes the tables into guest memory and the registers into the vCPU.
    ///
    /// # Errors
    ///
    /// A table does not lie in guest memory, or KVM refuses a register.
    pub fn prepare(&self, ram: &GuestRam, vcpu: &VcpuFd) -> Result<()> {
        let mut sregs = vcpu.get_sregs().context(|| "KVM: read the boot vCPU's segments")?;
        self.segments(ram, &mut sregs)?;
        if let Mode::Long { page_tables } = self.mode {
            identity_map(ram, page_tables)?;
            sregs.cr3 = page_tables;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        vcpu.set_sregs(&sregs).context(|| "KVM: set the boot vCPU's segments")?;
        let regs = kvm_regs {
            rip: self.rip,
            rsp: self.rsp,
            rbx: self.rbx,
            rsi: self.rsi,
            rflags: RFLAGS,
            ..Default::default()
        };
        vcpu.set_regs(&regs).context(|| "KVM: set the boot vCPU's registers")
    }

    /// Flat code and data segments, in `sregs` and in the table the guest can reload them from.
    fn segments(&self, ram: &GuestRam, sregs: &mut kvm_sregs) -> Result<()> {
        let long = matches!(self.mode, Mode::Long { .. });
        let flat = kvm_segment { base: 0, limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
        // Types (SDM volume 3, 3.4.5.1): 11 is code, readable, accessed; 3 is data, writable, accessed; and as a
        // system segment 11 is a busy task.
        let code = kvm_segment { type_: 11, selector: CODE, l: long.into(), db: (!long).into(), ..flat };
        let data = kvm_segment { type_: 3, selector: DATA, db: 1, ..flat };
        let task = kvm_segment { type_: 11, selector: TASK, limit: 0x67, s: 0, g: 0, ..flat };
        let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
        for (descriptor, index) in table.iter().zip(0u64..) {
            ram.write_obj(*descriptor, GuestAddress(self.gdt + index * 8)).context(|| "boot: write the GDT")?;
        }
        sregs.gdt.base = self.gdt;
        sregs.gdt.limit = (GDT_BYTES - 1) as u16;
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task;
        sregs.cr0 = CR0_PE | CR0_ET;
        Ok(())
    }
}

/// A segment as the eight bytes of its descriptor (SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.g) << 3 | u64::from(segment.db) << 2 | u64::from(segment.l) << 1;
    let access = u64::from(segment.present) << 7
        | u64::from(segment.dpl) << 5
        | u64::from(segment.s) << 4
        | u64::from(segment.type_);
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Page tables that map the first GiB to itself.
fn identity_map(ram: &GuestRam, tables: u64) -> Result<()> {
    let (pdpt, directory) = (tables + PAGE, tables + 2 * PAGE);
    let mut pages = [0u8; PAGE as usize];
    for (entry, index) in pages.chunks_exact_mut(8).zip(0u64..) {
        entry.copy_from_slice(&(index << 21 | PTE_LARGE | PTE_WRITABLE | PTE_PRESENT).to_le_bytes());
    }
    ram.write_obj(pdpt | PTE_WRITABLE | PTE_PRESENT, GuestAddress(tables))
        .and_then(|()| ram.write_obj(directory | PTE_WRITABLE | PTE_PRESENT, GuestAddress(pdpt)))
        .and_then(|()| ram.write_slice(&pages, GuestAddress(directory)))
        .context(|| "boot: write the page tables")
}

/// The registers that tell where and why a vCPU died, as one line. KVM's refusal to read them is part of the line.
pub fn dump(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(r), Ok(s)) => format!(
            "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x} rbp={:#x} \
             cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
            r.rip,
            r.rsp,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rbp,
            s.cs.selector,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer
        ),
        (Err(errno), _) | (_, Err(errno)) => format!("registers unknown: {errno}"),
    }
}

/// What the local APIC waits for, as one line: its timer (LVT, initial and current count, deadline beside the time-stamp
/// counter) and the vectors that are pending (IRR) and being served (ISR). For a guest that waits for an interrupt.
pub fn dump_lapic(vcpu: &VcpuFd) -> String {
    let mut msrs = [MSR_TSC, MSR_TSC_DEADLINE].map(|index| kvm_msr_entry { index, ..Default::default() });
    // One that this host has not stays 0.
    if let Ok(mut list) = Msrs::from_entries(&msrs)
        && vcpu.get_msrs(&mut list).is_ok()
    {
        msrs.copy_from_slice(list.as_slice());
    }
    let [tsc, deadline] = msrs.map(|msr| msr.data);
    match vcpu.get_lapic() {
        Ok(lapic) => {
            let word = |offset: usize| {
                let bytes = lapic.regs[offset..offset + 4].iter();
                bytes.rev().fold(0, |word: u32, byte| word << 8 | u32::from(*byte as u8))
            };
            let vectors = |offset: usize| {
                let set = (0..256).filter(|vector| word(offset + vector / 32 * 16) >> (vector % 32) & 1 == 1);
                set.map(|vector| format!("{vector:#x}")).collect::<Vec<_>>().join(" ")
            };
            format!(
                "lvtt={:#x} tmict={:#x} tmcct={:#x} deadline={deadline:#x} tsc={tsc:#x} tpr={:#x} svr={:#x} irr=[{}] isr=[{}]",
                word(0x320),
                word(0x380),
                word(0x390),
                word(0x80),
                word(0xf0),
                vectors(0x200),
                vectors(0x100)
            )
        }
        Err(errno) => format!("local APIC unknown: {errno}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn a_descriptor_says_what_the_segment_does() {
        let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
        let code = kvm_segment { type_: 11, l: 1, ..flat };
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        let data = kvm_segment { type_: 3, db: 1, ..flat };
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        let task = kvm_segment { base: 0x1234_5678, limit: 0x67, present: 1, type_: 11, ..Default::default() };
        assert_eq!(descriptor(&task), 0x1200_8b34_5678_0067);
    }

    #[test]
    fn the_page_tables_map_every_address_of_the_first_gigabyte_to_itself() {
        let ram = memory::allocate(1 << 20, false, true).unwrap();
        identity_map(&ram, 0x9000).unwrap();
        let entry = |table: u64, index: u64| -> u64 { ram.read_obj(GuestAddress(table + index * 8)).unwrap() };
        for address in [0, 0x10_0000, 0x1f_ffff, 0x20_0000, 0x1234_5678, 0x3fff_ffff_u64] {
            let pdpt = entry(0x9000, address >> 39 & 511);
            let directory = entry(pdpt & !0xfff, address >> 30 & 511);
            let page = entry(directory & !0xfff, address >> 21 & 511);
            assert_eq!([pdpt & 3, directory & 3, page & 0x83], [3, 3, 0x83]);
            assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(0xa000, 1), 0, "and nothing above");
    }
}
