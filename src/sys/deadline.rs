//! `Deadline`: the end of the process, also if one of its threads never ends.
//!
//! A thread that waits for a file that no longer answers cannot be joined. The process can end without it, because the
//! kernel then ends all threads. A thread of its own watches, because the main thread, which takes the machine apart, may
//! hang too.

use std::fs;
use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::error;

use super::{gettid, own_file, terminal};

/// How long the threads may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the last line may take.
const LOG_PATIENCE: Duration = Duration::from_secs(1);
/// The main thread may take this many times as long: giving back hundreds of GiB of memory takes more than seconds.
const MAIN: u32 = 12;

/// How the names of threads begin that the host's kernel adds to the process: KVM's, and io_uring's workers. They end with the
/// machine or the thread that they serve. An idle worker of io_uring stays for as long as its thread.
const KERNELS: [&str; 2] = ["kvm-", "iou-"];

/// Ends the process unless this is dropped in time.
pub struct Deadline(Option<(Sender<()>, JoinHandle<()>)>);

impl Deadline {
    /// The caller is the main thread. If other threads still run after five seconds, the process ends with `code`, its files
    /// removed and its terminal restored. If the host refuses the thread that watches, nothing ends the process.
    pub fn begin(code: u8) -> Deadline {
        let (end, ended) = channel::<()>();
        let thread = thread::Builder::new().name("end".into()).spawn(move || {
            for round in 1..=MAIN {
                if ended.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let others = others();
                if round == MAIN || !others.is_empty() {
                    terminal::restore();
                    own_file::remove_all();
                    // The log may lie on the file system that hangs.
                    let (said, heard) = channel::<()>();
                    thread::spawn(move || {
                        error!("ending without waiting any longer: [{}]", others.join(", "));
                        drop(said);
                    });
                    let _ = heard.recv_timeout(LOG_PATIENCE);
                    process::exit(code.into());
                }
            }
        });
        Deadline(thread.ok().map(|thread| (end, thread)))
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// The other threads of this process, without the main thread. With each, the kernel function in which it waits, if the
/// kernel shows it.
fn others() -> Vec<String> {
    let known = [process::id().to_string(), gettid().to_string()];
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let others = threads.filter(|thread| !known.iter().any(|known| thread.file_name() == known.as_str()));
    let name = |thread: fs::DirEntry| {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let place = fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
        let is_kernels = KERNELS.iter().any(|kernels| name.starts_with(kernels));
        (!is_kernels).then(|| format!("thread {:?} is in {place:?}", name.trim_end()))
    };
    others.filter_map(name).collect()
}
