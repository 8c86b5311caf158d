//! `smp cpus=N`: starts the other processors by INIT and SIPI; each comes to ring 3, prints who it is, and halts.

use crate::clock::Patience;
use crate::cpu;
use crate::interrupt;
use crate::memory::Registers;
use crate::text::Outcome;
use crate::words::Words;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

unsafe extern "C" {
    safe static ap_begin: u8;
    safe static ap_end: u8;
    safe static ap_count: AtomicU32;
    safe static gdt: [AtomicU64; 5 + 512];
    safe static cpu_areas: u8;
}

/// Where the processors begin: a page below 1 MiB.
const PAGE: u32 = 8;
/// Sizes and offsets that `boot.s` has too.
const CPU_AREA: u64 = 0x2000;
const TSS_BITMAP: u64 = 104;
const TSS_LIMIT: u64 = TSS_BITMAP + 512;
/// As many as there are areas.
const MOST_CPUS: u64 = 256;

/// Processors that have printed their line.
static HERE: AtomicU32 = AtomicU32::new(1);
static SPIN: AtomicBool = AtomicBool::new(false);
/// A function for the first of them, which it calls once; 0 is none.
static CALL: AtomicU64 = AtomicU64::new(0);

/// What the other processors do when they are up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Halt,
    Spin,
}

pub fn run(words: Words) -> Outcome {
    start(words.number("cpus", 1), Then::Halt)
}

/// Starts the processors up to `cpus`, and returns when all of them have printed their line.
pub fn start(cpus: u64, then: Then) -> Outcome {
    if cpus == 0 || cpus > MOST_CPUS {
        fail!("cpus={cpus} is outside 1 to {MOST_CPUS}");
    }
    say!("smp: cpu=0 apic={}", interrupt::id());
    if cpus == 1 {
        return Ok(());
    }
    SPIN.store(then == Then::Spin, Ordering::Relaxed);
    (1..cpus).for_each(prepare);
    copy_code();
    interrupt::start();
    interrupt::init_others();
    crate::clock::spin_ns(10_000_000);
    for _ in 0..2 {
        interrupt::start_others(PAGE);
        crate::clock::spin_ns(1_000_000);
    }
    let mut patience = Patience::new(10_000_000_000);
    while u64::from(HERE.load(Ordering::Acquire)) < cpus {
        if patience.is_over() {
            let began = ap_count.load(Ordering::Relaxed);
            fail!("of {cpus} processors {began} began and {} came to ring 3", HERE.load(Ordering::Relaxed));
        }
    }
    Ok(())
}

/// Has the first of the other processors call `function`. They were started with [`Then::Spin`].
pub fn call_first(function: fn()) {
    CALL.store(function as usize as u64, Ordering::Release);
}

/// Stops the others and has them begin at real-mode `code`, which is at most a page long.
pub fn restart_others(code: &[u8]) {
    let page = Registers::new(u64::from(PAGE) << 12);
    code.iter().zip(0..).for_each(|(&byte, offset)| page.write::<u8>(offset, byte));
    interrupt::init_others();
    crate::clock::spin_ns(10_000_000);
    interrupt::start_others(PAGE);
}

/// Writes the TSS of processor `cpu` and its descriptor.
fn prepare(cpu: u64) {
    let base = &raw const cpu_areas as u64 + cpu * CPU_AREA;
    let tss = Registers::new(base);
    tss.write::<u64>(4, base + 0x1000);
    tss.write::<u32>(100, (TSS_BITMAP as u32) << 16);
    tss.write::<u8>(TSS_LIMIT, 0xff);
    let low = TSS_LIMIT | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let index = 5 + 2 * cpu as usize;
    gdt[index].store(low, Ordering::Relaxed);
    gdt[index + 1].store(base >> 32, Ordering::Relaxed);
}

/// Copies the real-mode code to its page.
fn copy_code() {
    let (from, to) = (Registers::new(&raw const ap_begin as u64), Registers::new(u64::from(PAGE) << 12));
    for offset in 0..&raw const ap_end as u64 - from.base() {
        to.write::<u8>(offset, from.read(offset));
    }
}

/// The first function in ring 3 of every other processor; `cpu` counts them in the order they come.
#[unsafe(no_mangle)]
extern "C" fn ring3_ap(cpu: u32) -> ! {
    say!("smp: cpu={cpu} apic={}", interrupt::id());
    HERE.fetch_add(1, Ordering::Release);
    while SPIN.load(Ordering::Relaxed) {
        core::hint::spin_loop();
        let function = CALL.load(Ordering::Acquire);
        if cpu == 1 && function != 0 {
            CALL.store(0, Ordering::Relaxed);
            // SAFETY: `call_first` has stored a function of this type.
            unsafe { core::mem::transmute::<usize, fn()>(function as usize)() };
        }
    }
    cpu::halt()
}
