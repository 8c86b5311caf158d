//! `Progress`: tells somebody who waits for a start what it is at, when it takes longer than a second.
//!
//! It goes to standard error, whatever the log's level and file: who has typed a command looks there. A thread of its own
//! watches the clock and the signals, because the main thread may hang in an access to a file. It ends with the start. Used by
//! the main thread.

use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{own_file, signalfd, sink};

/// How long nobody is told anything; then after twice as long each time.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the thread checks whether a signal is pending.
const LOOK: Duration = Duration::from_millis(100);

/// A start that goes on until this is dropped.
pub struct Progress {
    step: Arc<Mutex<String>>,
    /// `None` only while being dropped.
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// A start begins now. The `signals` are blocked: one that is pending ends the process here, because the main loop does not
    /// read it yet. If the host refuses the thread, nothing is reported and no signal ends the start.
    pub fn begin(signals: Vec<i32>) -> Progress {
        let step = Arc::new(Mutex::new(String::new()));
        let (end, ended) = channel::<()>();
        let (shown, began) = (step.clone(), Instant::now());
        let thread = thread::Builder::new().name("start".into()).spawn(move || {
            let mut patience = PATIENCE;
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                let waited = began.elapsed();
                let step = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if signalfd::is_pending(&signals) {
                    own_file::remove_all();
                    sink::stderr_last_line(format!("loopvisor: ended by a signal while {step}\n").as_bytes());
                    process::exit(1);
                }
                if waited >= patience {
                    sink::stderr_line(format!("loopvisor: after {} s: {step}\n", waited.as_secs()).as_bytes());
                    patience = waited + 2 * patience;
                }
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
