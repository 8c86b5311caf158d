//! What the tests of this floor share: guest memory, files on a real disk and in memory, and waiting by the bell alone.

#![allow(unsafe_code)] // poll(2) on the bell, mount(2).

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::{Disk, GuestRam, Op, Segment, Submitted};
use crate::config::spec::{Cache, DriveSpec};

/// Guest memory starts here, and has a hole of nothing below it.
pub const RAM: u64 = 0x10_0000;
/// In two regions that touch, so that a segment may cross the border.
pub const RAM_BYTES: usize = 4 << 20;

/// A file that goes away with its test.
pub struct TestFile(pub PathBuf);

impl TestFile {
    /// On the disk that the build directory is on, or in memory (`/dev/shm`).
    pub fn new(in_memory: bool, content: &[u8]) -> TestFile {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("loopvisor-disk-{}-{number}", std::process::id());
        let directory = if in_memory { Path::new("/dev/shm") } else { Path::new(env!("CARGO_MANIFEST_DIR")) };
        let directory = if in_memory { directory.to_owned() } else { directory.join("target") };
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join(name);
        std::fs::write(&path, content).unwrap();
        TestFile(path)
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A file system that only the test's own thread sees.
pub struct Mount(PathBuf);

impl Mount {
    /// Needs the rights of root; where they are missing, a test says so and does without.
    pub fn new(kind: &str, options: &str, target: &Path) -> io::Result<Mount> {
        Mount::of(kind, kind, options, target)
    }

    /// A file system of that kind on a block device.
    pub fn device(kind: &str, device: &Path, target: &Path) -> io::Result<Mount> {
        Mount::of(device.to_str().unwrap(), kind, "", target)
    }

    fn of(source: &str, kind: &str, options: &str, target: &Path) -> io::Result<Mount> {
        let texts = [source, kind, options, target.to_str().unwrap()];
        let [source, kind, options, at] = texts.map(|text| CString::new(text).unwrap());
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: strings that live through the calls. The namespace is this thread's own and goes away with it.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()) == 0
                && libc::mount(source.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) == 0
        };
        if mounted { Ok(Mount(target.into())) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let target = CString::new(self.0.to_str().unwrap()).unwrap();
        // By force: a FUSE file that is still open answers with errors from now on. Its server is in this process, and
        // the process could not end while the kernel waits for a dead thread to answer its last `close`.
        // SAFETY: a string that lives through the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
    }
}

pub fn spec(path: &Path) -> DriveSpec {
    DriveSpec { cache: Cache::Buffered, ..DriveSpec::new("vda", path) }
}

pub fn ram() -> Arc<GuestRam> {
    let half = RAM_BYTES / 2;
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(RAM), half), (GuestAddress(RAM + half as u64), half)]).unwrap())
}

pub fn segment(offset: u64, len: usize) -> Segment {
    Segment { addr: GuestAddress(RAM + offset), len: u32::try_from(len).unwrap() }
}

pub fn errno(result: &io::Result<()>) -> i32 {
    result.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0)
}

/// A disk and its guest's memory.
pub struct Guest {
    pub ram: Arc<GuestRam>,
    pub disk: Disk,
}

impl Guest {
    pub fn new(spec: &DriveSpec) -> Guest {
        let ram = ram();
        Guest { disk: Disk::open(spec, Arc::clone(&ram)).unwrap(), ram }
    }

    /// Waits for the bell as an edge-triggered loop would: it must ring again for every new answer.
    pub fn wait(&self) {
        let mut poll = libc::pollfd { fd: self.disk.bell().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 20_000) };
        assert_eq!(ready, 1, "the bell stays silent with {} in flight", self.disk.in_flight());
        self.disk.bell().read().unwrap();
    }

    /// Collects everything that is in flight.
    pub fn drain(&mut self) -> Vec<(u32, io::Result<()>)> {
        let mut done = Vec::new();
        self.disk.poll(|token, result| done.push((token, result)));
        while self.disk.in_flight() > 0 {
            self.wait();
            self.disk.poll(|token, result| done.push((token, result)));
        }
        done
    }

    /// One request from start to end.
    pub fn run(&mut self, op: Op<'_>) -> io::Result<()> {
        match self.disk.submit(op, 7) {
            Submitted::Done(result) => result,
            Submitted::Queued => {
                let mut done = self.drain();
                assert_eq!(done.len(), 1);
                let (token, result) = done.remove(0);
                assert_eq!(token, 7);
                result
            }
        }
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(RAM + offset)).unwrap();
    }

    pub fn take(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(RAM + offset)).unwrap();
        bytes
    }
}
