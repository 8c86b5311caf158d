//! Giving guest memory back to the host, and counting what the host really got.
//!
//! A page that was given back is there again, as zeros, at its next touch; so nobody who reads or writes for the guest
//! has to know. Which pages the guest can do without is the balloon's business. Any thread.

#![allow(unsafe_code)] // mincore(2), madvise(2) and process_madvise(2) have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestRam, PAGE_BYTES, leave_out_of_dumps, page_bytes};
use crate::sys::io as sys_io;
use crate::sys::io::IoVec;

/// Pages that one mincore(2) is asked about.
const ASKED: usize = 1024;

/// Whether guest memory is part of core dumps. Memory that covers a part of it follows this too.
pub(super) static DUMPED: AtomicBool = AtomicBool::new(true);
/// Covers made since the last reset. Each may split a mapping in three.
static COVERS: AtomicUsize = AtomicUsize::new(0);
/// The most covers. The guest chooses their number; with the mappings that they split off they take half of those that a process
/// may have (vm.max_map_count).
const MAX_COVERS: usize = 16_384;

/// Ranges of guest memory on their way back to the host: collected, and given back together.
///
/// Together because each call interrupts every vCPU that runs, and once for each range where a call takes only one. Kernels
/// from 6.14 on take many; on older ones it is a call for each.
pub struct Discard {
    ram: Arc<GuestRam>,
    way: Way,
    ranges: Vec<IoVec>,
    /// Bytes of `ranges` that are in the host's memory.
    resident: u64,
    /// This process, for process_madvise(2); none where the kernel does not let a process advise itself.
    this: Option<OwnedFd>,
}

/// How memory goes back.
enum Way {
    /// By this advice to madvise(2). Private memory is dropped. Shared memory becomes a hole in its file, because otherwise the
    /// file or the mapping of another process would keep it.
    Advice(libc::c_int),
    /// By covering it with anonymous memory, because a private mapping of a file would show the file's content again. The file
    /// here is /proc/self/pagemap, which distinguishes the pages of this VM from the page cache of the file.
    Cover(Option<File>),
}

impl Way {
    fn of(ram: &GuestRam) -> Way {
        if ram.iter().any(is_shared) {
            Way::Advice(libc::MADV_REMOVE)
        } else if !is_blank(ram) {
            Way::Cover(File::open("/proc/self/pagemap").ok())
        } else {
            Way::Advice(libc::MADV_DONTNEED)
        }
    }

    /// Gives `len` bytes from `start` on back.
    ///
    /// # Safety
    /// The range is a part of guest memory.
    unsafe fn give_back(&self, start: *mut libc::c_void, len: usize) -> io::Result<()> {
        let Way::Advice(advice) = self else { return cover(start, len) };
        // SAFETY: the range is ours. The guest's memory is read and written as volatile memory only, so its change is like a
        // write of the guest's.
        match unsafe { libc::madvise(start, len, *advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// How many of the `count` pages from `start` on the host would get back.
    fn resident(&self, start: *mut u8, count: usize) -> io::Result<usize> {
        match self {
            Way::Advice(_) => {
                let mut pages = [0u8; ASKED];
                // SAFETY: the range is inside a mapping of guest memory, and the kernel writes a byte for each of its pages,
                // of which there are at most as many.
                match unsafe { libc::mincore(start.cast(), count * PAGE_BYTES as usize, pages.as_mut_ptr()) } {
                    0 => Ok(pages[..count].iter().filter(|&&page| page & 1 != 0).count()),
                    _ => Err(io::Error::last_os_error()),
                }
            }
            Way::Cover(None) => Ok(0),
            Way::Cover(Some(pagemap)) => {
                let mut entries = [0u8; ASKED * ENTRY];
                let entries = &mut entries[..count * ENTRY];
                pagemap.read_exact_at(entries, start as u64 / PAGE_BYTES * ENTRY as u64)?;
                let words =
                    entries.chunks_exact(ENTRY).filter_map(|entry| Some(u64::from_le_bytes(entry.try_into().ok()?)));
                Ok(words.filter(|word| word & PRESENT != 0 && word & OF_A_FILE == 0).count())
            }
        }
    }
}

/// Bytes of an entry of pagemap, and two of its bits (proc_pid_pagemap(5)).
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;

/// Puts new anonymous memory over a range of guest memory, in one step.
///
/// # Errors
/// What mmap(2) says, and ENOMEM for more covers than there may be.
fn cover(start: *mut libc::c_void, len: usize) -> io::Result<()> {
    if COVERS.fetch_add(1, Relaxed) >= MAX_COVERS {
        COVERS.fetch_sub(1, Relaxed);
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_ANONYMOUS);
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: the range is a part of guest memory, which is read and written as volatile memory only, so its change is like
    // a write of the guest's.
    if unsafe { libc::mmap(start, len, protection, flags, -1, 0) } == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        COVERS.fetch_sub(1, Relaxed);
        return Err(error);
    }
    if DUMPED.load(Relaxed) { Ok(()) } else { leave_out_of_dumps(start.cast(), len) }
}

/// Covers all of guest memory.
///
/// # Errors
/// As [`cover`].
pub(super) fn cover_all(ram: &GuestRam) -> io::Result<()> {
    ram.iter().try_for_each(|region| cover(region.as_ptr().cast(), region.size()))
}

impl Discard {
    /// For memory of `ram`.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        let way = Way::of(&ram);
        // SAFETY: the call takes numbers, and makes a descriptor of which nobody else knows.
        let this = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as libc::c_int;
            (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
        };
        Discard { ram, way, ranges: Vec::new(), resident: 0, this }
    }

    /// Adds the whole pages from `address` on, `len` bytes of them.
    ///
    /// # Errors
    /// `InvalidInput`: the range is not made of whole pages of one piece of guest memory.
    pub fn add(&mut self, address: GuestAddress, len: usize) -> io::Result<()> {
        let page = PAGE_BYTES as usize;
        let aligned = address.0.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(page);
        let slice = self.ram.get_slice(address, len).ok().filter(|_| aligned).ok_or(io::ErrorKind::InvalidInput)?;
        let start = slice.ptr_guard_mut().as_ptr();
        for at in (0..len).step_by(ASKED * page) {
            let asked = (len - at).min(ASKED * page);
            let there = self.way.resident(start.wrapping_add(at), asked / page).unwrap_or(0);
            self.resident += there as u64 * PAGE_BYTES;
        }
        if len > 0 {
            self.ranges.push(IoVec::new(&slice));
        }
        Ok(())
    }

    /// Gives back what was added since the last call: how many bytes of it were in the host's memory.
    ///
    /// # Errors
    /// What madvise(2) says: EOPNOTSUPP for a file that can have no holes, EINVAL for locked memory. Other ranges are
    /// given back all the same, and none is counted.
    pub fn give_back(&mut self) -> io::Result<u64> {
        let resident = std::mem::take(&mut self.resident);
        let together = self.give_back_together();
        let mut failed = None;
        for range in self.ranges.drain(..).skip(together) {
            let (start, len) = range.parts();
            // SAFETY: the range lies in the mapping of `ram`, which is ours.
            if let Err(error) = unsafe { self.way.give_back(start, len) } {
                failed = Some(error);
            }
        }
        failed.map_or(Ok(resident), Err)
    }

    /// How many ranges, from the first on, one call has given back.
    fn give_back_together(&mut self) -> usize {
        let (Some(this), Way::Advice(advice)) = (self.this.as_ref().filter(|_| self.ranges.len() > 1), &self.way)
        else {
            return 0;
        };
        let count = self.ranges.len().min(sys_io::MAX_IOVECS);
        // SAFETY: as in `give_back`, for each of the ranges; an IoVec is a struct iovec.
        let given = unsafe {
            libc::syscall(libc::SYS_process_madvise, this.as_raw_fd(), self.ranges.as_ptr(), count, *advice, 0)
        };
        let Ok(mut given) = usize::try_from(given) else {
            if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                self.this = None;
            }
            return 0;
        };
        // It stops at the first range that it cannot do; a part of one is done once more.
        self.ranges[..count]
            .iter()
            .take_while(|range| {
                range.len() <= given && {
                    given -= range.len();
                    true
                }
            })
            .count()
    }
}

/// Whether [`Discard`] can do anything at all for this memory.
///
/// # Errors
/// EOPNOTSUPP and the like from the file system of a shared file.
pub fn can_discard(ram: &GuestRam) -> io::Result<()> {
    let shared = ram.iter().filter(|region| is_shared(region)).filter_map(|region| region.file_offset());
    for file in shared {
        // A hole behind the file's end changes nothing, and is refused where a real one would be.
        let end = file.file().metadata()?.len().next_multiple_of(PAGE_BYTES);
        sys_io::fallocate(file.file().as_fd(), sys_io::PUNCH_HOLE, end, PAGE_BYTES)?;
    }
    Ok(())
}

/// Gives all of guest memory back to the host, for a guest that starts anew: it is all zeros then. A shared file becomes one
/// hole.
///
/// # Errors
/// Nothing is given back, or not all: EOPNOTSUPP of a file that can have no holes, EINVAL of locked memory, and
/// `Unsupported` for huge pages, of which those given back need not be there again.
pub fn discard_all(ram: &GuestRam) -> io::Result<()> {
    if page_bytes(ram)? != PAGE_BYTES {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // New covers replace all the earlier ones.
    COVERS.store(0, Relaxed);
    let way = Way::of(ram);
    // SAFETY: the range is the region's mapping, which `ram` holds.
    ram.iter().try_for_each(|region| unsafe { way.give_back(region.as_ptr().cast(), region.size()) })
}

/// Whether memory that nobody has written to reads as zeros, and not as what a file holds.
pub fn is_blank(ram: &GuestRam) -> bool {
    let mut files = ram.iter().filter_map(|region| region.file_offset());
    // A file without blocks is one hole.
    files.all(|file| file.file().metadata().is_ok_and(|metadata| metadata.blocks() == 0))
}

pub(super) fn is_shared(region: &vm_memory::GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_SHARED != 0
}

#[cfg(test)]
mod tests {
    use super::super::allocate;
    use super::*;
    use vm_memory::Bytes;

    /// One that gives back together, if the kernel can, and one that does not.
    fn both(ram: &Arc<GuestRam>) -> [Discard; 2] {
        [Discard::new(ram.clone()), Discard { this: None, ..Discard::new(ram.clone()) }]
    }

    #[test]
    fn what_is_given_back_is_counted_by_what_was_there_and_reads_as_zeros_afterwards() {
        for share in [false, true] {
            let ram = allocate(16 << 20, share, true).unwrap();
            for mut discard in both(&ram) {
                let touch = |page: u64| ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap();
                (0..100).for_each(touch);
                (2000..2050).for_each(touch);
                let mut give = |ranges: &[(u64, usize)]| {
                    ranges
                        .iter()
                        .for_each(|&(page, count)| discard.add(GuestAddress(page * 4096), count * 4096).unwrap());
                    discard.give_back().unwrap() / 4096
                };
                assert_eq!(give(&[(50, 1960)]), 60, "50 to 99, 2000 to 2009");
                assert_eq!(give(&[(50, 1960)]), 0);
                let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
                assert_eq!([49, 50, 99, 2009, 2010].map(read), [7, 0, 0, 0, 7]);
                (50..100).for_each(touch);
                assert_eq!(give(&[(10, 5), (20, 1), (4000, 9), (90, 5), (0, 0)]), 11);
                let gone: Vec<u64> = (0..100).filter(|&page| read(page) == 0).collect();
                assert_eq!(gone, [10, 11, 12, 13, 14, 20, 90, 91, 92, 93, 94]);
                let many: Vec<(u64, usize)> = (0..1500).map(|n| (2 * n, 1)).collect();
                give(&many);
                assert_eq!([0, 1, 2, 98, 99, 2048, 2049].map(read), [0, 7, 0, 0, 7, 0, 7]);
            }
        }
    }

    #[test]
    fn all_memory_that_is_given_back_reads_as_zeros_and_locked_memory_is_an_error() {
        for share in [false, true] {
            let ram = allocate(super::super::GAP_START + (16 << 20), share, true).unwrap();
            let places = [0, 1 << 20, super::super::GAP_END, super::super::GAP_END + (15 << 20)].map(GuestAddress);
            places.iter().for_each(|&place| ram.write_obj(7u8, place).unwrap());
            discard_all(&ram).unwrap();
            assert_eq!(places.map(|place| ram.read_obj::<u8>(place).unwrap()), [0; 4]);
        }
        let ram = allocate(16 << 20, false, true).unwrap();
        ram.write_obj(7u8, GuestAddress(0)).unwrap();
        let locked = ram.get_slice(GuestAddress(0), 4096).unwrap();
        // SAFETY: locking changes nothing that anybody could see, but for what this test is about.
        assert_eq!(unsafe { libc::mlock(locked.ptr_guard().as_ptr().cast(), 4096) }, 0);
        assert_eq!(discard_all(&ram).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
    }

    #[test]
    fn a_private_file_without_content_costs_each_page_once() {
        // On tmpfs a page that is read through a mapping of a file is the file's from then on.
        let path = std::path::PathBuf::from(format!("/dev/shm/loopvisor-discard-blank-{}", std::process::id()));
        let ram = super::super::allocate_on(&path, 16 << 20, false, true).unwrap();
        let touch = |page: u64| {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(page * 4096)).unwrap(), 0);
            ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap();
        };
        (0..100).for_each(touch);
        let blocks = || std::fs::metadata(&path).unwrap().blocks();
        assert_eq!(blocks(), 0);
        for mut discard in both(&ram) {
            discard.add(GuestAddress(0), 50 * 4096).unwrap();
            discard.add(GuestAddress(60 * 4096), 10 * 4096).unwrap();
            assert_eq!(discard.give_back().unwrap(), 60 * 4096);
            (0..100).filter(|page| *page < 50 || (60..70).contains(page)).for_each(touch);
        }
        assert_eq!(blocks(), 0);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_private_file_that_is_given_back_reads_as_zeros() {
        let path = std::env::temp_dir().join(format!("loopvisor-discard-{}", std::process::id()));
        std::fs::write(&path, vec![0xaa; 16 << 20]).unwrap();
        let ram = super::super::allocate_on(&path, 16 << 20, false, true).unwrap();
        let mut discard = Discard::new(ram.clone());
        let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
        // Pages that were only read are the file's, and bring the host nothing.
        assert_eq!([10, 11, 12, 13].map(read), [0xaa; 4]);
        (20..25).for_each(|page: u64| ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap());
        discard.add(GuestAddress(10 * 4096), 3 * 4096).unwrap();
        discard.add(GuestAddress(20 * 4096), 4 * 4096).unwrap();
        assert_eq!(discard.give_back().unwrap(), 4 * 4096);
        assert_eq!([9, 10, 12, 13, 19, 20, 23, 24, 25].map(read), [0xaa, 0, 0, 0xaa, 0xaa, 0, 0, 7, 0xaa]);
        // What was given back is memory like any other.
        ram.write_obj(9u8, GuestAddress(11 * 4096)).unwrap();
        discard.add(GuestAddress(11 * 4096), 4096).unwrap();
        assert_eq!((discard.give_back().unwrap(), read(11)), (4096, 0));
        discard_all(&ram).unwrap();
        assert_eq!([0, 9, 11, 24, 4095].map(read), [0; 5]);
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 0xaa), "the file is as it was");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_range_that_is_not_of_whole_pages_of_one_piece_is_refused() {
        let pieces = [(GuestAddress(0), 8 << 20), (GuestAddress(1 << 32), 8 << 20)];
        let ram = Arc::new(GuestRam::from_ranges(&pieces).unwrap());
        let mut discard = Discard::new(ram);
        for (address, len) in
            [(1, 4096), (0, 4095), (8 << 20, 4096), ((8 << 20) - 4096, 8192), (0, usize::MAX - 4095), (!4095, 4096)]
        {
            let error = discard.add(GuestAddress(address), len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{address:#x} {len:#x}");
        }
        discard.add(GuestAddress(1 << 32), 0).unwrap();
        assert_eq!(discard.give_back().unwrap(), 0);
    }

    #[test]
    fn a_range_that_cannot_be_given_back_is_an_error_and_the_others_are_gone() {
        let ram = allocate(16 << 20, false, true).unwrap();
        for mut discard in both(&ram) {
            (0..16).for_each(|page: u64| ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap());
            let locked = ram.get_slice(GuestAddress(4 * 4096), 4096).unwrap();
            // SAFETY: locking changes nothing that anybody could see, but for what this test is about.
            let lock = |call: unsafe extern "C" fn(*const libc::c_void, usize) -> libc::c_int| unsafe {
                call(locked.ptr_guard().as_ptr().cast(), 4096)
            };
            assert_eq!(lock(libc::mlock), 0);
            for page in [2, 4, 6, 8] {
                discard.add(GuestAddress(page * 4096), 4096).unwrap();
            }
            assert_eq!(discard.give_back().unwrap_err().raw_os_error(), Some(libc::EINVAL));
            let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
            assert_eq!([2, 3, 4, 5, 6, 7, 8].map(read), [0, 7, 7, 7, 0, 7, 0]);
            assert_eq!(lock(libc::munlock), 0);
        }
    }
}
