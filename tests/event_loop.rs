//! What a loop must not do while it works: allocate (G23). In a process of its own, for it counts every allocation.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use loopvisor::error::Result;
use loopvisor::event::{Cx, Event, EventLoop, Flow, Handler, Key, Receiver, Sender, Wait, channel};
use vmm_sys_util::eventfd::EventFd;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts what this thread asks for.
struct Counting;

// SAFETY: every call is handed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps alloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: `place` came from `alloc` above, hence from the system's allocator.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Has a bell, a timer that it arms anew at each call, a channel, and more to do after every call.
struct Busy {
    bell: Arc<EventFd>,
    messages: Receiver<u64>,
    timer: Option<Key>,
}

impl Handler for Busy {
    fn name(&self) -> &str {
        "busy"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.own(Box::new(self.bell.clone()), 0)?;
        cx.listen(&self.messages, 1);
        self.timer = Some(cx.timer(2)?);
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        while self.messages.receive().is_some() {}
        if let Some(timer) = self.timer {
            cx.arm(timer, cx.now_ns())?;
        }
        Ok(if event.tag == 0 { Flow::More } else { Flow::Done })
    }
}

#[test]
fn g23_a_turn_of_a_warm_loop_allocates_nothing() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut others: Vec<(Arc<EventFd>, Sender<u64>)> = Vec::new();
    for _ in 0..300 {
        let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (sender, messages) = channel();
        event_loop.add(Box::new(Busy { bell: bell.clone(), messages, timer: None })).unwrap();
        others.push((bell, sender));
    }
    let mut turn = |rounds: u64| -> usize {
        let round = |event_loop: &mut EventLoop, round: u64| {
            for (bell, sender) in &others {
                bell.write(1).unwrap();
                sender.send(round).unwrap();
            }
            event_loop.turn(Wait::Block).unwrap()
        };
        (0..rounds).map(|number| round(&mut event_loop, number)).sum()
    };
    turn(20);
    let before = ALLOCATIONS.get();
    assert!(before > 300, "the allocator counts");
    assert!(turn(50) > 300 * 50);
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
