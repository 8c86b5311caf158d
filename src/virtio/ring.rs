//! `Ring`: one live virtqueue (virtio 1.2, section 2.7), and the rules that keep a driver from stopping us.
//!
//! Made by Activate with a configuration that never changes (CVE-2026-5747), dropped by Reset. A popped head is in
//! flight until it is given back; one that is made available meanwhile is refused (CVE-2026-45782). Every popped head
//! is given back exactly once, malformed chains too. [`Ring::serve`] is the one notification dance, for all devices, and
//! keeps aside the chains that their device does not let go yet: not in flight, so neither a pause nor a reset waits for
//! them.
//! The split ring's layout is the crate virtio-queue's business. Worker's thread only.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::fence;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

use super::device::{Held, Verdict};
use super::fault::Fault;
use crate::memory::GuestRam;
use crate::qos::{Direction, Wait};

/// What the driver wrote into the queue's registers before it set it ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors: a power of two up to the device's maximum.
    pub size: u16,
    /// QueueReady was written with 1.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring (driver area).
    pub available: u64,
    /// Guest physical address of the used ring (device area).
    pub used: u64,
}

/// One descriptor of a chain. The address has not been checked against guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// Copies what follows the first `skip` bytes of `buffers`. The number of bytes, which is less than asked for where the
/// buffers end early or leave guest memory.
pub fn gather(ram: &GuestRam, buffers: &[Buffer], mut skip: u64, into: &mut [u8]) -> usize {
    let mut have = 0;
    for buffer in buffers {
        if have == into.len() {
            break;
        }
        let skipped = skip.min(buffer.len.into());
        skip -= skipped;
        let take = (into.len() - have).min((u64::from(buffer.len) - skipped) as usize);
        let Some(from) = buffer.address.0.checked_add(skipped) else { break };
        // One lookup, where `read_slice` would prepare to cross regions: they do not touch.
        let Ok(slice) = GuestMemoryBackend::get_slice(ram, GuestAddress(from), take) else { break };
        have += slice.copy_to(&mut into[have..have + take]);
    }
    have
}

/// A popped chain: its buffers in order, first those the device reads, then those it writes (section 2.7.4.2).
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    readable: usize,
}

impl Chain {
    /// The index of the first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers the device may read.
    pub fn readable(&self) -> &[Buffer] {
        &self.buffers[..self.readable]
    }

    /// The buffers the device may write.
    pub fn writable(&self) -> &[Buffer] {
        &self.buffers[self.readable..]
    }
}

/// What [`Ring::serve`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The ring is empty and the driver will kick.
    All,
    /// The budget is used up; the driver will not kick for what is left.
    More,
    /// What is left is to wait.
    Held {
        /// When the first of it may ask again, in nanoseconds.
        until_ns: u64,
        /// Whether the driver will kick for what it adds meanwhile. If not, nothing that it adds could go.
        kicks: bool,
        /// Whether any chain has gone.
        went: bool,
    },
}

/// The chains of one direction that were told to wait, in the order in which they came.
#[derive(Default)]
struct Aside {
    chains: VecDeque<Chain>,
    /// Since when the first of them has been held back; none if it has not been asked for.
    since_ns: Option<u64>,
}

/// What a call of `serve` has been told to wait for.
#[derive(Default)]
struct Waits {
    until_ns: Option<u64>,
    directions: [bool; 2],
    /// Some chain has gone all the same.
    went: bool,
}

impl Waits {
    fn note(&mut self, direction: Direction, wait: Wait) {
        self.until_ns = Some(self.until_ns.map_or(wait.until_ns, |until_ns| until_ns.min(wait.until_ns)));
        self.directions[direction as usize] = true;
        if !wait.other_may_go {
            self.directions = [true; 2];
        }
    }

    /// Nothing may go.
    fn all(&self) -> bool {
        self.directions == [true; 2]
    }

    /// What a call leaves behind that has come to its end.
    fn outcome(&self) -> Served {
        let (kicks, went) = (!self.all(), self.went);
        self.until_ns.map_or(Served::All, |until_ns| Served::Held { until_ns, kicks, went })
    }
}

/// One virtqueue in use.
pub struct Ring {
    queue: Queue,
    ram: Arc<GuestRam>,
    in_flight: Box<[bool]>,
    flying: usize,
    /// How far it had been given back when the driver was last thought of.
    decided: u16,
    /// The last call of `serve` ended by its budget.
    has_more: bool,
    chain: Chain,
    aside: [Aside; 2],
    /// Chains whose memory is free for the next that is set aside.
    spare: Vec<Chain>,
    /// How many of those available and not popped have been counted as held back.
    counted: u16,
    held: Held,
}

impl Ring {
    /// A ring on the driver's configuration.
    ///
    /// # Errors
    /// [`Fault::RingMemory`] when the size is no power of two up to `max_size`, an address is misaligned, or a ring
    /// does not lie in guest memory.
    pub fn new(setup: &RingSetup, max_size: u16, event_idx: bool, ram: Arc<GuestRam>) -> Result<Self, Fault> {
        let bad = |_| Fault::RingMemory;
        let mut queue = Queue::new(max_size).map_err(bad)?;
        queue.try_set_size(setup.size).map_err(bad)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(bad)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(bad)?;
        queue.try_set_used_ring_address(GuestAddress(setup.used)).map_err(bad)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The crate's own check says the same and writes a line to the log each time a guest asks for it.
        let size = usize::from(setup.size);
        let inside =
            |address: u64, len: usize, access| GuestMemory::check_range(&*ram, GuestAddress(address), len, access);
        let ok = inside(setup.descriptors, 16 * size, Permissions::Read)
            && inside(setup.available, 6 + 2 * size, Permissions::Read)
            && inside(setup.used, 6 + 8 * size, Permissions::Write)
            && setup.available != 0;
        if !ok {
            return Err(Fault::RingMemory);
        }
        let chain = Chain { head: 0, buffers: Vec::with_capacity(size), readable: 0 };
        Ok(Ring {
            queue,
            ram,
            in_flight: vec![false; size].into_boxed_slice(),
            flying: 0,
            decided: 0,
            has_more: false,
            chain,
            aside: Default::default(),
            spare: Vec::new(),
            counted: 0,
            held: Held::default(),
        })
    }

    /// Descriptors, and so the most chains that can be in it.
    pub fn size(&self) -> usize {
        self.in_flight.len()
    }

    /// What the driver wrote.
    pub fn setup(&self) -> RingSetup {
        RingSetup {
            size: self.queue.size(),
            ready: true,
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        }
    }

    /// The index of the available ring where it goes on.
    pub fn next(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on at this index of the available ring, after somebody else has served it and given back all that was taken;
    /// the used ring says how far that is.
    ///
    /// # Errors
    /// [`Fault::RingMemory`].
    pub fn go_on_at(&mut self, next: u16) -> Result<(), Fault> {
        let used = self.queue.used_idx(&*self.ram, Acquire).map_err(|_| Fault::RingMemory)?.0;
        self.queue.set_next_avail(next);
        self.queue.set_next_used(used);
        self.decided = used;
        Ok(())
    }

    /// Chains popped and not given back, those set aside among them.
    pub fn in_flight(&self) -> usize {
        self.flying
    }

    /// Hands chains to `process` until the ring is empty, `budget` is used up, or nothing may go: first those that were
    /// set aside, then new ones. When the ring is empty it asks the driver for a kick and looks once more, so that no
    /// chain is overlooked between the two (section 2.7.10.1); when nothing may go it does not ask, so that what the
    /// driver adds meanwhile costs nothing. Each look counts like a chain, so a driver that moves its index to and fro
    /// keeps nobody here.
    ///
    /// # Errors
    /// A [`Fault`], after which the ring must not be served again.
    pub fn serve(
        &mut self,
        budget: usize,
        now_ns: u64,
        mut process: impl FnMut(&Chain) -> Verdict,
    ) -> Result<Served, Fault> {
        let ram = self.ram.clone();
        let outside = |_| Fault::RingMemory;
        self.queue.disable_notification(&*ram).map_err(outside)?;
        self.has_more = false;
        let mut waits = Waits::default();
        let mut left = budget;
        if self.is_holding() {
            left = self.serve_aside(left, now_ns, &mut waits, &mut process)?;
        }
        while left > 0 && !waits.all() {
            left -= 1;
            if self.pop(&ram)? {
                match process(&self.chain) {
                    Verdict::Used(len) => {
                        waits.went = true;
                        self.give_back(self.chain.head, len)?;
                    }
                    Verdict::Pending => waits.went = true,
                    Verdict::Later(direction, wait) => {
                        waits.note(direction, wait);
                        self.set_aside(direction, now_ns);
                    }
                }
                self.counted = self.counted.saturating_sub(1);
            } else if !self.queue.enable_notification(&*ram).map_err(outside)? {
                return Ok(waits.outcome());
            }
        }
        if !waits.all() {
            self.has_more = true;
            return Ok(Served::More);
        }
        self.count_behind(&ram)?;
        Ok(waits.outcome())
    }

    /// Hands over what was set aside, each direction in its order up to the first that must still wait. What is left of
    /// the budget.
    fn serve_aside(
        &mut self,
        mut left: usize,
        now_ns: u64,
        waits: &mut Waits,
        process: &mut impl FnMut(&Chain) -> Verdict,
    ) -> Result<usize, Fault> {
        // Who has been held back for longer asks first, for there may be a limit that both share.
        let since_ns = |direction: usize| self.aside[direction].since_ns.unwrap_or(u64::MAX);
        let first = usize::from(since_ns(1) < since_ns(0));
        for direction in [first, first ^ 1] {
            while left > 0 && !waits.directions[direction] {
                let Some(chain) = self.aside[direction].chains.pop_front() else { break };
                left -= 1;
                match process(&chain) {
                    Verdict::Used(len) => self.give_back(chain.head, len)?,
                    Verdict::Pending => {}
                    // The driver may have turned it round meanwhile: it keeps its place.
                    Verdict::Later(turned, wait) => {
                        waits.note(turned, wait);
                        let aside = &mut self.aside[direction];
                        aside.chains.push_front(chain);
                        aside.since_ns.get_or_insert(now_ns);
                        break;
                    }
                }
                waits.went = true;
                if let Some(since_ns) = self.aside[direction].since_ns.take() {
                    let wait_ns = now_ns.saturating_sub(since_ns);
                    self.held.total_ns += wait_ns;
                    self.held.longest_ns = self.held.longest_ns.max(wait_ns);
                }
                self.spare.push(chain);
            }
        }
        Ok(left)
    }

    /// Keeps the chain that was popped last.
    fn set_aside(&mut self, direction: Direction, now_ns: u64) {
        let chain = std::mem::replace(&mut self.chain, self.spare.pop().unwrap_or_default());
        let aside = &mut self.aside[direction as usize];
        if aside.chains.is_empty() {
            aside.since_ns = Some(now_ns);
        }
        aside.chains.push_back(chain);
        self.held.chains += u64::from(self.counted == 0);
    }

    /// Counts the chains that wait in the ring itself behind those set aside, if they have not been counted before.
    fn count_behind(&mut self, ram: &GuestRam) -> Result<(), Fault> {
        let index = self.queue.avail_idx(ram, Acquire).map_err(|_| Fault::RingMemory)?;
        let behind = index.0.wrapping_sub(self.queue.next_avail()).min(self.queue.size());
        self.held.chains += u64::from(behind.saturating_sub(self.counted));
        self.counted = behind;
        Ok(())
    }

    /// Whether chains are set aside.
    pub fn is_holding(&self) -> bool {
        self.aside.iter().any(|aside| !aside.chains.is_empty())
    }

    /// Whether it will be served again without a kick: chains are set aside, or the budget was used up.
    pub fn goes_on(&self) -> bool {
        self.has_more || self.is_holding()
    }

    /// What waiting has cost since the last call; none if nothing.
    pub fn take_held(&mut self) -> Option<Held> {
        (self.held != Held::default()).then(|| std::mem::take(&mut self.held))
    }

    /// Puts a chain in the used ring with the number of bytes that the device wrote to it.
    ///
    /// # Errors
    /// [`Fault::HeadRange`] for a head that is not in flight: a mistake of the device's, answered like a driver's.
    pub fn give_back(&mut self, head: u16, len: u32) -> Result<(), Fault> {
        self.give_back_together(&[(head, len)])
    }

    /// Puts several chains in the used ring, in this order, and shows them to the driver all at once: what belongs together
    /// is never seen in part (section 5.1.6.4.1).
    ///
    /// # Errors
    /// As [`Ring::give_back`]; the driver sees none of them then.
    pub fn give_back_together(&mut self, chains: &[(u16, u32)]) -> Result<(), Fault> {
        let outside = |_| Fault::RingMemory;
        let mut next = self.queue.next_used();
        for &(head, len) in chains {
            if !self.land(head) {
                return Err(Fault::HeadRange(head));
            }
            let entry = self.queue.used_ring() + 4 + 8 * u64::from(next % self.queue.size());
            let element = u64::from(head) | u64::from(len) << 32;
            self.ram.write_obj(element.to_le(), GuestAddress(entry)).map_err(outside)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.ram.store(next.to_le(), GuestAddress(self.queue.used_ring() + 2), Release).map_err(outside)
    }

    /// Whether the driver wants an interrupt for what was given back since the last call (section 2.7.7.2).
    ///
    /// # Errors
    /// [`Fault::RingMemory`].
    pub fn needs_interrupt(&mut self) -> Result<bool, Fault> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.decided, new);
        if new == old {
            return Ok(false);
        }
        // The driver publishes its wish and then looks for what came back; we publish that and then look at its wish.
        fence(SeqCst);
        let event_idx = self.queue.event_idx_enabled();
        let offset = if event_idx { 4 + 2 * u64::from(self.queue.size()) } else { 0 };
        let word = self.ram.load(GuestAddress(self.queue.avail_ring() + offset), Acquire);
        let word = u16::from_le(word.map_err(|_| Fault::RingMemory)?);
        if event_idx {
            return Ok(new.wrapping_sub(word).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(u32::from(word) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Where both sides stand; of a ring that is `lent`, what guest memory says of it.
    pub fn dump(&self, lent: bool) -> String {
        let index = |read: Result<std::num::Wrapping<u16>, _>| {
            read.map_or_else(|_: virtio_queue::Error| "unreadable".to_string(), |index| index.to_string())
        };
        if lent {
            return format!(
                "lent, driver has made available up to {}, given back up to {}",
                index(self.queue.avail_idx(&*self.ram, Acquire)),
                index(self.queue.used_idx(&*self.ram, Acquire))
            );
        }
        let aside: usize = self.aside.iter().map(|aside| aside.chains.len()).sum();
        format!(
            "driver has made available up to {}, taken up to {}, given back up to {} (driver sees {}), {} in flight{}",
            index(self.queue.avail_idx(&*self.ram, Acquire)),
            self.queue.next_avail(),
            self.queue.next_used(),
            index(self.queue.used_idx(&*self.ram, Acquire)),
            self.flying - aside,
            if aside > 0 { format!(", {aside} set aside") } else { String::new() }
        )
    }

    /// Takes the next chain into `self.chain`. False when there is none.
    fn pop(&mut self, ram: &GuestRam) -> Result<bool, Fault> {
        let size = self.queue.size();
        let Some(descriptors) = self.queue.iter(ram).map_err(|_| Fault::AvailIndex)?.next() else { return Ok(false) };
        let head = descriptors.head_index();
        let flag = self.in_flight.get_mut(usize::from(head)).ok_or(Fault::HeadRange(head))?;
        if std::mem::replace(flag, true) {
            return Err(Fault::HeadInFlight(head));
        }
        self.flying += 1;
        let chain = &mut self.chain;
        chain.head = head;
        chain.readable = 0;
        chain.buffers.clear();
        // The iterator stops without a word at whatever is wrong, so the last descriptor must have said it was last.
        let mut ended = false;
        for descriptor in descriptors {
            if chain.buffers.len() == usize::from(size) {
                ended = false;
                break;
            }
            if !descriptor.is_write_only() {
                if chain.readable != chain.buffers.len() {
                    ended = false;
                    break;
                }
                chain.readable += 1;
            }
            chain.buffers.push(Buffer { address: descriptor.addr(), len: descriptor.len() });
            ended = !descriptor.has_next();
        }
        if ended {
            return Ok(true);
        }
        // Given back all the same: a driver that resets only this queue must find every head of its own.
        self.give_back(head, 0)?;
        Err(Fault::Chain(head))
    }

    /// Takes a head out of flight; false if it was not in flight.
    fn land(&mut self, head: u16) -> bool {
        match self.in_flight.get_mut(usize::from(head)) {
            Some(flag) if *flag => {
                *flag = false;
                self.flying -= 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod tests;
