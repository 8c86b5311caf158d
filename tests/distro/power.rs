//! Debian's ways to end: each leaves its file system clean, and the monitor says which it was.

use serde_json::json;

use crate::debian::{Debian, assert_clean, root};
use crate::monitor::Directory;

#[test]
fn debian_boots_reboots_and_powers_off() {
    let directory = Directory::new();
    let root = root(&directory);
    let mut debian = Debian::start(&root, &[]);
    let qmp = debian.monitor.qmp();
    debian.log_in();
    debian.assert_up();
    assert_eq!(debian.run("findmnt -no SOURCE,FSTYPE /"), "/dev/vda ext4");
    let first = debian.run("cat /proc/sys/kernel/random/boot_id");
    debian.monitor.type_line("systemctl reboot");

    debian.log_in();
    debian.assert_up();
    assert_ne!(debian.run("cat /proc/sys/kernel/random/boot_id"), first);
    // A file system that was not unmounted has its journal replayed.
    assert_eq!(debian.try_run("journalctl -kb --no-pager -g 'EXT4-fs.*recovery complete'").1, "-- No entries --");
    debian.monitor.type_line("systemctl poweroff");
    assert_eq!(debian.monitor.wait(), 0);
    let events = qmp.finish();
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["RESET", "SHUTDOWN"], "{events:?}");
    assert_eq!(events[1].1, json!({ "guest": true, "reason": "guest-shutdown" }));
    debian.assert_no_trouble();
    assert_clean(&root);
}
