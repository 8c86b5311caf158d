//! `Progress`: tells somebody who waits for a start what it is at, when it takes longer than a second.
//!
//! It goes to standard error, whatever the log's level and file: who has typed a command looks there. A thread of its own
//! waits meanwhile, for a start that is held up by a file cannot look at a clock; it ends with the start. Main thread.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::sink;

/// How long nobody is told anything; then after twice as long each time.
const PATIENCE: Duration = Duration::from_secs(1);

/// A start that goes on until this is dropped.
pub struct Progress {
    step: Arc<Mutex<String>>,
    /// `None` only while being dropped.
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// A start begins now. Without a thread, if the host has none left, nobody is told.
    pub fn begin() -> Progress {
        let step = Arc::new(Mutex::new(String::new()));
        let (end, ended) = channel::<()>();
        let (shown, began) = (step.clone(), Instant::now());
        let thread = thread::Builder::new().name("start".into()).spawn(move || {
            let mut patience = PATIENCE;
            while ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                let step = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
                sink::stderr_line(format!("loopvisor: after {} s: {step}\n", began.elapsed().as_secs()).as_bytes());
                patience *= 2;
            }
        });
        Progress { step, thread: thread.ok().map(|thread| (end, thread)) }
    }

    /// What it is at from now on, as `opening drive "vda"`.
    pub fn at(&self, step: impl Into<String>) {
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = step.into();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.thread.take() {
            drop(end);
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
