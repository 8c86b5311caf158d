//! What a monitor says and does when the host gives it less than it needs.

use std::fs;
use std::process::{Command, Output};

use crate::monitor::{Folder, guest, has_kvm, skipped};

/// Gives user 65533 a /dev/kvm of its own in a private mount namespace, and becomes "$@" as that user, with two processes or
/// threads at most. $0 is where the device can lie.
const TWO_THREADS: &str = "mknod \"$0\" c 10 232 && chmod 666 \"$0\" && mount --bind \"$0\" /dev/kvm && \
    exec setpriv --reuid=65533 --regid=65533 --clear-groups prlimit --nproc=2 \"$@\"";

#[test]
fn a_limit_on_threads_ends_the_monitor_with_its_name() {
    if !has_kvm() {
        return;
    }
    let folder = Folder::new();
    let [node, program, kernel] = ["kvm", "loopvisor", "guest"].map(|name| folder.path(name));
    // The user may not look into our folders.
    fs::copy(env!("CARGO_BIN_EXE_loopvisor"), &program).unwrap();
    fs::copy(guest(), &kernel).unwrap();
    let Output { status, stderr, .. } = Command::new("timeout")
        .args(["60", "unshare", "-m", "sh", "-c", TWO_THREADS])
        .arg(&node)
        .arg(&program)
        .args(["-no-reboot", "-append", "mode=hello", "-kernel"])
        .arg(&kernel)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&stderr);
    if told.contains("Operation not permitted") {
        return skipped("this user may not make a device node");
    }
    assert_eq!(status.code(), Some(1), "{told}");
    for part in ["the host refuses KVM a thread", "ulimit -u", "TasksMax=", "pids.max"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
}
