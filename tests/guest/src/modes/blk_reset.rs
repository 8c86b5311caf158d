//! `blk-reset`: resets a disk with requests in flight, again and again. Once the reset has returned nothing of the old
//! life may be written any more, neither a used ring nor a buffer, and the new life must work.

use crate::clock::{self, Patience};
use crate::modes::random::Random;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, F_RO, REQUEST_NS, S_OK, SECTOR, T_IN, T_OUT};
use crate::virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::virtio::pool::Pool;
use crate::virtio::ring::Ring;
use crate::words::Words;

/// How long the memory of the old life is left alone and watched.
const SETTLE_NS: u64 = 500_000;
/// The reset comes up to this long after the kick.
const LATEST_NS: u64 = 200_000;

/// What is in the buffers before the device fills them.
const POISON: u8 = 0xa5;

pub fn run(words: Words) -> Outcome {
    for (number, device) in blk::chosen(words) {
        let disk = Disk::start(number, device, blk::KNOWN & !F_INDIRECT_DESC, 256)?;
        let write = words.is("op", "mixed");
        if write && disk.has(F_RO) {
            fail!("disk {number} is read-only");
        }
        let (size, blocks) = (4096, disk.capacity_sectors * SECTOR / 4096);
        let spare = Ring::new(disk.ring.size(), disk.has(F_EVENT_IDX));
        let pool = Pool::new(disk, words.number("depth", 32), size, false)?;
        Lives { pool, spare, random: Random::new(number + 7), blocks, write }.many(words.number("count", 100))?;
    }
    Ok(())
}

/// A disk that lives on two queues in turn.
struct Lives {
    pool: Pool,
    spare: Ring,
    random: Random,
    blocks: u64,
    write: bool,
}

impl Lives {
    fn many(&mut self, count: u64) -> Outcome {
        let number = self.pool.disk.number;
        let (mut in_flight, mut unanswered, mut longest) = (0, 0, 0);
        let begin = clock::now();
        for _ in 0..count {
            // So that a late read shows, whatever is on the disk.
            self.pool.all_data().fill(POISON);
            self.send_all();
            clock::spin_ns(self.random.below(LATEST_NS));
            in_flight += self.unanswered();
            let before = clock::now();
            self.pool.disk.device.reset()?;
            longest = longest.max(clock::now() - before);
            unanswered += self.unanswered();
            self.rebirth()?;
        }
        self.pool.disk.device.reset()?;
        let ns = clock::now() - begin;
        say!(
            "reset: disk={number} resets={count} in_flight={in_flight} unanswered={unanswered} longest_ns={longest} \
             ns={ns}"
        );
        Ok(())
    }

    /// Requests that are not in the used ring: before the reset those in flight, after it those it dropped.
    fn unanswered(&self) -> u64 {
        u64::from(self.pool.depth()).saturating_sub(self.pool.disk.ring.used_waiting().into())
    }

    fn send_all(&mut self) {
        for slot in 0..self.pool.depth() {
            let kind = if self.write && slot % 2 == 1 { T_OUT } else { T_IN };
            // Reads and writes keep to their halves, so that what a read finds does not depend on a write.
            let half = self.blocks / 2;
            let block = self.random.below(half) + if kind == T_OUT { half } else { 0 };
            self.pool.offer(slot, kind, block * (4096 / SECTOR));
        }
        if self.pool.disk.ring.publish() {
            self.pool.disk.device.notify(0);
        }
    }

    /// Watches the old memory, starts the disk on the other queue, and has one round of requests there.
    fn rebirth(&mut self) -> Outcome {
        let number = self.pool.disk.number;
        let old_used = self.pool.disk.ring.used_area();
        let (used, data) = (old_used.digest(), self.pool.all_data().digest());
        clock::spin_ns(SETTLE_NS);
        if self.pool.all_data().digest() != data {
            fail!("disk {number}: a buffer was written after the reset");
        }
        let fresh = self.spare.renew();
        self.spare = self.pool.disk.start_on(fresh)?;
        self.pool.write_chains();
        self.send_all();
        let mut left = self.pool.depth();
        let mut patience = Patience::new(REQUEST_NS);
        while left > 0 {
            for _ in 0..self.pool.disk.ring.used_waiting() {
                let (slot, status) = self.pool.take()?;
                if status != S_OK {
                    fail!("disk {number}: slot {slot} ended with status {status} after a reset");
                }
                left -= 1;
            }
            if patience.is_over() {
                fail!("disk {number}: {left} requests do not complete after a reset");
            }
        }
        if old_used.digest() != used {
            fail!("disk {number}: the used ring of the old life was written after the reset");
        }
        Ok(())
    }
}
