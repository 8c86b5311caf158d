//! What takes an instruction the language does not have: ports, the time-stamp counter, ring 0's services.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    safe static exception_facts: [AtomicU64; 4];
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: devices do not write memory on a port write; the I/O bitmap of the TSS is open.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// The time-stamp counter.
pub fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Orders every earlier store before every later load: between publishing an index and asking whether to notify.
pub fn full_fence() {
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// What tells a call of ring 0 from an invalid instruction; `boot.s` has it too.
const SERVICE: u32 = 0x5e6_41ce;

/// Calls service `number` of ring 0 (`invalid_opcode` in boot.s) and returns eax, ebx, ecx and edx.
fn service(number: u32, c: u32, d: u32, si: u32) -> [u32; 4] {
    let (a, b, c_out, d_out): (u32, u64, u32, u32);
    // SAFETY: the gate changes these registers only; rbx is the compiler's, so it is put back.
    unsafe {
        asm!("mov {b}, rbx", "ud2", "xchg {b}, rbx", b = out(reg) b,
            inout("eax") number => a, inout("ecx") c => c_out, inout("edx") d => d_out, in("esi") si,
            in("r11d") SERVICE);
    }
    [a, b as u32, c_out, d_out]
}

/// Halts this processor for ever, with interrupts shut out.
pub fn halt() -> ! {
    loop {
        service(0, 0, 0, 0);
    }
}

/// Halts this processor until an interrupt has been handled.
pub fn wait_for_interrupt() {
    service(1, 0, 0, 0);
}

/// Lets interrupts into ring 3, or shuts them out.
pub fn let_interrupts_in(open: bool) {
    service(if open { 2 } else { 3 }, 0, 0, 0);
}

/// Writes a model-specific register.
pub fn write_msr(msr: u32, value: u64) {
    service(5, msr, (value >> 32) as u32, value as u32);
}

/// CPUID as ring 0 sees it: on software-only KVM the instruction is the host's own in ring 3.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    service(6, 0, 0, leaf)
}

/// Ends the virtual machine by a triple fault.
pub fn triple_fault() -> ! {
    loop {
        service(7, 0, 0, 0);
    }
}

/// Vector, error code, rip and cr2 of the exception that happened.
pub fn exception() -> [u64; 4] {
    [0, 1, 2, 3].map(|i: usize| exception_facts[i].load(Ordering::Relaxed))
}
