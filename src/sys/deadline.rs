//! `Deadline`: the end of the process, also if one of its threads never ends.
//!
//! A thread that waits for a file that no longer answers cannot be joined. The end of the process does not need it: the
//! kernel ends all threads. A thread of its own watches, for the one that takes the machine apart may itself be held up.

use std::fs;
use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::error;

use super::{gettid, own_file, terminal};

/// How long the threads may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many times as long the main thread may take: hundreds of GiB of memory are not given back in seconds.
const MAIN: u32 = 12;

/// Ends the process unless this is dropped in time.
pub struct Deadline(Option<(Sender<()>, JoinHandle<()>)>);

impl Deadline {
    /// If other threads than the caller's, which is the main thread, still run in five seconds, the process ends with `code`, its
    /// files removed and its terminal restored. Without a thread, if the host has none left, it does not.
    pub fn begin(code: u8) -> Deadline {
        let (end, ended) = channel::<()>();
        let thread = thread::Builder::new().name("end".into()).spawn(move || {
            for round in 1..=MAIN {
                if ended.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let others = others();
                if round == MAIN || !others.is_empty() {
                    error!("ending without waiting any longer: [{}]", others.join(", "));
                    terminal::restore();
                    own_file::remove_all();
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

/// The threads of ours beside the main thread and this one, and what each waits for in the kernel as far as that tells.
fn others() -> Vec<String> {
    let known = [process::id().to_string(), gettid().to_string()];
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let others = threads.filter(|thread| !known.iter().any(|known| thread.file_name() == known.as_str()));
    let name = |thread: fs::DirEntry| {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let place = fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
        // KVM's own belong to the machine, which the main thread takes apart.
        (!name.starts_with("kvm-")).then(|| format!("thread {:?} is in {place:?}", name.trim_end()))
    };
    others.filter_map(name).collect()
}
