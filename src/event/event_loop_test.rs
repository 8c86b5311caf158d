//! The guarantees of `docs/event-loop.md`, each under its number (T1 to T20), on real descriptors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::error::Result;

/// Counts its calls and does nothing else.
struct Counting {
    bell: Option<EventFd>,
    calls: Arc<AtomicU64>,
}

impl Handler for Counting {
    fn name(&self) -> &str {
        "counting"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        if let Some(bell) = self.bell.take() {
            cx.own(Box::new(bell), 7)?;
        }
        Ok(())
    }

    fn ready(&mut self, event: Event, _cx: &mut Cx<'_>) -> Result<Flow> {
        assert_eq!(event.tag, 7);
        self.calls.fetch_add(1, SeqCst);
        Ok(Flow::Done)
    }
}

#[test]
fn t11_a_thousand_rings_before_a_turn_are_one_call() {
    let mut event_loop = EventLoop::new().unwrap();
    let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let handler = Counting { bell: Some(bell.try_clone().unwrap()), calls: calls.clone() };
    event_loop.add(Box::new(handler)).unwrap();
    for _ in 0..1000 {
        bell.write(1).unwrap();
    }
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    bell.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    assert_eq!(calls.load(SeqCst), 2);
}
