//! Guest memory: the mappings that the guest sees as RAM.
//!
//! One mapping below the gap under 4 GiB and one above it, made before anything else and shared by everybody who
//! reads or writes for the guest; anonymous, or of a `file`. What the guest can do without is given back by `discard`. It
//! is *not* the map of devices (`bus`), and it does not tell KVM anything (`kvm::vm` does). Made by the main thread; used
//! by all of them, through volatile accesses only.

#![allow(unsafe_code)] // mmap(2) for a place of our choice and madvise(2) have no safe wrapper.

mod discard;
mod file;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::error::{Context, Error, Result};
use file::Backing;

pub use discard::{Discard, can_discard, discard_all, is_blank};
pub use file::{Found, full_file_system, page_bytes, reserve};

/// All of the guest's RAM.
pub type GuestRam = GuestMemoryMmap<()>;

/// Where RAM stops below 4 GiB: devices, interrupt controllers and KVM's own pages lie from here on.
pub const GAP_START: u64 = 0xC000_0000;
/// Where RAM goes on behind the gap: 4 GiB.
pub const GAP_END: u64 = 1 << 32;
/// The size of a page of the host's, which is the guest's too (rule D3.2): x86_64 has no other.
pub const PAGE_BYTES: u64 = 4096;
/// The size of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// How often a place for a mapping is sought. At a start the first does; it is more where other threads map memory too.
const TRIES: usize = 16;

/// The pieces of RAM, as address and length, that `bytes` of memory make: one, or two when they do not fit below
/// the gap.
pub fn pieces(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = bytes.min(GAP_START);
    [(0, low), (GAP_END, bytes - low)].into_iter().filter(|piece| piece.1 > 0)
}

/// Allocates `bytes` of guest memory (a multiple of the page size), all zero.
///
/// Nothing is reserved: a page that the guest never touches costs the host nothing. With `share` the mapping is a
/// shared one, so that a process forked or handed the mapping sees the guest's writes. Without `dump` the memory is
/// left out of a core dump of the monitor.
///
/// # Errors
///
/// The host refuses the mapping: not enough address space, or a limit (`ulimit -v`).
pub fn allocate(bytes: u64, share: bool, dump: bool) -> Result<Arc<GuestRam>> {
    build(bytes, None, share, dump)
}

/// The same on the file at `path`, or on one without a name in the folder there. Without `share` the guest's writes do not
/// reach the file; a file that is a single hole is then covered by anonymous memory. A file without a name is always mapped
/// shared, because a private mapping could hold a page twice: in the file and outside.
///
/// # Errors
///
/// What is wrong with the file, or that there are not as many huge pages.
pub fn allocate_on(path: &Path, bytes: u64, share: bool, dump: bool) -> Result<Arc<GuestRam>> {
    let backing = Backing::open(path, bytes, share)?;
    let share = share || backing.nameless;
    let covered = !share && backing.blank && !backing.system.is_hugetlb;
    let ram = build(bytes, Some(backing), share, dump)?;
    if covered {
        // The file stays open, and with it its lock.
        discard::cover_all(&ram).context(|| "guest memory")?;
    }
    Ok(ram)
}

fn build(bytes: u64, backing: Option<Backing>, share: bool, dump: bool) -> Result<Arc<GuestRam>> {
    discard::DUMPED.store(dump, Relaxed);
    let visibility = if share { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    // What is not reserved may be missing later. Huge pages are few, and the lack of one ends the guest.
    let huge = backing.as_ref().is_some_and(|backing| backing.system.is_hugetlb);
    let flags = visibility | if huge { 0 } else { libc::MAP_NORESERVE };
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, piece) in pieces(bytes) {
        let len = usize::try_from(piece).context(|| "guest memory")?;
        let part = backing.as_ref().map(|backing| backing.at(offset));
        offset += piece;
        let mapping = map(len, flags, part).context(|| match &backing {
            Some(backing) if huge => format!(
                "guest memory: map {} huge pages of {} MiB; /proc/meminfo says how many are free, and \
                 /proc/sys/vm/nr_hugepages makes more",
                piece / backing.system.block_bytes,
                backing.system.block_bytes >> 20
            ),
            _ => format!("guest memory: map {} MiB", len >> 20),
        })?;
        if !dump {
            leave_out_of_dumps(mapping.as_ptr(), len).context(|| "guest memory: leave it out of core dumps")?;
        }
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(start))
                .ok_or_else(|| Error::host("guest memory: does not fit the address space"))?,
        );
    }
    Ok(Arc::new(GuestRam::from_regions(regions).context(|| "guest memory")?))
}

/// Leaves a range of guest memory out of core dumps of the monitor.
fn leave_out_of_dumps(start: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: the range is a mapping of guest memory, and the advice changes nothing that the guest can see.
    match unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A mapping of `len` bytes that starts on a huge page's boundary, as every piece of guest memory does.
///
/// Only so can KVM map a huge page of the host's as one of the guest's: a stock kernel then boots with a tenth of
/// the page faults. Kernels since 6.7 place large mappings so by themselves. For older ones what is too much is taken
/// away above the place that they choose, which is the lower end of the last free range, so that they choose again
/// right below; and again, if another thread's mapping came between. If all tries fail, the guest is slower and nothing
/// else.
fn map(len: usize, flags: libc::c_int, file: Option<FileOffset>) -> std::result::Result<MmapRegion, MmapRegionError> {
    let map = || {
        let builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        match &file {
            Some(file) => builder.with_file_offset(file.clone()).with_mmap_flags(flags),
            None => builder.with_mmap_flags(flags | libc::MAP_ANONYMOUS),
        }
        .build()
    };
    let mut mapping = map()?;
    for _ in 0..TRIES {
        let excess = mapping.as_ptr() as usize % HUGE_PAGE;
        if excess == 0 || len < HUGE_PAGE {
            break;
        }
        let place = mapping.as_ptr().wrapping_add(len - excess).cast();
        drop(mapping);
        let flags = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE;
        // SAFETY: without MAP_FIXED the place is a wish; no other mapping is touched.
        let taken = unsafe { libc::mmap(place, excess, libc::PROT_NONE, flags, -1, 0) };
        let again = map();
        if taken != libc::MAP_FAILED {
            // SAFETY: the range is the mapping just made, and nobody else knows of it.
            unsafe { libc::munmap(taken, excess) };
        }
        mapping = again?;
    }
    Ok(mapping)
}

/// Where the RAM below the gap ends.
pub fn low_end(ram: &GuestRam) -> u64 {
    total(ram).min(GAP_START)
}

/// How much RAM there is, in bytes.
pub fn total(ram: &GuestRam) -> u64 {
    use vm_memory::GuestMemoryRegion;
    ram.iter().map(GuestMemoryRegion::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryRegion};

    #[test]
    fn memory_that_fits_below_the_gap_is_one_piece() {
        assert_eq!(pieces(16 << 20).collect::<Vec<_>>(), [(0, 16 << 20)]);
        assert_eq!(pieces(GAP_START).collect::<Vec<_>>(), [(0, GAP_START)]);
    }

    #[test]
    fn memory_that_does_not_fit_below_the_gap_goes_on_at_four_gigabytes() {
        assert_eq!(pieces(GAP_START + 4096).collect::<Vec<_>>(), [(0, GAP_START), (GAP_END, 4096)]);
    }

    #[test]
    fn the_gap_is_not_memory() {
        let ram = allocate(GAP_START + (1 << 20), false, true).unwrap();
        assert_eq!(ram.num_regions(), 2);
        assert_eq!((total(&ram), low_end(&ram)), (GAP_START + (1 << 20), GAP_START));
        assert!(ram.write_obj(1u8, GuestAddress(GAP_START - 1)).is_ok());
        assert!(ram.write_obj(1u8, GuestAddress(GAP_START)).is_err());
        assert!(ram.write_obj(1u8, GuestAddress(GAP_END)).is_ok());
        assert!(ram.write_obj(1u8, GuestAddress(GAP_END + (1 << 20))).is_err());
    }

    #[test]
    fn every_piece_starts_on_a_huge_page_wherever_the_last_mapping_ended() {
        let mut holds = Vec::new();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Takes places away between one look and the next, as the threads of other tests do.
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    drop(MmapRegion::<()>::new(5 * 4096).unwrap());
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
            });
            for pages in [1, 3, 100, 400] {
                // Moves the place that the kernel chooses next.
                holds.push(MmapRegion::<()>::new(pages * 4096).unwrap());
                let ram = allocate(GAP_START + (3 << 20), false, true).unwrap();
                let starts: Vec<_> = ram.iter().map(|region| region.as_ptr() as usize % HUGE_PAGE).collect();
                // What is smaller than a huge page gains nothing by it, and is left where it is.
                assert_eq!(total(&allocate(1 << 20, false, true).unwrap()), 1 << 20);
                if pages == 400 || starts != [0, 0] {
                    done.store(true, Relaxed);
                }
                assert_eq!(starts, [0, 0]);
            }
        });
    }

    /// How the kernel describes the mapping that `address` lies in: its first line, and its flags.
    fn mapping_of(address: u64) -> (String, String) {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps.lines().skip_while(|line| {
            let range = line.split(' ').next().unwrap().split_once('-');
            let ends = range.map(|(start, end)| (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)));
            !matches!(ends, Some((Ok(start), Ok(end))) if (start..end).contains(&address))
        });
        let head = lines.next().expect("the mapping is there").to_owned();
        (head, lines.find(|line| line.starts_with("VmFlags:")).expect("flags").to_owned())
    }

    #[test]
    fn untouched_memory_costs_nothing_and_stays_out_of_core_dumps_when_asked() {
        for (share, dump) in [(false, true), (false, false), (true, false)] {
            let ram = allocate(64 << 20, share, dump).unwrap();
            let region = ram.iter().next().unwrap();
            ram.write_obj(1u8, GuestAddress(32 << 20)).unwrap();
            let mut resident = vec![0u8; 64 << 8];
            // SAFETY: one byte is written for each page of the mapping, and there are that many.
            assert_eq!(unsafe { libc::mincore(region.as_ptr().cast(), 64 << 20, resident.as_mut_ptr()) }, 0);
            assert!(resident[..32 << 8].iter().all(|page| *page == 0), "only what was touched");
            assert_eq!(resident[32 << 8], 1);
            let (head, flags) = mapping_of(region.as_ptr() as u64);
            assert_eq!(flags.contains(" dd"), !dump, "{flags}");
            assert_eq!(head.contains("rw-s"), share, "{head}");
            assert_eq!(region.len(), 64 << 20);
        }
    }
}
