//! What lives in a loop: the contract between the loop and those it calls.
//!
//! Called by the loop that holds it, on that loop's thread, one call at a time.

use super::cx::Cx;
use super::watch::Event;
use crate::error::Result;

/// What a handler has to say at the end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It did what there was to do.
    Done,
    /// Its budget is used up: call again after the others have had their turn (G10).
    More,
    /// It could do nothing. A stream that goes on waking it for nothing is masked (G7).
    Idle,
}

/// Something that lives in a loop and is called when what it watches becomes ready.
pub trait Handler: Send {
    /// What messages and `query-iothreads` call it.
    fn name(&self) -> &str;

    /// Called once, by the loop's thread, when the handler has its place: it sets up its watches here.
    ///
    /// # Errors
    /// Whatever keeps it from working; the handler is dropped and the error goes to whoever added it.
    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()>;

    /// Called when a watch is ready, and again while it returns [`Flow::More`]. Must not block, and does a bounded
    /// amount of work. A call without a cause is allowed: look, find nothing, return [`Flow::Idle`].
    ///
    /// # Errors
    /// Trouble that ends this handler and no other: it is dropped and the failure reported under its name (G22).
    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow>;
}
