//! The bare-metal test guest of loopvisor: a freestanding ELF, one mode a test, results over the serial port.
//!
//! `boot.s` is the little that runs in ring 0; everything else runs in ring 3, natively even where the host's KVM
//! emulates ring 0. This file is the way in, the choice of the mode, and the way out. It is no place for drivers
//! (`virtio`) or tests (`modes`).

#![no_std]
#![no_main]

#[macro_use]
mod serial;
#[macro_use]
mod text;
mod clock;
mod cpu;
mod histogram;
mod interrupt;
mod memory;
mod modes;
mod start;
mod virtio;
mod words;

core::arch::global_asm!(include_str!("boot.s"));

use start::Machine;
use text::Outcome;

/// How long the monitor has to end the machine before a triple fault does.
const END_NS: u64 = 200_000_000;

/// The first function in ring 3, on the boot processor.
///
/// `protocol` is 0 for the Linux 64-bit boot protocol and 1 for PVH; `address` is that of boot_params or
/// hvm_start_info.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(protocol: u32, address: u32) -> ! {
    interrupt::prepare();
    let machine = Machine::read(protocol, address);
    clock::start();
    let mode = machine.words.get("mode").unwrap_or("hello");
    let outcome = modes::run(mode, &machine);
    end(machine.words, outcome);
}

/// Prints the verdict and ends the virtual machine.
fn end(words: words::Words, outcome: Outcome) -> ! {
    match outcome {
        Ok(()) => say!("guest: ok"),
        Err(why) => say!("guest: FAILED {why}"),
    }
    match words.get("end") {
        Some("hang") => cpu::halt(),
        Some("triple") => cpu::triple_fault(),
        Some("panic") => cpu::out8(modes::power::PVPANIC, modes::power::PANICKED),
        // SLP_TYP 5 and SLP_EN in the sleep control register of hardware-reduced ACPI.
        Some("acpi") => cpu::out8(words.number("sleep_port", 0x600) as u16, 5 << 2 | 1 << 5),
        _ => reset(),
    }
    clock::spin_ns(END_NS);
    cpu::triple_fault()
}

/// Where an exception ends up, in ring 3 again, with the facts in `exception_facts`.
#[unsafe(no_mangle)]
extern "C" fn ring3_exception() -> ! {
    let [vector, error, rip, cr2] = cpu::exception();
    say!("exception: vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}");
    say!("guest: FAILED exception {vector} at {rip:#x}");
    reset()
}

/// Ends the virtual machine when the command line cannot be asked how.
fn reset() -> ! {
    cpu::out8(0x64, 0xfe);
    clock::spin_ns(END_NS);
    cpu::triple_fault()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    say!("guest: FAILED {info}");
    reset()
}
