//! Kernel images, good, odd and hostile.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use linux_loader::elf::EM_AARCH64;
use proptest::prelude::*;
use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

use super::super::testing::{bzimage_with, elf_with, segment, with_note};
use super::*;

const MIB: u64 = 1 << 20;

/// Loads an image of these bytes into a guest of 64 MiB.
fn load_bytes(bytes: &[u8]) -> (Result<Kernel>, Arc<GuestRam>) {
    let ram = memory::allocate(64 * MIB, false, true).unwrap();
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(bytes).unwrap();
    (load(&ram, &mut file, KernelFormat::Auto, false, true), ram)
}

fn error_of(bytes: &[u8]) -> String {
    load_bytes(bytes).0.expect_err("refused").to_string()
}

#[test]
fn memory_of_an_earlier_life_is_zero_where_a_segment_goes_on_behind_its_file() {
    for zeroed in [true, false] {
        let ram = memory::allocate(64 * MIB, false, true).unwrap();
        let all = vec![0xaa; 5 << 12];
        ram.write_slice(&all, GuestAddress(MIB)).unwrap();
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&elf_with(MIB, &[segment(MIB)])).unwrap();
        load(&ram, &mut file, KernelFormat::Auto, false, zeroed).unwrap();
        let mut found = vec![0; all.len()];
        ram.read_slice(&mut found, GuestAddress(MIB)).unwrap();
        let rest = if zeroed { 0xaa } else { 0 };
        let expected = [vec![0x90; 1 << 12], vec![rest; 2 << 12], vec![0xaa; 2 << 12]].concat();
        assert!(found == expected, "{zeroed}");
    }
}

/// Loads an image of these bytes, whose name says that it may be flat or not.
fn load_as(bytes: &[u8], format: KernelFormat, may_be_flat: bool, zeroed: bool) -> (Result<Kernel>, Arc<GuestRam>) {
    let ram = memory::allocate(64 * MIB, false, true).unwrap();
    ram.write_slice(&[0xaa; 1 << 20], GuestAddress(16 * MIB)).unwrap();
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(bytes).unwrap();
    (load(&ram, &mut file, format, may_be_flat, zeroed), ram)
}

#[test]
fn a_flat_kernel_lies_at_16_mib_and_begins_there() {
    let bytes = vec![0x90; 5000];
    for (format, named) in [(KernelFormat::Flat, false), (KernelFormat::Auto, true)] {
        for zeroed in [true, false] {
            let (kernel, ram) = load_as(&bytes, format, named, zeroed);
            let kernel = kernel.unwrap();
            assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, 16 * MIB));
            assert!(kernel.end >= 32 * MIB && kernel.header.is_none());
            let mut found = vec![0; 6000];
            ram.read_slice(&mut found, GuestAddress(16 * MIB)).unwrap();
            let rest = if zeroed { 0xaa } else { 0 };
            assert!(found == [bytes.clone(), vec![rest; 1000]].concat(), "{zeroed}");
        }
    }
}

#[test]
fn a_format_that_was_asked_for_is_the_only_one_taken() {
    let refused = |bytes: &[u8], format, named| load_as(bytes, format, named, true).0.unwrap_err().to_string();
    let (elf, bzimage, flat) = (elf_with(MIB, &[segment(MIB)]), bzimage_with(|_| ()), vec![0x90; 5000]);
    for (bytes, format) in [(&elf, KernelFormat::Bzimage), (&bzimage, KernelFormat::Elf), (&flat, KernelFormat::Elf)] {
        assert!(refused(bytes, format, true).contains("kernel-format="), "{format:?}");
    }
    assert!(load_as(&elf, KernelFormat::Elf, false, true).0.is_ok());
    assert!(load_as(&bzimage, KernelFormat::Bzimage, false, true).0.is_ok());
    // Its content is believed before its name.
    assert_eq!(load_as(&elf, KernelFormat::Auto, true, true).0.unwrap().entry, MIB);
    assert_eq!(load_as(&bzimage, KernelFormat::Auto, true, true).0.unwrap().entry, 0x10_0200);
    assert!(refused(b"\x1f\x8bzipped", KernelFormat::Auto, true).contains("gzip"));
    assert!(refused(&flat, KernelFormat::Auto, false).contains("kernel-format=flat"));
    assert!(refused(&[], KernelFormat::Flat, false).contains("empty"));
    assert!(refused(&vec![0x90; 49 << 20], KernelFormat::Flat, false).contains("64 MiB"));
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_with_its_own_limits() {
    let (kernel, ram) = load_bytes(&bzimage_with(|header| header.cmdline_size = 99));
    let kernel = kernel.unwrap();
    assert_eq!((kernel.protocol, kernel.entry), (Protocol::Linux64, 0x10_0200));
    assert_eq!((kernel.command_line_max, kernel.initrd_max), (99, 0x7fff_ffff));
    assert_eq!(kernel.end, 20 * MIB, "it unpacks itself up to there");
    assert_eq!(ram.read_obj::<u32>(GuestAddress(0x10_0200)).unwrap(), 0x80, "the body follows the setup");
    assert!(kernel.header.is_some());
}

#[test]
fn a_header_ends_where_its_jump_lands() {
    let end = |jump: u16| {
        let kernel = load_bytes(&bzimage_with(|header| (header.jump, header.init_size) = (jump, 4 << 20))).0;
        kernel.map(|kernel| (kernel.entry, kernel.header.map(|header| header.kernel_info_offset)))
    };
    let with_info = |jump| {
        load_bytes(&bzimage_with(|header| (header.jump, header.kernel_info_offset) = (jump, 7)))
            .0
            .unwrap()
            .header
            .unwrap()
            .kernel_info_offset
    };
    assert!(end(0x6aeb).is_ok());
    assert_eq!((with_info(0x6aeb), with_info(0x66eb)), (7, 0), "0x268 is where that field begins");
}

#[test]
fn a_bzimage_without_a_64_bit_entry_is_refused_with_its_version() {
    let old = error_of(&bzimage_with(|header| header.version = 0x20b));
    assert!(old.contains("2.11") && old.contains("64-bit entry"), "{old}");
    assert!(error_of(&bzimage_with(|header| header.xloadflags = 0)).contains("64-bit entry"));
}

#[test]
fn a_bzimage_that_is_cut_short_or_does_not_fit_is_refused() {
    let whole = bzimage_with(|_| ());
    assert!(error_of(&whole[..1024]).contains("cut short"));
    assert!(error_of(&whole[..0x210]).contains("cut short"));
    assert!(error_of(&bzimage_with(|header| header.setup_sects = 255)).contains("cut short"));
    let big = error_of(&bzimage_with(|header| header.init_size = 60 << 20));
    assert!(big.contains("up to 76 MiB") && big.contains("64 MiB"), "{big}");
    assert!(error_of(&bzimage_with(|header| header.code32_start = 0x1_0000)).contains("outside"));
    assert!(error_of(&bzimage_with(|header| header.pref_address = u64::MAX)).contains("outside"));
    assert!(error_of(&bzimage_with(|header| header.code32_start = u32::MAX)).contains("outside"));
}

#[test]
fn an_elf_file_is_entered_at_its_entry_if_that_is_inside_and_by_its_note_otherwise() {
    let (kernel, ram) = load_bytes(&elf_with(MIB + 8, &[segment(MIB), segment(3 * MIB)]));
    let kernel = kernel.unwrap();
    assert_eq!((kernel.protocol, kernel.entry, kernel.end), (Protocol::Linux64, MIB + 8, 3 * MIB + 0x3000));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(3 * MIB + 0xfff)).unwrap(), 0x90);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(3 * MIB + 0x1000)).unwrap(), 0);

    let both = load_bytes(&with_note(MIB, 0x10_0010)).0.unwrap();
    assert_eq!((both.protocol, both.entry), (Protocol::Linux64, MIB));
    // A kernel linked to its virtual addresses.
    let note = load_bytes(&with_note(0xffff_ffff_8010_0000, 0x10_0010)).0.unwrap();
    assert_eq!((note.protocol, note.entry), (Protocol::Pvh, 0x10_0010));
    assert!(error_of(&with_note(0, 0x5000)).contains("none of its segments"));
}

#[test]
fn an_elf_file_that_lies_about_itself_is_refused() {
    let refused = |change: fn(&mut Elf64_Phdr), word: &str| {
        let mut segment = segment(MIB);
        change(&mut segment);
        let error = error_of(&elf_with(MIB, &[segment]));
        assert!(error.contains(word), "{error}");
    };
    refused(|s| s.p_paddr = 0x7000, "outside");
    refused(|s| s.p_paddr = 0xf_f000, "outside");
    refused(|s| s.p_paddr = u64::MAX - 0xfff, "outside");
    refused(|s| s.p_paddr = 4 << 30, "outside");
    refused(|s| s.p_memsz = u64::MAX, "outside");
    refused(|s| s.p_memsz = 64 << 20, "up to 65 MiB");
    refused(|s| (s.p_filesz, s.p_memsz) = (0x1001, 0x1001), "cut short");
    refused(|s| s.p_offset = u64::MAX, "cut short");
    refused(|s| s.p_memsz = 0xfff, "longer in the file");
    refused(|s| s.p_type = 0, "no segment");

    let mut many = elf_with(MIB, &[segment(MIB)]);
    many[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(error_of(&many).contains("65535 program headers"));
    let mut far = elf_with(MIB, &[segment(MIB)]);
    far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(error_of(&far).contains("cut short"));
    assert!(error_of(b"\x7fELF\x02\x01\x01").contains("cut short"));
    let mut arm = elf_with(MIB, &[segment(MIB)]);
    arm[18..20].copy_from_slice(&EM_AARCH64.to_le_bytes());
    assert!(error_of(&arm).contains("another kind of machine"));
}

#[test]
fn what_is_no_kernel_is_called_by_its_name() {
    let mut arm = vec![0; 64];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let mut boot_sector = vec![0; 512];
    boot_sector[0x1fe..].copy_from_slice(&[0x55, 0xaa]);
    let mut tar = vec![0; 512];
    tar[0x101..0x106].copy_from_slice(b"ustar");
    for (bytes, word) in [
        (&b"\x04\x22\x4d\x18\x64\x40"[..], "lz4"),
        (b"\x02\x21\x4c\x18\0\0", "lz4"),
        (b"BZh91AY", "bzip2"),
        (b"\x5d\0\0\x80\0\xff", "lzma"),
        (b"\x89LZO\0\r\n", "lzo"),
        (b"MZ\0\0zimg\0", "EFI zboot"),
        (b"MZ\x90\0\x03\0\0\0", "PE program"),
        (b"\x27\x05\x19\x56\0", "U-Boot uImage"),
        (b"\xd0\x0d\xfe\xed\0", "device tree"),
        (b"QFI\xfb\0\0\0\x03", "qcow2"),
        (b"KDMV\x01", "VMDK"),
        (b"070701000", "-initrd"),
        (&tar, "tar archive"),
        (b"!<arch>\ndebian-binary", "package"),
        (b"\xed\xab\xee\xdb\x03", "RPM"),
        (&boot_sector, "boot sector"),
        (&b""[..], "empty"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"#!/bin/sh\necho\n", "text"),
        (&[0; 4096], "neither"),
        (&arm, "ARM"),
    ] {
        let error = error_of(bytes);
        assert!(error.contains(word), "{error}");
    }
}

proptest! {
    // Any eight bytes of a header changed to anything: an answer, no panic, and an entry inside of the guest's memory.
    #[test]
    fn no_header_makes_us_fail_badly(at in 0usize..0x290, word in any::<u64>(), kind in 0..3, cut in 0usize..0x2400) {
        let mut image = match kind {
            0 => bzimage_with(|_| ()),
            1 => elf_with(MIB, &[segment(MIB), segment(2 * MIB)]),
            _ => with_note(0, 0x10_0010),
        };
        image[at..at + 8].copy_from_slice(&word.to_le_bytes());
        image.truncate(cut.max(1));
        let (kernel, _ram) = load_bytes(&image);
        if let Ok(kernel) = kernel {
            prop_assert!((HIGH_RAM..64 * MIB).contains(&kernel.entry), "{kernel:x?}");
            prop_assert!(kernel.end <= 64 * MIB);
        }
    }
}

#[test]
fn a_sparse_file_of_a_terabyte_is_refused_by_its_size_alone() {
    let ram = memory::allocate(64 * MIB, false, true).unwrap();
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all_at(&bzimage_with(|_| ()), 0).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(load(&ram, &mut file, KernelFormat::Auto, false, true).is_err());
}
