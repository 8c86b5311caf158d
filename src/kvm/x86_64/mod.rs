//! What an x86_64 vCPU is before its first instruction, at the start and after a reset.

pub mod cpuid;
pub mod msr;
pub mod regs;
pub mod state;
