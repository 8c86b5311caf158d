//! `blk-typed`: a driver of all disk slots, the empty ones too, that makes the requests that are typed on the serial port, a
//! line each, so that a test decides what happens when.
//!
//! D is the number of a disk, S a sector, N a number of sectors up to 128, X the seed of a pattern (`word_of`):
//!
//! | line | request |
//! |---|---|
//! | `write D S N X` | writes the pattern |
//! | `read D S N X` | reads; `same` says whether the pattern was read, `zeros` whether zeros were |
//! | `flush D`, `discard D S N`, `zeroes D S N`, `unmap D S N` | flush, discard, write-zeroes without and with the unmap flag |
//! | `begin` and one of these lines | makes the request and does not wait; a disk has one such request at a time |
//! | `end D` | waits for that request |
//! | `tell D` | makes no request; reports the size, the features and the topology of the disk |
//! | `quit` | ends |
//!
//! Each line gets one line in reply, with its number: `typed: 1 status=0`.

use crate::clock::Patience;
use crate::memory::{self, Dma};
use crate::serial;
use crate::text::Outcome;
use crate::virtio::blk::{self, *};
use crate::virtio::ring::{Desc, WRITE};
use crate::words::Words;

/// Most slots of a machine.
const MOST_DISKS: usize = 11;
const MOST_SECTORS: u64 = 128;
/// A segment of discard or write-zeroes: flag and bytes (virtio 1.2, 5.2.6).
const UNMAP: u32 = 1;
const RANGE_BYTES: u64 = 16;
/// A host may hold a request back for this long: a test with a slow device decides how long it waits.
const PATIENCE_NS: u64 = 60_000_000_000;

/// A disk, and what its request reads or writes.
struct Typed {
    disk: Disk,
    data: Dma,
    /// The pattern that a read should find: sector, number of sectors, seed.
    expected: Option<(u64, u64, u64)>,
}

pub fn run(words: Words) -> Outcome {
    let mut disks: [Option<Typed>; MOST_DISKS] = [const { None }; MOST_DISKS];
    let mut count = 0;
    for ((number, device), slot) in blk::disks(words).zip(&mut disks) {
        let disk = Disk::start(number, device, KNOWN, 64)?;
        *slot = Some(Typed { disk, data: memory::take(MOST_SECTORS * SECTOR), expected: None });
        count += 1;
    }
    say!("typed: begin disks={count}");
    let mut line = [0; 80];
    for number in 1.. {
        let mut words = read_line(&mut line)?.split(' ');
        let first = words.next().unwrap_or("");
        let (begun, word) = if first == "begin" { (true, words.next().unwrap_or("")) } else { (false, first) };
        if word == "quit" {
            break;
        }
        let mut value = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        let Some(Some(typed)) = disks.get_mut(value() as usize) else { fail!("line {number}: no such disk") };
        match word {
            "tell" => typed.tell(number),
            "end" => typed.end(number)?,
            _ => {
                typed.begin(word, value(), value(), value())?;
                if begun { say!("typed: {number} begun") } else { typed.end(number)? }
            }
        }
    }
    for typed in disks.iter().flatten() {
        typed.disk.device.reset()?;
    }
    Ok(())
}

/// Reads up to the end of the line.
fn read_line(line: &mut [u8; 80]) -> Outcome<&str> {
    let mut len = 0;
    loop {
        match serial::input() {
            Some(b'\n') => break,
            Some(byte) if len < line.len() => {
                line[len] = byte;
                len += 1;
            }
            Some(_) => fail!("a line of more than 80 bytes"),
            None => core::hint::spin_loop(),
        }
    }
    core::str::from_utf8(&line[..len]).or(Err("a line that is not text"))
}

/// The 8 bytes at `index` of a sector of the pattern, the same as in `tests/backings/typed.rs`.
fn word_of(seed: u64, sector: u64, index: u64) -> u64 {
    ((seed << 40) + (sector << 8) + index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Typed {
    fn begin(&mut self, word: &str, sector: u64, sectors: u64, seed: u64) -> Outcome {
        if sectors > MOST_SECTORS {
            fail!("{sectors} sectors at once: {MOST_SECTORS} at most");
        }
        let bytes = sectors * SECTOR;
        self.expected = None;
        let (kind, at, len) = match word {
            "write" => {
                for n in 0..sectors * 64 {
                    self.data.write64(8 * n, word_of(seed, sector + n / 64, n % 64));
                }
                (T_OUT, sector, bytes)
            }
            "read" => {
                self.data.fill(0x55);
                self.expected = Some((sector, sectors, seed));
                (T_IN, sector, bytes)
            }
            "flush" => (T_FLUSH, 0, 0),
            "discard" | "zeroes" | "unmap" => {
                self.data.write64(0, sector);
                self.data.write32(8, sectors as u32);
                self.data.write32(12, if word == "unmap" { UNMAP } else { 0 });
                (if word == "discard" { T_DISCARD } else { T_WRITE_ZEROES }, 0, RANGE_BYTES)
            }
            _ => fail!("no line begins with {word}"),
        };
        let flags = if kind == T_IN { WRITE } else { 0 };
        let data = Desc { address: self.data.at(0), len: len as u32, flags, next: 0 };
        self.disk.header(kind, at);
        let (header, status) = (self.disk.header_desc(), self.disk.status_desc());
        match len {
            0 => self.disk.offer(&[header, status], Layout::Direct),
            _ => self.disk.offer(&[header, data, status], Layout::Direct),
        }
        self.disk.kick();
        Ok(())
    }

    fn end(&mut self, number: u64) -> Outcome {
        let mut patience = Patience::new(PATIENCE_NS);
        while self.disk.ring.used_waiting() == 0 {
            if patience.is_over() {
                fail!("line {number}: the request does not complete");
            }
            core::hint::spin_loop();
        }
        self.disk.ring.take_used();
        let status = self.disk.status_byte();
        match self.expected.take() {
            Some((sector, sectors, seed)) => {
                let all = |wanted: fn(u64, u64, u64) -> u64| {
                    (0..sectors * 64).all(|n| self.data.read64(8 * n) == wanted(seed, sector + n / 64, n % 64))
                };
                let (same, zeros) = (u8::from(all(word_of)), u8::from(all(|_, _, _| 0)));
                say!("typed: {number} status={status} same={same} zeros={zeros}");
            }
            None => say!("typed: {number} status={status}"),
        }
        Ok(())
    }

    /// The configuration space (virtio 1.2, 5.2.4).
    fn tell(&self, number: u64) {
        let word = |offset| self.disk.config32(offset);
        let (sectors, topology) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(24));
        say!(
            "typed: {number} sectors={sectors} blk_size={} has_topology={} physical_exp={} alignment={} min_io={} opt_io={}",
            word(20),
            u8::from(self.disk.has(F_TOPOLOGY)),
            topology & 0xff,
            topology >> 8 & 0xff,
            topology >> 16,
            word(28),
        );
    }
}
