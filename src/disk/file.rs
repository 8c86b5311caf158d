//! Opening a drive's file: what it is, how large, who else has it, and what `O_DIRECT` asks for.
//!
//! The content is never looked at: a raw disk whose guest writes another format's header stays a raw disk. Used by the
//! main thread at open; afterwards the open file is read by the disk's thread and its helpers.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vm_memory::{MmapRegion, VolatileMemory};

use super::bounce::BOUNCE_BYTES;
use super::engine::{Call, Work};
use super::lock;
use super::request::{Kind, Request, Route};
use crate::config::spec::{Access, Cache, DriveSpec};
use crate::error::{Context, Error, Result};
use crate::sys::io::{self as sys_io, IoVec, Wait};

/// The largest alignment of memory that our own buffers have.
const PAGE_BYTES: u32 = 4096;

/// An open, locked file and the facts about it that do not change.
pub(super) struct DiskFile {
    file: File,
    /// With `direct=on`: the same file through the page cache, for what `O_DIRECT` cannot do.
    cached: Option<File>,
    /// In bytes, a multiple of 512. It only grows.
    capacity: AtomicU64,
    /// The file lives in memory: no access to it waits for a disk.
    pub(super) in_memory: bool,
    /// The file system keeps the promise of `RWF_NOWAIT`. Others wait even when asked not to, some (FUSE) also when
    /// io_uring asks, so nothing is tried on the loop's thread.
    pub(super) prompt: bool,
    /// What `O_DIRECT` asks of addresses, and of offsets and lengths: powers of two.
    memory_alignment: u32,
    offset_alignment: u32,
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
        other => other.context(|| format!("open {:?}", spec.file))?,
    };
    sys_io::set_blocking(file.as_fd()).context(|| format!("{:?}", spec.file))?;
    Ok(file)
}

fn no_direct(spec: &DriveSpec) -> Error {
    Error::host(format!(
        "the file system of {:?} cannot do direct I/O: say direct=off, or in QMP \"cache\":{{\"direct\":false}}",
        spec.file
    ))
}

impl DiskFile {
    pub(super) fn open(spec: &DriveSpec) -> Result<DiskFile> {
        let context = || format!("{:?}", spec.file);
        let mut file = open(spec, 0)?;
        let kind = file.metadata().context(context)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::host(format!("{:?} is neither a regular file nor a block device", spec.file)));
        }
        lock::take(&file, &spec.file, spec.access)?;
        // The length of a block device is where its end is.
        let size = file.seek(SeekFrom::End(0)).context(context)?;
        let capacity = size & !511;
        if capacity == 0 {
            return Err(Error::host(format!("{:?} has {size} bytes, less than one sector of 512", spec.file)));
        }
        if capacity != size {
            log::info!("drive \"{}\": the last {} bytes are not a sector and are left out", spec.id, size - capacity);
        }
        let in_memory = sys_io::is_in_memory(file.as_fd());
        let mut disk = DiskFile {
            file,
            cached: None,
            capacity: AtomicU64::new(capacity),
            in_memory,
            prompt: false,
            memory_alignment: 1,
            offset_alignment: 1,
        };
        // There is nothing to read behind the end, so this touches no disk: it only asks whether the flag is known.
        disk.prompt = disk.try_read(1, 1 << 60, Wait::Refused).is_ok();
        if spec.cache == Cache::Direct {
            disk.make_direct(spec)?;
        }
        Ok(disk)
    }

    fn make_direct(&mut self, spec: &DriveSpec) -> Result<()> {
        let direct = open(spec, libc::O_DIRECT)?;
        if self.in_memory {
            // There is no page cache to go round: memory is where the file is.
            return Ok(());
        }
        let said = sys_io::direct_alignment(direct.as_fd()).context(|| format!("{:?}", spec.file))?;
        self.cached = Some(std::mem::replace(&mut self.file, direct));
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

    /// Makes a regular file `bytes` long, or looks how long a block device has become; the new capacity. It may wait.
    pub(super) fn grow(&self, bytes: u64) -> Result<u64> {
        let facts = self.file.metadata().context(|| "look at the file")?;
        let capacity = self.capacity();
        if !bytes.is_multiple_of(512) {
            return Err(Error::usage(format!("{bytes} bytes are no whole sectors; accepted: a multiple of 512")));
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
            let size = (&self.file).seek(SeekFrom::End(0)).context(|| "look for the end of the block device")? & !511;
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
        match &self.cached {
            Some(file) if cached => file,
            _ => &self.file,
        }
    }

    pub(super) fn is_direct(&self) -> bool {
        self.cached.is_some()
    }

    /// What offset and length should be multiples of, in bytes.
    pub(super) fn block_size(&self) -> u32 {
        self.offset_alignment.max(512)
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
