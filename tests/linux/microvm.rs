//! The microVM kernel (tools/microvm-kernel) as users of microVMs boot it: from an ext4 root file system on /dev/vda, without
//! an initrd; with ACPI, and with `acpi=off`, where an MP table and the command line describe the machine.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::{TROUBLES, noise, shutdown, tap, topology, unexpected_warnings};
use crate::monitor::{Directory, Monitor};

/// A file of the directory that this variable names.
pub fn file(variable: &str, name: &str) -> String {
    let directory = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set, see docs/testing.md"));
    PathBuf::from(directory).join(name).into_os_string().into_string().unwrap()
}

/// A file of the microVM kernel's: `vmlinux` or `bzImage`.
pub fn kernel(name: &str) -> String {
    file("LOOPVISOR_MICROVM", name)
}

/// A machine's two disks: the root file system, and one of random data.
struct Disks {
    root: String,
    options: [String; 2],
    // Last, so dropped last.
    _directory: Directory,
}

impl Disks {
    fn new() -> Disks {
        let directory = Directory::new();
        let (root, data) = (directory.file("root.img"), directory.file("data.img"));
        fs::copy(file("LOOPVISOR_LINUX", "root.img"), &root).unwrap();
        fs::write(&data, noise(1_000_448)).unwrap();
        let options = [
            format!("id=root,file={root},direct=off,iothread=io"),
            format!("id=data,file={data},direct=off,readonly=on"),
        ];
        Disks { root, options, _directory: directory }
    }

    fn boot(&self, name: &str, words: &str, options: &[&str]) -> Monitor {
        let disks = ["-iothread", "id=io", "-drive", &self.options[0], "-drive", &self.options[1]];
        let words = format!("root=/dev/vda rw loglevel=5 {words}");
        Monitor::boot(&kernel(name), &words, &[&disks, options].concat())
    }

    /// That e2fsck finds nothing to repair on the root file system, its journal included.
    fn assert_root_is_clean(&self) {
        let output = Command::new("/usr/sbin/e2fsck").args(["-f", "-n", &self.root]).output().expect("e2fsck");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains("recovery"), "{text}");
    }
}

/// This kernel reads about its devices twice when it has ACPI: from the ACPI tables, then from the command line. It refuses the
/// second device of each pair, because the first has claimed the registers.
const REFUSED_TWICE: [&str; 2] = ["can't request region for resource [mem 0xf01", "failed with error -16"];

/// What the kernel must report of any of these machines in each of its boots: the script `report`.
fn assert_report(monitor: &Monitor, boots: usize, cpus: u32, accepted: &[&str]) {
    let cpu_lines: Vec<_> = monitor.lines("cpu").into_iter().map(|line| format!("cpu{line}")).collect();
    assert_eq!(cpu_lines, vec![topology(cpus); boots].concat());
    assert_eq!(monitor.lines("clocksource: "), vec!["kvm-clock"; boots]);
    assert_eq!(monitor.lines("timer: "), vec!["lapic-deadline"; boots]);
    let mut warnings = unexpected_warnings(monitor);
    warnings.retain(|line| !(line.contains("virtio-mmio") && accepted.iter().any(|text| line.contains(text))));
    assert_eq!(warnings, Vec::<String>::new());
    let interrupts = monitor.lines("interrupt: ");
    for device in ["virtio0", "virtio1", "ttyS0"] {
        let is = |line: &str| line.contains("IO-APIC") && line.ends_with(device);
        let found = interrupts.iter().filter(|line| is(line)).count();
        assert_eq!(found, boots, "{device} has an interrupt in each boot: {interrupts:#?}");
    }
    // Counters of emulated processors may disagree ("TSC unstable"), on which kvm-clock does not depend.
    let console = monitor.console();
    let is_trouble = |line: &&str| TROUBLES.iter().any(|trouble| *trouble != "unstable" && line.contains(trouble));
    assert_eq!(console.lines().filter(is_trouble).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn microvm_kernel_boots_from_ext4_with_acpi() {
    let disks = Disks::new();
    let mut options = vec!["-smp", "4", "-no-reboot"];
    let tap = tap("lvtap1", "10.9.7.1");
    // The monitor inherits the copy, which closes with this process.
    // SAFETY: makes a descriptor and touches no memory.
    let netdev = tap.as_ref().map(|tap| format!("id=net,fds={}", unsafe { libc::dup(tap.as_raw_fd()) }));
    match &netdev {
        Some(netdev) => options.extend(["-netdev", netdev]),
        None => println!("skipped: the NIC, because this user may not make a tap"),
    }
    let mut monitor = disks.boot("vmlinux", "loopvisor.script=report,root", &options);
    let qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert_eq!(qmp.finish(), [shutdown(true, "guest-shutdown")]);
    assert_report(&monitor, 1, 4, &REFUSED_TWICE);
    let mut expected = vec!["/dev/root ext4 rw", "the copy of boot 1 is complete in boot 1"];
    if netdev.is_some() {
        expected.insert(1, "eth0 pings");
    }
    assert_eq!(monitor.lines("root: "), expected);
    disks.assert_root_is_clean();
}

/// `reboot -f` without a word of how: this kernel uses the keyboard controller. It interrupts a mounted file system, whose
/// journal the second boot replays.
#[test]
fn microvm_kernel_without_acpi_reboots_and_finds_its_root() {
    let disks = Disks::new();
    let words = "acpi=off loglevel=7 loopvisor.script=report,root,reboot";
    let mut monitor = disks.boot("bzImage", words, &["-smp", "2"]);
    let mut qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest waits", 0);
    qmp.run("quit");
    assert_eq!(monitor.wait(), 0);
    let reset = ("RESET".to_string(), json!({ "guest": true, "reason": "guest-reset" }));
    assert_eq!(qmp.finish(), [reset, shutdown(false, "host-qmp-quit")]);
    assert_report(&monitor, 2, 2, &[]);
    let console = monitor.console();
    for line in ["Intel MultiProcessor Specification v1.4", "virtio-mmio: Registering device virtio-mmio.0"] {
        assert_eq!(console.matches(line).count(), 2, "{line}: once per boot");
    }
    // Of the second boot: the first ended in the middle.
    let boot = |number| format!("the copy of boot 1 is complete in boot {number}");
    let root = "/dev/root ext4 rw".to_string();
    assert_eq!(monitor.lines("root: "), [root.clone(), boot(1), root, boot(2)]);
    disks.assert_root_is_clean();
}
