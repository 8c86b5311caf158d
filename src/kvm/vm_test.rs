//! The interrupt controllers of a machine on the host's own KVM, and what a reset leaves in them.

use std::io::{Write, stderr};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_ioapic_state, kvm_pic_state};

use super::*;
use crate::kvm::irq::Irq;
use crate::memory;

fn vm() -> Option<Arc<Vm>> {
    match Vm::new(memory::allocate(16 << 20, false, true).unwrap()) {
        Ok(vm) => Some(Arc::new(vm)),
        Err(error) => {
            let _ = writeln!(stderr(), "skipped: no guest runs here: {error}");
            None
        }
    }
}

fn chip(vm: &Vm, chip_id: u32) -> kvm_irqchip {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.fd().get_irqchip(&mut chip).unwrap();
    chip
}

fn pic(vm: &Vm, chip_id: u32) -> kvm_pic_state {
    // SAFETY: KVM has filled in the member of the chip that it was asked for.
    unsafe { chip(vm, chip_id).chip.pic }
}

fn io_apic(vm: &Vm) -> kvm_ioapic_state {
    // SAFETY: as above.
    unsafe { chip(vm, KVM_IRQCHIP_IOAPIC).chip.ioapic }
}

/// The state of the three chips, as bytes that can be compared.
fn chips(vm: &Vm) -> (String, String, Vec<u64>) {
    let io_apic = io_apic(vm);
    // SAFETY: an entry is 64 bits in both views.
    let entries = io_apic.redirtbl.iter().map(|entry| unsafe { entry.bits });
    let registers = [io_apic.id, io_apic.ioregsel, io_apic.irr].map(u64::from);
    let pics = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].map(|chip_id| format!("{:x?}", pic(vm, chip_id)));
    let [master, slave] = pics;
    (master, slave, entries.chain(registers).collect())
}

/// Waits until the slave has latched `line`: KVM raises it on a thread of the host's kernel.
fn await_line(vm: &Vm, line: u32) {
    let until = Instant::now() + Duration::from_secs(30);
    while pic(vm, KVM_IRQCHIP_PIC_SLAVE).irr >> (line - 8) & 1 == 0 {
        assert!(Instant::now() < until, "line {line} is not raised");
    }
}

#[test]
fn both_8259s_start_masked_with_nothing_pending() {
    let Some(vm) = vm() else { return };
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let pic = pic(&vm, chip_id);
        assert_eq!((pic.imr, pic.irr, pic.isr, pic.elcr), (0xff, 0, 0, 0), "chip {chip_id}");
    }
}

#[test]
fn a_reset_leaves_no_line_of_the_slave_pending_in_the_master() {
    let Some(vm) = vm() else { return };
    let fresh = chips(&vm);
    for line in 8..16 {
        let irq = Irq::new(&vm, line).unwrap();
        // A guest that has programmed the 8259s, and lets everything in.
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = chip(&vm, chip_id);
            chip.chip.pic.imr = 0;
            vm.fd().set_irqchip(&chip).unwrap();
        }
        irq.trigger();
        await_line(&vm, line);
        assert_ne!(pic(&vm, KVM_IRQCHIP_PIC_MASTER).irr & 1 << 2, 0, "line {line} is cascaded");
        vm.reset_irqchips().unwrap();
        assert_eq!(chips(&vm), fresh, "line {line}");
    }
}

#[test]
fn a_reset_clears_what_the_io_apic_waits_for() {
    let Some(vm) = vm() else { return };
    let fresh = chips(&vm);
    let mut chip = chip(&vm, KVM_IRQCHIP_IOAPIC);
    let mut state = io_apic(&vm);
    // Pin 12: level-triggered, vector 0x30, and in service (remote IRR). Pin 13: an edge that waits for its mask.
    state.redirtbl[12].bits = 1 << 15 | 1 << 14 | 0x30;
    state.redirtbl[13].bits = 1 << 16 | 0x31;
    (state.irr, state.ioregsel) = (1 << 12, 0x10);
    chip.chip.ioapic = state;
    vm.fd().set_irqchip(&chip).unwrap();
    assert_ne!(chips(&vm), fresh);
    vm.reset_irqchips().unwrap();
    assert_eq!(chips(&vm), fresh);
}

#[test]
fn a_line_raised_before_a_reset_and_injected_after_it_is_masked() {
    let Some(vm) = vm() else { return };
    let irq = Irq::new(&vm, 12).unwrap();
    vm.reset_irqchips().unwrap();
    irq.trigger();
    await_line(&vm, 12);
    // The slave latches the edge, but a masked one neither reaches the master nor the processor.
    assert_eq!(pic(&vm, KVM_IRQCHIP_PIC_MASTER).irr, 0);
    assert_eq!(io_apic(&vm).irr, 0);
}

#[test]
fn the_rom_is_seen_below_1_mib_and_below_4_gib_and_ram_everywhere_else() {
    let gib = 1 << 30;
    for (bytes, expected) in [
        (0x8_0000, vec![(0, 0x8_0000, 0)]),
        (0x10_0000, vec![(0, 0xf_f000, 0)]),
        (16 << 20, vec![(0, 0xf_f000, 0), (0x10_0000, 15 << 20, 0)]),
        (4 * gib, vec![(0, 0xf_f000, 0), (0x10_0000, 3 * gib - (1 << 20), 0), (4 * gib, gib, 0)]),
    ] {
        let ram = memory::allocate(bytes, false, true).unwrap();
        let slots = memory_slots(&ram);
        let (ranges, ids): (Vec<_>, Vec<_>) =
            slots.iter().map(|slot| ((slot.guest_phys_addr, slot.memory_size, slot.flags), slot.slot)).unzip();
        let rom = [0xf_f000, 0xffff_f000].map(|at| (at, 4096, KVM_MEM_READONLY));
        assert_eq!(ranges, [expected, rom.to_vec()].concat(), "{bytes:#x}");
        assert_eq!(ids, (0..ids.len() as u32).collect::<Vec<_>>());
        for slot in slots.iter().filter(|slot| slot.flags == 0) {
            let host = ram.get_host_address(vm_memory::GuestAddress(slot.guest_phys_addr)).unwrap();
            assert_eq!(host as u64, slot.userspace_addr);
        }
    }
}
