//! Opening a drive's file: what it is, how large, who else has it, and what `O_DIRECT` asks for.
//!
//! The content is never looked at: a raw disk whose guest writes another format's header stays a raw disk. Used by the
//! main thread at open; afterwards the open file is read by the disk's thread and its helpers.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{MmapRegion, VolatileMemory};

use super::bounce::BOUNCE_BYTES;
use super::engine::{Call, Work};
use super::request::{Kind, Request, Route};
use crate::config::spec::{Access, Cache, DriveSpec, MAX_PHYSICAL_BLOCK};
use crate::error::{Context, Error, Result};
use crate::sys::block_device::{self, Geometry};
use crate::sys::io::{self as sys_io, IoVec, Wait};
use crate::sys::lock::{self, Lock, Used};

/// How long a block device may be busy before it is refused.
const PATIENCE: Duration = Duration::from_secs(1);
/// The largest alignment of memory that our own buffers have.
const PAGE_BYTES: u32 = 4096;

/// An open, locked file and the facts about it that do not change.
pub(super) struct DiskFile {
    /// As the user wants it used: with `O_DIRECT`, and a writable block device with `O_EXCL`, so that nothing else on the
    /// host mounts it or takes it for swap or device mapper.
    file: File,
    /// The first open of the same file, if `file` is a second one: through the page cache. It holds the lock.
    first: Option<File>,
    _used: Used,
    direct: bool,
    /// A block device, which takes a discard by ioctl(2) only.
    pub(super) is_block_device: bool,
    /// In bytes, a multiple of the logical block. It only grows.
    capacity: AtomicU64,
    topology: Topology,
    /// A regular file that lives in memory: no access to it waits for a disk.
    pub(super) in_memory: bool,
    /// The file system keeps the promise of `RWF_NOWAIT`. Others wait even when asked not to, some (FUSE) also when
    /// io_uring asks, so nothing is tried on the loop's thread.
    pub(super) prompt: bool,
    /// What `O_DIRECT` asks of addresses, and of offsets and lengths: powers of two.
    memory_alignment: u32,
    offset_alignment: u32,
}

/// The sizes that the driver reads, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The unit of the guest's requests: 512 or 4096.
    pub logical_block: u32,
    /// The smallest write that is done without reading first: a power of two, not below the logical block.
    pub physical_block: u32,
    /// The preferred granularity of random requests; 0 if unknown.
    pub minimum_io: u32,
    /// The preferred size of long requests; 0 if unknown.
    pub optimal_io: u32,
}

impl Topology {
    /// For a disk of 512-byte sectors whose other sizes are unknown.
    pub const SECTORS: Topology = Topology { logical_block: 512, physical_block: 512, minimum_io: 0, optimal_io: 0 };
}

fn open(spec: &DriveSpec, flags: i32) -> Result<File> {
    // O_NONBLOCK: the open of a FIFO would wait for its other end. It is taken off again, for io_uring heeds it.
    let file = OpenOptions::new()
        .read(true)
        .write(spec.access == Access::ReadWrite)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags)
        .open(&spec.file);
    let file = match file {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && flags & libc::O_DIRECT != 0 => {
            return Err(no_direct(spec).because(error));
        }
        Err(error) => return Err(not_opened(spec, error)),
        Ok(file) => file,
    };
    // Before a read can wait: /proc/kmsg has nothing to read at most times.
    let facts = file.metadata().context(|| format!("{:?}", spec.file))?;
    if facts.is_file() && facts.len() == 0 && (&file).read(&mut [0]).is_ok_and(|count| count > 0) {
        return Err(Error::host(format!(
            "{:?} has no size, as files have that the kernel makes when they are read (/proc, /sys): copy it to a file on a disk",
            spec.file
        )));
    }
    sys_io::set_blocking(file.as_fd()).context(|| format!("{:?}", spec.file))?;
    Ok(file)
}

/// The advice to open a drive for reading only, as each interface spells it.
const READ_ONLY: &str = "use readonly=on (\"read_only\": true in a file for -config, \"read-only\": true in QMP)";

/// The error for a file that the host refuses to open.
fn not_opened(spec: &DriveSpec, error: io::Error) -> Error {
    let is_socket = || spec.file.metadata().is_ok_and(|facts| facts.file_type().is_socket());
    let can_be_read = || {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().read(true).custom_flags(flags).open(&spec.file).is_ok()
    };
    match error.raw_os_error() {
        Some(libc::ENXIO) if is_socket() => {
            Error::host(format!("{:?} is a socket, and neither a regular file nor a block device", spec.file))
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY)
            if spec.access == Access::ReadWrite && can_be_read() =>
        {
            Error::host(format!("{:?} cannot be written ({error}), and can only be read: {READ_ONLY}", spec.file))
        }
        _ => Error::host(format!("open {:?}", spec.file)).because(error),
    }
}

/// Tries again for up to [`PATIENCE`], because udev and other programs that examine a new block device lock it or hold it open
/// for a moment.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(_) if Instant::now() < until => thread::sleep(PATIENCE / 50),
            result => return result,
        }
    }
}

/// The error for a block device that something else on the host uses.
fn in_use(spec: &DriveSpec, facts: &Metadata, error: Error) -> Error {
    let user = block_device::user_of(facts).map(|user| format!(" ({user})")).unwrap_or_default();
    Error::host(format!("{:?} is in use on this host{user}: release it, or {READ_ONLY}", spec.file)).because(error)
}

fn no_direct(spec: &DriveSpec) -> Error {
    Error::host(format!(
        "the file system of {:?} does not support direct I/O: use direct=off, or in QMP \"cache\":{{\"direct\":false}}",
        spec.file
    ))
}

/// A block device that is opened for writing must accept writes.
fn check_writable(spec: &DriveSpec, device: &File) -> Result<()> {
    match block_device::is_read_only(device.as_fd()).context(|| format!("{:?}: BLKROGET", spec.file))? {
        false => Ok(()),
        true => Err(Error::host(format!(
            "{:?} is a read-only block device: make it writable (blockdev --setrw), or {READ_ONLY}",
            spec.file
        ))),
    }
}

impl DiskFile {
    pub(super) fn open(spec: &DriveSpec) -> Result<DiskFile> {
        let context = || format!("{:?}", spec.file);
        let mut file = open(spec, 0)?;
        let facts = file.metadata().context(context)?;
        let kind = facts.file_type();
        let is_block_device = kind.is_block_device();
        if !kind.is_file() && !is_block_device {
            return Err(Error::host(format!("{:?} is neither a regular file nor a block device", spec.file)));
        }
        let claim = is_block_device && spec.access == Access::ReadWrite;
        if claim {
            check_writable(spec, &file)?;
        }
        let uses = if spec.access == Access::ReadOnly { "which reads it" } else { "which writes it" };
        let used = lock::used(&file, format!("drive \"{}\", {uses}", spec.id)).context(context)?;
        let lock = if spec.access == Access::ReadOnly { Lock::Shared } else { Lock::Exclusive };
        let take = || lock::take(&file, &spec.file, lock);
        if is_block_device { patiently(take) } else { take() }?;
        // The length of a block device is where its end is.
        let size = file.seek(SeekFrom::End(0)).context(context)?;
        let block = spec.logical_block.unwrap_or(Topology::SECTORS.logical_block);
        let capacity = size - size % u64::from(block);
        if capacity == 0 {
            return Err(Error::host(format!("{:?} has {size} bytes, less than one block of {block}", spec.file)));
        }
        if capacity != size {
            log::info!(
                "drive \"{}\": the last {} bytes are not a whole block and are not used",
                spec.id,
                size - capacity
            );
        }
        let in_memory = sys_io::is_in_memory(file.as_fd());
        let mut disk = DiskFile {
            file,
            first: None,
            _used: used,
            // A file in memory has no page cache to go round.
            direct: spec.cache == Cache::Direct && !in_memory,
            is_block_device,
            capacity: AtomicU64::new(capacity),
            topology: Topology { logical_block: block, ..Topology::SECTORS },
            in_memory,
            prompt: false,
            memory_alignment: 1,
            offset_alignment: 1,
        };
        // There is nothing to read behind the end, so this touches no disk: it only asks whether the flag is known.
        disk.prompt = disk.try_read(1, 1 << 60, Wait::Refused).is_ok();
        let flags = if claim { libc::O_EXCL } else { 0 } | if disk.direct { libc::O_DIRECT } else { 0 };
        if flags != 0 {
            disk.open_again(spec, flags)?;
        }
        if disk.direct {
            disk.find_alignments(spec)?;
        }
        disk.topology = disk.find_topology(spec).context(context)?;
        Ok(disk)
    }

    /// Opens the file again, with flags that the first open must not have.
    fn open_again(&mut self, spec: &DriveSpec, flags: i32) -> Result<()> {
        let context = || format!("{:?}", spec.file);
        let facts = self.file.metadata().context(context)?;
        let again = match flags & libc::O_EXCL {
            0 => open(spec, flags)?,
            _ => patiently(|| open(spec, flags)).map_err(|error| in_use(spec, &facts, error))?,
        };
        let identity = |facts: &Metadata| (facts.dev(), facts.ino(), facts.rdev());
        if identity(&again.metadata().context(context)?) != identity(&facts) {
            return Err(Error::host(format!("{:?} was replaced while it was opened: try again", spec.file)));
        }
        self.first = Some(std::mem::replace(&mut self.file, again));
        Ok(())
    }

    fn find_alignments(&mut self, spec: &DriveSpec) -> Result<()> {
        let said = sys_io::direct_alignment(self.file.as_fd()).context(|| format!("{:?}", spec.file))?;
        (self.memory_alignment, self.offset_alignment) = match said {
            Some(said) => said,
            None => self.try_alignments().ok_or_else(|| no_direct(spec))?,
        };
        let usable = |bytes: u32, most: u32| bytes.is_power_of_two() && bytes <= most;
        if !usable(self.memory_alignment, PAGE_BYTES) || !usable(self.offset_alignment, BOUNCE_BYTES as u32) {
            return Err(no_direct(spec));
        }
        Ok(())
    }

    /// The block sizes for the guest: those of the options, else those of the host's device. The logical block never follows the
    /// host's, because a partition table counts in logical blocks, and must stay valid when the disk moves to another device.
    fn find_topology(&self, spec: &DriveSpec) -> io::Result<Topology> {
        let logical_block = self.topology.logical_block;
        let host = match self.is_block_device {
            true => block_device::geometry(self.file.as_fd())?,
            false => Geometry::default(),
        };
        let found = host.physical_block.max(self.offset_alignment).max(logical_block);
        let physical_block = match spec.physical_block {
            Some(asked) => asked,
            None if found.is_power_of_two() && found <= MAX_PHYSICAL_BLOCK => found,
            None => logical_block,
        };
        Ok(Topology { logical_block, physical_block, minimum_io: host.minimum_io, optimal_io: host.optimal_io })
    }

    /// Where nobody says what is asked, reads at the start of the file find out.
    fn try_alignments(&self) -> Option<(u32, u32)> {
        let works = |&alignment: &u32| self.try_read(alignment as usize, 0, Wait::Allowed).is_ok();
        [512, PAGE_BYTES].into_iter().find(works).map(|alignment| (alignment, alignment))
    }

    /// Reads `len` bytes, at most a page, and forgets them.
    fn try_read(&self, len: usize, offset: u64, wait: Wait) -> io::Result<usize> {
        let buffer: MmapRegion = MmapRegion::new(PAGE_BYTES as usize).map_err(io::Error::other)?;
        // At the end of a page, so that it is no better aligned than it is long.
        let iov = [IoVec::new(&buffer.get_slice(PAGE_BYTES as usize - len, len).map_err(io::Error::other)?)];
        let work = Work::Read { iov: iov.as_ptr(), count: 1, offset };
        Call { work, cached: false, long: false }.run(self, wait)
    }

    /// In bytes, a multiple of 512.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Relaxed)
    }

    /// Discards a range; the error is `EOPNOTSUPP`, `EINVAL` or the like if the file system or device cannot. It may wait.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.is_block_device {
            true => block_device::discard(self.file.as_fd(), offset, len),
            false => sys_io::fallocate(self.file.as_fd(), sys_io::PUNCH_HOLE, offset, len),
        }
    }

    /// Makes a regular file `bytes` long, or looks how long a block device has become; the new capacity. It may wait.
    pub(super) fn grow(&self, bytes: u64) -> Result<u64> {
        let facts = self.file.metadata().context(|| "look at the file")?;
        let capacity = self.capacity();
        let block = u64::from(self.topology.logical_block);
        if !bytes.is_multiple_of(block) {
            return Err(Error::usage(format!("{bytes} bytes: the size must be a multiple of {block}")));
        }
        if bytes < capacity {
            return Err(Error::usage(format!(
                "a disk that is in use cannot become smaller, for the guest may have data in its last {} bytes; accepted: a \
                 size from {capacity} up",
                capacity - bytes
            )));
        }
        let grown = if facts.is_file() {
            // Somebody may have made it longer already: nothing is cut off.
            if facts.len() < bytes {
                self.file.set_len(bytes).context(|| format!("make the file {bytes} bytes long"))?;
            }
            bytes
        } else {
            let size = (&self.file).seek(SeekFrom::End(0)).context(|| "look for the end of the block device")?;
            let size = size - size % block;
            if size < bytes {
                return Err(Error::usage(format!(
                    "the block device has {size} bytes, and who made it must make it larger first; accepted: a size up to \
                     that"
                )));
            }
            size
        };
        self.capacity.store(grown, Relaxed);
        Ok(grown)
    }

    /// Makes durable what was written. It may wait.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The file as the user wants it used, or through the page cache.
    pub(super) fn get(&self, cached: bool) -> &File {
        self.first.as_ref().filter(|_| cached).unwrap_or(&self.file)
    }

    /// Releases the lock before the last descriptor is closed.
    pub(super) fn unlock(&self) {
        // If this fails, the lock goes with the last descriptor.
        let _ = self.get(true).unlock();
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    /// The way that a request must take.
    pub(super) fn route(&self, request: &Request) -> Route {
        let alignment = u64::from(self.offset_alignment);
        if !self.is_direct() || request.kind == Kind::Flush {
            Route::Plain
        } else if (request.offset | request.left) & (alignment - 1) != 0 {
            Route::Alone
        } else if request.iov.iter().all(|v| v.is_aligned(self.memory_alignment as usize, alignment as usize)) {
            Route::Plain
        } else {
            Route::Bounce
        }
    }
}
