//! `Done`: the reply slip inside a command.
//!
//! Whoever carries out a command ends its slip with a value. The asker either waits for it (only a vCPU and the
//! start-up and shut-down code may: invariant I2) or has it posted back to a loop. A slip that is dropped unended
//! answers [`Lost`], so nobody waits for a loop that is gone. Any thread.

use std::sync::mpsc;

/// The slip was dropped before anybody ended it: whoever should have is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

type Reply<T> = Box<dyn FnOnce(Result<T, Lost>) + Send>;

/// A reply slip for a value of type `T`.
pub struct Done<T: Send + 'static>(Option<Reply<T>>);

/// The other half of a slip that is waited for.
pub struct Waiter<T>(mpsc::Receiver<T>);

impl<T: Send + 'static> Done<T> {
    /// A slip and the place where its value can be waited for.
    pub fn waited() -> (Done<T>, Waiter<T>) {
        let (sender, receiver) = mpsc::sync_channel(1);
        let reply = move |value: Result<T, Lost>| {
            if let Ok(value) = value {
                // The asker may have stopped waiting; then nobody wants the value.
                let _ = sender.send(value);
            }
        };
        (Done(Some(Box::new(reply))), Waiter(receiver))
    }

    /// A slip that hands its end to `reply`, on the thread that ends or drops it. `reply` must not block: it posts.
    pub fn posted(reply: impl FnOnce(Result<T, Lost>) + Send + 'static) -> Done<T> {
        Done(Some(Box::new(reply)))
    }

    /// Ends the slip.
    pub fn end(mut self, value: T) {
        if let Some(reply) = self.0.take() {
            reply(Ok(value));
        }
    }
}

impl<T: Send + 'static> Drop for Done<T> {
    fn drop(&mut self) {
        if let Some(reply) = self.0.take() {
            reply(Err(Lost));
        }
    }
}

impl<T> Waiter<T> {
    /// Blocks until the slip is ended or dropped. Never called on a loop's thread (invariant I1).
    ///
    /// # Errors
    /// [`Lost`] when the slip was dropped.
    pub fn wait(self) -> Result<T, Lost> {
        self.0.recv().map_err(|_| Lost)
    }
}
