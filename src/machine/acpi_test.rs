//! The tables, read back as a kernel reads them.

use std::io::Write;
use std::process::Command;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::memory;

fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at `at`, its checksum verified.
fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
    assert!((layout::RSDP..layout::ACPI_END).contains(&at), "{at:#x}");
    let len = u32_at(&bytes(ram, at, 8), 4) as usize;
    let table = bytes(ram, at, len);
    assert_eq!(sum(&table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
    table
}

/// FADT, MADT and DSDT, found from the RSDP on.
fn tables(cpus: u8, slots: usize) -> [Vec<u8>; 3] {
    let ram = memory::allocate(16 << 20, false, true).unwrap();
    let slots: Vec<_> = (0..slots).map(|index| layout::virtio_slot(index).unwrap()).collect();
    write(&ram, cpus, &slots).unwrap();
    let rsdp = bytes(&ram, layout::RSDP, 36);
    assert_eq!((&rsdp[..8], rsdp[15]), (&b"RSD PTR "[..], 2));
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(&ram, u64_at(&rsdp, 24));
    assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
    let fadt = table(&ram, u64_at(&xsdt, 36));
    let madt = table(&ram, u64_at(&xsdt, 44));
    let dsdt = table(&ram, u64_at(&fadt, 140));
    assert_eq!([&fadt[..4], &madt[..4], &dsdt[..4]], [b"FACP", b"APIC", b"DSDT"]);
    [fadt, madt, dsdt]
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).filter(|window| *window == needle).count()
}

#[test]
fn the_machine_is_hardware_reduced_and_says_how_to_power_off_and_reset() {
    let [fadt, ..] = tables(1, 0);
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "hardware-reduced, reset register");
    // Generic addresses (5.2.3.2): port space, 8 bits wide, byte access, the port.
    let port = |port: u64| [&[1u8, 8, 0, 1][..], &port.to_le_bytes()].concat();
    assert_eq!((&fadt[116..128], fadt[128]), (&port(0x64)[..], 0xfe), "reset");
    assert_eq!(fadt[244..256], port(0x600), "sleep control");
    assert_eq!(fadt[256..268], port(0x601), "sleep status");
}

#[test]
fn every_processor_and_the_io_apic_are_there_for_any_number_of_vcpus() {
    for cpus in [1, 2, 254] {
        let [_, madt, _] = tables(cpus, 11);
        assert_eq!(u32_at(&madt, 36), layout::LOCAL_APIC);
        let (mut at, mut ids, mut io_apics) = (44, Vec::new(), Vec::new());
        while at < madt.len() {
            match madt[at] {
                0 => {
                    assert_eq!((madt[at + 2], u32_at(&madt, at + 4)), (madt[at + 3], 1), "enabled");
                    ids.push(madt[at + 3]);
                }
                1 => io_apics.push((u32_at(&madt, at + 4), u32_at(&madt, at + 8))),
                other => panic!("unexpected entry {other}"),
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(io_apics, [(layout::IO_APIC, 0)]);
    }
}

// Rule D3.4: up to eleven devices.
#[test]
fn each_virtio_slot_is_a_device_with_its_registers_and_its_interrupt() {
    for slots in [0, 1, 11] {
        let [_, _, dsdt] = tables(1, slots);
        assert_eq!(count(&dsdt, b"LNRO0005"), slots);
        for index in 0..slots {
            let slot = layout::virtio_slot(index).unwrap();
            // Fixed 32-bit memory, writable (6.4.3.4), then an extended interrupt (6.4.3.6): a consumer's edge.
            let memory = [&[0x86, 9, 0, 1][..], &(slot.base as u32).to_le_bytes(), &0x200u32.to_le_bytes()].concat();
            let interrupt = [&[0x89, 6, 0, 0b11, 1][..], &slot.irq.to_le_bytes()].concat();
            assert_eq!(count(&dsdt, &[memory, interrupt].concat()), 1);
        }
        assert_eq!(count(&dsdt, b"COM1"), 1);
        assert_eq!(count(&dsdt, b"_S5_"), 1);
    }
}

#[test]
fn the_power_button_is_an_event_with_an_interrupt_of_its_own_and_a_panic_has_its_port() {
    let [_, _, dsdt] = tables(1, 11);
    assert_eq!(count(&dsdt, &[b"PWRB\x08_HID\x0c".as_slice(), &[0x41, 0xd0, 0x0c, 0x0c]].concat()), 1, "PNP0C0C");
    let interrupt = [&[0x89, 6, 0, 0b11, 1][..], &layout::POWER_BUTTON_IRQ.to_le_bytes()].concat();
    assert_eq!((count(&dsdt, b"ACPI0013"), count(&dsdt, &interrupt)), (1, 1));
    // A method of one argument, serialized: notify the button with 0x80 (20.2.5.3).
    assert_eq!(count(&dsdt, b"_EVT\x09\x86PWRB\x0a\x80"), 1);
    // Ports (6.4.2.5): 16 bits decoded, from and to 0x505, one of them.
    let port = [&b"QEMU0001\0"[..]].concat();
    let io = [0x47, 1, 5, 5, 5, 5, 0, 1];
    assert_eq!((count(&dsdt, &port), count(&dsdt, &io)), (1, 1));
}

// ACPICA's own disassembler, where it is installed, reads every byte of the definition block.
#[test]
fn the_definition_block_is_what_acpica_reads() {
    let [_, _, dsdt] = tables(2, 11);
    let dir = TempDir::new().unwrap();
    let file = dir.as_path().join("dsdt.aml");
    std::fs::write(&file, dsdt).unwrap();
    match Command::new("iasl").arg("-d").arg(&file).output() {
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "skipped, iasl does not start: {error}");
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && !said.contains("Error"), "{said}");
            let source = std::fs::read_to_string(file.with_extension("dsl")).unwrap();
            assert_eq!(source.matches("LNRO0005").count(), 11, "{source}");
            for text in ["EisaId (\"PNP0501\")", "IO (Decode16", "Edge, ActiveHigh, Exclusive", "Name (\\_S5"] {
                assert!(source.replace("Name (_S5", "Name (\\_S5").contains(text), "{text}: {source}");
            }
        }
    }
}
