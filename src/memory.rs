//! placeholder
/// placeholder
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
