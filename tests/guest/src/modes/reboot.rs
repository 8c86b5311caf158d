//! `reboot`: a machine that is reset in the middle of its work, again and again, and finds everything as it must be: memory
//! without a trace of the life before, the other processors to be started anew, and on the disk what was written last.
//!
//! The first disk keeps the books: how often the machine has booted, and how many rounds of writes are done. A round writes
//! every block with its number; so each holds the last whole round's or the one's after it, and never a mixture. `how=` is
//! the way to reset, in the middle of a round: one of [`WAYS`], `each` for all of them in turn, or `wait` for somebody outside,
//! round after round, until a `q` is typed. `by=other` has the first of the other processors do it. After `count` boots it ends. `cpus=N` starts the
//! others too; `memory=kept` is for a host that keeps memory,
//! `memory=filled` for one whose memory is not zero at first.

use crate::clock::{self, Patience};
use crate::cpu;
use crate::interrupt;
use crate::memory;
use crate::modes::blk_verify::each_word;
use crate::modes::random::Random;
use crate::modes::smp;
use crate::serial;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, REQUEST_NS, S_OK, SECTOR, T_IN, T_OUT};
use crate::virtio::mmio::F_INDIRECT_DESC;
use crate::virtio::pool::Pool;
use crate::words::Words;

/// What marks the book as ours, and memory as used: it is not zero.
const MARK: u64 = 0x7265_626f_6f74_2121;
/// Bytes of memory that are looked at, and soiled, in steps of a page.
const MEMORY: u64 = 8 << 20;
const BLOCK: u64 = 4096;
/// How long the machine may run on after it was told to reset.
const RESET_NS: u64 = 20_000_000_000;
/// The reset comes up to this long after the kick.
const LATEST_NS: u64 = 200_000;

const BIOS: &str = "bios";
/// Each way in which a machine is restarted from inside.
const WAYS: [(&str, fn()); 10] = [
    // As Linux does it: again and again.
    ("i8042", || (0..20).for_each(|_| cpu::out8(0x64, 0xfe))),
    // Any even command from 0xf0 on pulses the reset line.
    ("pulse", || cpu::out8(0x64, 0xf0)),
    // Writes the output lines, of which bit 0 is the reset line.
    ("output", || {
        cpu::out8(0x64, 0xd1);
        cpu::out8(0x60, 0xfe);
    }),
    ("cf9-hard", || {
        cpu::out8(0xcf9, cpu::in8(0xcf9) & !0x0e | 2);
        cpu::out8(0xcf9, cpu::in8(0xcf9) & !0x0e | 0x0e);
    }),
    ("cf9-soft", || cpu::out8(0xcf9, 4)),
    ("port92", || cpu::out8(0x92, cpu::in8(0x92) | 1)),
    ("triple", || cpu::triple_fault()),
    // The other processors, of which there must be one, jump to F000:FFF0 in real mode.
    (BIOS, || smp::restart_others(&[0xea, 0xf0, 0xff, 0x00, 0xf0])),
    // The boot processor begins at its reset vector, 16 bytes below 4 GiB.
    ("init", || {
        interrupt::start();
        interrupt::init(0);
    }),
    // From the handler of a non-maskable interrupt, where no other is taken.
    ("nmi", || {
        interrupt::start();
        interrupt::non_maskable(interrupt::id());
    }),
];

pub fn run(words: Words) -> Outcome {
    let found = soil(words)?;
    let by_other = words.is("by", "other");
    smp::start(words.number("cpus", 1), if by_other { smp::Then::Spin } else { smp::Then::Halt })?;
    let Some((number, device)) = blk::disks(words).next() else { fail!("no disk") };
    // Before this driver resets it.
    if device.status() != 0 {
        fail!("disk {number} still has a driver: status {:#x}", device.status());
    }
    let disk = Disk::start(number, device, blk::KNOWN & !F_INDIRECT_DESC, 256)?;
    // One slot a block, and one for the book.
    let depth = words.number("depth", 32);
    let mut lives = Lives { pool: Pool::new(disk, depth + 1, BLOCK, false)?, blocks: depth, boots: 0, round: 0 };
    lives.open_book()?;
    lives.check()?;
    say!("reboot: boot={} round={} memory={found}", lives.boots, lives.round);
    let how = words.get("how").unwrap_or("i8042");
    if how == "wait" {
        while serial::input() != Some(b'q') {
            lives.whole_round()?;
        }
        return Ok(());
    }
    lives.whole_round()?;
    if lives.boots >= words.number("count", 10) {
        return Ok(());
    }
    lives.send_round();
    clock::spin_ns(Random::new(lives.boots).below(LATEST_NS));
    let possible = || WAYS.iter().filter(|(name, _)| *name != BIOS || words.number("cpus", 1) > 1);
    let way = match how {
        "each" => possible().cycle().nth(lives.boots as usize - 1),
        _ => possible().find(|(name, _)| *name == how),
    };
    let Some((how, reset)) = way else { fail!("how={how} is not a way to reset") };
    say!("reboot: by {how}");
    if by_other {
        smp::call_first(*reset);
    } else {
        reset();
    }
    clock::spin_ns(RESET_NS);
    fail!("how={how} has not reset the machine")
}

/// Looks whether memory has a trace of an earlier life, and leaves one.
fn soil(words: Words) -> Outcome<&'static str> {
    let piece = memory::take_as_is(MEMORY);
    let (mut traces, mut filled) = (0, 0);
    for at in (0..MEMORY).step_by(BLOCK as usize) {
        match piece.read64(at) {
            0 => {}
            MARK => traces += 1,
            _ if words.is("memory", "filled") => filled += 1,
            other => fail!("memory at {:#x} holds {other:#x}", piece.at(at)),
        }
        piece.write64(at, MARK);
    }
    match traces {
        0 if filled > 0 => Ok("filled"),
        0 => Ok("zero"),
        _ if words.is("memory", "kept") => Ok("kept"),
        _ => fail!("{traces} pages of an earlier life are still in memory"),
    }
}

struct Lives {
    pool: Pool,
    blocks: u64,
    /// How often the machine has booted, and the last whole round.
    boots: u64,
    round: u64,
}

impl Lives {
    fn book(&self) -> u16 {
        self.blocks as u16
    }

    /// Reads the book, and enters this boot.
    fn open_book(&mut self) -> Outcome {
        self.pool.offer(self.book(), T_IN, 0);
        self.wait(1)?;
        let page = self.pool.data(self.book());
        if page.read64(0) == MARK {
            (self.boots, self.round) = (page.read64(8), page.read64(16));
        }
        self.boots += 1;
        self.write_book()
    }

    fn write_book(&mut self) -> Outcome {
        let page = self.pool.data(self.book());
        [MARK, self.boots, self.round].iter().zip(0..).for_each(|(word, index)| page.write64(8 * index, *word));
        self.pool.offer(self.book(), T_OUT, 0);
        self.wait(1)
    }

    /// Reads all blocks: each is of the last whole round or of the next, sector by sector.
    fn check(&mut self) -> Outcome {
        (0..self.blocks).for_each(|block| self.pool.offer(block as u16, T_IN, sector(block)));
        self.wait(self.blocks)?;
        for block in 0..self.blocks {
            for index in 0..BLOCK / SECTOR {
                let (data, first) = (self.pool.data(block as u16).piece(index * SECTOR, SECTOR), sector(block) + index);
                let is = |round: u64| each_word(data, first, round as u32, |data, at, word| data.read64(at) == word);
                let never_written = self.round == 0 && data.read64(0) == 0;
                if !never_written && !is(self.round) && !is(self.round + 1) {
                    let found = data.read64(8);
                    fail!(
                        "boot {}: sector {first} holds round {found}, the last whole one is {}",
                        self.boots,
                        self.round
                    );
                }
            }
        }
        Ok(())
    }

    fn send_round(&mut self) {
        for block in 0..self.blocks {
            each_word(self.pool.data(block as u16), sector(block), self.round as u32 + 1, |data, at, word| {
                data.write64(at, word);
                true
            });
            self.pool.offer(block as u16, T_OUT, sector(block));
        }
        self.kick();
    }

    fn whole_round(&mut self) -> Outcome {
        self.send_round();
        self.wait(self.blocks)?;
        self.round += 1;
        self.write_book()
    }

    fn kick(&mut self) {
        if self.pool.disk.ring.publish() {
            self.pool.disk.device.notify(0);
        }
    }

    /// Waits for so many completions.
    fn wait(&mut self, mut left: u64) -> Outcome {
        self.kick();
        let mut patience = Patience::new(REQUEST_NS);
        while left > 0 {
            for _ in 0..self.pool.disk.ring.used_waiting() {
                let (slot, status) = self.pool.take()?;
                if status != S_OK {
                    fail!("slot {slot} ended with status {status}");
                }
                left -= 1;
            }
            if patience.is_over() {
                fail!("{left} requests do not complete");
            }
        }
        Ok(())
    }
}

/// The first sector of a block; the book is in front of them.
fn sector(block: u64) -> u64 {
    (block + 1) * (BLOCK / SECTOR)
}
