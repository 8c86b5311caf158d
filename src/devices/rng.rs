//! virtio-rng (virtio 1.2, section 5.4): random bytes for the guest, from a character device of the host's.
//!
//! A buffer is filled in place, up to 64 KiB of it; a longer one comes back short, as the specification allows. A limit
//! on bytes a second is kept by the same bucket as a disk's: what may not go yet stays in the ring. A source that has
//! nothing is watched and not waited for (invariant I1); one that fails or ends is answered with an empty buffer and
//! logged at a limited rate. Which file it is, the builder says. Runs in the main loop (rule D1.3).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::error::Result;
use crate::event::{Cx, Event, Interest, Key};
use crate::memory::GuestRam;
use crate::qos::{Bucket, Direction, Limit, Limits, Quantity, Request, Wait};
use crate::sys::stream;
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict, pieces};

const QUEUE_SIZE: u16 = 64;
/// Bytes of one answer at most.
const MOST: u64 = 64 << 10;
/// Bytes read before the other handlers of the loop have their turn (G10): half a millisecond of the kernel's generator.
const BYTES_PER_TURN: u64 = 128 << 10;
/// One answer is at most this part of the bytes of a second, and so is what a second may have in excess twice: once for the
/// last answer, once for one that was let go and not used.
const ANSWERS_PER_SECOND: u64 = 256;
const SOURCE: u32 = DEVICE_TAG;

/// The device.
pub struct Rng {
    id: String,
    ram: Arc<GuestRam>,
    source: File,
    /// Bytes of one answer at most.
    most: u64,
    bucket: Bucket,
    /// Bytes that the bucket has let go and the source has not given.
    granted: u64,
    /// Bytes left of this turn.
    budget: u64,
    /// The source has nothing; its watch will tell.
    dry: bool,
    /// None for a file that cannot be watched: such a one always has something.
    watch: Option<Key>,
    log: FaultLog,
}

impl Rng {
    /// A device called `id` that reads `source`, which was opened with O_NONBLOCK, and gives at most so many bytes in any
    /// second (64 or more).
    pub fn new(id: &str, source: File, bytes_per_second: Option<u64>, ram: Arc<GuestRam>) -> Self {
        let mut limits = Limits::default();
        let mut most = MOST;
        if let Some(rate) = bytes_per_second {
            // A power of two: Linux takes 64 bytes at a time, and some of its versions (Debian's 6.1) wait for ever when a
            // part of an answer is left over.
            most = 1 << (rate / ANSWERS_PER_SECOND).clamp(1, MOST).ilog2();
            limits.each[Quantity::Bps as usize] = Limit { rate: rate - 2 * most, ..Limit::default() };
        }
        Rng {
            id: id.to_owned(),
            ram,
            source,
            most,
            bucket: Bucket::new(&limits),
            granted: 0,
            budget: BYTES_PER_TURN,
            dry: false,
            watch: None,
            log: FaultLog::default(),
        }
    }

    /// Fills up to `most` bytes of the chain's buffers. None if the first of them lies outside memory.
    fn fill(&self, chain: &Chain, most: u64) -> Option<io::Result<usize>> {
        let pieces = pieces(&self.ram, chain.writable(), 0, most);
        (pieces.bytes() > 0).then(|| stream::read(self.source.as_fd(), &pieces))
    }
}

impl Device for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn write_config(&self, _page: &Page) {
        // It has none.
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        // EPERM of a file that always has something.
        self.watch = cx.watch(&self.source, Interest::NONE, SOURCE).ok();
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        if event.is_hang_up()
            && let Some(watch) = self.watch.take()
        {
            // It is not told again; what the source says from now on is its last word.
            cx.unwatch(watch);
        }
        std::mem::take(&mut self.dry)
    }

    fn process(&mut self, _queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        if self.dry {
            return Verdict::Later(Direction::Read, Wait::UNTIL_TOLD);
        }
        if self.budget == 0 {
            return Verdict::Later(Direction::Read, Wait { until_ns: now_ns, other_may_go: false });
        }
        let room: u64 = chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum();
        let wanted = room.min(self.most);
        if wanted == 0 {
            self.log.warn(now_ns, &self.id, &"a buffer with no room for a byte");
            return Verdict::Used(0);
        }
        if self.granted < wanted {
            if let Err(wait) = self.bucket.ask(now_ns, &Request::new(Direction::Read, wanted - self.granted)) {
                return Verdict::Later(Direction::Read, wait);
            }
            self.granted = wanted;
        }
        self.budget = self.budget.saturating_sub(wanted);
        match self.fill(chain, wanted) {
            Some(Ok(bytes)) if bytes > 0 => {
                self.granted = self.granted.saturating_sub(bytes as u64);
                return Verdict::Used(bytes as u32);
            }
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock && self.watch.is_some() => {
                self.dry = true;
                return Verdict::Later(Direction::Read, Wait::UNTIL_TOLD);
            }
            Some(Ok(_)) => self.log.warn(now_ns, &self.id, &"the source of random numbers has come to its end"),
            Some(Err(e)) => self.log.warn(now_ns, &self.id, &format!("read random numbers: {e}")),
            None => self.log.warn(now_ns, &self.id, &"a buffer outside guest memory"),
        }
        Verdict::Used(0)
    }

    fn reap(&mut self, cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {
        self.budget = BYTES_PER_TURN;
        if let Some(watch) = self.watch {
            let interest = if self.dry { Interest::READ } else { Interest::NONE };
            if let Err(e) = cx.set_interest(watch, interest) {
                log::error!("{}: {e}", self.id);
            }
        }
    }

    /// All work is done on the spot.
    fn in_flight(&self) -> usize {
        0
    }
}

#[cfg(test)]
#[path = "rng_test.rs"]
mod tests;
