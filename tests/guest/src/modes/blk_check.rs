//! `blk-check`: every kind of request a disk offers, in several layouts, and the errors the specification asks for. It
//! writes to the first 64 KiB of each disk.

use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::blk::*;
use crate::virtio::mmio::F_INDIRECT_DESC;
use crate::words::Words;

/// Bytes of the data requests; the odd segments add up to them.
const BYTES: u64 = 4096;
const ODD_SEGMENTS: [u64; 8] = [1, 511, 513, 7, 1017, 3, 1021, 1023];
/// The first sector that is written to.
const SECTOR_AT: u64 = 8;
/// Flag of a write-zeroes segment: the device may unmap it.
const UNMAP: u32 = 1;

/// A disk under test, and how many steps went wrong.
struct Check {
    disk: Disk,
    wrong: u32,
    memory: Dma,
}

pub fn run(words: Words) -> Outcome {
    let mut wrong = 0;
    for (number, device) in chosen(words) {
        let disk = Disk::start(number, device, KNOWN, 256)?;
        let mut check = Check { disk, wrong: 0, memory: memory::take(0x10000) };
        check.all()?;
        check.disk.device.reset()?;
        wrong += check.wrong;
    }
    match wrong {
        0 => Ok(()),
        _ => fail!("{wrong} steps went wrong"),
    }
}

impl Check {
    fn all(&mut self) -> Outcome {
        self.identity()?;
        if self.disk.has(F_RO) {
            self.read_only()?;
        } else {
            self.layouts()?;
            self.ranges(T_DISCARD, F_DISCARD, "discard")?;
            self.ranges(T_WRITE_ZEROES, F_WRITE_ZEROES, "write-zeroes")?;
        }
        if self.disk.has(F_FLUSH) {
            self.step("flush", T_FLUSH, 0, &[], Layout::Direct, S_OK)?;
        }
        self.beyond_the_end()?;
        let sector = self.piece(0, 512);
        self.step("unknown-type", 0x77, 0, &[sector], Layout::Direct, S_UNSUPP)
    }

    fn piece(&self, offset: u64, len: u64) -> Dma {
        self.memory.piece(offset, len)
    }

    /// Runs one request and compares its status byte with the one wanted.
    fn step(&mut self, name: &str, kind: u32, sector: u64, data: &[Dma], layout: Layout, wanted: u8) -> Outcome {
        let (status, used) = self.disk.run(kind, sector, data, layout)?;
        let bytes: u64 = data.iter().map(Dma::len).sum();
        // What the device wrote (virtio 1.2, 2.7.8.2): the data of a successful read, and the status byte.
        let wanted_used = if kind == T_IN && wanted == S_OK { bytes as u32 + 1 } else { 1 };
        let used_right = used == wanted_used || wanted != S_OK || kind == T_GET_ID;
        let verdict = self.judge(status == wanted && used_right);
        say!("check: disk={} step={name} status={status} used={used} {verdict}", self.disk.number);
        if verdict != "ok" {
            say!("check: wanted status={wanted} used={wanted_used}");
        }
        Ok(())
    }

    fn judge(&mut self, right: bool) -> &'static str {
        self.wrong += u32::from(!right);
        if right { "ok" } else { "WRONG" }
    }

    fn compare(&mut self, name: &str, right: bool) {
        let verdict = self.judge(right);
        say!("check: disk={} step={name} {verdict}", self.disk.number);
    }

    fn identity(&mut self) -> Outcome {
        let id = self.piece(0, 20);
        self.step("get-id", T_GET_ID, 0, &[id], Layout::Direct, S_OK)?;
        let bytes: [u8; 20] = core::array::from_fn(|i| id.read8(i as u64));
        let text = bytes.split(|&byte| byte == 0).next().and_then(|text| core::str::from_utf8(text).ok());
        say!("check: disk={} id={}", self.disk.number, text.unwrap_or("(not text)"));
        Ok(())
    }

    /// Writes and reads back in each layout the disk takes.
    fn layouts(&mut self) -> Outcome {
        let (whole, odd_from, odd_to) = (self.piece(0, BYTES), self.odd(0x2000), self.odd(0x4000));
        let seg_max = if self.disk.has(F_SEG_MAX) { self.disk.config32(12) } else { 128 };
        for (round, layout) in [Layout::Direct, Layout::Indirect].into_iter().enumerate() {
            if layout == Layout::Indirect && !self.disk.has(F_INDIRECT_DESC) {
                continue;
            }
            let name = ["direct", "indirect"][round];
            say!("check: disk={} layout={name} seg_max={seg_max}", self.disk.number);
            self.write_and_read(1 + round as u64, &[whole], &[whole], layout)?;
            if seg_max >= 8 {
                self.write_and_read(3 + round as u64, &odd_from, &odd_to, layout)?;
                self.write_and_read(5 + round as u64, &odd_from, &[self.piece(0x6000, BYTES)], layout)?;
            }
        }
        Ok(())
    }

    /// Odd-sized segments that follow each other in memory, so that their content can be compared as one piece.
    fn odd(&self, at: u64) -> [Dma; 8] {
        let mut offset = at;
        ODD_SEGMENTS.map(|len| {
            offset += len;
            self.piece(offset - len, len)
        })
    }

    /// Writes a pattern, reads it back into other memory, and compares.
    fn write_and_read(&mut self, seed: u64, from: &[Dma], to: &[Dma], layout: Layout) -> Outcome {
        let pattern = |i: u64| (seed * 0x9e37 + i * 31 + i / 512) as u8;
        let mut i = 0;
        for piece in from {
            for offset in 0..piece.len() {
                piece.write8(offset, pattern(i));
                i += 1;
            }
        }
        self.step("write", T_OUT, SECTOR_AT, from, layout, S_OK)?;
        to.iter().for_each(|piece| piece.fill(0x55));
        self.step("read", T_IN, SECTOR_AT, to, layout, S_OK)?;
        let mut i = 0;
        let mut same = true;
        for piece in to {
            for offset in 0..piece.len() {
                same &= piece.read8(offset) == pattern(i);
                i += 1;
            }
        }
        self.compare("read-back", same);
        Ok(())
    }

    /// Discard or write-zeroes (virtio 1.2, 5.2.6): good, beyond the end, with flags nobody defined; or not offered.
    fn ranges(&mut self, kind: u32, feature: u64, name: &str) -> Outcome {
        let segment = self.piece(0x8000, 16);
        if !self.disk.has(feature) {
            self.range(&segment, SECTOR_AT, 8, 0);
            return self.step(name, kind, 0, &[segment], Layout::Direct, S_UNSUPP);
        }
        let data = self.piece(0, BYTES);
        data.fill(0xaa);
        self.disk.must(T_OUT, SECTOR_AT, &[data], Layout::Direct)?;
        // Byte 56 of the configuration: whether write-zeroes may unmap.
        let unmap = if kind == T_WRITE_ZEROES && self.disk.config32(56) & 1 != 0 { UNMAP } else { 0 };
        self.range(&segment, SECTOR_AT, 8, unmap);
        self.step(name, kind, 0, &[segment], Layout::Direct, S_OK)?;
        self.disk.must(T_IN, SECTOR_AT, &[data], Layout::Direct)?;
        let zeros = (0..BYTES).all(|offset| data.read8(offset) == 0);
        if kind == T_WRITE_ZEROES {
            self.compare("reads-zeros", zeros);
        } else {
            say!("check: disk={} step=discarded zeros={}", self.disk.number, u8::from(zeros));
        }
        self.range(&segment, self.disk.capacity_sectors - 4, 8, 0);
        self.step("range-beyond-end", kind, 0, &[segment], Layout::Direct, S_IOERR)?;
        self.range(&segment, SECTOR_AT, 8, 1 << 7);
        self.step("range-unknown-flag", kind, 0, &[segment], Layout::Direct, S_UNSUPP)
    }

    fn range(&self, segment: &Dma, sector: u64, sectors: u32, flags: u32) {
        segment.write64(0, sector);
        segment.write32(8, sectors);
        segment.write32(12, flags);
    }

    fn read_only(&mut self) -> Outcome {
        let data = self.piece(0, BYTES);
        self.step("read", T_IN, 0, &[data], Layout::Direct, S_OK)?;
        let before = data.digest();
        data.fill(0x77);
        self.step("write-to-read-only", T_OUT, 0, &[data], Layout::Direct, S_IOERR)?;
        self.step("read", T_IN, 0, &[data], Layout::Direct, S_OK)?;
        self.compare("unchanged", data.digest() == before);
        Ok(())
    }

    fn beyond_the_end(&mut self) -> Outcome {
        let end = self.disk.capacity_sectors;
        let (one, two) = (self.piece(0, 512), self.piece(0, 1024));
        self.step("read-last-sector", T_IN, end - 1, &[one], Layout::Direct, S_OK)?;
        for kind in [T_IN, T_OUT] {
            let name = if kind == T_IN { "read-beyond-end" } else { "write-beyond-end" };
            self.step(name, kind, end, &[one], Layout::Direct, S_IOERR)?;
            self.step(name, kind, end - 1, &[two], Layout::Direct, S_IOERR)?;
            self.step(name, kind, u64::MAX, &[one], Layout::Direct, S_IOERR)?;
        }
        Ok(())
    }
}
