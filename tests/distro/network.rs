//! ssh over the NIC, the clock across stops, and power-off by logind after `system_powerdown`.
//!
//! The client is the image's own: the nested host has no ssh.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::debian::{Debian, PATIENCE, assert_clean, given, root};
use crate::monitor::Directory;

/// Runs a line of the nested host's shell: whether it succeeded, and what it said.
fn shell(line: &str) -> (bool, String) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text.trim_end().to_string())
}

#[track_caller]
fn run(line: &str) -> String {
    let (succeeded, text) = shell(line);
    assert!(succeeded, "{line}: {text}");
    text
}

/// Makes tap0, 10.0.0.1/24.
fn make_tap() {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: zeros are a request: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes one struct ifreq; the other takes a number.
    let made = unsafe {
        libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) == 0
            && libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST as _, 1) == 0
    };
    assert!(made, "make a tap: {}", std::io::Error::last_os_error());
    run("ip addr add 10.0.0.1/24 dev tap0 && ip link set tap0 up");
}

/// By how many seconds the guest's clock is ahead of the host's.
fn ahead(debian: &mut Debian) -> f64 {
    let guest: f64 = debian.run("date +%s.%N").parse().unwrap();
    guest - SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
fn ssh_stops_and_the_power_button() {
    let directory = Directory::new();
    let root = root(&directory);
    make_tap();
    let tools = directory.file("debian");
    run(&format!(
        "mkdir {tools} && mount -t ext4 -o ro,noload {} {tools} && mount -o bind /dev {tools}/dev",
        given("LOOPVISOR_DISTRO_ROOT")
    ));
    let mut debian = Debian::start(&root, &["-netdev", "id=net0,netdev=tap0,mac=52:54:00:12:34:56"]);
    let mut qmp = debian.monitor.qmp();
    debian.log_in();
    debian.assert_up();

    let ssh = |command: &str| {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = format!(
                "chroot {tools} ssh -o BatchMode=yes -o UpdateHostKeys=no -o ConnectTimeout=60 10.0.0.2 '{command}'"
            );
            match shell(&line) {
                (true, text) => return text,
                (false, text) => assert!(Instant::now() < until, "{line}: {text}"),
            }
            thread::sleep(Duration::from_secs(1));
        }
    };
    assert_eq!(ssh("hostname; cat /etc/debian_version | cut -d . -f 1"), "loopvisor\n12");
    let much = ssh("dd if=/dev/zero bs=1M count=4 2>/dev/null | sha256sum");
    assert_eq!(much, run("dd if=/dev/zero bs=1M count=4 2>/dev/null | sha256sum"));

    let before = ahead(&mut debian);
    let until = Instant::now() + Duration::from_secs(60);
    let mut stops = 0;
    while Instant::now() < until {
        qmp.run("stop");
        thread::sleep(Duration::from_millis(700));
        qmp.run("cont");
        thread::sleep(Duration::from_millis(300));
        stops += 1;
    }
    let after = ahead(&mut debian);
    assert!((after - before).abs() < 2.0, "the clock was {before} s ahead, and is {after} s after {stops} stops");
    assert_eq!(ssh("echo still here"), "still here");
    debian.assert_up();
    debian.assert_no_trouble();
    let (_, warnings) = debian.try_run("dmesg | grep -i -e 'clocksource.*unstable' -e 'rcu.*stall' -e lockup");
    assert_eq!(warnings, "");

    qmp.run("system_powerdown");
    assert_eq!(debian.monitor.wait(), 0);
    let names: Vec<_> = qmp.finish().into_iter().filter(|(name, _)| name != "STOP" && name != "RESUME").collect();
    assert_eq!(names[0], ("POWERDOWN".to_string(), Value::Null), "{names:?}");
    assert_eq!((names.len(), &names[1].1["reason"]), (2, &Value::from("guest-shutdown")), "{names:?}");
    assert_clean(&root);
    run(&format!("umount {tools}/dev && umount {tools}"));
}
