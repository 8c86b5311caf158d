//! A loop on a thread of its own: an iothread.
//!
//! The thread carries the iothread's id as its name on the host (rule D1.7; the kernel keeps its first 15 bytes). It
//! ends when it is told to stop and is joined when its handle is dropped: no thread outlives its owner. The handle
//! belongs to the main thread.

use std::thread::{Builder, JoinHandle};

use log::error;

use super::done::{Done, Waiter};
use super::event_loop::EventLoop;
use super::inbox::Remote;
use crate::error::{Context, Result};

/// A running loop and its thread.
pub struct LoopThread {
    id: String,
    remote: Remote,
    begun: Option<Waiter<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LoopThread {
    /// Starts a thread named `id` that runs an empty loop. `prepare` runs first on the new thread.
    ///
    /// # Errors
    /// The loop's own (EMFILE) and EAGAIN from the kernel's limit on threads.
    pub fn start(id: &str, prepare: impl FnOnce() + Send + 'static) -> Result<Self> {
        let mut event_loop = EventLoop::new().context(|| format!("iothread \"{id}\""))?;
        let remote = event_loop.remote();
        let name = id.to_string();
        let (begun, waiter) = Done::waited();
        let thread = Builder::new()
            .name(id.to_string())
            .spawn(move || {
                prepare();
                event_loop.remote().inbox.enter();
                begun.end(());
                if let Err(e) = event_loop.run() {
                    error!("iothread \"{name}\": {e}");
                }
            })
            .context(|| format!("iothread \"{id}\": start its thread"))?;
        Ok(LoopThread { id: id.to_string(), remote, begun: Some(waiter), thread: Some(thread) })
    }

    /// Waits until the thread runs: from then on it has its name, and its loop its thread's id. Blocks, so it is for
    /// whoever sets the machine up, as the last thing, when the thread has long begun.
    pub fn await_begun(&mut self) {
        if let Some(begun) = self.begun.take() {
            // It has begun even if it was lost since.
            let _ = begun.wait();
        }
    }

    /// The iothread's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A handle on its loop.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.remote.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed by it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_d1_7_a_thread_that_has_begun_has_its_id_however_long_its_preparation_took() {
        let prepare = || (0..1000).for_each(|_| std::thread::yield_now());
        let mut thread = LoopThread::start("io1", prepare).unwrap();
        thread.await_begun();
        assert_ne!(thread.remote().thread_id(), 0);
    }
}
