//! The ROM: one page, whose last 16 bytes are the reset vector. The code there resets the machine.
//!
//! A guest reaches it in two ways. A kernel that restarts by the BIOS jumps to F000:FFF0 in real mode, as Linux does with
//! hardware-reduced ACPI and without EFI. And a boot vCPU that receives an INIT begins at 0xFFFF_FFF0. So the page is mapped
//! at the end of the first MiB and below 4 GiB, like the end of a PC's firmware. It is read-only, so no guest can overwrite
//! it. The page holds nothing else, and no vCPU begins there at power-on. Only the host's kernel reads it.

use crate::memory::PAGE_BYTES;

/// The guest's address of the page below 1 MiB.
pub const LOW: u64 = 0x10_0000 - PAGE_BYTES;
/// Its address below 4 GiB.
pub const HIGH: u64 = 0x1_0000_0000 - PAGE_BYTES;

/// How the code asks for the reset: the keyboard controller's command port, and its command.
pub const PORT: u8 = 0x64;
/// See [`PORT`].
pub const COMMAND: u8 = 0xfe;

/// The code; it means the same in real, protected and 64-bit mode. A non-maskable interrupt that ends the wait asks again.
const CODE: [u8; 8] = [
    0xfa, // cli
    0xb0, COMMAND, // mov al, COMMAND
    0xe6, PORT, // out PORT, al
    0xf4, // hlt
    0xeb, 0xf8, // jmp to the beginning
];
/// From the end of the page back to the reset vector (SDM volume 3, 10.1.4).
const VECTOR: usize = PAGE_BYTES as usize - 16;

#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES as usize]);

static ROM: Page = {
    let mut page = [0; PAGE_BYTES as usize];
    let mut at = 0;
    while at < CODE.len() {
        page[VECTOR + at] = CODE[at];
        at += 1;
    }
    Page(page)
};

/// Where the page is in the monitor's memory.
pub fn host_address() -> u64 {
    ROM.0.as_ptr() as u64
}
