//! What an x86_64 vCPU is before its first instruction.

pub mod cpuid;
pub mod msr;
pub mod regs;
