//! As many vCPUs as a machine can have, with the bare-metal guest: it starts each and hears of each.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "the lints' exception for tests")]

use std::collections::BTreeSet;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_ioctls::Kvm;

const MAX: usize = 254;
/// With an emulated ring 0 and other users of two cores.
const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn the_guest_starts_all_of_254_vcpus_each_with_an_apic_id_of_its_own() {
    let guest = std::env::var("LOOPVISOR_GUEST").expect("LOOPVISOR_GUEST, see docs/testing.md");
    let host_max = Kvm::new().expect("/dev/kvm").get_max_vcpus();
    let count = MAX.min(host_max);
    if count < MAX {
        println!(
            "skipped: this host's KVM has {host_max} vCPUs at most, so a machine of {count} was made instead of {MAX}"
        );
    }
    let count = count.to_string();
    let mut child = Command::new(env!("CARGO_BIN_EXE_loopvisor"))
        .args(["-smp", &count, "-m", "64M", "-kernel", &guest, "-serial", "stdio", "-no-reboot"])
        .args(["-append", "mode=smp", &format!("cpus={count}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut console = child.stdout.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let _ = console.read_to_string(&mut text);
        let _ = sender.send(text);
    });
    let text = receiver.recv_timeout(LIMIT);
    if text.is_err() {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    let stdout = text.expect("the machine ends in time");
    assert_eq!(status.code(), Some(0), "{stdout}");
    assert!(stdout.contains("guest: ok"), "{stdout}");
    let ids: BTreeSet<usize> =
        stdout.split_whitespace().filter_map(|word| word.strip_prefix("apic=")?.parse().ok()).collect();
    assert_eq!(ids.into_iter().collect::<Vec<_>>(), (0..count.parse().unwrap()).collect::<Vec<usize>>());
}
