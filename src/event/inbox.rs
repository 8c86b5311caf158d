//! The one door through which other threads reach a loop: a queue of commands, a bell, and one word of flags.
//!
//! All of the handshake is in that word. The loop falls asleep by turning 0 into `ASLEEP`, in one step that fails if any
//! flag is up; a poster fills the queue, then puts a flag up, and rings the bell if the word was `ASLEEP` and nothing
//! else. So either the loop sees the flag and stays up, or the poster sees the sleeper and rings: no wake-up is lost
//! (G16), the bell rings once a sleep, and never while the loop is awake (G17). Not for the hot path: kicks and
//! completions have descriptors of their own.

use std::sync::atomic::{
    AtomicI32, AtomicU8,
    Ordering::{AcqRel, Acquire, Relaxed},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::counters::{Board, Counters};
use super::done::Done;
use super::handler::Handler;
use super::slots::Key;
use crate::error::{Context, Result};
use crate::sys::{clock, gettid};

/// The loop sleeps, or is about to.
const ASLEEP: u8 = 1;
/// The queue has commands.
const POSTED: u8 = 2;
/// One of them is to be carried out before the next handler is called: a removal.
const URGENT: u8 = 4;
/// The loop is to end its run.
const STOP: u8 = 8;

thread_local! {
    /// The kernel's id of this thread: asking for it is a system call.
    static THREAD: i32 = gettid();
}

pub(super) enum Command {
    /// Take in a handler; the slip carries its key, or why `attach` failed.
    Adopt(Box<dyn Handler>, Done<Result<Key>>),
    /// Drop a handler; the slip says whether it was there.
    Remove(Key, Done<bool>),
    /// A channel that was empty has a message.
    Ready(Key),
}

pub(super) struct Inbox {
    flags: AtomicU8,
    /// None when the loop is gone.
    commands: Mutex<Option<Vec<Command>>>,
    bell: EventFd,
    /// The kernel's id of the loop's thread; zero before it runs.
    thread: AtomicI32,
    pub board: Board,
}

impl Inbox {
    pub fn new() -> Result<Arc<Inbox>> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context(|| "event loop: make an eventfd")?;
        Ok(Arc::new(Inbox {
            flags: AtomicU8::new(0),
            commands: Mutex::new(Some(Vec::new())),
            bell,
            thread: AtomicI32::new(0),
            board: Board::default(),
        }))
    }

    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        // Nothing that can panic runs under this lock.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, command: Command) {
        let flags = if matches!(command, Command::Remove(..)) { POSTED | URGENT } else { POSTED };
        let refused = match &mut *self.lock() {
            Some(commands) => {
                commands.push(command);
                None
            }
            None => Some(command),
        };
        // Dropping it has its slip answer `Lost`, outside the lock: a slip may post.
        if refused.is_none() {
            self.raise(flags);
        }
    }

    fn raise(&self, flags: u8) {
        if self.flags.fetch_or(flags, AcqRel) == ASLEEP {
            // EAGAIN means 2^64-1 rings nobody has seen: the bell is ringing all the same.
            let _ = self.bell.write(1);
        }
    }

    /// Says that the loop is about to sleep. False if it must not, because something has come in.
    pub fn sleep(&self) -> bool {
        self.flags.compare_exchange(0, ASLEEP, AcqRel, Relaxed).is_ok()
    }

    /// Says that the loop is awake: posts cost no system call from here on.
    pub fn awake(&self) {
        self.flags.fetch_and(!ASLEEP, AcqRel);
    }

    /// False if there is nothing to take: then no lock need be.
    pub fn is_posted(&self) -> bool {
        self.flags.load(Relaxed) & POSTED != 0
    }

    /// Exchanges the queue for `empty`, which keeps its memory from turn to turn.
    pub fn take(&self, empty: &mut Vec<Command>) {
        // The flags before the queue: who posts between the two puts the flag up again.
        self.flags.fetch_and(!(POSTED | URGENT), AcqRel);
        if let Some(commands) = &mut *self.lock() {
            std::mem::swap(commands, empty);
        }
    }

    /// True if the next handler must not be called before [`Inbox::stopped`] and [`Inbox::take`] have been asked.
    pub fn urgent(&self) -> bool {
        self.flags.load(Relaxed) & (URGENT | STOP) != 0
    }

    pub fn stopped(&self) -> bool {
        self.flags.load(Acquire) & STOP != 0
    }

    pub fn stop(&self) {
        self.raise(STOP);
    }

    /// The stop has been obeyed.
    pub fn clear_stop(&self) {
        self.flags.fetch_and(!STOP, AcqRel);
    }

    /// The loop is gone: the slips of what it has not done, and of all that comes, answer `Lost`.
    pub fn close(&self) {
        let undone = self.lock().take();
        drop(undone);
    }

    #[cfg(test)]
    pub fn is_asleep(&self) -> bool {
        self.flags.load(Acquire) & ASLEEP != 0
    }

    pub fn enter(&self) {
        self.thread.store(THREAD.with(|id| *id), Relaxed);
    }

    pub fn thread(&self) -> i32 {
        self.thread.load(Relaxed)
    }
}

/// A handle on a loop for other threads. Cheap to clone; keeps no loop alive, and after the loop's end its commands
/// answer [`super::Lost`].
#[derive(Clone)]
pub struct Remote {
    pub(super) inbox: Arc<Inbox>,
}

impl Remote {
    /// Gives a handler to the loop. The slip carries its key once it is attached.
    pub fn adopt(&self, handler: Box<dyn Handler>, done: Done<Result<Key>>) {
        self.inbox.push(Command::Adopt(handler, done));
    }

    /// Has a handler dropped before the loop calls any other. The slip says whether it was there.
    pub fn remove(&self, handler: Key, done: Done<bool>) {
        self.inbox.push(Command::Remove(handler, done));
    }

    /// Drops a handler and returns when no callback of it runs or will run (G18). On the loop's own thread it returns
    /// at once, with the same promise but for the callback it is called from (G19). False if it was not there.
    pub fn remove_and_wait(&self, handler: Key) -> bool {
        let (done, waiter) = Done::waited();
        self.remove(handler, done);
        if THREAD.with(|id| *id) == self.inbox.thread() { true } else { waiter.wait().unwrap_or(false) }
    }

    /// Ends the loop's `run` within the handler call that is going on (G21).
    pub fn stop(&self) {
        self.inbox.stop();
    }

    /// What the loop has done so far.
    pub fn counters(&self) -> Counters {
        self.inbox.board.read(clock::monotonic_ns())
    }

    /// The kernel's id of the thread that runs the loop; zero before it does.
    pub fn thread_id(&self) -> i32 {
        self.inbox.thread()
    }
}
