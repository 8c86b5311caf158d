//! `Lending`: rings that somebody else serves for a device, such as the host's kernel.
//!
//! From one [`Device::hand_over`] to the next [`Device::take_back`] nobody here touches them. Kicks go from KVM to whoever has
//! them, past the loop, which never watches them. What comes back the other way is heard by the worker: a call, which is an
//! interrupt for the driver, and the word that a ring is broken. Which rings are lent, and to whom, is the device's. Worker's
//! thread only.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Device;
use super::ring::{Ring, RingSetup};
use crate::error::{Context, Error, Result};
use crate::event::{Cx, Key, Signal};

/// One ring as it is handed over. The eventfds are the worker's: whoever wants them for longer takes duplicates.
pub struct Lent<'a> {
    /// The number of its queue.
    pub queue: usize,
    /// What the driver wrote, which lies in guest memory.
    pub setup: RingSetup,
    /// The index of the available ring where to go on.
    pub next: u16,
    /// Rung by the driver.
    pub kick: &'a dyn AsRawFd,
    /// To be rung when the driver wants an interrupt.
    pub call: &'a dyn AsRawFd,
    /// To be rung when the driver has broken the rules.
    pub broken: &'a dyn AsRawFd,
}

/// The rings of one life of a driver's that are lent whenever the device runs.
pub(super) struct Lending {
    /// By the numbers of their queues.
    kicks: Vec<(usize, Signal)>,
    call: Arc<EventFd>,
    broken: Arc<EventFd>,
    watches: [Key; 2],
    out: bool,
}

impl Lending {
    /// Of the queues with these kicks. Calls are told as `call`, broken rings as `broken`.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(kicks: Vec<(usize, Signal)>, call: u32, broken: u32, cx: &mut Cx<'_>) -> Result<Self> {
        let own = |tag, cx: &mut Cx<'_>| -> Result<(Arc<EventFd>, Key)> {
            let fd = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context(|| "make an eventfd")?);
            let key = cx.own(Box::new(fd.clone()), tag)?;
            Ok((fd, key))
        };
        let (call, call_key) = own(call, cx)?;
        let (broken, broken_key) = own(broken, cx)?;
        Ok(Lending { kicks, call, broken, watches: [call_key, broken_key], out: false })
    }

    /// Whether the ring of that queue is in somebody else's hands at the moment.
    pub fn has(&self, queue: usize) -> bool {
        self.out && self.kicks.iter().any(|(lent, _)| *lent == queue)
    }

    /// Hands all of them over.
    pub fn hand_over(&mut self, device: &mut dyn Device, rings: &[Option<Ring>]) -> Result<()> {
        let lent = self.kicks.iter().filter_map(|(queue, kick)| {
            let ring = rings.get(*queue)?.as_ref()?;
            let (kick, call, broken) = (&**kick, &*self.call, &*self.broken);
            Some(Lent { queue: *queue, setup: ring.setup(), next: ring.next(), kick, call, broken })
        });
        device.hand_over(&lent.collect::<Vec<_>>())?;
        self.out = true;
        Ok(())
    }

    /// Takes them back, if they are out.
    pub fn take_back(&mut self, device: &mut dyn Device, rings: &mut [Option<Ring>]) -> Result<()> {
        if !std::mem::take(&mut self.out) {
            return Ok(());
        }
        for (queue, next) in device.take_back()? {
            if let Some(Some(ring)) = rings.get_mut(queue) {
                ring.go_on_at(next).map_err(|fault| Error::host(format!("queue {queue}: {fault}")))?;
            }
        }
        Ok(())
    }

    /// Ends the watches, and with the kicks KVM's knowledge of them.
    pub fn end(self, cx: &mut Cx<'_>) {
        self.watches.into_iter().for_each(|watch| cx.unwatch(watch));
    }
}
