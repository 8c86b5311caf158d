//! The engine for kernels without io_uring: up to four threads that make plain system calls.
//!
//! A thread is started when there is work and none is idle, and stays. The one lock (a third kind of lock in this
//! program) is held to move a job or an answer, never during a call, so the loop does not wait for a disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::engine::{Call, Engine};
use super::file::DiskFile;
use crate::sys::io::Wait;

const MAX_THREADS: usize = 4;
/// The calls go no deeper than the C library.
const STACK_BYTES: usize = 64 << 10;

type Answer = (u32, io::Result<usize>);

/// One call, and the file it is made on. A thread drops the file before it answers. So a disk with nothing in flight closes its
/// file when it is dropped, and not when its last thread has ended; with the file goes the claim on a block device.
struct Job {
    id: u32,
    call: Call,
    file: Arc<DiskFile>,
}

/// One disk's threads. Dropping it waits for nothing: each thread ends when its call does.
pub(super) struct Threads {
    id: String,
    file: Arc<DiskFile>,
    shared: Arc<Shared>,
    queued: Vec<Job>,
    answers: VecDeque<Answer>,
}

struct Shared {
    bell: Arc<EventFd>,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    answers: VecDeque<Answer>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked did so outside the lock or left a queue that is still one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a thread.
    fn serve(&self) {
        let mut state = self.lock();
        while !state.closed {
            let Some(Job { id, call, file }) = state.jobs.pop_front() else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let result = call.run(&file, Wait::Allowed);
            drop(file);
            state = self.lock();
            state.answers.push_back((id, result));
            if state.answers.len() == 1 {
                // Cannot fail: the counter of an eventfd has room for more answers than there will be.
                let _ = self.bell.write(1);
            }
        }
    }
}

impl Threads {
    pub(super) fn new(id: &str, file: &Arc<DiskFile>, bell: &Arc<EventFd>) -> Threads {
        let shared = Shared { bell: Arc::clone(bell), state: Mutex::default(), work: Condvar::new() };
        let (id, file) = (id.to_owned(), Arc::clone(file));
        Threads { id, file, shared: Arc::new(shared), queued: Vec::new(), answers: VecDeque::new() }
    }

    /// Starts as many threads as there are jobs that nobody is free for. Without any thread the jobs fail.
    fn staff(&self, state: &mut State) {
        let mut hands = state.idle;
        while state.jobs.len() > hands && state.threads < MAX_THREADS {
            let shared = Arc::clone(&self.shared);
            // The kernel keeps 15 bytes of a name; the number must be among them.
            let id: String = self.id.chars().take(10).collect();
            let name = format!("{id}/aio{}", state.threads);
            let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || shared.serve());
            match thread {
                Ok(_) => (state.threads, hands) = (state.threads + 1, hands + 1),
                Err(_) if state.threads > 0 => return,
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::ENOMEM);
                    log::error!("drive \"{}\": start a thread: {error}", self.id);
                    let failed = state.jobs.drain(..).map(|job| (job.id, Err(io::Error::from_raw_os_error(errno))));
                    state.answers.extend(failed);
                }
            }
        }
    }
}

impl Engine for Threads {
    fn queue(&mut self, id: u32, call: Call) {
        self.queued.push(Job { id, call, file: Arc::clone(&self.file) });
    }

    fn push(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        let count = self.queued.len();
        let mut state = self.shared.lock();
        state.jobs.extend(self.queued.drain(..));
        self.staff(&mut state);
        drop(state);
        for _ in 0..count.min(MAX_THREADS) {
            self.shared.work.notify_one();
        }
    }

    fn next(&mut self) -> Option<Answer> {
        if self.answers.is_empty() {
            std::mem::swap(&mut self.answers, &mut self.shared.lock().answers);
        }
        self.answers.pop_front()
    }

    fn rest(&mut self) -> bool {
        self.queued.is_empty() && self.answers.is_empty() && self.shared.lock().answers.is_empty()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_all();
    }
}
