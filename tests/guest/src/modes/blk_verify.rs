//! `blk-verify`: a load in which every request is checked: a write carries its sector and a sequence number, a read must
//! find the last one written, and each request completes exactly once. At the end everything written is read again.

use crate::clock::{self, Patience};
use crate::memory::{self, Dma};
use crate::modes::random::Random;
use crate::serial;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, F_RO, S_OK, SECTOR, T_IN, T_OUT};
use crate::virtio::mmio::F_INDIRECT_DESC;
use crate::virtio::pool::Pool;
use crate::words::Words;

const MOST_DISKS: usize = 11;
/// Between two looks at the serial port, which cost an exit each.
const LOOK_NS: u64 = 10_000_000;
/// Without any completion for this long, of time the processor ran, the load has failed.
const SILENCE_NS: u64 = 30_000_000_000;
/// Tries to find a block that no request in flight touches.
const TRIES: u32 = 64;

/// What is next for a lane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Random reads and writes.
    Load,
    /// No more of them.
    Drain,
    /// Reads of all blocks in order; holds the next one.
    Sweep(u64),
}

/// One disk, and what each of its blocks must hold.
struct Lane {
    pool: Pool,
    size: u64,
    random: Random,
    phase: Phase,
    /// The sequence number last written to a block; 0 is never.
    sequence: &'static mut [u32],
    /// Whether a request in flight touches the block.
    busy: &'static mut [u8],
    /// What a slot has in flight: block and type.
    sent: &'static mut [(u64, u32)],
    in_flight: u64,
    reads: u64,
    writes: u64,
    checked: u64,
}

pub fn run(words: Words) -> Outcome {
    let mut lanes: [Option<Lane>; MOST_DISKS] = [const { None }; MOST_DISKS];
    for ((number, device), lane) in blk::chosen(words).zip(&mut lanes) {
        let disk = Disk::start(number, device, blk::KNOWN & !F_INDIRECT_DESC, 1024)?;
        *lane = Some(Lane::new(disk, words)?);
    }
    let lanes: &mut [Option<Lane>] = &mut lanes;
    if lanes.iter().flatten().count() == 0 {
        fail!("no such disk");
    }
    let count = words.get("count").map(|_| words.number("count", 0));
    let until = words.get("ms").map(|_| clock::now() + words.number("ms", 0) * 1_000_000);
    say!("verify: begin");
    let begin = clock::now();
    let mut look = begin;
    turn_until(lanes, |lanes| {
        let now = clock::now();
        let mut over = count.is_some_and(|count| lanes.iter().flatten().all(|lane| lane.reads + lane.writes >= count));
        over |= until.is_some_and(|until| now >= until);
        if now - look >= LOOK_NS {
            look = now;
            over |= serial::input() == Some(b'q');
        }
        over
    })?;
    let ns = clock::now() - begin;
    for next in [Phase::Drain, Phase::Sweep(0)] {
        lanes.iter_mut().flatten().for_each(|lane| lane.enter(next));
        turn_until(lanes, |lanes| lanes.iter().flatten().all(|lane| lane.in_flight == 0))?;
    }
    for lane in lanes.iter().flatten() {
        let (disk, total) = (lane.pool.disk.number, lane.reads + lane.writes);
        let (reads, writes, checked) = (lane.reads, lane.writes, lane.checked);
        say!("verify: disk={disk} requests={total} reads={reads} writes={writes} checked={checked} ns={ns}");
    }
    Ok(())
}

/// Serves all lanes until `over`; fails when none of them gets anywhere.
fn turn_until(lanes: &mut [Option<Lane>], mut over: impl FnMut(&[Option<Lane>]) -> bool) -> Outcome {
    let mut patience = Patience::new(SILENCE_NS);
    while !over(lanes) {
        for lane in lanes.iter_mut().flatten() {
            if lane.turn()? {
                patience = Patience::new(SILENCE_NS);
            }
        }
        if patience.is_over() {
            fail!("requests in flight and no completion");
        }
    }
    Ok(())
}

impl Lane {
    fn new(disk: Disk, words: Words) -> Outcome<Lane> {
        let number = disk.number;
        let size = words.number("bs", 4096);
        if disk.has(F_RO) || size == 0 || !size.is_multiple_of(SECTOR) {
            fail!("disk {number} is read-only, or bs={size} is not a multiple of {SECTOR}");
        }
        let blocks = (disk.capacity_sectors * SECTOR).min(words.number("region", 16 << 20)) / size;
        let depth = words.number("depth", 32);
        if blocks < 2 * depth {
            fail!("disk {number} has {blocks} blocks, too few for depth={depth}");
        }
        let mut lane = Lane {
            pool: Pool::new(disk, depth, size, false)?,
            size,
            random: Random::new(words.number("seed", 1) + number),
            phase: Phase::Load,
            sequence: memory::table(blocks as usize, 0),
            busy: memory::table(blocks as usize, 0),
            sent: memory::table(depth as usize, (0, T_IN)),
            in_flight: 0,
            reads: 0,
            writes: 0,
            checked: 0,
        };
        lane.pool.disk.ring.ask_interrupt(!words.is("irq", "off"));
        lane.enter(Phase::Load);
        Ok(lane)
    }

    /// Begins a phase; all slots are idle unless it is `Drain`.
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        if phase != Phase::Drain {
            (0..self.pool.depth()).for_each(|slot| self.send(slot));
            self.kick();
        }
    }

    fn kick(&mut self) {
        if self.pool.disk.ring.publish() {
            self.pool.disk.device.notify(0);
        }
    }

    /// Takes all completions; true when there were any.
    fn turn(&mut self) -> Outcome<bool> {
        let waiting = self.pool.disk.ring.used_waiting();
        if waiting > self.pool.depth() {
            fail!("disk {}: {waiting} completions of {} requests", self.pool.disk.number, self.pool.depth());
        }
        for _ in 0..waiting {
            let (slot, status) = self.pool.take()?;
            self.complete(slot, status)?;
            self.send(slot);
        }
        self.kick();
        Ok(waiting != 0)
    }

    /// Sends the next request, if the phase has one.
    fn send(&mut self, slot: u16) {
        let next = match self.phase {
            Phase::Load => self.pick(),
            Phase::Drain => None,
            Phase::Sweep(block) if block < self.sequence.len() as u64 => {
                self.phase = Phase::Sweep(block + 1);
                Some((block, T_IN))
            }
            Phase::Sweep(_) => None,
        };
        let Some((block, kind)) = next else { return };
        if kind == T_OUT {
            let sequence = self.sequence[block as usize] + 1;
            self.sequence[block as usize] = sequence;
            each_word(self.pool.data(slot), self.first_sector(block), sequence, |data, at, word| {
                data.write64(at, word);
                true
            });
        }
        self.busy[block as usize] = 1;
        self.sent[usize::from(slot)] = (block, kind);
        self.in_flight += 1;
        self.pool.offer(slot, kind, self.first_sector(block));
    }

    /// A block that is not busy, and what to do with it.
    fn pick(&mut self) -> Option<(u64, u32)> {
        let blocks = self.busy.len() as u64;
        let block = (0..TRIES).map(|_| self.random.below(blocks)).find(|&block| self.busy[block as usize] == 0)?;
        Some((block, [T_IN, T_OUT][self.random.below(2) as usize]))
    }

    fn first_sector(&self, block: u64) -> u64 {
        block * (self.size / SECTOR)
    }

    fn complete(&mut self, slot: u16, status: u8) -> Outcome {
        let disk = self.pool.disk.number;
        let (block, kind) = self.sent[usize::from(slot)];
        self.in_flight -= 1;
        self.busy[block as usize] = 0;
        if status != S_OK {
            fail!("disk {disk}: type {kind} of block {block}: status {status}");
        }
        if kind == T_OUT {
            self.writes += 1;
            return Ok(());
        }
        self.reads += 1;
        let sequence = self.sequence[block as usize];
        if sequence == 0 {
            return Ok(());
        }
        self.checked += 1;
        let data = self.pool.data(slot);
        if !each_word(data, self.first_sector(block), sequence, |data, at, word| data.read64(at) == word) {
            let (sector, found) = (data.read64(0), data.read64(8));
            fail!("disk {disk}: block {block} holds sector {sector} write {found}, not write {sequence}");
        }
        Ok(())
    }
}

/// Calls `each` for every word of a block with what it holds: each sector begins with its number and the sequence
/// number of the write, and goes on with words that follow from both. False when `each` was false once.
pub fn each_word(data: Dma, first_sector: u64, sequence: u32, each: impl Fn(&Dma, u64, u64) -> bool) -> bool {
    const WORDS: u64 = SECTOR / 8;
    (0..data.len() / 8).all(|i| {
        let sector = first_sector + i / WORDS;
        let word = match i % WORDS {
            0 => sector,
            1 => u64::from(sequence),
            n => (sector << 32 | u64::from(sequence)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n),
        };
        each(&data, 8 * i, word)
    })
}
