//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its processors and learns
//! that interrupts go to the I/O APIC. Main thread, before the guest runs.

use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::error::{Context, Error, Result};
use crate::memory::GuestRam;

/// "Version 1.4", in the floating pointer and in the table's header.
const VERSION: u8 = 4;
/// What KVM's local APICs and its I/O APIC say of themselves.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Interrupt types (table 4-11): a vectored interrupt, a non-maskable one, and one whose vector the 8259 gives.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// "All local APICs".
const EVERY_APIC: u8 = 0xff;

const POINTER_BYTES: u64 = 16;
const HEADER_BYTES: u64 = 44;

/// Writes the floating pointer to [`layout::MP_POINTER`] and the table behind it, for `cpus` vCPUs whose APIC ids are
/// their numbers.
///
/// # Errors
///
/// The table does not fit its place, which no number of vCPUs brings about.
pub fn write(ram: &GuestRam, cpus: u8) -> Result<()> {
    let at = layout::MP_POINTER + POINTER_BYTES;
    let table = table(cpus);
    if at + table.len() as u64 > layout::MP_END {
        return Err(Error::host("MP table: it does not fit its place"));
    }
    let mut pointer = Vec::with_capacity(POINTER_BYTES as usize);
    pointer.extend(b"_MP_");
    pointer.extend((at as u32).to_le_bytes());
    pointer.extend([(POINTER_BYTES / 16) as u8, VERSION, 0]);
    // Feature bytes: there is a table, and the machine starts with the 8259s wired to the boot vCPU.
    pointer.extend([0; 5]);
    seal(&mut pointer, 10);
    ram.write_slice(&table, GuestAddress(at))
        .and_then(|()| ram.write_slice(&pointer, GuestAddress(layout::MP_POINTER)))
        .context(|| "MP table: write it")
}

/// The table: a header (4.2) and the entries in the order of their types (4.3).
fn table(cpus: u8) -> Vec<u8> {
    let io_apic = cpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = if cpu == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, LOCAL_APIC_VERSION, flags]);
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IO_APIC.to_le_bytes();
    add(&[IO_APIC, io_apic, IO_APIC_VERSION, ENABLED, a, b, c, d]);
    for irq in 0..layout::ISA_IRQS as u8 {
        add(&[IO_INTERRUPT, INT, 0, 0, 0, irq, io_apic, irq]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, EVERY_APIC, 1]);

    let mut table = Vec::with_capacity(HEADER_BYTES as usize + entries.len());
    table.extend(b"PCMP");
    table.extend((HEADER_BYTES as u16 + entries.len() as u16).to_le_bytes());
    table.extend([VERSION, 0]);
    table.extend(b"LOOPVISR");
    table.extend(b"LOOPVISOR   ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    seal(&mut table, 7);
    table
}

/// Sets the byte at `at` so that all of them add up to zero.
fn seal(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = checksum.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The entries of the table for `cpus` vCPUs, found from the floating pointer on and told apart by their types.
    fn entries(cpus: u8) -> Vec<Vec<u8>> {
        let ram = memory::allocate(16 << 20, false, true).unwrap();
        write(&ram, cpus).unwrap();
        let pointer = bytes(&ram, layout::MP_POINTER, 16);
        assert_eq!((&pointer[..4], pointer[8], pointer[9], sum(&pointer)), (&b"_MP_"[..], 1, 4, 0));
        let at = u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap()));
        let len = bytes(&ram, at + 4, 2);
        let table = bytes(&ram, at, u16::from_le_bytes([len[0], len[1]]).into());
        assert_eq!((&table[..4], sum(&table)), (&b"PCMP"[..], 0));
        assert_eq!(table[36..40], layout::LOCAL_APIC.to_le_bytes());
        let (mut rest, mut entries) = (&table[44..], Vec::new());
        while let [kind, ..] = rest {
            let (entry, others) = rest.split_at(if *kind == PROCESSOR { 20 } else { 8 });
            entries.push(entry.to_vec());
            rest = others;
        }
        assert_eq!(entries.len(), usize::from(u16::from_le_bytes([table[34], table[35]])));
        entries
    }

    #[test]
    fn every_vcpu_is_in_the_table_and_the_first_is_the_boot_processor() {
        for cpus in [1, 2, 254] {
            let entries = entries(cpus);
            let processors: Vec<_> = entries.iter().filter(|entry| entry[0] == PROCESSOR).collect();
            assert_eq!(processors.iter().map(|entry| entry[1]).collect::<Vec<_>>(), (0..cpus).collect::<Vec<_>>());
            for entry in processors {
                assert_eq!(entry[3], if entry[1] == 0 { 3 } else { 1 });
            }
        }
    }

    #[test]
    fn every_isa_interrupt_goes_to_the_io_apics_input_of_its_number() {
        let entries = entries(2);
        let io_apic = entries.iter().find(|entry| entry[0] == IO_APIC).unwrap();
        assert_eq!((io_apic[1], io_apic[3], &io_apic[4..]), (2, 1, &layout::IO_APIC.to_le_bytes()[..]));
        let inputs: Vec<_> = entries.iter().filter(|entry| entry[0] == IO_INTERRUPT).collect();
        assert_eq!(inputs.len(), 16);
        for (entry, irq) in inputs.into_iter().zip(0..) {
            assert_eq!(entry[1..], [INT, 0, 0, 0, irq, 2, irq]);
        }
    }
}
