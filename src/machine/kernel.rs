//! Kernel images: told apart by their content, checked, and read straight into guest memory.
//!
//! Three are known: the bzImage that distributions ship, the ELF file `vmlinux`, and the flat memory that `objcopy` makes of
//! that one, which has no header and is taken for what it is by its name or if asked for. All else is refused with a sentence
//! that says what it is and what would do. A header is believed only as far as it has been checked: every range lies
//! in the file and in the guest's RAM above 1 MiB, every loop is bounded by a constant, nothing is allocated by a
//! header's word. Main thread, before the guest runs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use log::info;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::layout::HIGH_RAM;
use crate::config::spec::KernelFormat;
use crate::error::{Context, Error, Result};
use crate::memory::{self, GuestRam};

/// How a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// In 64-bit mode, with `struct boot_params` (Linux x86 boot protocol, "64-bit boot protocol").
    Linux64,
    /// In 32-bit protected mode, with `struct hvm_start_info` (PVH).
    Pvh,
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// How it is entered.
    pub protocol: Protocol,
    /// Its first instruction.
    pub entry: u64,
    /// The first address behind all that it uses before it has read the memory map.
    pub end: u64,
    /// The longest command line it reads, in bytes without the zero behind it.
    pub command_line_max: u64,
    /// The highest address that an initrd may use.
    pub initrd_max: u64,
    /// The header that a bzImage hands on to itself.
    pub header: Option<setup_header>,
}

/// What an x86_64 kernel that has no header to say so reads of its command line: COMMAND_LINE_SIZE less the zero.
const ELF_COMMAND_LINE_MAX: u64 = 2047;
/// The highest address of an initrd that every x86_64 bzImage declares.
const ELF_INITRD_MAX: u64 = 0x7fff_ffff;
/// More program headers than any kernel has; Linux has five.
const ELF_HEADERS_MAX: u16 = 64;

/// Where a bzImage's setup header starts in the file, and how the structure that mirrors it begins.
const SETUP_HEADER: usize = 0x1f1;
/// The boot protocol that introduced the 64-bit entry: 2.12, Linux 3.8.
const PROTOCOL_64: u16 = 0x20c;
/// A bzImage's 64-bit entry, from where its protected-mode part is loaded.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Where a flat kernel lies, and begins: the physical address that x86_64 kernels are linked to (CONFIG_PHYSICAL_START).
const FLAT_START: u64 = 16 << 20;
/// Memory behind a flat kernel's file that it uses as if it were zero, as far as can be known: Linux's .bss and .brk are less.
const FLAT_REST: u64 = 16 << 20;

/// Loads the kernel image in `file`, which is of that `format`, into memory that is `zeroed` or holds an earlier life.
/// `may_be_flat`: its name says so, if it has no header that says anything.
///
/// # Errors
///
/// It is none that we know, it is cut short or contradicts itself, or it does not fit the guest's memory.
pub fn load(ram: &GuestRam, file: &mut File, format: KernelFormat, may_be_flat: bool, zeroed: bool) -> Result<Kernel> {
    let len = file.metadata().context(|| "ask for its size")?.len();
    let mut head = [0; 4096];
    let got = read_at(file, 0, &mut head)?;
    let head = &head[..got];
    let found = if head.starts_with(b"\x7fELF") {
        Some(KernelFormat::Elf)
    } else if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS") {
        Some(KernelFormat::Bzimage)
    } else {
        None
    };
    let flat = format == KernelFormat::Flat || format == KernelFormat::Auto && may_be_flat && is_code(head);
    match found {
        Some(found) if format != KernelFormat::Auto && format != found => Err(refuse(format!(
            "it is {}, and -machine kernel-format= asks for something else; accepted: without it",
            if found == KernelFormat::Elf { "an ELF file" } else { "a bzImage" }
        ))),
        Some(KernelFormat::Elf) => elf(ram, file, len, zeroed),
        Some(_) => bzimage(ram, file, len, head),
        None if flat => self::flat(ram, file, len, zeroed),
        None if format == KernelFormat::Auto => Err(refuse(what_else(head))),
        None => Err(refuse(format!("{}, and -machine kernel-format= asks for one of these", what_else(head)))),
    }
}

/// Whether it may be a kernel without a header: nothing else is known to begin like that.
fn is_code(head: &[u8]) -> bool {
    what_else(head) == UNKNOWN
}

/// Flat memory: read to where it belongs, entered in 64-bit mode at its first byte.
fn flat(ram: &GuestRam, file: &mut File, len: u64, zeroed: bool) -> Result<Kernel> {
    if len == 0 {
        return Err(refuse(what_else(&[])));
    }
    let file_end = check_range(ram, "the flat kernel", FLAT_START, len)?;
    let end = (file_end + FLAT_REST).min(memory::low_end(ram));
    file.rewind().context(|| "seek")?;
    ram.read_exact_volatile_from(GuestAddress(FLAT_START), file, len as usize).context(|| "read it")?;
    if !zeroed {
        clear(ram, file_end, end)?;
    }
    info!("the kernel is taken for flat memory (vmlinux.bin): loaded at {FLAT_START:#x}, and begun there");
    let command_line_max = ELF_COMMAND_LINE_MAX;
    let (protocol, entry) = (Protocol::Linux64, FLAT_START);
    Ok(Kernel { protocol, entry, end, command_line_max, initrd_max: ELF_INITRD_MAX, header: None })
}

/// A name for what is not a kernel, and the way out.
fn what_else(head: &[u8]) -> &'static str {
    match head {
        [] => "it is empty",
        [0x1f, 0x8b, ..] => "it is compressed by gzip: unpack it (gunzip), or give the bzImage",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed by xz: unpack it (unxz), or give the bzImage",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed by zstd: unpack it (unzstd), or give the bzImage",
        [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => {
            "it is compressed by lz4: unpack it (unlz4), or give the bzImage"
        }
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => "it is compressed by bzip2: unpack it (bunzip2), or give the bzImage",
        [0x5d, 0, 0, ..] => "it is compressed by lzma: unpack it (unlzma), or give the bzImage",
        [0x89, b'L', b'Z', b'O', ..] => "it is compressed by lzo: unpack it (lzop -d), or give the bzImage",
        _ if head.get(0x38..0x3c) == Some(b"ARM\x64") => "it is a kernel for 64-bit ARM, and the guest is an x86_64",
        [b'M', b'Z', _, _, b'z', b'i', b'm', b'g', ..] => {
            "it is an EFI zboot image, a compressed kernel for EFI firmware, which the guest does not have: give the bzImage or \
             an ELF vmlinux"
        }
        [b'M', b'Z', ..] => {
            "it is a PE program for EFI firmware, which the guest does not have (a unified kernel image has the kernel in its \
             section .linux): give the bzImage or an ELF vmlinux"
        }
        [0x27, 0x05, 0x19, 0x56, ..] => "it is a U-Boot uImage: give the bzImage or an ELF vmlinux it was made of",
        [0xd0, 0x0d, 0xfe, 0xed, ..] => "it is a U-Boot FIT image or a device tree: give the bzImage or an ELF vmlinux",
        [b'Q', b'F', b'I', 0xfb, ..] => "it is a qcow2 disk: give the kernel in it as a file of its own",
        [b'K', b'D', b'M', b'V', ..] => "it is a VMDK disk: give the kernel in it as a file of its own",
        [b'0', b'7', b'0', b'7', b'0', b'1' | b'2' | b'7', ..] => "it is an initramfs (cpio): give it with -initrd",
        _ if head.get(0x101..0x106) == Some(b"ustar") => "it is a tar archive: unpack it, and give the kernel in it",
        _ if head.starts_with(b"!<arch>\n") => "it is a package or library (ar): unpack it, and give the kernel in it",
        [0xed, 0xab, 0xee, 0xdb, ..] => "it is an RPM package: unpack it, and give the kernel in it",
        _ if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) => "it is a disk with a boot sector: give it as a drive",
        _ if head.iter().all(|byte| matches!(byte, 9..=13 | 32..=126)) => {
            "it is text; a bzImage (/boot/vmlinuz-*) or an ELF vmlinux is wanted"
        }
        _ => UNKNOWN,
    }
}

const UNKNOWN: &str = "it is neither a bzImage (/boot/vmlinuz-*) nor an ELF vmlinux; a flat vmlinux.bin is taken with \
                       -machine microvm,kernel-format=flat, or by a name that ends with .bin";

fn refuse(why: impl Into<String>) -> Error {
    Error::host(why)
}

/// Fills `buffer` from `offset` on, as far as the file goes.
fn read_at(file: &mut File, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    file.seek(SeekFrom::Start(offset)).context(|| "seek")?;
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..]).context(|| "read")? {
            0 => break,
            more => got += more,
        }
    }
    Ok(got)
}

/// Refuses a range of addresses that is not RAM below the gap, or that our own tables are in.
fn check_range(ram: &GuestRam, what: &str, start: u64, len: u64) -> Result<u64> {
    let top = memory::low_end(ram);
    match start.checked_add(len) {
        Some(end) if start >= HIGH_RAM && end <= top => Ok(end),
        Some(end) if start >= HIGH_RAM && end <= memory::GAP_START => Err(refuse(format!(
            "{what} needs memory up to {} MiB, and the guest has {} MiB",
            end.div_ceil(1 << 20),
            top >> 20
        ))),
        _ => Err(refuse(format!(
            "{what} ({len:#x} bytes at {start:#x}) lies outside of the memory for kernels, {HIGH_RAM:#x} to {top:#x}"
        ))),
    }
}

/// A bzImage: the protected-mode part, entered by its 64-bit entry.
fn bzimage(ram: &GuestRam, file: &mut File, len: u64, head: &[u8]) -> Result<Kernel> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let in_file =
        head.get(SETUP_HEADER..SETUP_HEADER + bytes.len()).ok_or_else(|| refuse("its header is cut short"))?;
    bytes.copy_from_slice(in_file);
    // The header ends where the jump in front of it lands; what follows in an older kernel is code, not header.
    let end = 0x202 + usize::from(head[0x201]) - SETUP_HEADER;
    bytes.get_mut(end..).unwrap_or_default().fill(0);

    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_64 || flags & XLF_KERNEL_64 == 0 {
        let (major, minor) = (version >> 8, version & 0xff);
        return Err(refuse(format!(
            "it has no 64-bit entry (boot protocol {major}.{minor:02}, flags {flags:#x}): an x86_64 kernel, Linux 3.8 \
             or later, is wanted"
        )));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup = (sectors + 1) * SECTOR;
    let body = len.checked_sub(setup).filter(|body| *body > ENTRY_64);
    let body = body.ok_or_else(|| refuse(format!("it is cut short: {len} bytes, of which {setup} are its setup")))?;
    let start = u64::from(header.code32_start);
    let file_end = check_range(ram, "the kernel's file", start, body)?;
    // Unless it was loaded there, the kernel unpacks itself to where it prefers to be.
    let unpacked = header.pref_address.max(start);
    let end = check_range(ram, "the unpacked kernel", unpacked, header.init_size.into())?.max(file_end);

    let loaded = BzImage::load(ram, None, file, Some(GuestAddress(HIGH_RAM))).context(|| "read it")?;
    header.code32_start = start as u32;
    Ok(Kernel {
        protocol: Protocol::Linux64,
        entry: loaded.kernel_load.0 + ENTRY_64,
        end,
        command_line_max: header.cmdline_size.into(),
        initrd_max: header.initrd_addr_max.into(),
        header: Some(header),
    })
}

/// An ELF file: its segments, entered in 64-bit mode at its entry if that is an address inside of them, and by its
/// PVH note otherwise.
///
/// Linux has both, and its 64-bit entry is the shorter way: no page tables to build, no mode to switch, no start
/// information to translate. Kernels whose ELF entry is a virtual address or none have the note only.
fn elf(ram: &GuestRam, file: &mut File, len: u64, zeroed: bool) -> Result<Kernel> {
    let mut header = Elf64_Ehdr::default();
    if read_at(file, 0, header.as_mut_slice())? < size_of::<Elf64_Ehdr>() {
        return Err(refuse("its ELF header is cut short"));
    }
    if header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != EM_X86_64
    {
        return Err(refuse("it is an ELF file for another kind of machine; one for x86_64 is wanted"));
    }
    if header.e_phnum == 0 || header.e_phnum > ELF_HEADERS_MAX {
        return Err(refuse(format!("it has {} program headers; 1 to {ELF_HEADERS_MAX} are wanted", header.e_phnum)));
    }
    let mut segments = Vec::with_capacity(header.e_phnum.into());
    for index in 0..u64::from(header.e_phnum) {
        let offset = header.e_phoff.checked_add(index * size_of::<Elf64_Phdr>() as u64).filter(|offset| *offset < len);
        let mut segment = Elf64_Phdr::default();
        let got = offset.map_or(Ok(0), |offset| read_at(file, offset, segment.as_mut_slice()))?;
        if got < size_of::<Elf64_Phdr>() {
            return Err(refuse("its program headers are cut short"));
        }
        if matches!(segment.p_type, PT_LOAD | PT_NOTE) {
            check_segment(ram, &segment, len)?;
            segments.push(segment);
        }
    }
    segments.retain(|segment| segment.p_type == PT_LOAD);
    let end = segments.iter().map(|segment| segment.p_paddr + segment.p_memsz).max();
    let end = end.ok_or_else(|| refuse("it has no segment to load"))?;

    let loaded = Elf::load(ram, None, file, None).context(|| "read it")?;
    if !zeroed {
        segments.iter().try_for_each(|segment| clear_rest(ram, segment))?;
    }
    let inside = |at: u64| segments.iter().any(|s| (s.p_paddr..s.p_paddr + s.p_filesz).contains(&at));
    let (protocol, entry) = match loaded.pvh_boot_cap {
        _ if inside(header.e_entry) => (Protocol::Linux64, header.e_entry),
        PvhBootCapability::PvhEntryPresent(entry) if inside(entry.0) => (Protocol::Pvh, entry.0),
        _ => {
            return Err(refuse(format!(
                "its entry {:#x} lies in none of its segments, and it has no PVH entry that does",
                header.e_entry
            )));
        }
    };
    let command_line_max = ELF_COMMAND_LINE_MAX;
    Ok(Kernel { protocol, entry, end, command_line_max, initrd_max: ELF_INITRD_MAX, header: None })
}

/// Writes the zeros that a segment ends with and that are not in the file.
fn clear_rest(ram: &GuestRam, segment: &Elf64_Phdr) -> Result<()> {
    clear(ram, segment.p_paddr + segment.p_filesz, segment.p_paddr + segment.p_memsz)
}

/// Writes zeros from one address up to another.
fn clear(ram: &GuestRam, mut at: u64, end: u64) -> Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    while at < end {
        let len = (end - at).min(ZEROS.len() as u64);
        ram.write_slice(&ZEROS[..len as usize], GuestAddress(at)).context(|| "clear what follows it")?;
        at += len;
    }
    Ok(())
}

/// Checks that a segment lies in the file, and what is loaded of it in memory.
fn check_segment(ram: &GuestRam, segment: &Elf64_Phdr, len: u64) -> Result<()> {
    let file_end = segment.p_offset.checked_add(segment.p_filesz);
    if file_end.is_none_or(|end| end > len) {
        return Err(refuse(format!(
            "it is cut short: a segment of {:#x} bytes starts at {:#x} of {len:#x}",
            segment.p_filesz, segment.p_offset
        )));
    }
    if segment.p_type == PT_LOAD {
        if segment.p_filesz > segment.p_memsz {
            return Err(refuse("it contradicts itself: a segment is longer in the file than in memory"));
        }
        check_range(ram, "a segment of it", segment.p_paddr, segment.p_memsz)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "kernel_test.rs"]
mod tests;
