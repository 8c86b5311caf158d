//! What an x86_64 vCPU is before its first instruction, at the start and after a reset; and the ROM at its reset vector.

pub mod cpuid;
pub mod msr;
pub mod regs;
pub mod rom;
pub mod state;
