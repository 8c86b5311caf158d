//! Model-specific registers that a kernel expects its firmware to have set.
//!
//! Everything else starts as KVM's reset leaves it, which is what the processor's manual says. Main thread.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Context, Error, Result};

/// IA32_MISC_ENABLE (Intel SDM volume 4, table 2-2), and its bit 0: fast string operations. Linux takes a clear bit
/// on an Intel processor as "rep movs is slow" and copies without it.
const MISC_ENABLE: (u32, u64) = (0x1A0, 1);
/// IA32_MTRR_DEF_TYPE (SDM volume 3, 12.11.2.1): bit 11 switches the memory type ranges on, type 6 is write-back.
/// All memory is write-back then; left at reset, all of it would be uncached in the guest's own books.
const MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 1 << 11 | 6);

/// Sets them on one vCPU.
///
/// # Errors
///
/// KVM refuses one, which is named.
pub fn set(vcpu: &VcpuFd) -> Result<()> {
    let entries = [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).context(|| "KVM: a list of MSRs")?;
    let set = vcpu.set_msrs(&msrs).context(|| "KVM: set MSRs")?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::host(format!("KVM: set MSR {:#x} to {:#x}: refused", refused.index, refused.data))),
    }
}
