//! Linux on the network: a tap in a network namespace of the test's own, and the host's side of what its guest does there.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::monitor::{LIMIT, Monitor, Qmp, cpus};

/// What goes each way, if there is time for all of it.
const BYTES: u64 = 1 << 30;
/// How long it may take on a host that emulates its processors. Not longer, for there a guest resets itself by a triple fault
/// about once in three minutes of such load.
const TIME: Duration = Duration::from_secs(20);

/// Runs a command of the shell's in this namespace; what it says. The nested host has no programs but the shell's own.
fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{line}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Leaves this thread in a network namespace of its own with a tap of several queues.
fn enter() {
    // SAFETY: changes what this thread sees and nothing in memory.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: zeros are one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE) as libc::c_short;
    // SAFETY: the kernel reads and writes one struct ifreq; the other takes a number.
    let made = unsafe {
        libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) == 0
            && libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST as _, 1) == 0
    };
    assert!(made, "make a tap: {}", std::io::Error::last_os_error());
    drop(tun);
    for line in ["ip link set lo up", "ip addr add 10.0.0.1/24 dev tap0", "ip link set tap0 up"] {
        run(line);
    }
}

/// The sum that `crc32` makes, the one of Ethernet.
struct Sum {
    table: [u32; 256],
    sum: u32,
    len: u64,
}

impl Sum {
    fn new() -> Sum {
        let row = |byte: usize| (0..8).fold(byte as u32, |row, _| (row >> 1) ^ ((row & 1) * 0xedb8_8320));
        Sum { table: std::array::from_fn(row), sum: !0, len: 0 }
    }

    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.sum = self.sum >> 8 ^ self.table[(self.sum as u8 ^ byte) as usize];
        }
        self.len += bytes.len() as u64;
    }

    /// What `crc32` prints.
    fn text(&self) -> String {
        format!("{:08x}", !self.sum)
    }
}

/// Sends noise until there is enough or the time is over: its sum, and how much it was.
fn send(mut stream: TcpStream, noise: &[u8]) -> (String, u64) {
    let until = Instant::now() + TIME;
    let mut sum = Sum::new();
    while sum.len < BYTES && Instant::now() < until {
        // Pieces of odd sizes, so that no two segments begin alike.
        let from = (sum.len * 31) as usize % (noise.len() / 2);
        let piece = &noise[from..from + 65_521];
        stream.write_all(piece).unwrap();
        sum.add(piece);
    }
    (sum.text(), sum.len)
}

/// Receives one file over and over until there is enough or the time is over: how much that was, and the file's sum.
fn receive(mut stream: TcpStream, len: usize) -> (u64, String) {
    let until = Instant::now() + TIME;
    let mut first = vec![0; len];
    stream.read_exact(&mut first).unwrap();
    let mut total = len as u64;
    let mut bytes = vec![0; 1 << 16];
    while total < BYTES && Instant::now() < until {
        let count = stream.read(&mut bytes).unwrap();
        assert!(count > 0, "the guest ends before us");
        let mut got = &bytes[..count];
        while !got.is_empty() {
            let at = (total % len as u64) as usize;
            let now = got.len().min(len - at);
            assert!(got[..now] == first[at..at + now], "what came differs from the file at {total}");
            total += now as u64;
            got = &got[now..];
        }
    }
    let mut sum = Sum::new();
    sum.add(&first);
    (total, sum.text())
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Runs `work` on a thread of its own, and stops the machine and lets it go on meanwhile: what came out, and how often.
fn across_stops<T: Send>(qmp: &mut Qmp, work: impl FnOnce() -> T + Send) -> (T, u32) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let result = work();
            ended.store(true, SeqCst);
            result
        });
        let mut rounds = 0;
        while !ended.load(SeqCst) && !worker.is_finished() {
            qmp.run("stop");
            thread::sleep(Duration::from_millis(20));
            qmp.run("cont");
            rounds += 1;
            thread::sleep(Duration::from_millis(300));
        }
        (worker.join().unwrap(), rounds)
    })
}

fn stats(qmp: &mut Qmp) -> Value {
    qmp.run("query-netstats")[0].take()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Everything at once, because a boot is dear: both pairs of a multi-queue tap, pings both ways, a bulk transfer each way
/// across stops, and the cable.
pub fn all() {
    enter();
    let [down, up] = [9001, 9002].map(|port| TcpListener::bind(("10.0.0.1", port)).unwrap());
    let netdev = "id=net0,netdev=tap0,mac=52:54:00:12:34:56,iothread=io,queues=2,queue-size=1024";
    // Linux uses a pair of queues a vCPU.
    let cpus = cpus();
    let options = ["-iothread", "id=io", "-smp", &cpus.to_string(), "-netdev", netdev];
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=net", &options);
    let mut qmp = monitor.qmp();
    monitor.wait_for(&format!("net eth0: mtu 1500, {cpus} queues"), 0);
    assert_eq!(monitor.lines("net eth0: ")[0], "52:54:00:12:34:56");
    monitor.wait_for("net noise: ", 0);
    for size in [56, 1400, 8000] {
        let told = &monitor.lines(&format!("net ping {size}: "))[0];
        assert!(told.contains("5 packets transmitted, 5 packets received"), "{told}");
        let told = run(&format!("ping -q -c 5 -s {size} 10.0.0.2"));
        assert!(told.contains("5 packets transmitted, 5 packets received"), "{told}");
    }
    let before = stats(&mut qmp);
    assert_eq!((&before["queue-pairs"], &before["active-pairs"]), (&json!(2), &json!(cpus)), "{before}");

    let noise = crate::noise(1 << 20);
    let begin = Instant::now();
    let ((sum, bytes), rounds) = across_stops(&mut qmp, || send(accept(&down), &noise));
    let (_, told) = monitor.wait_for("net received: ", 0);
    assert_eq!(told.trim_end(), format!("net received: {sum}"));
    let received = stats(&mut qmp);
    println!("to the guest: {bytes} bytes in {:?}, stopped {rounds} times", begin.elapsed());
    let begin = Instant::now();
    let ((bytes, sum), rounds) = across_stops(&mut qmp, || receive(accept(&up), 1 << 20));
    monitor.wait_for("net sent", 0);
    assert_eq!(monitor.lines("net noise: "), [sum]);
    println!("from the guest: {bytes} bytes in {:?}, stopped {rounds} times", begin.elapsed());
    let after = stats(&mut qmp);
    println!("{after}");
    // Frames of 1514 bytes would be the most without offloads; whoever only acknowledges sends small ones.
    for (way, from, to) in [("receive", &before, &received), ("transmit", &received, &after)] {
        let [packets, bytes] = ["packets", "bytes"].map(|what| number(&to[way][what]) - number(&from[way][what]));
        assert!(bytes / packets > 1514, "{way}: {bytes} bytes in {packets} packets");
        assert_eq!((&to[way]["dropped"], &to[way]["errors"]), (&json!(0), &json!(0)), "{to}");
    }

    qmp.run_with("set_link", &json!({ "name": "net0", "up": false }));
    monitor.wait_for("net carrier: 0", 0);
    qmp.run_with("set_link", &json!({ "name": "net0", "up": true }));
    monitor.wait_for("net carrier: 1", 0);
    let (_, told) = monitor.wait_for("net ping again: ", 0);
    assert!(told.contains("5 packets transmitted, 5 packets received"), "{told}");
    assert_eq!(monitor.wait(), 0);
    // Not all troubles: two emulated processors may disagree about the time, which is nothing of a NIC's.
    let console = monitor.console();
    for trouble in ["BUG", "Oops", "NETDEV WATCHDOG", "rx error", "lockup"] {
        assert!(!console.contains(trouble), "the guest's kernel says {trouble:?}");
    }
    assert!(monitor.console().contains("loopvisor guest is done"));
}
