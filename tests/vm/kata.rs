//! What Kata Containers' StratoVirt driver does to the program, byte for byte: its command line with descriptors from 3 on,
//! its QMP commands for block devices, and its end by SIGKILL.
//!
//! The driver reads standard output alone, so the guest's serial port is not connected, and what the guest has done to a disk
//! is seen in the disk's file.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::Client;
use crate::monitor::{Monitor, PATIENCE, Setup, guest, has_kvm};
use crate::net::has_taps;

const SIZE: u64 = 8 << 20;

/// Opens what the driver hands over, in its order and from descriptor 3 on, and becomes the program.
const WITH_DESCRIPTORS: &str = "
import fcntl, os, struct, sys
opened = []
if os.path.exists('/dev/vhost-vsock'):
    vsock = os.open('/dev/vhost-vsock', os.O_RDWR)
    fcntl.ioctl(vsock, 0x4008af60, struct.pack('Q', 2000000 + os.getpid()))
    opened.append(vsock)
tap = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tap, 0x400454ca, struct.pack('16sH22x', b'tap0_kata', 0x5002))
opened.append(tap)
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in opened]
for target, fd in enumerate(moved, 3):
    os.dup2(fd, target)
cid = str(2000000 + os.getpid())
os.execv(sys.argv[1], [word.replace('CID', cid) for word in sys.argv[1:]])
";

/// The driver's line for a pod with a root image and a NIC; `params` is what its user has put before the driver's own words.
fn line(machine: &str, params: &str) -> Setup {
    let setup = Setup::bare();
    let path = |name: &str| setup.folder.path(name).display().to_string();
    fs::File::create(path("rootfs.img")).unwrap().set_len(SIZE).unwrap();
    let append = format!(
        "{params} root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 reboot=k panic=1 net.ifnames=0 \
         ramdom.trust_cpu=on quiet 8250.nr_uarts=0 agent.log_vport=1025"
    );
    let (qmp, console) = (path("qmp"), path("console.socket"));
    let root = format!("id=rootfs,file={},readonly=on,direct=off", path("rootfs.img"));
    let mut setup = setup
        .option("-name", "sandbox-5a1e")
        .option("-uuid", "8dbc8a5c-e1b1-4b1c-9a30-2a1d58fa1a3e")
        .option("-smp", "1")
        .option("-m", "128")
        .option("-kernel", guest().to_str().unwrap())
        .option("-append", &append)
        .option("-qmp", &format!("unix:{qmp},server,nowait"))
        .flag("-D")
        .flag("-disable-seccomp")
        .option("-machine", &format!("type={machine},dump-guest-core=off"))
        .option("-object", "rng-random,id=objrng0,filename=/dev/urandom")
        .option("-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0")
        .option("-device", "virtio-serial-device,id=virtio-serial0")
        .option("-chardev", &format!("socket,id=charconsole0,path={console},server,nowait"))
        .option("-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0")
        .option("-drive", &root)
        .option("-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0");
    let mut descriptor = 3;
    if Path::new("/dev/vhost-vsock").exists() {
        setup = setup.option("-device", "vhost-vsock-device,id=vsock-1,guest-cid=CID,vhostfd=3");
        descriptor += 1;
    }
    let python = std::env::var("LOOPVISOR_PYTHON").unwrap_or_else(|_| "python3".into());
    setup
        .option("-netdev", &format!("tap,id=eth0,fds={descriptor}"))
        .option("-device", "virtio-net-device,netdev=eth0,id=eth0,mac=52:54:00:00:00:01")
        .under(&["unshare", "-n", &python, "-c", WITH_DESCRIPTORS])
}

/// Sends these bytes; what is returned, which must be nothing.
#[track_caller]
fn ask(client: &mut Client, bytes: &str) {
    client.send(bytes);
    assert_eq!(client.answer(), json!({"return": {}}), "{bytes}");
}

/// The driver's three commands for the disk `drive-H` on that file in the second slot; it is used between plug and unplug.
#[track_caller]
fn plug_and_unplug(client: &mut Client, file: &Path) {
    let path = file.display();
    ask(
        client,
        &format!(
            r#"{{"arguments":{{"driver":"raw","file":{{"aio":"native","driver":"file","filename":"{path}"}},"node-name":"drive-6b86b273ff34fce1","read-only":false}},"execute":"blockdev-add"}}"#
        ),
    );
    ask(
        client,
        r#"{"arguments":{"addr":"1","drive":"drive-6b86b273ff34fce1","driver":"virtio-blk-mmio","id":"drive-6b86b273ff34fce1","logical_block_size":512,"physical_block_size":4096,"romfile":""},"execute":"device_add"}"#,
    );
    await_mark(file);
    client.send(r#"{"arguments":{"id":"drive-6b86b273ff34fce1"},"execute":"device_del"}"#);
    assert_eq!(client.await_event("DEVICE_DELETED")["data"]["device"], "drive-6b86b273ff34fce1");
    assert_eq!(client.answer(), json!({"return": {}}));
}

/// Waits until the guest has written its mark to the last block.
#[track_caller]
fn await_mark(file: &Path) {
    let bytes = fs::metadata(file).unwrap().len();
    let mark = ((bytes / 512) ^ 0x706c_7567).to_le_bytes();
    let until = Instant::now() + PATIENCE;
    while fs::read(file).unwrap()[bytes as usize - 4096..][..8] != mark {
        assert!(Instant::now() < until, "the guest has not used the disk");
        thread::sleep(Duration::from_millis(5));
    }
}

fn open_files(monitor: &Monitor) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap();
    entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect()
}

#[test]
fn katas_driver_plugs_and_unplugs_a_disk_twenty_times() {
    if !has_kvm() || !has_taps() {
        return;
    }
    let mut monitor = line("microvm,accel=kvm,reboot=off,disk-slots=4,nic-slots=1", "mode=blk-plug").start();
    // The driver asks once whether the machine is there, and connects again for good.
    drop(monitor.qmp());
    let mut client = monitor.connect();
    client.negotiate();
    let cpus = client.call("query-cpus");
    assert_eq!(cpus[0]["CPU"], 0);
    assert!(cpus[0]["thread_id"].is_u64(), "{cpus}");
    for round in 0..20 {
        // Of another size each time, so that the guest looks again.
        let file = monitor.folder.path(&format!("container{round}.img"));
        fs::File::create(&file).unwrap().set_len(SIZE + round * 4096).unwrap();
        plug_and_unplug(&mut client, &file);
        assert!(!open_files(&monitor).contains(&file), "round {round}: the file is still open");
    }
    // A client that deletes the node all the same is told that it is gone.
    ask(&mut client, r#"{"arguments":{"node-name":"drive-6b86b273ff34fce1"},"execute":"blockdev-del"}"#);
    monitor.kill();
}

#[test]
fn reboot_off_ends_the_process_at_katas_reset() {
    if !has_kvm() || !has_taps() {
        return;
    }
    // Linux with `reboot=k` pulses the line again and again, as this guest does.
    let mut monitor = line("microvm,accel=kvm,reboot=off", "mode=hello end=i8042").start();
    assert_eq!(monitor.exit_code(), 0);
    let told = monitor.serial.wait(PATIENCE, |text, ended| ended.then(|| text.to_owned())).unwrap();
    assert_eq!(told.matches("the guest resets the machine").count(), 1, "{told}");
    assert_eq!(monitor.log.text(), "", "the log is on standard output");
}

#[test]
fn katas_driver_reads_the_cause_of_a_failed_start() {
    let host = Setup::bare().flag("-D").option("-kernel", "/no/such/kernel");
    let usage = Setup::bare().option("-kernel", "k").flag("-D").option("-device", "vhost-user-fs-device,tag=t");
    for (setup, code, part) in [(host, 1, "/no/such/kernel"), (usage, 2, "vhost-user-fs-device")] {
        let mut monitor = setup.start();
        assert_eq!(monitor.exit_code(), code);
        let told = monitor.serial.wait(PATIENCE, |text, ended| ended.then(|| text.to_owned())).unwrap();
        assert!(told.contains(part), "{told}");
        assert!(monitor.log.text().contains(part), "{}", monitor.log.text());
    }
    // Where the guest's serial port is, the log is not.
    let mut monitor = Setup::bare().flag("-D").option("-kernel", "/no/such/kernel").option("-serial", "stdio").start();
    assert_eq!(monitor.exit_code(), 1);
    assert_eq!(monitor.serial.wait(PATIENCE, |text, ended| ended.then(|| text.to_owned())).unwrap(), "");
}
