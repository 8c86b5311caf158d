//! What the monitor says at the start: command line and memory map, by either boot protocol.

use crate::memory::{self, Registers};
use crate::words::Words;

/// The machine as the monitor described it.
pub struct Machine {
    pub words: Words,
    pub protocol: &'static str,
    /// Bytes of usable RAM in the whole memory map.
    pub ram: u64,
    /// The end of the piece of RAM that holds this image, below 4 GiB.
    pub ram_end: u64,
}

/// Longest command line taken; the rest is cut.
const COMMAND_LINE: usize = 4096;
/// Entries of the memory map looked at.
const MAP_ENTRIES: u64 = 128;

impl Machine {
    /// Reads boot_params (protocol 0) or hvm_start_info (protocol 1) at `address`.
    pub fn read(protocol: u32, address: u32) -> Machine {
        let block = Registers::new(u64::from(address));
        // boot_params: e820_entries u8 at 0x1e8, cmd_line_ptr u32 at 0x228, e820 table at 0x2d0 (20 bytes an entry).
        // hvm_start_info: cmdline_paddr u64 at 24, memmap_paddr u64 at 40, memmap_entries u32 at 48 (24 bytes an entry).
        // An entry of either begins with address u64, size u64, type u32, and RAM is type 1.
        let (name, line, map, entries, step) = match protocol {
            0 => (
                "linux64",
                u64::from(block.read32(0x228)),
                block.base() + 0x2d0,
                u64::from(block.read::<u8>(0x1e8)),
                20,
            ),
            _ => ("pvh", block.read(24), block.read(40), u64::from(block.read32(48)), 24),
        };
        let map = Registers::new(map);
        let (mut ram, mut ram_end) = (0, 0);
        for entry in 0..entries.min(MAP_ENTRIES) {
            let at = entry * step;
            let (start, size) = (map.read::<u64>(at), map.read::<u64>(at + 8));
            if map.read32(at + 16) != 1 {
                continue;
            }
            ram += size;
            if (start..start + size).contains(&0x10_0000) {
                ram_end = (start + size).min(1 << 32);
            }
        }
        memory::start(ram_end);
        Machine { words: Words(copy_line(line)), protocol: name, ram, ram_end }
    }
}

/// Copies the command line before its place is used for anything else.
fn copy_line(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    let (from, to) = (Registers::new(address), memory::table(COMMAND_LINE, 0u8));
    let mut len = 0;
    while len < COMMAND_LINE {
        to[len] = from.read(len as u64);
        if to[len] == 0 {
            break;
        }
        len += 1;
    }
    core::str::from_utf8(&to[..len]).unwrap_or("")
}
