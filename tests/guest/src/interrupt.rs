//! Interrupts: the IDT, the local APIC and the I/O APICs, all reached from ring 3; the handlers are in `boot.s`.

use crate::cpu;
use crate::memory::Registers;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

unsafe extern "C" {
    safe static idt: [AtomicU64; 512];
    safe static interrupt_count: [AtomicU32; 32];
    safe static interrupt_device: [AtomicU64; 32];
    safe static exception_gates: u8;
    safe static interrupt_gates: u8;
    safe static spurious_gate: u8;
}

/// The vector of line 0; each line has its own up to 31.
const FIRST_VECTOR: u32 = 0x20;
const SPURIOUS_VECTOR: u32 = 0xff;

const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
/// The second I/O APIC of a machine that has one (QEMU's microvm with ACPI), and the lines of the first.
const IO_APIC_STEP: u64 = 0x1_0000;
const IO_APIC_LINES: u32 = 24;

/// The line whose vector the local APIC's timer uses: no device has it.
pub const TIMER_LINE: u32 = 31;

const APIC_ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;
const MASKED: u32 = 1 << 16;

/// How a line is raised.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    Edge,
    Level,
}

/// Fills the IDT (until then an exception ends the machine) and masks the 8259s: they would kick the processor at each
/// interrupt of a device, which a load that polls does not take.
pub fn prepare() {
    cpu::out8(0x21, 0xff);
    cpu::out8(0xa1, 0xff);
    for vector in 0..32 {
        gate(vector, &raw const exception_gates as u64 + 16 * vector as u64);
        gate(FIRST_VECTOR as usize + vector, &raw const interrupt_gates as u64 + 16 * vector as u64);
    }
    gate(SPURIOUS_VECTOR as usize, &raw const spurious_gate as u64);
}

/// An interrupt gate to ring 0.
fn gate(vector: usize, address: u64) {
    let low = address & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (address & 0xffff_0000) << 32;
    idt[2 * vector].store(low, Ordering::Relaxed);
    idt[2 * vector + 1].store(address >> 32, Ordering::Relaxed);
}

fn local() -> Registers {
    Registers::new(LOCAL_APIC)
}

/// Switches the local APIC on.
pub fn start() {
    local().write32(LVT_LINT0, MASKED);
    local().write32(SPURIOUS, SPURIOUS_VECTOR | 1 << 8);
}

/// Routes a line of the I/O APIC to this processor; the handler acknowledges the virtio-mmio device at `device`, if any.
pub fn route(line: u32, trigger: Trigger, device: Option<Registers>) {
    let vector = line % 32;
    interrupt_device[vector as usize].store(device.map_or(0, |device| device.base()), Ordering::Relaxed);
    let io = Registers::new(IO_APIC + u64::from(line / IO_APIC_LINES) * IO_APIC_STEP);
    let entry = 0x10 + 2 * (line % IO_APIC_LINES);
    let level = if trigger == Trigger::Level { 1 << 15 } else { 0 };
    for (register, value) in [(entry + 1, id() << 24), (entry, (FIRST_VECTOR + vector) | level)] {
        io.write32(0, register);
        io.write32(0x10, value);
    }
}

/// How many interrupts of a line the handler has seen.
pub fn count(line: u32) -> u32 {
    interrupt_count[line as usize % 32].load(Ordering::Relaxed)
}

/// The APIC id of this processor.
pub fn id() -> u32 {
    local().read32(APIC_ID) >> 24
}

/// Raises `TIMER_LINE` once, about `ns` nanoseconds from now: KVM's APIC bus ticks once a nanosecond.
pub fn start_timer(ns: u64) {
    local().write32(TIMER_DIVIDE, 0b1011);
    local().write32(LVT_TIMER, FIRST_VECTOR + TIMER_LINE);
    local().write32(TIMER_COUNT, ns.min(u64::from(u32::MAX)) as u32);
}

/// Sends all other processors an INIT.
pub fn init_others() {
    local().write32(ICR_LOW, 0xc_4500);
}

/// Sends all other processors to real mode at `page << 12`.
pub fn start_others(page: u32) {
    local().write32(ICR_LOW, 0xc_4600 | page);
}

/// Sends the processor with that APIC id an INIT.
pub fn init(id: u32) {
    local().write32(ICR_HIGH, id << 24);
    local().write32(ICR_LOW, 0x4500);
}

/// Sends it a non-maskable interrupt, by which it restarts the machine.
pub fn non_maskable(id: u32) {
    local().write32(ICR_HIGH, id << 24);
    local().write32(ICR_LOW, 0x4400);
}
