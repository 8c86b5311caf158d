//! Kernel images for tests, made byte by byte.

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

const MIB: u64 = 1 << 20;

/// A bzImage of a setup sector and a body, as a boot loader finds it.
pub fn bzimage_with(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        pref_address: 16 * MIB,
        init_size: 4 << 20,
        ..setup_header::default()
    };
    change(&mut header);
    let mut image = vec![0; 1024];
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend((0..0x1000u32).flat_map(u32::to_le_bytes));
    image
}

/// An ELF file with these program headers, and 4096 bytes of 0x90 from 0x1000 on.
pub fn elf_with(entry: u64, segments: &[Elf64_Phdr]) -> Vec<u8> {
    let mut header = Elf64_Ehdr {
        e_type: 2,
        e_machine: EM_X86_64,
        e_version: 1,
        e_entry: entry,
        e_phoff: 64,
        e_ehsize: 64,
        e_phentsize: 56,
        e_phnum: segments.len() as u16,
        ..Elf64_Ehdr::default()
    };
    header.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut image = header.as_slice().to_vec();
    segments.iter().for_each(|segment| image.extend(segment.as_slice()));
    image.resize(0x1000, 0);
    image.resize(0x2000, 0x90);
    image
}

/// A segment at `paddr` whose first page is those bytes, of three.
pub fn segment(paddr: u64) -> Elf64_Phdr {
    Elf64_Phdr {
        p_type: PT_LOAD,
        p_offset: 0x1000,
        p_paddr: paddr,
        p_filesz: 0x1000,
        p_memsz: 0x3000,
        ..Elf64_Phdr::default()
    }
}

/// The same file with a PVH note that says `entry`, and the note's program header.
pub fn with_note(entry: u64, pvh: u32) -> Vec<u8> {
    let note = Elf64_Phdr { p_type: PT_NOTE, p_offset: 0x1800, p_filesz: 20, ..Elf64_Phdr::default() };
    let mut image = elf_with(entry, &[segment(MIB), note]);
    let words = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), pvh];
    image.splice(0x1800..0x1814, words.into_iter().flat_map(u32::to_le_bytes));
    image
}
