//! Positional, vectored I/O on memory that others may write at the same time, and the file facts that go with it.
//!
//! Guest memory must never be seen through a Rust reference, so ranges of it travel as [`IoVec`], which is an address
//! and a length. It is *not* a buffer type: nothing here owns memory. Any thread may call anything.

#![allow(unsafe_code)] // The one place where iovecs are made and handed to the kernel.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most ranges that one vectored call takes (`IOV_MAX`).
pub const MAX_IOVECS: usize = 1024;

/// A range of memory that the kernel is to read or write: `struct iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an address and a length; using them is `unsafe` below and says what must hold.
unsafe impl Send for IoVec {}

impl IoVec {
    /// The range that `slice` covers. It does not keep the memory alive.
    pub fn new(slice: &VolatileSlice<'_>) -> Self {
        IoVec(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
    }

    /// Where it begins, and its length in bytes.
    pub fn parts(&self) -> (*mut libc::c_void, usize) {
        (self.0.iov_base, self.0.iov_len)
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether address and length are multiples of these powers of two.
    pub fn is_aligned(&self, address: usize, length: usize) -> bool {
        (self.0.iov_base as usize) & (address - 1) == 0 && self.len() & (length - 1) == 0
    }

    /// Drops the first `count` bytes of the range, which has at least as many.
    pub fn advance(&mut self, count: usize) {
        debug_assert!(count <= self.len());
        self.0.iov_base = self.0.iov_base.wrapping_byte_add(count);
        self.0.iov_len = self.0.iov_len.saturating_sub(count);
    }

    /// The range as memory again.
    ///
    /// # Safety
    ///
    /// The memory behind it must outlive `'a`.
    pub unsafe fn slice<'a>(&self) -> VolatileSlice<'a> {
        // SAFETY: made from a valid slice and only ever shortened; that it still lives is the caller's word.
        unsafe { VolatileSlice::new(self.0.iov_base.cast(), self.0.iov_len) }
    }

    /// What `io_uring` wants to see.
    pub fn as_raw(this: *const IoVec) -> *const libc::iovec {
        this.cast()
    }
}

/// Whether a call may wait for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// As long as it takes.
    Allowed,
    /// `RWF_NOWAIT`: `EAGAIN` rather than wait, `EOPNOTSUPP` where the file system cannot promise that.
    Refused,
}

fn count_of(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn iov_len(len: usize) -> libc::c_int {
    len.min(MAX_IOVECS) as libc::c_int
}

/// Reads from `offset` into the first [`MAX_IOVECS`] of `iov`; answers how many bytes, 0 at the end of the file.
///
/// # Safety
///
/// The memory behind `iov` must be mapped, and nobody may hold a Rust reference into it.
pub unsafe fn read_at(fd: BorrowedFd<'_>, iov: &[IoVec], offset: u64, wait: Wait) -> io::Result<usize> {
    let (fd, offset) = (fd.as_raw_fd(), offset.cast_signed());
    count_of(match (iov, wait) {
        // One range and no flag: `pread` is measurably cheaper than `preadv2` (docs/disk.md).
        // SAFETY: the caller's word for the memory.
        ([one], Wait::Allowed) => unsafe { libc::pread(fd, one.0.iov_base, one.0.iov_len, offset) },
        (_, Wait::Allowed) => {
            // SAFETY: as above; `IoVec` is an `iovec`.
            unsafe { libc::preadv(fd, IoVec::as_raw(iov.as_ptr()), iov_len(iov.len()), offset) }
        }
        (_, Wait::Refused) => {
            let flags = libc::RWF_NOWAIT;
            // SAFETY: as above.
            unsafe { libc::preadv2(fd, IoVec::as_raw(iov.as_ptr()), iov_len(iov.len()), offset, flags) }
        }
    })
}

/// Writes the first [`MAX_IOVECS`] of `iov` at `offset`; answers how many bytes.
///
/// # Safety
///
/// The memory behind `iov` must be mapped.
pub unsafe fn write_at(fd: BorrowedFd<'_>, iov: &[IoVec], offset: u64) -> io::Result<usize> {
    let (fd, offset) = (fd.as_raw_fd(), offset.cast_signed());
    count_of(match iov {
        // SAFETY: the caller's word for the memory.
        [one] => unsafe { libc::pwrite(fd, one.0.iov_base, one.0.iov_len, offset) },
        // SAFETY: as above; `IoVec` is an `iovec`.
        _ => unsafe { libc::pwritev(fd, IoVec::as_raw(iov.as_ptr()), iov_len(iov.len()), offset) },
    })
}

/// What the file system behind a file says of itself.
#[derive(Clone, Copy, Debug)]
pub struct FileSystem {
    /// Whether it is hugetlbfs, whose files consist of huge pages.
    pub is_hugetlb: bool,
    /// Bytes of its blocks: on hugetlbfs of its huge pages.
    pub block_bytes: u64,
    /// Bytes that we may still use.
    pub free_bytes: u64,
}

/// `fstatfs(2)`.
pub fn file_system(file: &impl AsRawFd) -> io::Result<FileSystem> {
    let mut facts = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel writes at most one struct statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), facts.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeros are one, and so is what the kernel wrote.
    let facts = unsafe { facts.assume_init() };
    let block_bytes = facts.f_bsize as u64;
    Ok(FileSystem {
        is_hugetlb: magic(&facts) == libc::HUGETLBFS_MAGIC,
        block_bytes,
        free_bytes: facts.f_bavail.saturating_mul(block_bytes),
    })
}

/// The file system's number; libraries do not agree whether it has a sign.
fn magic(facts: &libc::statfs) -> i64 {
    facts.f_type as _
}

/// The mode of fallocate(2) that gives the space of a range back.
pub const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// `fallocate(2)`: `mode` is a set of `FALLOC_FL_*`.
pub fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset.cast_signed(), len.cast_signed()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes `O_NONBLOCK` off the open file, which it was opened with so that the open itself could not hang.
pub fn set_blocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: no memory is involved.
    match flags >= 0 && unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) } == 0 {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}

/// Whether a *regular* file is known to live in memory, so that no access to it waits for a disk: tmpfs and ramfs.
///
/// For other files fstatfs(2) describes the file system that holds their name: for a block device that is /dev, which is in
/// memory.
pub fn is_in_memory(fd: BorrowedFd<'_>) -> bool {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    let mut facts = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills the structure it is given.
    let result = unsafe { libc::fstatfs(fd.as_raw_fd(), facts.as_mut_ptr()) };
    // SAFETY: plain integers, zeroed before and perhaps filled now.
    let magic = magic(&unsafe { facts.assume_init() });
    result == 0 && (magic == libc::TMPFS_MAGIC || magic == RAMFS_MAGIC) && is_regular(fd)
}

/// Whether fstat(2) says that it is a regular file.
fn is_regular(fd: BorrowedFd<'_>) -> bool {
    let mut facts = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills the structure it is given.
    let result = unsafe { libc::fstat(fd.as_raw_fd(), facts.as_mut_ptr()) };
    // SAFETY: plain integers, zeroed before and perhaps filled now.
    result == 0 && unsafe { facts.assume_init() }.st_mode & libc::S_IFMT == libc::S_IFREG
}

/// What `O_DIRECT` asks of the address in memory and of offset and length, in bytes (`STATX_DIOALIGN`, Linux 6.1).
///
/// `None` if the kernel or the file system does not report it, or if a seccomp filter refuses statx(2), as those of older
/// container runtimes do; zeros if the file does not support direct I/O.
pub fn direct_alignment(fd: BorrowedFd<'_>) -> io::Result<Option<(u32, u32)>> {
    let mut facts = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string, and the kernel fills the structure it is given.
    let result = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, facts.as_mut_ptr())
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: plain integers, zeroed before and filled now.
    let facts = unsafe { facts.assume_init() };
    let said = facts.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(said.then_some((facts.stx_dio_mem_align, facts.stx_dio_offset_align)))
}
