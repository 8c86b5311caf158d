//! ACPI tables: how a kernel with ACPI finds its processors, its interrupts and its devices.
//!
//! A hardware-reduced machine (ACPI 6.5, 4.1): no fixed power-management hardware, no system control interrupt, no
//! legacy timer; one sleep register to power off by, and a power button that is an event of its own (5.6.9). Every device there is stands in the DSDT; what stands nowhere
//! does not exist, and a kernel that has these tables probes for nothing. Main thread, before the guest runs.

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{self, VirtioSlot};
use crate::devices::i8042;
use crate::devices::power::SLEEP_TYPE_S5;
use crate::error::{Context, Error, Result};
use crate::memory::GuestRam;

const OEM: [u8; 6] = *b"LOOPVS";
const OEM_TABLE: [u8; 8] = *b"LOOPVISR";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): no VGA, no message-signalled interrupts, no real-time clock; and, by their
/// bits being clear, no keyboard controller and no legacy devices that the kernel would have to guess.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 5;

/// The table header's length.
const HEADER: u32 = 36;

/// Writes the tables of a machine with `cpus` vCPUs and these virtio slots; the RSDP goes to [`layout::RSDP`].
///
/// # Errors
///
/// The tables do not fit their place, which no machine within the limits of `config::spec` brings about.
pub fn write(ram: &GuestRam, cpus: u8, slots: &[VirtioSlot]) -> Result<()> {
    let mut next = layout::RSDP + 64;
    let mut place = |table: &dyn Aml| -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(64);
        if next > layout::ACPI_END {
            return Err(Error::host("ACPI: the tables do not fit their place"));
        }
        ram.write_slice(&bytes, GuestAddress(at)).context(|| "ACPI: write a table")?;
        Ok(at)
    };
    let dsdt = place(&dsdt(slots))?;
    let fadt = place(&fadt(dsdt))?;
    let madt = place(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt)?;

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    ram.write_slice(&rsdp, GuestAddress(layout::RSDP)).context(|| "ACPI: write the RSDP")
}

/// What the machine is: hardware-reduced, powered off by the sleep register, reset through the keyboard controller.
fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means "no such fixed button".
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::I8042_COMMAND);
    fadt.reset_value = i8042::RESET;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_CONTROL + 1);
    fadt.finalize()
}

/// The processors, whose APIC ids are their numbers, and the I/O APIC. The interrupts of our devices are edges and
/// go where their numbers say, so no override is needed.
fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // Ids of I/O APICs and of processors are apart: this one only has to differ from the processors'.
    madt.add_structure(IoApic::new(cpus, layout::IO_APIC, 0));
    madt
}

/// The devices, and how to power off.
fn dsdt(slots: &[VirtioSlot]) -> Sdt {
    let mut devices = Vec::new();
    serial(&mut devices);
    power_button(&mut devices);
    pvpanic(&mut devices);
    for (number, slot) in slots.iter().enumerate() {
        virtio(&mut devices, number, slot);
    }
    let mut body = Vec::new();
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_S5])).to_aml_bytes(&mut body);
    body.extend(aml::Scope::raw("_SB_".into(), devices));
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// An interrupt of a device of ours: an edge, active high, shared with nobody.
fn edge(irq: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, irq)
}

/// The serial port, as a 16550 (PNP0501).
fn serial(devices: &mut Vec<u8>) {
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::SERIAL, layout::SERIAL, 0, layout::SERIAL_PORTS as u8),
                    &edge(layout::SERIAL_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(devices);
}

/// The power button (PNP0C0C), and the event device (ACPI0013) whose one interrupt says that it was pressed: notification
/// 0x80 (ACPI 6.5, table 5.174).
fn power_button(devices: &mut Vec<u8>) {
    let button = || aml::Path::new("PWRB");
    aml::Device::new(
        button(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    )
    .to_aml_bytes(devices);
    aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&edge(layout::POWER_BUTTON_IRQ)])),
            &aml::Method::new("_EVT".into(), 1, true, vec![&aml::Notify::new(&button(), &0x80u8)]),
        ],
    )
    .to_aml_bytes(devices);
}

/// The port by which a kernel tells of its panic: QEMU's identifier, which is the one that kernels know.
fn pvpanic(devices: &mut Vec<u8>) {
    aml::Device::new(
        "PVPN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(layout::PVPANIC, layout::PVPANIC, 0, 1)]),
            ),
        ],
    )
    .to_aml_bytes(devices);
}

/// A virtio-mmio slot: Linux knows the identifier LNRO0005 for it.
fn virtio(devices: &mut Vec<u8>, number: usize, slot: &VirtioSlot) {
    aml::Device::new(
        format!("V{number:03}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &number),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, slot.base as u32, slot.len as u32),
                    &edge(slot.irq),
                ]),
            ),
        ],
    )
    .to_aml_bytes(devices);
}

#[cfg(test)]
#[path = "acpi_test.rs"]
mod tests;
