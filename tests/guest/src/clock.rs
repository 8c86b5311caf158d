//! Time: the time-stamp counter, scaled to nanoseconds by kvm-clock's page.
//!
//! Only the scale is taken from the page, so the clock runs evenly whatever the monitor does with the offset, and reading
//! it is native. Without kvm-clock a tick counts as a nanosecond, and `hello` says so.

use crate::cpu;
use crate::memory::{self, Dma};
use core::sync::atomic::{AtomicU64, Ordering};

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Nanoseconds in a tick, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(1 << 32);

/// Where the scale came from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    KvmClock,
    Uncalibrated,
}

/// Asks KVM for the scale of the time-stamp counter.
pub fn start() {
    if let Some(scale) = kvm_scale() {
        SCALE.store(scale, Ordering::Relaxed);
    }
}

/// Where the time comes from.
pub fn source() -> Source {
    if SCALE.load(Ordering::Relaxed) == 1 << 32 { Source::Uncalibrated } else { Source::KvmClock }
}

fn kvm_scale() -> Option<u64> {
    let [_, b, c, d] = cpu::cpuid(0x4000_0000);
    if [b, c, d].map(u32::to_le_bytes).as_flattened() != b"KVMKVMKVM\0\0\0" {
        return None;
    }
    if cpu::cpuid(0x4000_0001)[0] & 1 << 3 == 0 {
        return None;
    }
    let page: Dma = memory::take(4096);
    cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, page.at(0) | 1);
    // struct pvclock_vcpu_time_info: version u32, tsc_timestamp u64 at 8, system_time u64 at 16,
    // tsc_to_system_mul u32 at 24, tsc_shift i8 at 28. An odd version is an update under way; KVM makes none while
    // the vCPU runs, so the first even one will do.
    for _ in 0..1_000_000 {
        let version = page.read32(0);
        let (mul, shift) = (u64::from(page.read32(24)), page.read8(28) as i8);
        if version != 0 && version & 1 == 0 && version == page.read32(0) && mul != 0 {
            return Some(if shift >= 0 { mul << shift } else { mul >> -shift });
        }
    }
    None
}

/// A number of ticks in nanoseconds.
pub fn ns(ticks: u64) -> u64 {
    ((u128::from(ticks) * u128::from(SCALE.load(Ordering::Relaxed))) >> 32) as u64
}

/// Nanoseconds since some fixed moment.
pub fn now() -> u64 {
    ns(cpu::ticks())
}

/// A number of nanoseconds in ticks, to compare `cpu::ticks` with.
pub fn to_ticks(ns: u64) -> u64 {
    ((u128::from(ns) << 32) / u128::from(SCALE.load(Ordering::Relaxed))) as u64
}

/// Keeps the processor busy for `ns` nanoseconds.
pub fn spin_ns(ns: u64) {
    let mut patience = Patience::new(ns);
    while !patience.is_over() {
        core::hint::spin_loop();
    }
}

/// A bound on a wait, in time this processor ran: a machine that is stopped, or not scheduled, loses no patience.
pub struct Patience {
    left_ns: u64,
    last: u64,
}

impl Patience {
    /// The longest step that counts in full; a longer one means the processor was away.
    const STEP_NS: u64 = 10_000_000;

    pub fn new(ns: u64) -> Self {
        Patience { left_ns: ns, last: now() }
    }

    /// Whether the wait has lasted long enough. To be asked in a loop.
    pub fn is_over(&mut self) -> bool {
        let now = now();
        self.left_ns = self.left_ns.saturating_sub(now.saturating_sub(self.last).min(Self::STEP_NS));
        self.last = now;
        self.left_ns == 0
    }
}
