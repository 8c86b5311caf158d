//! What the host gives to disks: loop devices, mounts, counters of block devices.
//!
//! Nothing is left after a test, also one that is killed: mounts belong to a namespace of the test's own thread, and the
//! kernel detaches a loop device (`LO_FLAGS_AUTOCLEAR`) when its last descriptor is closed.

#![allow(unsafe_code, reason = "ioctl(2), mount(2) and unshare(2) have no safe functions")]

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// `ioctl(2)` whose argument is a number.
pub fn ioctl(file: &File, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the callers' requests take a number.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// `ioctl(2)` whose argument is a structure that the kernel may read and write.
pub fn ioctl_on(file: &File, request: u64, structure: &mut [u8]) -> io::Result<i32> {
    ioctl(file, request, structure.as_mut_ptr() as u64)
}

/// A number that the device tells by an `ioctl(2)` of this request.
pub fn told(file: &File, request: u64) -> u32 {
    let mut answer = [0; 8];
    ioctl_on(file, request, &mut answer).unwrap();
    u32::from_ne_bytes(answer[..4].try_into().unwrap())
}

fn text(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

/// Gives this thread, and all that it starts, mounts of its own. They end with the thread and its processes.
pub fn make_mounts_private() -> io::Result<()> {
    // SAFETY: strings that live through the calls.
    let done = unsafe {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file system that is mounted until this is dropped.
pub struct Mount(PathBuf);

impl Mount {
    #[track_caller]
    pub fn new(kind: &str, source: &Path, at: &Path, options: &str) -> Mount {
        try_mount(kind, source, at, options).unwrap_or_else(|error| panic!("mount {kind} at {at:?}: {error}"))
    }
    pub fn at(&self) -> &Path {
        &self.0
    }
}

/// Mounts it, if the kernel lets us. The folder `at` is made if it is not there.
pub fn try_mount(kind: &str, source: &Path, at: &Path, options: &str) -> io::Result<Mount> {
    if !at.exists() {
        fs::create_dir_all(at)?;
    }
    let [kind, options] = [kind, options].map(|text| CString::new(text).unwrap());
    let (from, to) = (text(source), text(at));
    // SAFETY: strings that live through the call.
    match unsafe { libc::mount(from.as_ptr(), to.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) } {
        0 => Ok(Mount(at.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // By force: the FUSE server of a test that has failed may be gone.
        // SAFETY: a string that lives through the call.
        unsafe { libc::umount2(text(&self.0).as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
    }
}

/// How a loop device is made.
#[derive(Clone, Copy)]
pub struct Loop {
    pub sector: u32,
    pub direct: bool,
    pub read_only: bool,
    /// The kernel looks for a partition table.
    pub partitions: bool,
}

impl Default for Loop {
    fn default() -> Loop {
        Loop { sector: 512, direct: false, read_only: false, partitions: false }
    }
}

/// A loop device, and the file it lies on.
pub struct LoopDevice {
    pub device: File,
    pub path: PathBuf,
    pub image: PathBuf,
}

impl LoopDevice {
    /// A new loop device on the file.
    #[track_caller]
    pub fn new(image: &Path, how: Loop) -> LoopDevice {
        const LOOP_CONFIGURE: u64 = 0x4c0a;
        const LOOP_CTL_GET_FREE: u64 = 0x4c82;
        const READ_ONLY: u32 = 1;
        const AUTOCLEAR: u32 = 4;
        const PARTITIONS: u32 = 8;
        const DIRECT_IO: u32 = 16;
        let file = File::options().read(true).write(!how.read_only).open(image).unwrap();
        let options = [(how.read_only, READ_ONLY), (how.partitions, PARTITIONS), (how.direct, DIRECT_IO)];
        let flags = options.iter().filter(|(wanted, _)| *wanted).fold(AUTOCLEAR, |flags, (_, flag)| flags | flag);
        let control = File::options().read(true).write(true).open("/dev/loop-control").unwrap();
        // A device that another test is making would be claimed by us for a moment, and refused to its monitor.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let number = ioctl(&control, LOOP_CTL_GET_FREE, 0).unwrap();
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options().read(true).write(!how.read_only).open(&path).unwrap();
            // struct loop_config: descriptor, block size, struct loop_info64 with the flags at 52, eight reserved words.
            let fd = (file.as_raw_fd() as u32).to_ne_bytes();
            let info = [&[0; 52][..], &flags.to_ne_bytes(), &[0; 176]].concat();
            let mut config = [&fd[..], &how.sector.to_ne_bytes(), &info, &[0; 64]].concat();
            match ioctl_on(&device, LOOP_CONFIGURE, &mut config) {
                Ok(_) => return LoopDevice { device, path, image: image.into() },
                // Another test took it first.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => panic!("{path:?} on {image:?}: {error}"),
            }
        }
    }

    /// Looks how long the file has become.
    pub fn grow(&self) {
        const LOOP_SET_CAPACITY: u64 = 0x4c07;
        ioctl(&self.device, LOOP_SET_CAPACITY, 0).unwrap();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What BLKROSET has said outlives the file: the next test would find the device read-only.
        let _ = set_read_only(&self.device, false);
    }
}

/// `BLKROSET`.
pub fn set_read_only(device: &File, read_only: bool) -> io::Result<()> {
    const BLKROSET: u64 = 0x125d;
    ioctl_on(device, BLKROSET, &mut i32::from(read_only).to_ne_bytes()).map(drop)
}

/// A number of a block device's line of counters (Linux, Documentation/block/stat.rst), counted from 1 as awk does.
#[track_caller]
fn counter(device: &Path, field: usize) -> u64 {
    let number = fs::metadata(device).unwrap().rdev();
    let path = format!("/sys/dev/block/{}:{}/stat", libc::major(number), libc::minor(number));
    let line = fs::read_to_string(&path).unwrap();
    line.split_ascii_whitespace().nth(field - 1).and_then(|word| word.parse().ok()).unwrap()
}

/// How many flushes the block device has completed.
pub fn flushes(device: &Path) -> u64 {
    counter(device, 16)
}

/// How many discards the block device has completed.
pub fn discards(device: &Path) -> u64 {
    counter(device, 12)
}

/// Bytes that the file takes on its file system.
pub fn allocated(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

/// Whether each block of 4096 bytes of this content is somewhere in the file, at a multiple of 512. Holes are not read.
pub fn holds(path: &Path, content: &[u8]) -> bool {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let seek = |from: u64, whence: i32| {
        // SAFETY: no memory is involved.
        u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), from.cast_signed(), whence) }).ok()
    };
    // The first bytes of a block tell it from all others.
    let mut missing: HashMap<&[u8], &[u8]> = content.chunks(4096).map(|block| (&block[..16], block)).collect();
    let mut at = 0;
    while let Some(data) = seek(at, libc::SEEK_DATA) {
        let end = seek(data, libc::SEEK_HOLE).unwrap_or(size);
        let mut bytes = vec![0; (end - data) as usize];
        file.read_exact_at(&mut bytes, data).unwrap();
        for from in (0..bytes.len().saturating_sub(15)).step_by(512) {
            let start = &bytes[from..from + 16];
            if missing.get(start).is_some_and(|block| bytes[from..].starts_with(block)) {
                missing.remove(start);
            }
        }
        at = end;
    }
    missing.is_empty()
}

/// Whether the file has these bytes at that offset.
pub fn holds_at(path: &Path, offset: u64, content: &[u8]) -> bool {
    let mut bytes = vec![0; content.len()];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes == content
}

/// Reads from a device without its page cache.
pub fn read_direct(device: &Path, offset: u64, bytes: usize) -> Vec<u8> {
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(device).unwrap();
    let mut buffer = vec![0; bytes + 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[aligned..aligned + bytes], offset).unwrap();
    buffer[aligned..aligned + bytes].to_vec()
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &[&str]) {
    let output = Command::new(command[0]).args(&command[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}: run make deps", command[0]));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A folder of files in memory, so that a flush at the bottom costs nothing. It is removed with all that is in it.
pub struct Memory(PathBuf);

impl Memory {
    pub fn new() -> Memory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Relaxed);
        let path = PathBuf::from(format!("/dev/shm/loopvisor-backing-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Memory(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new sparse file of that many bytes.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
