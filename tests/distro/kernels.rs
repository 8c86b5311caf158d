//! Debian's kernels, each as bzImage and as ELF, on one vCPU and on four: what they find, and three lives.
//!
//! The guest is that of `tools/linux-image` with the modules of each kernel (`tools/distro-kernels`).

use std::fs;

use serde_json::json;

use crate::debian::given;
use crate::monitor::{Directory, Monitor};

/// A life with each way to go on: a reboot, a panic, and power-off.
fn three_lives(name: &str, file: &str, cpus: u32) {
    let folder = format!("{}/{name}", given("LOOPVISOR_DISTRO_KERNELS"));
    let release = fs::read_to_string(format!("{folder}/version")).unwrap();
    println!("{name}: {} as {file} on {cpus} vCPUs", release.trim());
    let directory = Directory::new();
    let drive = format!("id=one,file={},direct=off,serial=first", directory.image("a.img", 8 << 20));
    let smp = cpus.to_string();
    let initrd = format!("{folder}/initramfs.cpio");
    let machine = "microvm,disk-slots=2,nic-slots=1";
    let devices = ["-drive", &drive, "-balloon", "deflate-on-oom=true", "-rng", "random_file=/dev/urandom"];
    let options = [&["-machine", machine, "-initrd", &initrd, "-smp", &smp, "-m", "512M"], &devices[..]].concat();
    // docs/testing.md, "The nested host".
    let noxsave = if release.starts_with("6.1.") { "" } else { "noxsave " };
    let words = format!("loglevel=5 {noxsave}loopvisor.script=report,restart");
    let mut monitor = Monitor::boot(&format!("{folder}/{file}"), &words, &options);
    let qmp = monitor.qmp();
    let mut ready = 0;
    for way in ["reboot", "panic", "poweroff"] {
        ready = monitor.wait_for("restart: ready", ready).0;
        monitor.type_line(way);
    }
    assert_eq!(monitor.wait(), 0, "{name} as {file}");
    let reset = |reason: &str| ("RESET".to_owned(), json!({ "guest": true, "reason": reason }));
    let shutdown = ("SHUTDOWN".to_owned(), json!({ "guest": true, "reason": "guest-shutdown" }));
    let events: Vec<_> = qmp.finish().into_iter().filter(|(name, _)| name != "BALLOON_CHANGE").collect();
    assert_eq!(events, [reset("guest-reset"), reset("guest-reset"), shutdown], "{name} as {file}");

    let three = |line: &str| vec![line.to_string(); 3];
    assert_eq!(monitor.lines("kernel: "), three(release.trim()));
    assert_eq!(
        monitor.lines("vcpus: "),
        three(&match cpus {
            1 => "1 (online: 0)".to_string(),
            _ => format!("{cpus} (online: 0-{})", cpus - 1),
        })
    );
    assert_eq!(monitor.lines("disk vda: serial "), three("first, LNRO0005:00"));
    assert_eq!(monitor.lines("restart: the ")[1..], three("disk holds what the last life has written")[1..]);
    assert_eq!(monitor.lines("disk vdb: empty slot").len(), 3);
    assert_eq!(monitor.lines("net eth0: ").len(), 3);
    // Two disks, the NIC, the balloon and the source of random numbers.
    for number in 0..5 {
        let interrupts = monitor.lines("interrupt: ");
        let of_device = interrupts.iter().filter(|line| line.ends_with(&format!(" virtio{number}"))).count();
        assert_eq!(of_device, 3, "{name} as {file}: virtio{number}: {interrupts:#?}");
    }
    let clocks = monitor.lines("clocksource: ");
    assert!(clocks.len() == 3 && clocks.iter().all(|clock| clock == "kvm-clock" || clock == "tsc"), "{clocks:?}");
    assert_eq!(monitor.lines("timer: "), three("lapic-deadline"));
    let console = monitor.console();
    assert_eq!(console.matches("Kernel panic").count(), 1, "{name} as {file}");
    for trouble in ["lockup", "LOCKUP", "stall", "BUG", "Oops", "unstable", "I/O error", "doesn't work"] {
        assert!(!console.contains(trouble), "{name} as {file}: {trouble}");
    }
}

/// A test for each form of a kernel, so that what fails has a name and is tried again by itself.
macro_rules! kernels {
    ($($module:ident: $name:literal),* $(,)?) => {
        $(mod $module {
            use super::three_lives;

            #[test]
            fn lives_thrice_from_a_bzimage() {
                three_lives($name, "vmlinuz", 1);
            }

            #[test]
            fn lives_thrice_from_an_elf_file() {
                three_lives($name, "vmlinux", 1);
            }

            #[test]
            fn lives_thrice_from_a_bzimage_on_four_vcpus() {
                three_lives($name, "vmlinuz", 4);
            }

            #[test]
            fn lives_thrice_from_an_elf_file_on_four_vcpus() {
                three_lives($name, "vmlinux", 4);
            }
        })*
    };
}

kernels! {
    bookworm_cloud: "bookworm-cloud",
    bookworm_plain: "bookworm-plain",
    bookworm_backports_cloud: "bookworm-backports-cloud",
    bookworm_backports_plain: "bookworm-backports-plain",
    trixie_cloud: "trixie-cloud",
    trixie_plain: "trixie-plain",
    trixie_backports_cloud: "trixie-backports-cloud",
    trixie_backports_plain: "trixie-backports-plain",
}
