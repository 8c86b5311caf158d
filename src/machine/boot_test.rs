//! What a loaded guest finds in its memory.

use std::io::Write;
use std::sync::Arc;

use vmm_sys_util::tempfile::TempFile;

use super::super::testing::{bzimage_with, with_note};
use super::*;

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

/// A bzImage that unpacks itself to 16 to 20 MiB and reads 99 bytes of command line.
fn bzimage() -> TempFile {
    file(&bzimage_with(|header| header.cmdline_size = 99))
}

fn load_all(kernel: &TempFile, initrd: Option<&[u8]>, line: &str, mib: u64) -> (Result<Entry>, Arc<GuestRam>) {
    let ram = memory::allocate(mib * MIB, false, true).unwrap();
    let initrd = initrd.map(file);
    let boot =
        Boot::open(kernel.as_path(), KernelFormat::Auto, initrd.as_ref().map(TempFile::as_path), line.to_owned());
    (boot.and_then(|mut boot| load(&ram, &mut boot, true)), ram)
}

fn zero_page(ram: &GuestRam) -> boot_params {
    ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap()
}

fn command_line(ram: &GuestRam, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; len + 1];
    ram.read_slice(&mut bytes, GuestAddress(layout::COMMAND_LINE)).unwrap();
    bytes
}

#[test]
fn a_bzimage_finds_command_line_initrd_and_acpi_through_the_zero_page() {
    let initrd = vec![7; 5000];
    let (entry, ram) = load_all(&bzimage(), Some(&initrd), "quiet a=b=c", 64);
    let entry = entry.unwrap();
    assert_eq!(entry.mode, Mode::Long { page_tables: layout::PAGE_TABLES });
    assert_eq!((entry.rip, entry.rsi), (0x10_0200, layout::ZERO_PAGE));
    let page = zero_page(&ram);
    let (line, start, size, loader) =
        (page.hdr.cmd_line_ptr, page.hdr.ramdisk_image, page.hdr.ramdisk_size, page.hdr.type_of_loader);
    assert_eq!((line, loader, page.acpi_rsdp_addr), (layout::COMMAND_LINE as u32, 0xff, layout::RSDP));
    assert_eq!(command_line(&ram, 11), b"quiet a=b=c\0");
    // The highest whole pages that hold it.
    assert_eq!((u64::from(start), size), (64 * MIB - 8192, 5000));
    let mut found = vec![0; 5000];
    ram.read_slice(&mut found, GuestAddress(start.into())).unwrap();
    assert_eq!(found, initrd);
    let version = page.hdr.version;
    assert_eq!(version, 0x20f, "the kernel's own header");
}

#[test]
fn a_pvh_kernel_finds_the_same_through_its_start_information() {
    let (entry, ram) = load_all(&file(&with_note(0, 0x10_0040)), Some(b"initrd"), "console=ttyS0", 64);
    let entry = entry.unwrap();
    assert_eq!((entry.mode, entry.rip, entry.rbx), (Mode::Protected, 0x10_0040, layout::PVH_START));
    let start: hvm_start_info = ram.read_obj(GuestAddress(entry.rbx)).unwrap();
    assert_eq!((start.magic, start.version, start.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((start.cmdline_paddr, start.rsdp_paddr), (layout::COMMAND_LINE, layout::RSDP));
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(start.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (64 * MIB - 4096, 6));
    let map: Vec<(u64, u64, u32)> = (0..u64::from(start.memmap_entries))
        .map(|index| ram.read_obj(GuestAddress(start.memmap_paddr + index * 24)).unwrap())
        .map(|entry: hvm_memmap_table_entry| (entry.addr, entry.size, entry.type_))
        .collect();
    assert_eq!(map, [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 63 * MIB, 1)]);
    assert_eq!(command_line(&ram, 13), b"console=ttyS0\0");
}

#[test]
fn the_memory_map_leaves_the_gap_out() {
    let (entry, ram) = load_all(&bzimage(), None, "", 4096);
    entry.unwrap();
    let page = zero_page(&ram);
    let table = page.e820_table;
    let map: Vec<(u64, u64, u32)> =
        table[..page.e820_entries.into()].iter().map(|entry| (entry.addr, entry.size, entry.r#type)).collect();
    assert_eq!(map, [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 0xc000_0000 - MIB, 1), (4 << 30, 1 << 30, 1)]);
    let ramdisk = page.hdr.ramdisk_size;
    assert_eq!(ramdisk, 0);
}

#[test]
fn an_initrd_stays_below_what_the_kernel_can_reach() {
    let (entry, ram) = load_all(&bzimage(), Some(b"x"), "", 4096);
    entry.unwrap();
    let start = zero_page(&ram).hdr.ramdisk_image;
    assert_eq!(start, 0x7fff_f000);
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_the_sizes() {
    let fits = load_all(&bzimage(), Some(&vec![1; 4 << 20]), "", 24).0;
    assert!(fits.is_ok());
    let error = load_all(&bzimage(), Some(&vec![1; (4 << 20) + 1]), "", 24).0.expect_err("one byte more").to_string();
    assert!(error.contains("4194305") && error.contains("4194304") && error.contains("initrd"), "{error}");
    let error = load_all(&bzimage(), Some(b""), "", 24).0.expect_err("empty").to_string();
    assert!(error.contains("empty"), "{error}");
}

#[test]
fn a_command_line_is_as_long_as_the_kernel_reads_and_no_longer() {
    assert!(load_all(&bzimage(), None, &"x".repeat(99), 64).0.is_ok());
    let error = load_all(&bzimage(), None, &"x".repeat(100), 64).0.expect_err("one byte more");
    assert_eq!(error.exit_code(), 2, "the operator typed it");
    let error = error.to_string();
    assert!(error.contains("100 bytes") && error.contains("99"), "{error}");
    assert!(load_all(&bzimage(), None, "a\0b", 64).0.is_err());
}

#[test]
fn command_line_that_is_too_long_says_how_much_is_the_monitors_own() {
    let ram = memory::allocate(64 * MIB, false, true).unwrap();
    let words = ("x".repeat(50), "y".repeat(60));
    let boot = Boot::open(bzimage().as_path(), KernelFormat::Auto, None, words.0);
    let boot = boot.map(|boot| boot.with_words(words.1, Some(true)));
    let error = boot.and_then(|mut boot| load(&ram, &mut boot, true)).expect_err("too long").to_string();
    assert!(
        error.contains("111 bytes, of which 60 are the monitor's own words") && error.contains("disk-slots"),
        "{error}"
    );
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let ram = memory::allocate(64 * MIB, false, true).unwrap();
    let kernel = bzimage();
    let refused = |kernel: &Path, initrd: Option<&Path>| {
        Boot::open(kernel, KernelFormat::Auto, initrd, String::new())
            .and_then(|mut boot| load(&ram, &mut boot, true))
            .expect_err("refused")
            .to_string()
    };
    let missing = Path::new("/nonexistent/vmlinuz");
    assert!(refused(missing, None).starts_with("kernel \"/nonexistent/vmlinuz\": open: No such file"));
    assert!(refused(kernel.as_path(), Some(missing)).starts_with("initrd \"/nonexistent/vmlinuz\": open: No such"));
    assert!(refused(Path::new("/dev"), None).contains("not a regular file"));
    assert!(refused(Path::new("/dev/zero"), None).contains("not a regular file"));
}

#[test]
fn only_kernels_that_read_them_get_words_for_the_devices() {
    let plain = with_note(0, 0x10_0040);
    let with_parameter = |at: usize| {
        let mut image = plain.clone();
        image.resize(at, 0);
        image.extend(layout::KERNEL_PARAMETER.bytes());
        file(&image)
    };
    let ends = [0, 1, 9, 18].map(|before| with_parameter(SCAN_BYTES - before));
    let kernels = [(bzimage(), false), (file(&plain), false), (with_parameter(plain.len()), true)];
    for (kernel, reads) in kernels.into_iter().chain(ends.map(|kernel| (kernel, true))) {
        for (append, acpi) in [
            ("a", true),
            ("a acpi=off", false),
            ("\"acpi=off\" a", false),
            ("a acpi=offline", true),
            ("a -- acpi=off", true),
        ] {
            for given in [None, Some(true), Some(false)] {
                let ram = memory::allocate(64 * MIB, false, true).unwrap();
                let boot = Boot::open(kernel.as_path(), KernelFormat::Auto, None, append.to_owned()).unwrap();
                load(&ram, &mut boot.with_words("w=1".to_owned(), given), true).unwrap();
                let line = super::command_line(append, if given.unwrap_or(reads || !acpi) { "w=1" } else { "" });
                let told = format!("reads {reads}, {append:?}, {given:?}");
                assert_eq!(command_line(&ram, line.len()), format!("{line}\0").into_bytes(), "{told}");
            }
        }
    }
}

#[test]
fn own_words_come_before_the_words_of_init() {
    for (append, line) in [
        ("", "own=1"),
        ("a=b c", "a=b c own=1"),
        ("a -- b c", "a own=1 -- b c"),
        ("--", "own=1 --"),
        ("-- b", "own=1 -- b"),
        ("a --b -- c", "a --b own=1 -- c"),
        ("a --", "a own=1 --"),
        // The kernel takes quotes off, and a blank between them ends no word.
        ("a \"--\" b", "a own=1 \"--\" b"),
        ("a=\"x -- y\" b", "a=\"x -- y\" b own=1"),
        ("a=-- b", "a=-- b own=1"),
        ("a\t--\tb", "a own=1 --\tb"),
        ("ü -- ü", "ü own=1 -- ü"),
    ] {
        assert_eq!(super::command_line(append, "own=1"), line, "{append:?}");
    }
    assert_eq!(super::command_line("a -- b", ""), "a -- b");
}
