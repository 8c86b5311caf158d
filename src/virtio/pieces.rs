//! The bytes of a chain's buffers as ranges of our memory, for the kernel to fill or to send, and small things written into
//! them. The loop's thread of the device that has the chain.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::ring::Buffer;
use crate::memory::GuestRam;
use crate::sys::stream::Ranges;

/// The ranges behind the first `skip` bytes of `buffers`, `most` bytes of them: fewer where the buffers end early or leave
/// guest memory, or come in more than [`crate::sys::stream::MAX_RANGES`] of them.
pub fn pieces<'m>(ram: &'m GuestRam, buffers: &[Buffer], skip: u64, most: u64) -> Ranges<'m> {
    let mut pieces = Ranges::default();
    each(ram, buffers, skip, most, |slice| pieces.push(slice));
    pieces
}

/// Copies `bytes` behind the first `skip` of `buffers`. False if they do not all fit, or the buffers leave guest memory.
pub fn scatter(ram: &GuestRam, buffers: &[Buffer], skip: u64, bytes: &[u8]) -> bool {
    let mut left = bytes;
    each(ram, buffers, skip, bytes.len() as u64, |slice| {
        let (now, later) = left.split_at(slice.len().min(left.len()));
        slice.copy_from(now);
        left = later;
        true
    });
    left.is_empty()
}

/// Hands over range after range, none of them empty, until `take` says no.
fn each<'m>(
    ram: &'m GuestRam,
    buffers: &[Buffer],
    mut skip: u64,
    most: u64,
    mut take: impl FnMut(&VolatileSlice<'m>) -> bool,
) {
    let mut left = most;
    for buffer in buffers {
        let len = u64::from(buffer.len);
        let skipped = skip.min(len);
        skip -= skipped;
        let now = left.min(len - skipped);
        if now == 0 {
            continue;
        }
        let Some(from) = buffer.address.0.checked_add(skipped) else { return };
        let Ok(slice) = GuestMemoryBackend::get_slice(ram, GuestAddress(from), now as usize) else { return };
        if !take(&slice) {
            return;
        }
        left -= now;
    }
}
