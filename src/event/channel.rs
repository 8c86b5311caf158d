//! A channel into a handler: a queue, and the loop's inbox as its wake-up.
//!
//! The sender names the channel to the loop only when the queue was empty, so a burst of messages is one call of the
//! handler. There is no bound: what is sent is control, at the rate of an operator or of a vCPU that waits for the
//! answer. Never for requests of a guest, which stay in their ring. Senders on any thread, the receiver on the loop's.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inbox::{Command, Inbox};
use super::slots::Key;

struct State<T> {
    queue: VecDeque<T>,
    /// Where the receiver is listened to; none before that.
    listener: Option<(Arc<Inbox>, Key)>,
    closed: bool,
}

struct Shared<T>(Mutex<State<T>>);

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending half. Clones send into the same channel.
pub struct Sender<T>(Arc<Shared<T>>);

/// The receiving half, given to a handler, which has its loop listen to it.
pub struct Receiver<T>(Arc<Shared<T>>);

/// A channel whose messages wait until a loop listens.
pub fn channel<T: Send>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared(Mutex::new(State { queue: VecDeque::new(), listener: None, closed: false })));
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(self.0.clone())
    }
}

impl<T> Sender<T> {
    /// Puts a message in the queue and wakes the loop if it sleeps. Never blocks.
    ///
    /// # Errors
    /// The message comes back when the receiver is gone.
    pub fn send(&self, message: T) -> Result<(), T> {
        let listener = {
            let mut state = self.0.lock();
            if state.closed {
                return Err(message);
            }
            state.queue.push_back(message);
            if state.queue.len() == 1 { state.listener.clone() } else { None }
        };
        // Without the lock, or the loop that wakes up would find it held. A receiver that has moved to another loop
        // meanwhile has found the message when it did.
        if let Some((inbox, key)) = listener {
            inbox.push(Command::Ready(key));
        }
        Ok(())
    }

    /// Whether the receiver is gone, so that nothing sent would be heard.
    pub fn is_closed(&self) -> bool {
        self.0.lock().closed
    }
}

impl<T> Receiver<T> {
    /// The oldest message. A handler that is called for a channel receives until there is none, or returns
    /// [`super::Flow::More`].
    pub fn receive(&self) -> Option<T> {
        self.0.lock().queue.pop_front()
    }

    /// Directs the wake-ups to `key`; true if messages are waiting already.
    pub(super) fn listen(&self, inbox: Arc<Inbox>, key: Key) -> bool {
        let mut state = self.0.lock();
        state.listener = Some((inbox, key));
        !state.queue.is_empty()
    }
}

impl<T> Drop for Receiver<T> {
    /// What was not received is dropped, and so are the reply slips in it.
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.listener = None;
        let unreceived = std::mem::take(&mut state.queue);
        drop(state);
        drop(unreceived);
    }
}
