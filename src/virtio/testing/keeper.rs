//! A device that keeps a place: it answers each chain at once, and says that it does. One that the host refuses what it
//! needs is the other kind.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{Error, Result};
use crate::event::{Cx, Event};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, Page, Verdict};

/// The heads that a device was handed, in order.
pub type Heads = Arc<Mutex<Vec<u16>>>;

/// The device.
pub struct Keeper {
    heads: Heads,
    queue_sizes: Vec<u16>,
    refused: bool,
}

impl Keeper {
    pub fn new(queue_sizes: &[u16]) -> (Keeper, Heads) {
        let heads = Heads::default();
        (Keeper { heads: heads.clone(), queue_sizes: queue_sizes.to_vec(), refused: false }, heads)
    }

    /// One that finds a first descriptor and no second.
    pub fn refused(queue_sizes: &[u16]) -> Keeper {
        Keeper { refused: true, ..Keeper::new(queue_sizes).0 }
    }
}

impl Device for Keeper {
    fn id(&self) -> &str {
        "keeper"
    }

    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn write_config(&self, _page: &Page) {}

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        if self.refused {
            let bell = EventFd::new(EFD_NONBLOCK).unwrap();
            bell.write(1).unwrap();
            cx.own(Box::new(bell), DEVICE_TAG + 7)?;
            return Err(Error::host("no descriptor left"));
        }
        Ok(())
    }

    fn ready(&mut self, event: Event, _cx: &mut Cx<'_>) -> bool {
        panic!("it waits for nothing, and is told of {event:?}");
    }

    fn process(&mut self, _queue: usize, chain: &Chain, _now_ns: u64) -> Verdict {
        self.heads.lock().unwrap().push(chain.head());
        Verdict::Used(0)
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn is_vacant(&self) -> bool {
        !self.refused
    }
}
