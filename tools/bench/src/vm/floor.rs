//! The floor: the smallest program that creates the VM and runs the guest. What it costs, KVM costs.
//!
//! One memory region, the in-kernel interrupt controllers, one vCPU, and a serial port that is a `write`. It runs in a
//! process of its own, like the monitors it is compared with; the guest starts by its PVH note, for which nothing but
//! segments need be set up.

use std::fs;
use std::io::{self, Write};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::Result;
use super::monitor::MEMORY_MIB;

const MEMORY: usize = (MEMORY_MIB as usize) << 20;
const COMMAND_LINE: usize = 0x6000;
const START_INFO: usize = 0x7000;
const MEMORY_MAP: usize = 0x7100;
const TSS: usize = 0xfffb_d000;
const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = SERIAL + 5;
/// The transmitter is empty.
const IDLE: u8 = 0x60;
const I8042: u16 = 0x64;
const RESET: u8 = 0xfe;

/// Runs the ELF file `kernel` with a command line until it resets itself.
pub fn run(kernel: &str, command_line: &str) -> Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which nothing unmaps before the process ends.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), MEMORY, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: place as u64,
        ..kvm_userspace_memory_region::default()
    };
    // SAFETY: the mapping is that long and stays.
    unsafe { vm.set_user_memory_region(region)? };
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()?;
    // SAFETY: the same mapping; the guest does not run yet.
    let memory = unsafe { std::slice::from_raw_parts_mut(place.cast::<u8>(), MEMORY) };
    let entry = load(memory, &fs::read(kernel).map_err(|error| format!("{kernel:?}: {error}"))?)?;
    write_start_info(memory, command_line);
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_at(&vcpu, entry)?;
    serve(&mut vcpu)
}

/// Copies the segments to their places; the entry of the PVH note.
fn load(memory: &mut [u8], elf: &[u8]) -> Result<u64> {
    const LOAD: u64 = 1;
    const NOTE: u64 = 4;
    // Elf64_Phdr, and a note of three words, the name "Xen" and the entry.
    const HEADER_BYTES: usize = 56;
    const NOTE_ENTRY: usize = 16;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        Some(elf.get(at..at + bytes)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let mut headers = || -> Option<u64> {
        let (table, count) = (number(32, 8)? as usize, number(56, 2)? as usize);
        let mut entry = None;
        for header in (0..count).map(|i| table + i * HEADER_BYTES) {
            let offset = number(header + 8, 8)? as usize;
            let address = number(header + 24, 8)? as usize;
            let bytes = number(header + 32, 8)? as usize;
            match number(header, 4)? {
                LOAD => {
                    memory.get_mut(address..address + bytes)?.copy_from_slice(elf.get(offset..offset + bytes)?);
                }
                NOTE => entry = number(offset + NOTE_ENTRY, 4),
                _ => {}
            }
        }
        entry
    };
    headers().ok_or_else(|| "the guest is no ELF file with a PVH note".into())
}

/// What the guest is told (Xen, public/arch-x86/hvm/start_info.h): its command line and its memory.
fn write_start_info(memory: &mut [u8], command_line: &str) {
    let mut write = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    write(COMMAND_LINE, command_line.as_bytes());
    write(START_INFO, &0x336e_c578u32.to_le_bytes());
    write(START_INFO + 4, &1u32.to_le_bytes());
    write(START_INFO + 24, &(COMMAND_LINE as u64).to_le_bytes());
    write(START_INFO + 40, &(MEMORY_MAP as u64).to_le_bytes());
    write(START_INFO + 48, &2u32.to_le_bytes());
    for (i, (start, bytes)) in [(0, 0x9_f000), (1 << 20, MEMORY as u64 - (1 << 20))].into_iter().enumerate() {
        let entry = MEMORY_MAP + 24 * i;
        write(entry, &u64::to_le_bytes(start));
        write(entry + 8, &u64::to_le_bytes(bytes));
        write(entry + 16, &1u32.to_le_bytes());
    }
}

/// 32-bit protected mode without paging.
fn enter_at(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment { limit: u32::MAX, type_: 3, present: 1, s: 1, db: 1, g: 1, ..kvm_segment::default() };
    sregs.cs = kvm_segment { type_: 11, selector: 8, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..kvm_segment::default() };
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rbx: START_INFO as u64, rflags: 2, ..kvm_regs::default() })?;
    Ok(())
}

/// Runs the guest: bytes written to the serial port are printed, the reset ends it, all else reads as ones.
fn serve(vcpu: &mut VcpuFd) -> Result<()> {
    let mut output = io::stdout().lock();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(SERIAL, byte) => {
                output.write_all(byte)?;
                output.flush()?;
            }
            VcpuExit::IoOut(I8042, [RESET]) | VcpuExit::Shutdown => return Ok(()),
            VcpuExit::IoIn(LINE_STATUS, byte) => byte.fill(IDLE),
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            exit => return Err(format!("the guest ended by {exit:?}").into()),
        }
    }
}
