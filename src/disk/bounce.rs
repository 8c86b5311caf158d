//! The disk's own memory: aligned buffers that stand in for guest memory which `O_DIRECT` cannot take, and zeros.
//!
//! Bounded per disk, mapped at open and never touched until needed, so it costs address space only. It is *not* a cache.
//! Belongs to one disk and its thread.

use std::io;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::sys::io::IoVec;

/// Bytes of one buffer, and so the most that one call transfers through it: a multiple of every alignment.
pub(super) const BOUNCE_BYTES: usize = 256 << 10;
/// How many a disk has; requests beyond them wait.
const BOUNCES: usize = 8;
/// Bytes of zeros that one call can write.
pub(super) const ZERO_BYTES: usize = 1 << 20;

/// All bounce buffers of one disk.
#[derive(Default)]
pub(super) struct Bounces {
    buffers: Option<MmapRegion>,
    zeros: Option<MmapRegion>,
    free: Vec<usize>,
}

impl Bounces {
    /// Maps the zeros, and the buffers if the disk is a direct one.
    pub(super) fn new(direct: bool) -> io::Result<Self> {
        let map = |len| MmapRegion::new(len).map_err(io::Error::other);
        let buffers = if direct { Some(map(BOUNCES * BOUNCE_BYTES)?) } else { None };
        let free = if direct { (0..BOUNCES).collect() } else { Vec::new() };
        Ok(Bounces { buffers, zeros: Some(map(ZERO_BYTES)?), free })
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn take(&mut self) -> Option<usize> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, buffer: usize) {
        self.free.push(buffer);
    }

    /// The first `len` bytes of a buffer that was taken.
    pub(super) fn slice(&self, buffer: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.buffers.as_ref()?.get_slice(buffer * BOUNCE_BYTES, len.min(BOUNCE_BYTES)).ok()
    }

    /// At most [`ZERO_BYTES`] of zeros; they are only ever read.
    pub(super) fn zeros(&self, len: usize) -> Option<IoVec> {
        let slice = self.zeros.as_ref()?.get_slice(0, len.min(ZERO_BYTES)).ok()?;
        Some(IoVec::new(&slice))
    }
}
