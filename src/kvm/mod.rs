//! KVM: one virtual machine, its vCPUs, and the two kinds of eventfd that join it to the loops.

pub mod irq;
pub mod kick;
mod run_page;
pub mod vcpu;
pub mod vm;
pub mod x86_64;
