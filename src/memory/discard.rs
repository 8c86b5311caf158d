//! Giving guest memory back to the host, and counting what the host really got.
//!
//! A page that was given back is there again, as zeros, at its next touch; so nobody who reads or writes for the guest
//! has to know. Which pages the guest can do without is the balloon's business. Any thread.

#![allow(unsafe_code)] // mincore(2) and madvise(2) have no safe wrapper.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestRam, PAGE_BYTES};
use crate::sys::io as sys_io;

/// Pages that one mincore(2) is asked about.
const ASKED: usize = 1024;

/// Gives back the whole pages from `address` on, `len` bytes of them: how many of these bytes were in the host's memory.
///
/// Anonymous and private memory is dropped; of shared memory a hole is made, so that a file or another process's mapping
/// does not keep it.
///
/// # Errors
/// The range is not made of whole pages of one piece of guest memory (`InvalidInput`); or what madvise(2) says:
/// EOPNOTSUPP for a file that can have no holes, EINVAL for locked memory. Nothing is given back then, or a part.
pub fn discard(ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<u64> {
    let page = PAGE_BYTES as usize;
    let aligned = address.0.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(page);
    let region = ram.find_region(address).filter(|_| aligned).ok_or(io::ErrorKind::InvalidInput)?;
    let slice = ram.get_slice(address, len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let advice = if is_shared(region) { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let start = slice.ptr_guard_mut().as_ptr();
    let mut resident = 0;
    for at in (0..len).step_by(ASKED * page) {
        let asked = (len - at).min(ASKED * page);
        let mut pages = [0u8; ASKED];
        // SAFETY: the range is inside the mapping, which the slice holds, and the kernel writes a byte for each of its
        // pages, of which there are at most as many.
        if unsafe { libc::mincore(start.wrapping_add(at).cast(), asked, pages.as_mut_ptr()) } == 0 {
            resident += pages[..asked / page].iter().filter(|&&page| page & 1 != 0).count() as u64;
        }
    }
    // SAFETY: as above. The guest's memory is read and written as volatile memory only, so its change is like a write of
    // the guest's.
    if len > 0 && unsafe { libc::madvise(start.cast(), len, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(resident * PAGE_BYTES)
}

/// Whether [`discard`] can do anything at all for this memory.
///
/// # Errors
/// EOPNOTSUPP and the like from the file system of a shared file.
pub fn can_discard(ram: &GuestRam) -> io::Result<()> {
    let shared = ram.iter().filter(|region| is_shared(region)).filter_map(|region| region.file_offset());
    for file in shared {
        // A hole behind the file's end changes nothing, and is refused where a real one would be.
        let end = file.file().metadata()?.len().next_multiple_of(PAGE_BYTES);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        sys_io::fallocate(file.file().as_fd(), mode, end, PAGE_BYTES)?;
    }
    Ok(())
}

/// Whether what was given back reads as zeros afterwards, and not as what a private mapping's file holds.
///
/// # Errors
/// What fstat(2) says of the file.
pub fn leaves_zeros(ram: &GuestRam) -> io::Result<bool> {
    let mut private = ram.iter().filter(|region| !is_shared(region)).filter_map(|region| region.file_offset());
    // A file without blocks is one hole.
    private.try_fold(true, |zeros, file| Ok(zeros && file.file().metadata()?.blocks() == 0))
}

fn is_shared(region: &vm_memory::GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_SHARED != 0
}

#[cfg(test)]
mod tests {
    use super::super::allocate;
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_is_given_back_is_counted_by_what_was_there_and_reads_as_zeros_afterwards() {
        for share in [false, true] {
            let ram = allocate(16 << 20, share, true).unwrap();
            let touch = |page: u64| ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap();
            (0..100).for_each(touch);
            (2000..2050).for_each(touch);
            assert_eq!(
                discard(&ram, GuestAddress(4096 * 50), 4096 * 1960).unwrap(),
                4096 * 60,
                "50 to 99, 2000 to 2009"
            );
            assert_eq!(discard(&ram, GuestAddress(4096 * 50), 4096 * 1960).unwrap(), 0);
            let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
            assert_eq!([49, 50, 99, 2009, 2010].map(read), [7, 0, 0, 0, 7]);
        }
    }

    #[test]
    fn a_range_that_is_not_of_whole_pages_of_one_piece_is_refused() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 8 << 20), (GuestAddress(1 << 32), 8 << 20)]).unwrap();
        for (address, len) in
            [(1, 4096), (0, 4095), (8 << 20, 4096), ((8 << 20) - 4096, 8192), (0, usize::MAX - 4095), (!4095, 4096)]
        {
            let error = discard(&ram, GuestAddress(address), len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address:#x} {len:#x}");
        }
        assert_eq!(discard(&ram, GuestAddress(1 << 32), 0).unwrap(), 0);
    }
}
