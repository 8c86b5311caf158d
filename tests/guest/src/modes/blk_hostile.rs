//! `blk-hostile`: what no driver may do, case after case. Each case says how the device took it; then the device is
//! reset and must read its first sector as before. Only that decides: the guest may be answered in any way, or not at
//! all. The cases are in `blk_hostile/`, a family each.

mod chains;
mod registers;

use crate::clock::{self, Patience};
use crate::memory::{self, Dma};
use crate::start::Machine;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, Layout, S_NOT_WRITTEN, S_OK, T_IN};
use crate::virtio::ring::{Desc, WRITE};
use core::fmt;

/// How the device took a case.
enum Answer {
    /// The head came back with this status byte.
    Status(u8),
    /// The head came back and no status was written.
    Used,
    NeedsReset,
    /// Nothing happened for as long as we waited.
    Ignored,
    /// The device does not offer what the case needs.
    NotOffered,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Status(byte) => write!(f, "status:{byte}"),
            Answer::Used => f.write_str("used"),
            Answer::NeedsReset => f.write_str("needs_reset"),
            Answer::Ignored => f.write_str("ignored"),
            Answer::NotOffered => f.write_str("not_offered"),
        }
    }
}

/// A disk that is treated badly.
struct Victim {
    disk: Disk,
    /// 64 KiB for data and tables.
    memory: Dma,
    ram_end: u64,
    wait_ns: u64,
}

type Case = (&'static str, fn(&mut Victim) -> Outcome<Answer>);

pub fn run(machine: &Machine) -> Outcome {
    let words = machine.words;
    let only = words.get("case");
    for (number, device) in blk::chosen(words) {
        let disk = Disk::start(number, device, blk::KNOWN, 256)?;
        let wait_ns = words.number("wait_ms", 50) * 1_000_000;
        let mut victim = Victim { disk, memory: memory::take(0x10000), ram_end: machine.ram_end, wait_ns };
        let good = victim.first_sector()?;
        for (name, case) in chains::CASES.iter().chain(registers::CASES) {
            if only.is_some_and(|only| only != *name) {
                continue;
            }
            let begin = clock::now();
            let answer = case(&mut victim)?;
            let more = victim.disk.ring.used_waiting();
            say!("hostile: case={name} result={answer} more_used={more} us={}", (clock::now() - begin) / 1000);
            victim.disk.restart()?;
            if victim.first_sector()? != good {
                fail!("disk {number}: after case {name} the first sector reads differently");
            }
        }
        victim.disk.device.reset()?;
    }
    Ok(())
}

impl Victim {
    /// The digest of the first sector, read by a proper request.
    fn first_sector(&mut self) -> Outcome<u64> {
        let data = self.memory.piece(0, 512);
        data.fill(0x3c);
        self.disk.must(T_IN, 0, &[data], Layout::Direct)?;
        Ok(data.digest())
    }

    /// Publishes what is offered, notifies whatever the device wishes, and looks what happens.
    fn send(&mut self) -> Answer {
        self.disk.ring.publish();
        self.disk.device.notify(0);
        self.watch()
    }

    /// Looks what the device does: a used element, NEEDS_RESET, or nothing for `wait_ns`.
    fn watch(&mut self) -> Answer {
        let mut patience = Patience::new(self.wait_ns);
        loop {
            if self.disk.wait(1_000_000).is_some() {
                return match self.disk.status_byte() {
                    S_NOT_WRITTEN => Answer::Used,
                    status => Answer::Status(status),
                };
            }
            if self.disk.device.needs_reset() {
                return Answer::NeedsReset;
            }
            if patience.is_over() {
                return Answer::Ignored;
            }
        }
    }

    /// Sends a proper read, to see whether the device still serves; never fails.
    fn proper_read(&mut self) -> Answer {
        self.disk.header(T_IN, 0);
        let chain = [self.disk.header_desc(), self.data_desc(512), self.disk.status_desc()];
        self.disk.offer(&chain, Layout::Direct);
        self.send()
    }

    /// A buffer for read data.
    fn data_desc(&self, len: u32) -> Desc {
        Desc { address: self.memory.at(0), len, flags: WRITE, next: 0 }
    }
}

/// Whether a proper request was answered well.
fn served(answer: &Answer) -> bool {
    matches!(answer, Answer::Status(S_OK))
}
