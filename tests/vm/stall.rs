//! A file that blocks: a FUSE server of the least kind, one file, full of sevens at first, no library. It is mounted in a
//! namespace of the monitor's own or of the test's thread, so nothing of it is left when that has ended.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::monitor::{Folder, PATIENCE, skipped};

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const FALLOCATE: u32 = 43;

/// The shell's words that mount the file at $0 from the descriptor 0 and become "$@".
const MOUNT: &str = "mount -i -t fuse -o fd=0,rootmode=100644,user_id=0,group_id=0 loopvisor-test \"$0\" \
                     && exec \"$@\" </dev/null";

#[derive(Default)]
struct State {
    stalled: bool,
    /// Requests that wait: number and answer.
    held: Vec<(u64, Vec<u8>)>,
    content: Vec<u8>,
    fsyncs: u64,
    fallocates: u64,
    /// What reads and writes fail with; 0 if they do not.
    errno: i32,
}

/// The file and its server.
pub struct Stall {
    path: PathBuf,
    device: File,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Stall {
    /// A file of that size in `folder`; `None`, with the reason printed, where FUSE cannot be used.
    pub fn new(folder: &Folder, size: u64) -> Option<Stall> {
        let probe = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
        if !probe.as_ref().is_ok_and(|output| output.status.success()) {
            skipped(&format!("a private mount is refused: {probe:?}"));
            return None;
        }
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                skipped(&format!("/dev/fuse: {error}"));
                return None;
            }
        };
        let path = folder.path("stall.img");
        fs::write(&path, "").unwrap();
        let state = State { content: vec![7; size as usize], ..State::default() };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let (served, theirs) = (device.try_clone().unwrap(), shared.clone());
        thread::spawn(move || serve(served, &theirs));
        Some(Stall { path, device, shared })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the monitor is started under, and with which standard input, to have the file.
    pub fn mounting(&self) -> ([&str; 6], Stdio) {
        let words = ["unshare", "-m", "sh", "-c", MOUNT, self.path.to_str().unwrap()];
        (words, self.device.try_clone().unwrap().into())
    }

    /// The options that mount it, of type `fuse`, in this process.
    pub fn options(&self) -> String {
        format!("fd={},rootmode=100644,user_id=0,group_id=0", self.device.as_raw_fd())
    }

    /// How often the file was synchronised.
    pub fn fsyncs(&self) -> u64 {
        self.shared.0.lock().unwrap().fsyncs
    }

    /// How often a range was given back or zeroed.
    pub fn fallocates(&self) -> u64 {
        self.shared.0.lock().unwrap().fallocates
    }

    /// Whether the file has these bytes at that offset.
    pub fn holds(&self, offset: u64, bytes: &[u8]) -> bool {
        self.shared.0.lock().unwrap().content[offset as usize..].starts_with(bytes)
    }

    /// From now on reads and writes fail with this; 0 ends it.
    pub fn fail(&self, errno: i32) {
        self.shared.0.lock().unwrap().errno = errno;
    }

    /// From now on every access waits.
    pub fn stall(&self) {
        self.shared.0.lock().unwrap().stalled = true;
    }

    /// Returns when so many accesses wait.
    pub fn await_held(&self, count: usize) {
        let state = self.shared.0.lock().unwrap();
        let (state, timeout) =
            self.shared.1.wait_timeout_while(state, PATIENCE, |state| state.held.len() < count).unwrap();
        assert!(!timeout.timed_out(), "{} of {count} accesses reached the file", state.held.len());
    }

    /// Lets all accesses go on.
    pub fn release(&self) {
        let mut state = self.shared.0.lock().unwrap();
        state.stalled = false;
        for (unique, answer) in state.held.drain(..) {
            reply(&self.device, unique, 0, &answer);
        }
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        // Also after a failed test: a process that waits for this file could not be ended.
        if !thread::panicking() || self.shared.0.try_lock().is_ok() {
            self.release();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_attr_out`: valid for no time, a regular file of `size` bytes.
fn attributes(size: u64) -> Vec<u8> {
    let mut out = vec![0; 16];
    out.extend([1, size, size.div_ceil(512), 0, 0, 0].into_iter().flat_map(u64::to_ne_bytes));
    out.extend(words(&[0, 0, 0, libc::S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0]));
    out
}

/// Answers until the file is unmounted.
fn serve(mut device: File, shared: &(Mutex<State>, Condvar)) {
    let mut request = vec![0; 256 << 10];
    loop {
        // ENODEV when it is unmounted, EPERM before it is mounted.
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                thread::yield_now();
                continue;
            }
            Err(_) => return,
        };
        let request = &request[..len];
        let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
        let number = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap()) as usize;
        let mut state = shared.0.lock().unwrap();
        let (error, answer) = match word(request, 4) {
            // Version 7.31, no extras, writes of at most 64 KiB.
            INIT => (0, [words(&[7, 31, 65536, 0, 0x000c_000c, 65536, 1]), vec![0; 36]].concat()),
            GETATTR => (0, attributes(state.content.len() as u64)),
            // FOPEN_DIRECT_IO: no page cache, every access comes here.
            OPEN => (0, words(&[0, 0, 1, 0])),
            READ | WRITE if state.errno != 0 => (-state.errno, vec![]),
            // The handle at 40, the offset at 48, the length at 56; what is written follows at 80.
            READ => {
                let from = number(48).min(state.content.len());
                let to = (from + word(request, 56) as usize).min(state.content.len());
                (0, state.content[from..to].to_vec())
            }
            WRITE => {
                let len = word(request, 56);
                state.content[number(48)..][..len as usize].copy_from_slice(&request[80..][..len as usize]);
                (0, words(&[len, 0]))
            }
            FSYNC => {
                state.fsyncs += 1;
                (0, vec![])
            }
            // A hole, or zeros, at 48, of the length at 56.
            FALLOCATE => {
                state.fallocates += 1;
                state.content[number(48)..][..number(56)].fill(0);
                (0, vec![])
            }
            STATFS => (0, vec![0; 80]),
            FORGET | INTERRUPT => continue,
            _ => (-libc::ENOSYS, vec![]),
        };
        if state.stalled && error == 0 {
            state.held.push((unique, answer));
            shared.1.notify_all();
        } else {
            drop(state);
            reply(&device, unique, error, &answer);
        }
    }
}

fn reply(mut device: &File, unique: u64, error: i32, body: &[u8]) {
    let mut out = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
    out.extend(error.to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend_from_slice(body);
    // The one who asked may be gone.
    let _ = device.write_all(&out);
}
