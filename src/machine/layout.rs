//! Every address, port and interrupt of the machine, in one place. No code beyond arithmetic.
//!
//! Memory, as the boot vCPU finds it (not to scale):
//!
//! ```text
//! 0x0000_0500  GDT                                   \
//! 0x0000_6000  PVH start information                  |
//! 0x0000_7000  zero page (struct boot_params)         |
//! 0x0000_8ff0  boot stack, downwards                  | RAM that the kernel may use
//! 0x0000_9000  page tables: PML4, PDPT, directory     | once it has read what is there
//! 0x0002_0000  command line, up to 64 KiB            /
//! 0x0009_fc00  ---- reserved: where a PC has its BIOS ----
//! 0x000e_0000  ACPI: RSDP, then the tables it leads to
//! 0x000f_0000  MP floating pointer, then its table
//! 0x000f_f000  ROM, 1 page: the reset vector of real mode, F000:FFF0, at its end
//! 0x0010_0000  ---- RAM: the kernel; the initrd at the top of what lies below the gap ----
//! 0xc000_0000  ---- the gap: no RAM, at most 1 GiB of addresses ----
//! 0xf010_0000  virtio-mmio slots 0 to 10, 0x200 bytes each
//! 0xfec0_0000  I/O APIC            (in KVM)
//! 0xfee0_0000  local APICs         (in KVM)
//! 0xfffb_c000  identity map, 1 page  (KVM's own)
//! 0xfffb_d000  task state, 3 pages   (KVM's own)
//! 0xffff_f000  the same page of ROM: the reset vector of the processor, 0xffff_fff0, at its end
//! 0x1_0000_0000  ---- RAM that did not fit below the gap ----
//! ```
//!
//! Ports: i8042 at 0x60 and 0x64, system control port A at 0x92, the serial port at 0x3f8 to 0x3ff, pvpanic at 0x505, ACPI's
//! sleep registers at 0x600 and 0x601, reset control at 0xcf9; the two 8259 (0x20, 0xa0, 0x4d0) are in KVM. Interrupts: 4 for
//! the serial port, 5 to 15 for the virtio slots in order (rule D3.4: eleven devices at most), 16 for the power button, which
//! only the I/O APIC has; all of them edges.

use crate::config::spec::MAX_VIRTIO_DEVICES;
use crate::devices::i8042;
pub use crate::kvm::vm::{IDENTITY_MAP, TSS};
use crate::kvm::x86_64::rom;
pub use crate::memory::{GAP_END, GAP_START};

/// Segment descriptors of the boot vCPU.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, and a page for all that it leads to.
pub const PVH_START: u64 = 0x6000;
/// PVH: the list of modules, of which the initrd is the only one.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// The zero page: `struct boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Where the boot vCPU's stack grows down from.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Three page tables of the boot vCPU.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line and the zero byte behind it.
pub const COMMAND_LINE_BYTES: u64 = 0x1_0000;

/// From here to 1 MiB is no RAM for the kernel.
pub const BIOS: u64 = 0x9_fc00;
/// The root of the ACPI tables, in the range that kernels search for it; the tables follow.
pub const RSDP: u64 = 0xe_0000;
/// Where the ACPI tables must have ended.
pub const ACPI_END: u64 = MP_POINTER;
/// The MP floating pointer, in the range that kernels search for it; the MP table follows.
pub const MP_POINTER: u64 = 0xf_0000;
/// Where the MP table must have ended.
pub const MP_END: u64 = rom::LOW;
/// Where kernels are loaded: 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The first virtio-mmio slot.
pub const VIRTIO_MMIO: u64 = 0xf010_0000;
/// The bytes of registers of one slot.
pub const VIRTIO_MMIO_BYTES: u64 = 0x200;
/// The interrupt of the first slot.
pub const VIRTIO_IRQ: u32 = 5;
/// How many interrupts the I/O APIC and the 8259s have in common.
pub const ISA_IRQS: u32 = 16;

/// The I/O APIC that KVM emulates.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC, for each vCPU its own.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// The keyboard controller: the data port, and four ports up the command and status port.
pub const I8042: u16 = 0x60;
/// How many ports the keyboard controller has, those between its two included.
pub const I8042_PORTS: u64 = 5;
/// The keyboard controller's command port.
pub const I8042_COMMAND: u16 = 0x64;

/// System control port A, and the chipset's reset control register.
pub const PORT_A: u16 = 0x92;
/// See [`PORT_A`].
pub const RESET_CONTROL: u16 = 0xcf9;

// The ROM restarts the machine by the keyboard controller.
const _: () = assert!(rom::PORT as u16 == I8042_COMMAND && rom::COMMAND == i8042::RESET);

/// The first serial port.
pub const SERIAL: u16 = 0x3f8;
/// How many ports the serial port has.
pub const SERIAL_PORTS: u64 = 8;
/// The interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;

/// The port of pvpanic, where QEMU has it.
pub const PVPANIC: u16 = 0x505;

/// ACPI's sleep control register; the status register is the next port.
pub const SLEEP_CONTROL: u16 = 0x600;
/// How many ports the two sleep registers are.
pub const SLEEP_PORTS: u64 = 2;

/// The interrupt of the power button, the first that the I/O APIC has for itself.
pub const POWER_BUTTON_IRQ: u32 = ISA_IRQS;

// The last slot has the last interrupt that both kinds of controller have.
const _: () = assert!(VIRTIO_IRQ + MAX_VIRTIO_DEVICES as u32 == ISA_IRQS);

/// One virtio-mmio slot, as the guest finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// The address of its registers.
    pub base: u64,
    /// How many bytes they are.
    pub len: u64,
    /// Its interrupt.
    pub irq: u32,
}

/// Slot `index`, or `None` past the last (rule D3.4).
pub fn virtio_slot(index: usize) -> Option<VirtioSlot> {
    let number = u32::try_from(index).ok().filter(|_| index < MAX_VIRTIO_DEVICES)?;
    Some(VirtioSlot {
        base: VIRTIO_MMIO + u64::from(number) * VIRTIO_MMIO_BYTES,
        len: VIRTIO_MMIO_BYTES,
        irq: VIRTIO_IRQ + number,
    })
}

/// The kernel parameter that names a slot to a kernel without ACPI.
pub const KERNEL_PARAMETER: &str = "virtio_mmio.device";

impl VirtioSlot {
    /// The word on the kernel's command line by which a kernel without ACPI finds the slot.
    pub fn kernel_word(&self) -> String {
        format!("{KERNEL_PARAMETER}={}@{:#x}:{}", self.len, self.base, self.irq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Rule D3.4: interrupts 5 to 15, eleven devices.
    #[test]
    fn eleven_virtio_slots_have_the_interrupts_5_to_15_and_a_twelfth_does_not_exist() {
        let slots: Vec<_> = (0..).map_while(virtio_slot).collect();
        assert_eq!(slots.iter().map(|slot| slot.irq).collect::<Vec<_>>(), (5..=15).collect::<Vec<_>>());
        assert_eq!(virtio_slot(11), None);
        assert_eq!(slots[10].kernel_word(), "virtio_mmio.device=512@0xf0101400:15");
    }

    #[test]
    fn what_the_machine_reserves_does_not_overlap() {
        let slots = (0..).map_while(virtio_slot).map(|slot| (slot.base, slot.len));
        let fixed = [
            (GDT, crate::kvm::x86_64::regs::GDT_BYTES),
            (PVH_START, 0x40),
            (PVH_MODULES, 0x20),
            (PVH_MEMORY_MAP, ZERO_PAGE - PVH_MEMORY_MAP),
            (ZERO_PAGE, 4096),
            (BOOT_STACK - 0xff0, 0xff0),
            (PAGE_TABLES, 3 * 4096),
            (COMMAND_LINE, COMMAND_LINE_BYTES),
            (BIOS, RSDP - BIOS),
            (RSDP, ACPI_END - RSDP),
            (MP_POINTER, MP_END - MP_POINTER),
            (rom::LOW, HIGH_RAM - rom::LOW),
            (IO_APIC.into(), 4096),
            (LOCAL_APIC.into(), 4096),
            (IDENTITY_MAP, 4096),
            (TSS, 3 * 4096),
            (rom::HIGH, 4096),
        ];
        let mut all: Vec<(u64, u64)> = fixed.into_iter().chain(slots).collect();
        all.sort();
        for pair in all.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        let devices = all.iter().filter(|range| range.0 >= HIGH_RAM);
        devices.for_each(|range| assert!(range.0 >= GAP_START && range.0 + range.1 <= GAP_END, "{range:x?}"));
    }
}
