//! Resets: the machine starts anew in the same process, with nothing of the old life in it and nothing lost on its disks.

use crate::monitor::Setup;

/// The lines of the guest's boots.
fn boots(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.starts_with("reboot: boot=")).collect()
}

#[test]
fn a_guest_that_resets_itself_fifty_times_in_the_middle_of_its_work_finds_everything_as_it_must_be() {
    for (how, cpus, drive) in [
        ("i8042", 1, "direct=off"),
        ("triple", 1, "direct=on,iothread=io1"),
        ("i8042", 4, "direct=off,aio=threads,iothread=io1"),
        ("triple", 4, "direct=off,iothread=io1"),
    ] {
        let words = format!("mode=reboot how={how} count=50 cpus={cpus} end=acpi");
        let Some(setup) = Setup::guest_that_reboots(&words) else { return };
        let setup = setup.iothread("io1").disk("vda", 1 << 20, drive).option("-smp", &cpus.to_string());
        let mut monitor = setup.start();
        monitor.expect_ok();
        let text = monitor.serial.text();
        let expected: Vec<String> = (1..=50).map(|n| format!("reboot: boot={n} round={} memory=zero", n - 1)).collect();
        assert_eq!(boots(&text), expected, "{how}, {cpus} vCPUs, {drive}");
    }
}
