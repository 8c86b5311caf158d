//! Loading: kernel, initrd, command line and start information go into guest memory, and out comes where the boot
//! vCPU starts.
//!
//! What the image is and whether it can be believed is `kernel`'s business; what the registers look like then is
//! `kvm::x86_64::regs`'. Main thread before the guest runs, and the boot vCPU's at a
//! reset: the files stay open, so that they are there then, whatever has become of their names.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use memchr::memmem;
use vm_memory::{Bytes, GuestAddress};

use super::kernel::{self, Kernel, Protocol};
use super::layout;
use crate::config::spec::KernelFormat;
use crate::error::{Context, Error, Result};
use crate::kvm::x86_64::regs::{Entry, Mode};
use crate::memory::{self, GuestRam};
use crate::sys::lock::{self, Lock};

/// What the guest starts from.
#[derive(Debug)]
pub struct Boot {
    /// The kernel's image.
    kernel: (PathBuf, File),
    /// What it is.
    format: KernelFormat,
    /// The initial RAM disk.
    initrd: Option<(PathBuf, File)>,
    /// The user's part of the command line.
    append: String,
    /// The words that name the virtio devices, and whether the command line has them. If `None`, the kernel and its command line
    /// decide.
    words: (String, Option<bool>),
}

impl Boot {
    /// Opens the files.
    ///
    /// # Errors
    ///
    /// One cannot be opened, or is no regular file.
    pub fn open(kernel: &Path, format: KernelFormat, initrd: Option<&Path>, append: String) -> Result<Boot> {
        let named = |what, path: &Path| -> Result<_> {
            Ok((path.to_owned(), open(path, what).context(|| format!("{what} {path:?}"))?))
        };
        let kernel = named("kernel", kernel)?;
        let initrd = initrd.map(|path| named("initrd", path)).transpose()?;
        Ok(Boot { kernel, format, initrd, append, words: (String::new(), None) })
    }

    /// The same with these words for the virtio devices: added, left out, or, if `given` is `None`, added if the kernel reads them.
    #[must_use]
    pub fn with_words(self, words: String, given: Option<bool>) -> Boot {
        Boot { words: (words, given), ..self }
    }

    /// The whole command line, and how many bytes of it are the words for the devices.
    ///
    /// A kernel warns of words that it does not know, so only a kernel that reads them gets them: one that has the parameter, and
    /// any if ACPI is switched off. A bzImage is compressed and cannot be searched; those of distributions use ACPI.
    fn command_line(&self, is_bzimage: bool) -> Result<(String, usize)> {
        let (words, given) = &self.words;
        let given = match given {
            Some(given) => *given,
            None => has_acpi_off(&self.append) || !is_bzimage && has_parameter(&self.kernel.1).context(|| "read it")?,
        };
        let own = if given { words } else { "" };
        Ok((command_line(&self.append, own), own.len()))
    }
}

/// Kinds of memory in the map that the guest is given (ACPI 6.5, 15.4).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The loader's number in the boot protocol's list: "none of those assigned".
const LOADER_UNDEFINED: u8 = 0xff;

const PAGE: u64 = 4096;

/// Loads everything, and says where and how the boot vCPU starts.
///
/// Memory that is not `zeroed` holds an earlier life, of which nothing is left where a kernel expects zeros.
///
/// The ACPI tables are expected at [`layout::RSDP`]; they may be written before or after.
///
/// # Errors
///
/// A file cannot be read or is not what it should be, or something does not fit: the sentence names the file, and the
/// sizes.
pub fn load(ram: &GuestRam, boot: &mut Boot, zeroed: bool) -> Result<Entry> {
    let (path, file) = &mut boot.kernel;
    let may_be_flat = path.extension().is_some_and(|extension| extension == "bin");
    let kernel = kernel::load(ram, file, boot.format, may_be_flat, zeroed).context(|| format!("kernel {path:?}"))?;
    let (line, own_bytes) =
        boot.command_line(kernel.header.is_some()).context(|| format!("kernel {:?}", boot.kernel.0))?;
    write_command_line(ram, &line, own_bytes, kernel.command_line_max)?;
    let initrd = match &mut boot.initrd {
        Some((path, file)) => Some(load_initrd(ram, file, &kernel).context(|| format!("initrd {path:?}"))?),
        None => None,
    };
    match kernel.protocol {
        Protocol::Linux64 => write_zero_page(ram, &kernel, initrd)?,
        Protocol::Pvh => write_start_info(ram, initrd)?,
    }
    let (mode, rsi, rbx) = match kernel.protocol {
        Protocol::Linux64 => (Mode::Long { page_tables: layout::PAGE_TABLES }, layout::ZERO_PAGE, 0),
        Protocol::Pvh => (Mode::Protected, 0, layout::PVH_START),
    };
    Ok(Entry { mode, rip: kernel.entry, rsp: layout::BOOT_STACK, rbx, rsi, gdt: layout::GDT })
}

/// Opens a file that has a size: a pipe or a directory is refused before it can block us.
fn open(path: &Path, what: &str) -> Result<File> {
    if !path.metadata().context(|| "open")?.is_file() {
        return Err(Error::host("it is not a regular file"));
    }
    let file = File::open(path).context(|| "open")?;
    let used = lock::used(&file, what).context(|| "stat")?;
    lock::take(&file, path, Lock::Shared)?;
    used.keep();
    Ok(file)
}

/// The kernel's command line: the user's words, then the monitor's `own`. These go before a word `--`, because all words after it
/// are for init (Linux, Documentation/admin-guide/kernel-parameters.rst).
pub fn command_line(append: &str, own: &str) -> String {
    let at = end_of_options(append);
    let (kernels, inits) = append.split_at(at);
    [kernels.trim(), own, inits].into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Whether an uncompressed kernel reads the words that name virtio devices (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES): the name of the
/// parameter is in it.
fn has_parameter(kernel: &File) -> io::Result<bool> {
    let finder = memmem::Finder::new(layout::KERNEL_PARAMETER);
    let mut piece = vec![0; SCAN_BYTES];
    let (mut kept, mut at) = (0, 0);
    loop {
        let got = match kernel.read_at(&mut piece[kept..], at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if got == 0 {
            return Ok(false);
        }
        let end = kept + got;
        if finder.find(&piece[..end]).is_some() {
            return Ok(true);
        }
        at += got as u64;
        // The name may lie across the end of the piece.
        kept = end.min(layout::KERNEL_PARAMETER.len() - 1);
        piece.copy_within(end - kept..end, 0);
    }
}

/// Bytes of a kernel that are searched at once: they stay in the processor's cache.
const SCAN_BYTES: usize = 256 << 10;

/// Whether the user's words switch ACPI off.
fn has_acpi_off(append: &str) -> bool {
    append[..end_of_options(append)].split_ascii_whitespace().any(|word| word.trim_matches('"') == "acpi=off")
}

/// Where the word `--` begins, or the end of the line if there is none. The kernel's rules for quotes hold: a blank in double
/// quotes does not end a word, and the quotes around a word do not belong to it.
fn end_of_options(line: &str) -> usize {
    let mut start = 0;
    let mut quoted = false;
    let ends = line.char_indices().filter(|&(_, c)| {
        quoted ^= c == '"';
        c.is_ascii_whitespace() && !quoted
    });
    for end in ends.map(|(end, _)| end).chain([line.len()]) {
        if line[start..end].trim_matches('"') == "--" {
            return start;
        }
        start = end + 1;
    }
    line.len()
}

fn write_command_line(ram: &GuestRam, line: &str, own_bytes: usize, kernel_max: u64) -> Result<()> {
    let max = kernel_max.min(layout::COMMAND_LINE_BYTES - 1);
    if line.len() as u64 > max {
        return Err(Error::usage(format!(
            "kernel command line: {} bytes, of which {} are the monitor's own words for its devices, and this kernel reads {max} \
             at most: make -append shorter, or use fewer empty slots (-machine microvm,disk-slots=N,nic-slots=N)",
            line.len(),
            own_bytes
        )));
    }
    if line.contains('\0') {
        return Err(Error::usage("kernel command line: it has a zero byte in it, and a kernel would stop there"));
    }
    let end = GuestAddress(layout::COMMAND_LINE + line.len() as u64);
    ram.write_slice(line.as_bytes(), GuestAddress(layout::COMMAND_LINE))
        .and_then(|()| ram.write_obj(0u8, end))
        .context(|| "boot: write the command line")
}

/// Reads the initrd to the highest place where the kernel looks for one: its address and size.
fn load_initrd(ram: &GuestRam, file: &mut File, kernel: &Kernel) -> Result<(u64, u64)> {
    file.rewind().context(|| "seek")?;
    let size = file.metadata().context(|| "ask for its size")?.len();
    if size == 0 {
        return Err(Error::host("it is empty"));
    }
    let top = memory::low_end(ram).min(kernel.initrd_max.saturating_add(1));
    let start = top.checked_sub(size).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel.end);
    let start = start.ok_or_else(|| {
        Error::host(format!(
            "it has {size} bytes, and between the kernel ({:#x}) and the top ({top:#x}) there are {}: the guest needs \
             more memory",
            kernel.end,
            top.saturating_sub(kernel.end)
        ))
    })?;
    let bytes = usize::try_from(size).context(|| "its size")?;
    ram.read_exact_volatile_from(GuestAddress(start), file, bytes).context(|| "read it")?;
    Ok((start, size))
}

/// The memory map of the guest: what is RAM, and what looks like it and is not.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let total = memory::total(ram);
    let mut map = vec![(0, layout::BIOS, E820_RAM), (layout::BIOS, layout::HIGH_RAM - layout::BIOS, E820_RESERVED)];
    for (start, len) in memory::pieces(total) {
        let from = start.max(layout::HIGH_RAM);
        map.push((from, start + len - from, E820_RAM));
    }
    map
}

/// The start information of the 64-bit entry (Linux, Documentation/arch/x86/zero-page.rst).
fn write_zero_page(ram: &GuestRam, kernel: &Kernel, initrd: Option<(u64, u64)>) -> Result<()> {
    let mut params = boot_params {
        hdr: kernel.header.unwrap_or(setup_header {
            // An ELF kernel has no header; these two are how a reader knows that one stands here.
            boot_flag: 0xaa55,
            header: u32::from_le_bytes(*b"HdrS"),
            ..setup_header::default()
        }),
        acpi_rsdp_addr: layout::RSDP,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    if let Some((start, size)) = initrd {
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE)).context(|| "boot: write the zero page")
}

/// The start information of the PVH entry (Xen, public/arch-x86/hvm/start_info.h).
fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<()> {
    let map = memory_map(ram);
    let start = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.iter().len() as u32,
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::RSDP,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let (paddr, size) = initrd.unwrap_or_default();
    let module = hvm_modlist_entry { paddr, size, ..hvm_modlist_entry::default() };
    let mut written = ram
        .write_obj(start, GuestAddress(layout::PVH_START))
        .and_then(|()| ram.write_obj(module, GuestAddress(layout::PVH_MODULES)));
    for ((addr, size, kind), index) in map.into_iter().zip(0u64..) {
        let entry = hvm_memmap_table_entry { addr, size, type_: kind, reserved: 0 };
        let at = layout::PVH_MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64;
        written = written.and_then(|()| ram.write_obj(entry, GuestAddress(at)));
    }
    written.context(|| "boot: write the start information")
}

#[cfg(test)]
#[path = "boot_test.rs"]
mod tests;
