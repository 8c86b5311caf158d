//! Which pages of guest memory are in the balloon: a bit for each.
//!
//! It makes the count true whatever a guest says twice, takes back without having given, or makes up. The balloon's
//! thread.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestRam, PAGE_BYTES};

/// A set of guest pages, by their number: the guest physical address through 4096.
pub(super) struct Pages {
    /// The pieces of memory: first page, pages, and how many pages lie in the pieces before.
    pieces: Vec<(u64, u64, u64)>,
    bits: Vec<u64>,
    len: u64,
}

impl Pages {
    /// The empty set over the pages of `ram`.
    pub fn new(ram: &GuestRam) -> Self {
        let mut before = 0;
        let pieces = ram
            .iter()
            .map(|region| {
                let (first, count) = (region.start_addr().0 / PAGE_BYTES, region.len() / PAGE_BYTES);
                before += count;
                (first, count, before - count)
            })
            .collect();
        Pages { pieces, bits: vec![0; before.div_ceil(64) as usize], len: 0 }
    }

    /// How many pages the guest has.
    pub fn total(&self) -> u64 {
        self.pieces.last().map_or(0, |&(_, count, before)| before + count)
    }

    /// How many are in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether `count` pages from `first` on are memory, in one piece.
    pub fn contain(&self, first: u64, count: u64) -> bool {
        self.pieces
            .iter()
            .any(|&(start, len, _)| first >= start && first - start <= len && count <= len - (first - start))
    }

    /// Puts a page in: whether it was not there; `None` if it is no page of memory.
    pub fn insert(&mut self, page: u64) -> Option<bool> {
        let (word, bit) = self.place(page)?;
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.len += u64::from(new);
        Some(new)
    }

    /// Takes a page out: whether it was there; `None` if it is no page of memory.
    pub fn remove(&mut self, page: u64) -> Option<bool> {
        let (word, bit) = self.place(page)?;
        let there = self.bits[word] & bit != 0;
        self.bits[word] &= !bit;
        self.len -= u64::from(there);
        Some(there)
    }

    /// Takes all out. The bits come fresh from the host, which costs nothing until they are set.
    pub fn clear(&mut self) {
        if self.len > 0 {
            self.bits = vec![0; self.bits.len()];
            self.len = 0;
        }
    }

    fn place(&self, page: u64) -> Option<(usize, u64)> {
        let piece = self.pieces.iter().find(|&&(first, count, _)| page >= first && page - first < count);
        let place = piece.map(|&(first, _, before)| before + page - first)?;
        Some(((place / 64) as usize, 1 << (place % 64)))
    }
}
