//! A device that lends its first two rings to the test, which stands where the host's kernel would: it has the eventfds, and
//! says at each taking back how far it has come.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::event::{Cx, Event};
use crate::virtio::{Chain, Completions, Device, Lent, Page, RingSetup, Verdict};

/// One ring that is out.
pub struct Out {
    pub queue: usize,
    pub setup: RingSetup,
    pub next: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub broken: EventFd,
}

#[derive(Default)]
struct State {
    out: Vec<Out>,
    refuses: bool,
    /// Where each goes on when it is taken back.
    next: Vec<(usize, u16)>,
    /// `+` for a hand-over, `-` for a taking back, `r` and `s` for a device that is told to run and to stand.
    steps: String,
    taken: Vec<(usize, u16)>,
}

/// The device.
pub struct Lender(Arc<Mutex<State>>);

/// The test's hand on it.
pub struct Borrower(Arc<Mutex<State>>);

impl Lender {
    pub fn new() -> (Lender, Borrower) {
        let state = Arc::<Mutex<State>>::default();
        (Lender(state.clone()), Borrower(state))
    }
}

impl Borrower {
    /// What happened since the last call.
    pub fn steps(&self) -> String {
        std::mem::take(&mut self.0.lock().unwrap().steps)
    }

    /// Looks at the rings that are out.
    pub fn with<T>(&self, look: impl FnOnce(&[Out]) -> T) -> T {
        look(&self.0.lock().unwrap().out)
    }

    /// Says where each queue goes on when it is taken back.
    pub fn came_to(&self, next: &[(usize, u16)]) {
        self.0.lock().unwrap().next = next.to_vec();
    }

    /// Has the next hand-overs refused, or not.
    pub fn refuse(&self, refuses: bool) {
        self.0.lock().unwrap().refuses = refuses;
    }

    /// Queues and heads of the chains that reached the device itself.
    pub fn taken(&self) -> Vec<(usize, u16)> {
        self.0.lock().unwrap().taken.clone()
    }
}

/// A duplicate, as the kernel takes one.
fn duplicate(fd: &dyn AsRawFd) -> EventFd {
    #![allow(unsafe_code)] // A number becomes a descriptor.
    // SAFETY: the worker has it open for as long as the call goes on.
    let fd: OwnedFd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned().unwrap();
    // SAFETY: it is an eventfd's.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd)) }
}

impl Device for Lender {
    fn id(&self) -> &str {
        "lender"
    }

    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16, 8]
    }

    fn write_config(&self, _page: &Page) {}

    fn set_running(&mut self, running: bool, _cx: &mut Cx<'_>) {
        self.0.lock().unwrap().steps.push(if running { 'r' } else { 's' });
    }

    fn lends(&self) -> usize {
        2
    }

    fn hand_over(&mut self, rings: &[Lent<'_>]) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        assert!(state.out.is_empty(), "they are out");
        if state.refuses {
            return Err(Error::host("no, thank you"));
        }
        state.steps.push('+');
        state.out.extend(rings.iter().map(|lent| Out {
            queue: lent.queue,
            setup: lent.setup,
            next: lent.next,
            kick: duplicate(lent.kick),
            call: duplicate(lent.call),
            broken: duplicate(lent.broken),
        }));
        Ok(())
    }

    fn take_back(&mut self) -> Result<Vec<(usize, u16)>> {
        let mut state = self.0.lock().unwrap();
        assert!(!state.out.is_empty(), "they are here");
        state.steps.push('-');
        state.out.clear();
        Ok(state.next.clone())
    }

    fn attach(&mut self, _cx: &mut Cx<'_>) -> Result<()> {
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        false
    }

    fn process(&mut self, queue: usize, chain: &Chain, _now_ns: u64) -> Verdict {
        self.0.lock().unwrap().taken.push((queue, chain.head()));
        Verdict::Used(0)
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {}

    fn in_flight(&self) -> usize {
        0
    }
}
