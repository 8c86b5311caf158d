//! Reads what dm-log-writes has logged, and makes of it the content that the disk had at any point of it.
//!
//! The log (Linux, drivers/md/dm-log-writes.c) is sectors: the first is its super block; then come entries, a sector that
//! describes a write, followed by the data of it. Writes that were completed and not yet flushed are no part of it: they come
//! when the next flush has been completed, in front of it. So every point of it is what a power cut may leave.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Of our disks, and so of the log.
const SECTOR: u64 = 512;

/// One entry of a log.
pub enum Entry {
    /// Writes this place of the log at this place of the disk; whether a flush came before, and was completed.
    Write {
        from: u64,
        to: u64,
        bytes: u64,
        flush: bool,
    },
    /// The disk may forget this.
    Discard {
        at: u64,
        bytes: u64,
    },
    Mark(String),
}

pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

impl Log {
    /// The log on this device or file, which is complete when dm-log-writes is gone.
    pub fn read(path: &Path) -> Log {
        let file = File::open(path).unwrap();
        let sector = |at: u64| {
            let mut bytes = [0; SECTOR as usize];
            file.read_exact_at(&mut bytes, at).unwrap();
            move |field: usize| u64::from_le_bytes(bytes[8 * field..8 * field + 8].try_into().unwrap())
        };
        let first = sector(0);
        assert_eq!(first(0), MAGIC, "{path:?} is no log");
        assert_eq!(first(3) & 0xffff_ffff, SECTOR, "bytes of the log's sectors");
        let (count, mut at) = (first(2), SECTOR);
        let entries = (0..count).map(|_| {
            let entry = sector(at);
            let [place, length, flags, data] = [0, 1, 2, 3].map(&entry);
            at += SECTOR;
            if flags & MARK != 0 {
                let mut text = vec![0; data as usize];
                // The text follows in the entry's own sector.
                file.read_exact_at(&mut text, at - SECTOR + 32).unwrap();
                return Entry::Mark(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned());
            }
            let (to, bytes) = (place * SECTOR, length * SECTOR);
            if flags & DISCARD != 0 {
                return Entry::Discard { at: to, bytes };
            }
            let from = at;
            at += bytes;
            Entry::Write { from, to, bytes, flush: flags & FLUSH != 0 }
        });
        let entries = entries.collect();
        Log { file, entries }
    }

    /// Does to the disk what the entry says.
    pub fn apply(&self, entry: &Entry, disk: &mut [u8]) {
        match entry {
            Entry::Write { from, to, bytes, .. } => {
                let to = *to as usize..(to + bytes) as usize;
                self.file.read_exact_at(&mut disk[to], *from).unwrap();
            }
            Entry::Discard { at, bytes } => disk[*at as usize..(at + bytes) as usize].fill(0),
            Entry::Mark(_) => {}
        }
    }

    /// The places of the log, a number of entries each, right after a flush.
    pub fn flushes(&self) -> Vec<usize> {
        let after = |(n, entry): (usize, &Entry)| matches!(entry, Entry::Write { flush: true, .. }).then_some(n + 1);
        self.entries.iter().enumerate().filter_map(after).collect()
    }
}
