//! The one door through which other threads reach a loop: a queue of commands, a bell, and two flags.
//!
//! The bell (an eventfd) is rung only when the loop is asleep or about to be (G17); the handshake of `push` and
//! `Inbox::sleep` is the classic one of two flags: the loop says *asleep*, then looks at the queue once more; the
//! poster fills the queue, then looks at *asleep*. Both steps are sequentially consistent, so at least one of the two
//! sees the other and no wake-up is lost (G16). Not for the hot path: kicks, completions and timers have descriptors of
//! their own.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::counters::{Board, Counters};
use super::done::Done;
use super::event_loop::Handler;
use super::slots::Key;
use crate::error::{Context, Result};
use crate::sys::{clock, gettid};

pub(super) enum Command {
    /// Take in a handler; the slip carries its key, or why `attach` failed.
    Adopt(Box<dyn Handler>, Done<Result<Key>>),
    /// Drop a handler; the slip says whether it was there.
    Remove(Key, Done<bool>),
    /// A channel that was empty has a message.
    Ready(Key),
}

pub(super) struct Inbox {
    commands: Mutex<Vec<Command>>,
    bell: EventFd,
    asleep: AtomicBool,
    /// There is something that must be seen before the next handler is called: a stop, or a removal.
    urgent: AtomicBool,
    stop: AtomicBool,
    /// The kernel's id of the loop's thread; zero before it runs.
    thread: AtomicI32,
    pub board: Board,
}

impl Inbox {
    pub fn new() -> Result<Arc<Inbox>> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context(|| "event loop: make an eventfd")?;
        Ok(Arc::new(Inbox {
            commands: Mutex::new(Vec::new()),
            bell,
            // A loop that has not run yet is awake: it looks at the inbox before it first sleeps.
            asleep: AtomicBool::new(false),
            urgent: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            board: Board::default(),
        }))
    }

    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Command>> {
        // Nothing that can panic runs under this lock.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, command: Command) {
        let urgent = matches!(command, Command::Remove(..));
        self.lock().push(command);
        if urgent {
            self.urgent.store(true, SeqCst);
        }
        self.wake();
    }

    fn wake(&self) {
        if self.asleep.swap(false, SeqCst) {
            // EAGAIN means 2^64-1 rings nobody has seen: the bell is ringing all the same.
            let _ = self.bell.write(1);
        }
    }

    /// Says that the loop is about to sleep. False if it must not, because something has come in.
    pub fn sleep(&self) -> bool {
        self.asleep.store(true, SeqCst);
        let idle = self.lock().is_empty() && !self.urgent.load(SeqCst);
        if !idle {
            self.asleep.store(false, SeqCst);
        }
        idle
    }

    /// Says that the loop is awake: posts cost no system call from here on.
    pub fn awake(&self) {
        self.asleep.store(false, SeqCst);
    }

    /// Exchanges the queue for `empty`, which keeps its memory from turn to turn.
    pub fn take(&self, empty: &mut Vec<Command>) {
        std::mem::swap(&mut *self.lock(), empty);
    }

    /// True if something urgent has come in since the last call. One relaxed-cost load on the hot path.
    pub fn take_urgent(&self) -> bool {
        self.urgent.load(SeqCst) && self.urgent.swap(false, SeqCst)
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }

    pub fn set_stop(&self, stop: bool) {
        self.stop.store(stop, SeqCst);
        self.urgent.store(stop, SeqCst);
        if stop {
            self.wake();
        }
    }

    pub fn enter(&self) {
        self.thread.store(gettid(), SeqCst);
    }

    pub fn thread(&self) -> i32 {
        self.thread.load(SeqCst)
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
        if gettid() == self.inbox.thread() { true } else { waiter.wait().unwrap_or(false) }
    }

    /// Ends the loop's `run` within the handler call that is going on (G21).
    pub fn stop(&self) {
        self.inbox.set_stop(true);
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
