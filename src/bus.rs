//! placeholder
/// placeholder
pub trait Slot: Send {
    /// x
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// x
    fn write(&mut self, offset: u64, data: &[u8]);
}
