//! `Device`: what makes a block device a block device.
//!
//! The trait is a contract between one device file and the [`super::Worker`] that owns it, which is written once for
//! all devices. A device never sees registers, kicks, interrupts, resets in the making, or other threads. All calls
//! come from the worker's loop, on one thread, none of them re-entrant, and none may block.

use std::ops::Range;

use super::fault::Fault;
use super::lent::Lent;
use super::page::Page;
use super::ring::{Chain, Ring};
use crate::error::Result;
use crate::event::{Cx, Event};
use crate::qos::{Direction, Wait};

/// What a device says of a chain it was handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is finished; so many bytes were written into it.
    Used(u32),
    /// It is in flight; [`Device::reap`] gives it back.
    Pending,
    /// It may not go yet. The ring keeps it and hands it over again when the wait is over, before any that came after
    /// it and goes its way; those of the other direction, too, if they may not go either.
    Later(Direction, Wait),
}

/// What waiting cost since the ring was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Chains that were in the ring while it was told to wait, each counted once.
    pub chains: u64,
    /// How long the first in the row was held back, summed over those that have gone since, in nanoseconds.
    pub total_ns: u64,
    /// The longest of these, in nanoseconds.
    pub longest_ns: u64,
}

/// A virtio device without its transport.
pub trait Device: Send + 'static {
    /// The id its user gave it.
    fn id(&self) -> &str;

    /// The device number (virtio 1.2, section 5).
    fn kind(&self) -> u32;

    /// The feature bits it offers, without those of the transport and the ring, which are added to them.
    fn features(&self) -> u64;

    /// The greatest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Writes the whole configuration space. Called once, before any driver looks.
    fn write_config(&self, page: &Page);

    /// Changes `page`, which holds the whole configuration, to the one that the driver is to read first when this device takes
    /// the place of another. False if there is none: the whole configuration is announced at once.
    fn write_interim_config(&self, _page: &Page) -> bool {
        false
    }

    /// The driver has read the interim configuration, or (`whole`) the whole one after it.
    fn config_read(&mut self, _whole: bool) {}

    /// The bytes of the configuration space that the driver may write: whole words, which the device itself does not
    /// write, and which are zero again for the next driver. What it writes elsewhere is dropped.
    fn driver_writes(&self) -> &'static [Range<usize>] {
        &[]
    }

    /// A driver has taken the device and agreed on `features`; its chains come from now on. `page` holds what it wrote
    /// into the configuration space.
    fn begin(&mut self, _features: u64, _page: &Page, _now_ns: u64) {}

    /// Whether it may work from now on: a driver has it and has broken no rule, and the machine is not stopped. Called at
    /// every change, after [`Device::begin`]. A device that takes in what comes from outside by itself leaves it there
    /// meanwhile, and touches no guest memory.
    fn set_running(&mut self, _running: bool, _cx: &mut Cx<'_>) {}

    /// How many of its queues, from the first on, somebody else serves for it, such as the host's kernel. Their chains are
    /// never handed to [`Device::process`].
    fn lends(&self) -> usize {
        0
    }

    /// Gives the rings of these queues to whoever serves them: those that it lends and that the driver has set up. Called
    /// after [`Device::set_running`] has told that it runs. Each is to be looked at once, whether or not it was kicked: what
    /// came before is not told again.
    ///
    /// # Errors
    /// What keeps them from being served. None is out then, and the driver is told that the device needs a reset.
    fn hand_over(&mut self, _rings: &[Lent<'_>]) -> Result<()> {
        Ok(())
    }

    /// Takes them back: the number of each queue, and the index of its available ring where to go on. When it returns,
    /// nobody touches them, every chain that was taken is given back, and every interrupt that is due has been called
    /// for. Called before [`Device::set_running`] tells that it does not run any more.
    ///
    /// # Errors
    /// What kept it from that.
    fn take_back(&mut self) -> Result<Vec<(usize, u16)>> {
        Ok(Vec::new())
    }

    /// The driver is gone, and with it all chains that were not given back.
    fn reset(&mut self) {}

    /// Called once, when its worker has its place in a loop. Sets up what the device itself waits for; its tags are
    /// told to [`Device::ready`] and must be [`super::DEVICE_TAG`] or above.
    ///
    /// # Errors
    /// What the host refused. The device then answers nothing.
    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()>;

    /// One of the device's own watches was ready; [`Device::reap`] comes next. True if chains that were told to wait may
    /// ask again: they are handed over at once.
    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool;

    /// One chain of queue `queue`. A chain that is `Pending` is the device's until it gives it back, once. `now_ns` is
    /// the time of the loop's turn.
    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict;

    /// Sends out what was queued and gives back, through `completions`, what has finished since the last call. Called
    /// once after every batch of [`Device::process`], and when one of the device's own watches was ready. The place to
    /// change what the device's watches are told of.
    fn reap(&mut self, cx: &mut Cx<'_>, completions: &mut Completions<'_>);

    /// What telling chains to wait has cost; called after a batch in which it cost something. A device that never says
    /// [`Verdict::Later`] is never told.
    fn held(&mut self, _held: Held) {}

    /// Chains it holds. At zero, pause and reset are complete.
    fn in_flight(&self) -> usize;

    /// Whether it only keeps a place for another device. It answers each chain at once, and before another takes its
    /// place also those that still lie in the rings: they were sent when nothing was there, or to what was there before.
    fn is_vacant(&self) -> bool {
        false
    }

    /// Makes durable what was written through it. It may wait: called on a thread of its own, when the device is out of
    /// its slot and has nothing in flight.
    ///
    /// # Errors
    /// What the host could not keep.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Where a device puts the chains it has finished, and what it changes in its configuration space.
pub struct Completions<'a> {
    rings: &'a mut [Option<Ring>],
    page: &'a Page,
    /// The driver is still to read the interim configuration: it finds the whole one, with every change, after it.
    interim: bool,
    configured: bool,
    fault: Option<Fault>,
}

impl<'a> Completions<'a> {
    pub(super) fn new(rings: &'a mut [Option<Ring>], page: &'a Page, interim: bool) -> Self {
        Completions { rings, page, interim, configured: false, fault: None }
    }

    /// Replaces bytes of the configuration space from `offset` on, and tells the driver.
    pub fn set_config(&mut self, offset: usize, bytes: &[u8]) {
        if !self.interim {
            self.page.set_config(offset, bytes);
            self.configured = true;
        }
    }

    /// Gives a chain back with the number of bytes that were written into it. One that the device does not have is a
    /// fault: the device's own, answered as if it were the driver's.
    pub fn give_back(&mut self, queue: usize, head: u16, len: u32) {
        // A ring lives until its last chain is back.
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        if let Err(fault) = ring.map_or(Err(Fault::HeadRange(head)), |ring| ring.give_back(head, len)) {
            self.fault = Some(fault);
        }
    }

    /// Gives several chains back in this order, so that the driver sees all of them at once.
    pub fn give_back_together(&mut self, queue: usize, chains: &[(u16, u32)]) {
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        if let Err(fault) = ring.map_or(Err(Fault::HeadRange(0)), |ring| ring.give_back_together(chains)) {
            self.fault = Some(fault);
        }
    }

    /// Whether the queue has chains that will be handed over without anything that the driver does.
    pub fn has_more(&self, queue: usize) -> bool {
        self.rings.get(queue).and_then(Option::as_ref).is_some_and(Ring::goes_on)
    }

    /// Whether the configuration has changed, or what went wrong.
    pub(super) fn outcome(self) -> std::result::Result<bool, Fault> {
        self.fault.map_or(Ok(self.configured), Err)
    }
}
