//! `Pieces`: ranges of guest memory in a row, for one call of the kernel after another to read or write.
//!
//! It keeps the memory mapped that they lie in, so who has them may hand them to the kernel. Behind those that a call is
//! given it can put an overflow of its own: what turns out longer than the guest has room for is not lost. What the bytes
//! mean is nothing to it. Any thread; each belongs to one.

#![allow(unsafe_code)] // Guest memory by its address in ours.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::io::{IoVec, MAX_IOVECS};

/// Ranges of guest memory, in the order in which they were added.
pub struct Pieces {
    ram: Arc<GuestMemoryMmap>,
    iov: Vec<IoVec>,
    /// Those before it have been taken away.
    first: usize,
    /// Made when a call is first given it: most of those that could be never are.
    overflow: Vec<u8>,
    overflow_bytes: usize,
}

impl Pieces {
    /// None yet, in `ram`; with an overflow of so many bytes.
    pub fn new(ram: Arc<GuestMemoryMmap>, overflow: usize) -> Self {
        Pieces { ram, iov: Vec::new(), first: 0, overflow: Vec::new(), overflow_bytes: overflow }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.iov.len() - self.first
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many more may be added for one call to take all of them, overflow included.
    pub fn room(&self) -> usize {
        (MAX_IOVECS - 1).saturating_sub(self.len())
    }

    /// Adds `len` bytes at `address`. False, and nothing is added, if they do not lie in guest memory as one.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> bool {
        let slice = GuestMemoryBackend::get_slice(&*self.ram, address, len as usize);
        if let Ok(slice) = &slice {
            self.iov.push(IoVec::new(slice));
        }
        slice.is_ok()
    }

    /// Takes away all but the first `count`.
    pub fn truncate(&mut self, count: usize) {
        self.iov.truncate(self.first + count);
    }

    /// Takes away the first `count`, of which there are so many.
    pub fn remove_first(&mut self, count: usize) {
        self.first = (self.first + count).min(self.iov.len());
        // Moved seldom enough to cost nothing a piece.
        if self.first == self.iov.len() {
            self.iov.clear();
            self.first = 0;
        } else if self.first >= MAX_IOVECS / 2 {
            self.iov.drain(..self.first);
            self.first = 0;
        }
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        self.iov.clear();
        self.first = 0;
    }

    /// Copies `len` bytes from `offset` of the overflow into the pieces from number `first` on, as far as either goes.
    pub fn copy_overflow(&self, offset: usize, len: usize, first: usize) {
        let end = (offset + len).min(self.overflow.len());
        let mut left = self.overflow.get(offset..end).unwrap_or_default();
        for piece in self.all().iter().skip(first) {
            if left.is_empty() {
                break;
            }
            // SAFETY: it lies in `ram`, which we keep.
            let slice: VolatileSlice<'_> = unsafe { piece.slice() };
            let now = left.len().min(slice.len());
            slice.copy_from(&left[..now]);
            left = &left[now..];
        }
    }

    pub(super) fn all(&self) -> &[IoVec] {
        &self.iov[self.first..]
    }

    /// Calls with the first `count` and the overflow behind them.
    pub(super) fn with_overflow<T>(&mut self, count: usize, call: impl FnOnce(&[IoVec]) -> T) -> T {
        if self.overflow.len() < self.overflow_bytes {
            self.overflow.resize(self.overflow_bytes, 0);
        }
        let overflow = IoVec::new(&VolatileSlice::from(&mut self.overflow[..]));
        let end = (self.first + count).min(self.iov.len());
        // In the place of the piece that comes next, if there is one.
        match self.iov.get_mut(end) {
            Some(next) => {
                let kept = std::mem::replace(next, overflow);
                let result = call(&self.iov[self.first..=end]);
                self.iov[end] = kept;
                result
            }
            None => {
                self.iov.push(overflow);
                let result = call(&self.iov[self.first..]);
                self.iov.pop();
                result
            }
        }
    }
}
