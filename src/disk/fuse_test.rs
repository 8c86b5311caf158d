//! A file whose reads stall until they are told to go on: a FUSE server of the least kind, one file, no library.
//!
//! The mount point is a regular file, so the root node is the file and no name is ever looked up.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::testing::Mount;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;

/// A mounted file of sevens.
pub struct StallingFile {
    path: PathBuf,
    mount: Option<Mount>,
    reads: Receiver<()>,
    server: Arc<Server>,
}

struct Server {
    device: File,
    size: u64,
    /// Requests that wait for an answer, and how long the answer is; `None` when nothing waits any more.
    held: Mutex<Option<Vec<(u64, usize)>>>,
}

impl StallingFile {
    /// Mounts it where only this thread sees it; `None`, with the reason printed, where that is not allowed.
    pub fn mount(size: u64) -> Option<StallingFile> {
        let path = std::env::temp_dir().join(format!("loopvisor-fuse-{}-{:p}", std::process::id(), &raw const size));
        std::fs::write(&path, "").unwrap();
        match try_mount(&path) {
            Ok((device, mount)) => {
                let (read, reads) = channel();
                let server = Arc::new(Server { device, size, held: Mutex::new(Some(Vec::new())) });
                let serving = Arc::clone(&server);
                std::thread::spawn(move || serving.serve(&read));
                Some(StallingFile { path, mount: Some(mount), reads, server })
            }
            Err(error) => {
                eprintln!("skipped: cannot mount a FUSE file: {error}");
                let _ = std::fs::remove_file(path);
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns when a read has reached the server, where it stalls.
    pub fn await_read(&self) {
        self.reads.recv().unwrap();
    }

    /// Lets everything go on, from now on.
    pub fn release(&self) {
        let held = self.server.held.lock().unwrap().take();
        for (unique, len) in held.unwrap_or_default() {
            self.server.reply(unique, 0, &vec![7; len]);
        }
    }
}

impl Drop for StallingFile {
    fn drop(&mut self) {
        self.release();
        // A mount point cannot be removed.
        self.mount = None;
        let _ = std::fs::remove_file(&self.path);
    }
}

fn try_mount(path: &Path) -> io::Result<(File, Mount)> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd={},rootmode=100644,user_id=0,group_id=0", device.as_raw_fd());
    Ok((device, Mount::new("fuse", &options, path)?))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// `struct fuse_attr_out`: valid for no time, a regular file of `size` bytes.
fn attributes(size: u64) -> Vec<u8> {
    let mut out = vec![0; 16];
    for field in [1_u64, size, size.div_ceil(512), 0, 0, 0] {
        out.extend(field.to_ne_bytes());
    }
    for field in [0_u32, 0, 0, libc::S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0] {
        out.extend(field.to_ne_bytes());
    }
    out
}

impl Server {
    /// Answers until the file is unmounted. Reads, and what a close waits for, are held back until the release.
    fn serve(&self, read: &Sender<()>) {
        let mut request = vec![0; 256 << 10];
        while let Ok(len) = (&self.device).read(&mut request) {
            let request = &request[..len];
            let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
            match word(request, 4) {
                // Version 7.31, no extras, writes of at most 64 KiB.
                INIT => self.reply(unique, 0, &words(&[7, 31, 65536, 0, 12, 65536, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
                GETATTR => self.reply(unique, 0, &attributes(self.size)),
                // FOPEN_DIRECT_IO: no page cache, every read comes here.
                OPEN => self.reply(unique, 0, &words(&[0, 0, 1, 0])),
                READ => {
                    self.hold(unique, word(request, 40 + 16) as usize);
                    let _ = read.send(());
                }
                FLUSH => self.hold(unique, 0),
                FORGET | INTERRUPT => (),
                _ => self.reply(unique, -libc::ENOSYS, &[]),
            }
        }
    }

    fn hold(&self, unique: u64, len: usize) {
        match self.held.lock().unwrap().as_mut() {
            Some(held) => held.push((unique, len)),
            None => self.reply(unique, 0, &vec![7; len]),
        }
    }

    fn reply(&self, unique: u64, error: i32, body: &[u8]) {
        let mut out = Vec::with_capacity(16 + body.len());
        out.extend(u32::try_from(16 + body.len()).unwrap().to_ne_bytes());
        out.extend(error.to_ne_bytes());
        out.extend(unique.to_ne_bytes());
        out.extend_from_slice(body);
        // The one who asked may be gone.
        let _ = (&self.device).write_all(&out);
    }
}
