//! Linux, end to end: Debian's stock kernel in the real monitor, few boots that each prove much.
//!
//! They need a KVM under which Linux runs: hardware, or the nested host (docs/testing.md). Nothing here is measured, and
//! every wait is bounded.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "the lints' exception for tests")]
#![allow(unsafe_code, reason = "a signal to the monitor has no safe function")]
#![allow(missing_docs, reason = "the names say it")]

#[path = "linux/microvm.rs"]
mod microvm;
#[path = "linux/monitor.rs"]
mod monitor;
#[path = "linux/net.rs"]
mod net;
#[path = "linux/restart.rs"]
mod restart;
#[path = "linux/vsock.rs"]
mod vsock;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;

use monitor::{Directory, Monitor, Qmp};
use serde_json::{Value, json};

/// What Linux warns of in a machine where nothing is wrong.
const ACCEPTED: [&str; 3] = [
    // There is no PCI, and we say so.
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    // Unsigned, because its debugging symbols were removed.
    "module verification failed",
];

/// The warnings in the kernel's log that are none of those accepted.
///
/// QEMU's emulated SVM lets a guest's XSETBV pass without telling the KVM above it, which therefore answers CPUID leaf
/// 0xD with the sizes of another state: Linux prints a warning of many lines in every monitor under it.
fn unexpected_warnings(monitor: &Monitor) -> Vec<String> {
    let mut warnings = monitor.lines("warning: ");
    let place = |lines: &[String], text: &str| lines.iter().position(|line| line.contains(text));
    while let Some(start) = place(&warnings, "XSAVE consistency problem") {
        let Some(length) = place(&warnings[start..], "[ end trace") else { break };
        let end = start + length;
        // The line before it is the one to cut along.
        warnings.drain(start.saturating_sub(1)..=end);
    }
    warnings.retain(|line| !line.contains("CPUID[0d") && !ACCEPTED.iter().any(|accepted| line.contains(accepted)));
    warnings
}

/// What no guest's console may show.
const TROUBLES: [&str; 9] =
    ["lockup", "LOCKUP", "stall", "blocked for more", "BUG", "Oops", "unstable", "I/O error", "doesn't work"];

fn assert_no_trouble(monitor: &Monitor) {
    let console = monitor.console();
    let troubles: Vec<_> =
        console.lines().filter(|line| TROUBLES.iter().any(|trouble| line.contains(trouble))).collect();
    assert!(troubles.is_empty(), "{troubles:#?}");
}

/// The topology that `count` vCPUs have: cores of one package, a thread each.
fn topology(count: u32) -> Vec<String> {
    let cores = if count == 1 { "0".to_string() } else { format!("0-{}", count - 1) };
    (0..count).map(|cpu| format!("cpu{cpu}: package 0 core {cpu} threads {cpu} cores {cores}")).collect()
}

fn assert_topology(monitor: &Monitor, count: u32) {
    let lines: Vec<_> = monitor.lines("cpu").into_iter().map(|line| format!("cpu{line}")).collect();
    assert_eq!(lines, topology(count));
}

/// The only event of a machine that ended itself.
fn shutdown(guest: bool, reason: &str) -> (String, Value) {
    ("SHUTDOWN".to_string(), json!({ "guest": guest, "reason": reason }))
}

/// Bytes that no file system writes by chance.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(|_| next()).collect()
}

/// That an ext2 image holds all of `data`, in blocks at any place.
fn assert_holds(image: &str, data: &[u8]) {
    const BLOCK: usize = 1024;
    let image_bytes = fs::read(image).unwrap();
    assert_eq!(image_bytes[1080..1082], [0x53, 0xef], "{image}: the magic number of ext2");
    let blocks: HashSet<&[u8]> = image_bytes.chunks(BLOCK).collect();
    let missing = data.chunks_exact(BLOCK).filter(|block| !blocks.contains(block)).count();
    assert_eq!(missing, 0, "{image}: blocks of the file that are not there");
}

/// A kernel as a distribution ships it, with a disk on each of two iothreads, one on the main loop and one that is
/// read-only: what the kernel says of the machine, and where the data ends up.
#[test]
fn a_stock_kernel_finds_everything_there_is_and_its_files_reach_the_images() {
    let directory = Directory::new();
    let source = noise(2_000_500);
    let readonly = directory.file("readonly.img");
    fs::write(&readonly, &source).unwrap();
    let on_disk = Directory::on_disk();
    let direct = std::env::var("LOOPVISOR_DISK").unwrap_or_else(|_| on_disk.image("direct.img", 32 << 20));
    let direct_size = monitor::size(&direct);
    let images = [directory.image("a.img", 48 << 20), direct, directory.image("c.img", 24 << 20)];
    let drives = [
        format!("id=one,file={},direct=off,iothread=a,serial=first", images[0]),
        format!("id=two,file={},direct=on,iothread=b", images[1]),
        format!("id=three,file={},direct=off", images[2]),
        format!("id=four,file={readonly},direct=off,readonly=on,iothread=a,serial=serial-number-of-20b"),
    ];
    let mut options = vec!["-iothread", "id=a", "-iothread", "id=b"];
    options.extend(drives.iter().flat_map(|drive| ["-drive", drive]));
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=report,copy", &options);
    let qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert_eq!(qmp.finish(), [shutdown(true, "guest-shutdown")]);

    let console = monitor.console();
    for line in
        ["kvm-clock: Using msrs", "TSC deadline timer available", "x2apic enabled", "ACPI: PM: (supports S0 S5)"]
    {
        assert!(console.contains(line), "the kernel did not say {line:?}");
    }
    assert_no_trouble(&monitor);
    let told = monitor.log().lines().filter(|line| line.contains(" INFO ")).count();
    assert!((1..=20).contains(&told), "{told} lines of the log by then:\n{}", monitor.log());
    assert_eq!(monitor.lines("timer: "), ["lapic-deadline"]);
    assert!(["kvm-clock", "tsc"].map(String::from).contains(&monitor.lines("clocksource: ")[0]));
    assert_topology(&monitor, 1);
    assert_eq!(unexpected_warnings(&monitor), Vec::<String>::new());
    let disks: Vec<_> = monitor.lines("disk ").into_iter().filter(|line| !line.ends_with(": empty slot")).collect();
    let expected = [
        format!("vda: {} bytes, read-write", 48 << 20),
        format!("vdb: {direct_size} bytes, read-write"),
        format!("vdc: {} bytes, read-write", 24 << 20),
        format!("vdd: {} bytes, read-only", source.len() / 512 * 512),
        "vda: serial first, LNRO0005:00".to_string(),
        "vdb: serial two, LNRO0005:01".to_string(),
        "vdc: serial three, LNRO0005:02".to_string(),
        "vdd: serial serial-number-of-20b, LNRO0005:03".to_string(),
    ];
    assert_eq!(disks, expected);
    let interrupts = monitor.lines("interrupt: ");
    for (line, owner) in [(4, "ttyS0"), (5, "virtio0"), (6, "virtio1"), (7, "virtio2"), (8, "virtio3")] {
        let found = interrupts.iter().any(|interrupt| {
            let words: Vec<_> = interrupt.split_whitespace().collect();
            words.ends_with(&["IO-APIC", &format!("{line}-edge"), owner])
        });
        assert!(found, "{owner} has no edge on line {line}: {interrupts:#?}");
    }
    for image in &images {
        assert_holds(image, &source[..source.len() / 512 * 512]);
    }
}

/// What `objcopy -O binary vmlinux` writes: the memory that the segments are, from the first of them on.
fn flat(elf: &[u8]) -> Vec<u8> {
    let word =
        |at: usize, len: usize| elf[at..at + len].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let headers = (0..word(56, 2)).map(|n| (word(32, 8) + n * word(54, 2)) as usize);
    let loads: Vec<_> = headers.filter(|&at| word(at, 4) == 1).collect();
    let start = loads.iter().map(|at| word(at + 24, 8)).min().unwrap();
    let mut memory = Vec::new();
    for at in loads {
        let (from, to, len) =
            (word(at + 8, 8) as usize, (word(at + 24, 8) - start) as usize, word(at + 32, 8) as usize);
        memory.resize(memory.len().max(to + len), 0);
        memory[to..to + len].copy_from_slice(&elf[from..from + len]);
    }
    memory
}

/// The original's manual has users make such a file.
#[test]
fn a_flat_kernel_boots_by_its_name_and_says_so() {
    let directory = Directory::new();
    let kernel = directory.file("vmlinux.bin");
    let elf = fs::read(format!("{}/vmlinux", std::env::var("LOOPVISOR_LINUX").unwrap())).unwrap();
    fs::write(&kernel, flat(&elf)).unwrap();
    let mut monitor = Monitor::start(&kernel, "loopvisor.script=report", &[]);
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert!(monitor.log().contains("taken for flat memory"), "{}", monitor.log());
    assert_no_trouble(&monitor);
}

/// What the only disk has done, but for the rates of the last second, which go on while it stands.
fn standing(qmp: &mut Qmp) -> Value {
    let mut stats = qmp.run("query-blockstats")[0]["stats"].take();
    stats.as_object_mut().unwrap().retain(|key, _| !key.ends_with("_last_second"));
    stats
}

/// Counters of the only disk: bytes read and bytes written.
fn bytes(stats: &Value) -> [u64; 2] {
    ["rd_bytes", "wr_bytes"].map(|key| stats[0]["stats"][key].as_u64().unwrap())
}

/// The same as the guest counts them, in a line `load: N rounds, R read, W written`.
fn guest_bytes(line: &str) -> [u64; 2] {
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    [numbers[1], numbers[2]]
}

/// The unpacked kernel: nothing before `cont`, a disk load that twenty stops do not disturb, and an end
/// by `quit` in its midst. The guest compares what it reads with what it wrote.
#[test]
fn an_elf_kernel_waits_for_cont_and_its_disk_load_survives_twenty_stops() {
    let directory = Directory::new();
    let drive = format!("id=vda,file={},direct=off,iothread=io", directory.image("disk.img", 64 << 20));
    let words = "loglevel=5 loopvisor.script=report,load loopvisor.seconds=3600";
    let cpus = monitor::cpus();
    let options = ["-smp", &cpus.to_string(), "-S", "-iothread", "id=io", "-drive", &drive];
    let mut monitor = Monitor::start("vmlinux", words, &options);
    let mut qmp = monitor.qmp();
    for _ in 0..100 {
        assert_eq!(qmp.run("query-status")["status"], "prelaunch");
    }
    assert_eq!(monitor.console(), "", "before cont");
    qmp.run("cont");
    let (mut seen, _) = monitor.wait_for("written", 0);
    assert_topology(&monitor, cpus);

    for round in 0..20 {
        qmp.run("stop");
        assert_eq!(qmp.run("query-status")["status"], "paused");
        let stats = standing(&mut qmp);
        assert_eq!(stats["in_flight_operations"], 0);
        assert_eq!(standing(&mut qmp), stats, "nothing moves while the machine stands");
        qmp.run("cont");
        if round % 4 == 0 {
            seen = monitor.wait_for("written", seen).0;
        }
    }
    let (_, before) = monitor.wait_for("written", seen);
    let stats = qmp.run("query-blockstats");
    let counted = bytes(&stats);
    // The first of two new lines may have been on its way already.
    let (seen, _) = monitor.wait_for("written", monitor.lines("load: ").len());
    let (_, after) = monitor.wait_for("written", seen);
    for (what, index) in [("read", 0), ("written", 1)] {
        let (low, high) = (guest_bytes(&before)[index], guest_bytes(&after)[index]);
        assert!((low..=high).contains(&counted[index]), "{what}: {low} to {high}, and we say {}", counted[index]);
    }
    assert!(["failed_rd_operations", "invalid_wr_operations"].iter().all(|key| stats[0]["stats"][*key] == 0));
    assert_eq!(qmp.run("query-block")[0]["inserted"]["image"]["virtual-size"], 64 << 20);
    assert_no_trouble(&monitor);

    qmp.run("quit");
    assert_eq!(monitor.wait(), 0);
    let mut events = vec![("RESUME".to_string(), Value::Null)];
    for _ in 0..20 {
        events.extend([("STOP".to_string(), Value::Null), ("RESUME".to_string(), Value::Null)]);
    }
    events.push(shutdown(false, "host-qmp-quit"));
    assert_eq!(qmp.finish(), events);
}

/// Rule D2.6: Linux reads at random places and counts its requests itself, by its own clock.
#[test]
fn rule_d2_3_linux_counts_two_hundred_reads_a_second_from_a_disk_of_so_many() {
    let directory = Directory::new();
    let drive = format!("id=vda,file={},direct=off,iothread=io,iops=200", directory.image("disk.img", 64 << 20));
    let options = ["-iothread", "id=io", "-drive", &drive];
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=reads loopvisor.seconds=12", &options);
    let qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert_eq!(qmp.finish(), [shutdown(true, "guest-shutdown")]);
    let lines = monitor.lines("reads: ");
    println!("iops=200: {lines:?}");
    let numbers: Vec<f64> = lines[0].split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let rate = numbers[0] / numbers[1] * 100.0;
    // The guest's clock is read in hundredths of a second, of which there are twelve hundred, at both ends. A crowded host may
    // keep the guest from asking for its share; how exact the limit is, tests/qos counts.
    let clock = 2.0 / numbers[1];
    assert!((110.0..=200.0 * (1.0 + clock)).contains(&rate), "{rate} a second");
    assert_no_trouble(&monitor);
}

/// Linux feeds its generator from the device, which gives at most a thousand bytes a second.
/// Debian's modprobe passes such a word on to the driver, which warns of it.
#[test]
fn linux_is_given_no_word_for_a_device_that_it_does_not_know() {
    for (machine, given) in [("microvm", false), ("microvm,auto-kernel-cmdline=on", true)] {
        let monitor = Monitor::start("vmlinuz", "loglevel=7 loopvisor.script=restart", &["-machine", machine]);
        let mut qmp = monitor.qmp();
        monitor.wait_for("restart: ready", 0);
        assert_eq!(monitor.console().contains("virtio_mmio.device="), given, "{machine}");
        qmp.run("quit");
    }
}

#[test]
fn linux_takes_its_random_numbers_from_the_device() {
    let options = ["-rng", "random_file=/dev/urandom,bytes_per_sec=1000"];
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=rng", &options);
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert_eq!(monitor.lines("rng current: "), ["virtio_rng.0"]);
    assert_eq!(monitor.lines("rng sizes: "), ["256 256"]);
    assert_eq!(monitor.lines("rng reads: "), ["different"]);
    assert_no_trouble(&monitor);
}

/// Linux connects to the host, and the host to Linux, through Unix sockets; the bytes come back as they were sent.
#[test]
fn linux_and_the_host_talk_over_vsock_both_ways() {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::{UnixListener, UnixStream};

    let directory = Directory::new();
    let path = directory.file("v");
    let listener = UnixListener::bind(format!("{path}_53")).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        std::io::copy(&mut &stream, &mut &stream).unwrap();
    });
    let device = format!("vsock,id=v,guest-cid=3,uds_path={path}");
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=vsock", &["-device", &device]);
    monitor.wait_for("vsock: listening at 52", 0);
    for size in [1, 100_000, 1_000_000] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(monitor::LIMIT)).unwrap();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let mut answer = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("OK 1"), "{answer:?}");
        let sent = noise(size);
        let mut reader = stream.try_clone().unwrap();
        let reads = std::thread::spawn(move || {
            let mut back = Vec::new();
            reader.read_to_end(&mut back).map(|_| back)
        });
        stream.write_all(&sent).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(reads.join().unwrap().unwrap() == sent, "{size} bytes");
    }
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    let expected = [
        "connect 54 failed: Connection reset by peer (os error 104)",
        "connect 53 ok, 2000000 bytes",
        "listening at 52",
        "listen 52 ok, 1100001 bytes",
    ];
    assert_eq!(monitor.lines("vsock: "), expected);
    assert_no_trouble(&monitor);
}

/// The same through the host's kernel and its AF_VSOCK, which the monitor opens itself; and what is on its way when the machine
/// is stopped stands still and goes on.
#[test]
fn linux_and_the_host_talk_over_the_kernels_vsock_both_ways_and_stops_lose_nothing() {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::thread;
    use std::time::Duration;

    const LONG: usize = 6_000_000;
    if !vsock::is_here() {
        return;
    }
    let listener = vsock::listen(53);
    thread::spawn(move || {
        let stream = vsock::accept(&listener);
        std::io::copy(&mut &stream, &mut &stream).unwrap();
    });
    let cid = vsock::own_cid();
    let device = format!("vsock,id=v,guest-cid={cid}");
    let mut monitor = Monitor::start("vmlinuz", "loopvisor.script=vsock", &["-device", &device]);
    let mut qmp = monitor.qmp();
    monitor.wait_for("vsock: listening at 52", 0);
    assert_eq!(qmp.run("query-vsock"), json!([{ "id": "v", "guest-cid": cid, "backend": "kernel" }]));
    let told = monitor.dump("v");
    let lent = |queue| format!("queue {queue}: lent, driver has made available up to ");
    assert!(told.contains("v: live") && told.contains(&lent(0)) && told.contains(&lent(1)), "{told}");
    for size in [1, 100_000] {
        vsock::echo(&vsock::connect(cid, 52), &noise(size));
    }

    let (sent, back) = (noise(LONG), Arc::new(AtomicUsize::new(0)));
    let (count, expected) = (back.clone(), sent.clone());
    let stream = vsock::connect(cid, 52);
    let transfer = thread::spawn(move || vsock::echo_counted(&stream, &expected, &count));
    let mut stops = 0;
    while back.load(SeqCst) < LONG && stops < 10 {
        qmp.run("stop");
        // What the kernel had taken before is still read.
        thread::sleep(Duration::from_millis(300));
        let before = back.load(SeqCst);
        thread::sleep(Duration::from_millis(300));
        assert_eq!(back.load(SeqCst), before, "nothing comes from a guest that stands");
        qmp.run("cont");
        stops += 1;
        let until = std::time::Instant::now() + monitor::LIMIT;
        while back.load(SeqCst) < LONG.min(before + 200_000) {
            assert!(std::time::Instant::now() < until, "{before} bytes, and no more after the cont");
            thread::sleep(Duration::from_millis(1));
        }
    }
    transfer.join().unwrap();
    println!("{stops} stops in {LONG} bytes");
    assert!(stops >= 3, "the stops came too late");
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    let expected = [
        "connect 54 failed: Connection reset by peer (os error 104)".to_owned(),
        "connect 53 ok, 2000000 bytes".to_owned(),
        "listening at 52".to_owned(),
        format!("listen 52 ok, {} bytes", LONG + 100_001),
    ];
    assert_eq!(monitor.lines("vsock: "), expected);
    assert_no_trouble(&monitor);
}

/// A descriptor that is handed over as Kata Containers does it. Each life of the guest is reached anew, keeps no descriptor of
/// the life before, and knows nothing of its connections.
#[test]
fn linux_reboots_and_is_reached_through_the_vhost_descriptor_that_was_handed_over_each_time() {
    if !vsock::is_here() {
        return;
    }
    let cid = vsock::own_cid() + 1;
    let file = vsock::prepare(cid);
    let device = format!("vhost-vsock-device,id=v,guest-cid={cid},vhostfd={}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let words = "loglevel=4 loopvisor.script=streams";
    let monitor = Monitor::start_that_reboots("vmlinuz", words, &["-device", &device]);
    let mut qmp = monitor.qmp();
    let (mut descriptors, mut left) = (Vec::new(), None::<UnixStream>);
    for life in 0..3 {
        monitor.wait_for("vsock: listening at 52", life);
        let stream = vsock::connect(cid, 52);
        descriptors.push(monitor.descriptors());
        if let Some(mut left) = left.take() {
            let broken = left.write_all(b"x").and_then(|()| left.read_exact(&mut [0]));
            assert!(broken.is_err(), "a connection has outlived the guest");
        }
        left = Some(vsock::connect(cid, 52));
        vsock::echo(&stream, &noise(300_000));
    }
    assert_eq!(descriptors, [descriptors[0]; 3]);
    qmp.run("quit");
    assert_no_trouble(&monitor);

    let refused = vsock::refusal(&format!("vsock,id=w,guest-cid={cid}"));
    assert!(refused.contains("another machine on this host has this context id"), "{refused}");
}

/// A guest that does with its slots what it is told (tools/linux/tests/plug).
struct Slots {
    monitor: Monitor,
    qmp: Qmp,
    seen: usize,
}

impl Slots {
    /// Has a command carried out, after which it says `expected`.
    fn run(&mut self, command: &str, expected: &str) {
        self.monitor.type_line(command);
        self.seen = self.monitor.wait_for("plug: ready", self.seen).0;
        let last = self.monitor.lines("plug: ").into_iter().rev().nth(1).unwrap();
        assert_eq!(last, expected, "{command}");
    }

    fn plug(&mut self, name: &str, file: &str, addr: &str) {
        let file = json!({"driver": "file", "filename": file});
        let node = json!({"node-name": name, "file": file, "cache": {"direct": false}});
        self.qmp.run_with("blockdev-add", &node);
        self.qmp.run_with("device_add", &json!({"id": name, "driver": "virtio-blk-mmio", "addr": addr}));
    }
}

/// A new tap of that name with an address, opened as the monitor needs it; none where this user may not.
fn tap(name: &str, address: &str) -> Option<fs::File> {
    let file = fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: zeros are a request: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one struct ifreq.
    let made = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::TUNSETIFF as _, &raw mut request) };
    // In the nested host it is busybox's, and no file of its own.
    let ip = |words: &str| {
        let run = |program: &[&str]| Command::new(program[0]).args(&program[1..]).args(words.split(' ')).status();
        [&["ip"][..], &["busybox", "ip"]].iter().any(|program| run(program).is_ok_and(|status| status.success()))
    };
    let up = made == 0 && ip(&format!("addr add {address}/24 dev {name}")) && ip(&format!("link set {name} up"));
    up.then_some(file)
}

/// A NIC that Linux found without a carrier gets one when it is plugged into a tap that a client hands over, pings, and loses
/// it again.
#[test]
fn a_nic_that_linux_found_without_a_link_gets_one_and_pings() {
    let Some(tap) = tap("lvtap0", "10.9.8.1") else {
        return println!("skipped: a tap cannot be made here by this user");
    };
    let options = ["-machine", "microvm,disk-slots=0"];
    let monitor = Monitor::start("vmlinuz", "loopvisor.script=plug loglevel=5", &options);
    let qmp = monitor.qmp();
    let (seen, _) = monitor.wait_for("plug: ready", 0);
    let mut slots = Slots { monitor, qmp, seen };
    assert_eq!(slots.monitor.lines("net eth").len(), 2);
    slots.run("link eth1 0", "eth1 link 0");
    for round in 0..2 {
        slots.qmp.hand_over("tap", &tap);
        slots.qmp.run_with("netdev_add", &json!({"type": "tap", "id": "net", "fd": "tap"}));
        slots.qmp.run_with("device_add", &json!({"id": "net", "driver": "virtio-net-mmio", "addr": "0x1"}));
        slots.run("link eth1 1", "eth1 link 1");
        slots.run("ping eth1 10.9.8.1", "eth1 pings");
        let stats = slots.qmp.run("query-netstats");
        assert!(stats[0]["transmit"]["packets"].as_u64() >= Some(3), "round {round}: {stats}");
        slots.qmp.run_with("device_del", &json!({"id": "net"}));
        slots.run("link eth1 0", "eth1 link 0");
    }
    slots.monitor.type_line("end");
    slots.monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(slots.monitor.wait(), 0);
}

/// Disks come into slots that Linux found empty, carry a file system, grow, and go; what was written is in their files.
#[test]
fn disks_are_plugged_into_slots_that_linux_found_empty_and_what_it_writes_is_in_their_files() {
    let directory = Directory::new();
    let source = noise(1_500_160);
    let (first, images) =
        (directory.file("source.img"), ["b.img", "c.img"].map(|name| directory.image(name, 16 << 20)));
    fs::write(&first, &source).unwrap();
    let drive = format!("id=vda,file={first},direct=off,readonly=on");
    let monitor = Monitor::start("vmlinuz", "loopvisor.script=plug loglevel=5", &["-drive", &drive]);
    let qmp = monitor.qmp();
    let (seen, _) = monitor.wait_for("plug: ready", 0);
    let mut slots = Slots { monitor, qmp, seen };
    for disk in ["vdb", "vdf"] {
        slots.run(&format!("size {disk} 0"), &format!("{disk} has 0 bytes"));
        slots.run(&format!("read {disk}"), &format!("{disk} is not read"));
    }
    for (name, image, addr, disk) in [("one", &images[0], "0x1", "vdb"), ("two", &images[1], "0x5", "vdf")] {
        slots.plug(name, image, addr);
        slots.run(&format!("size {disk} {}", 16 << 20), &format!("{disk} has {} bytes", 16 << 20));
        slots.run(&format!("copy {disk}"), &format!("{disk} copied"));
    }
    slots.qmp.run_with("block_resize", &json!({"device": "two", "size": 20 << 20}));
    slots.run(&format!("size vdf {}", 20 << 20), &format!("vdf has {} bytes", 20 << 20));
    for (name, image, disk) in [("one", &images[0], "vdb"), ("two", &images[1], "vdf")] {
        slots.qmp.run_with("device_del", &json!({"id": name}));
        assert_holds(image, &source[..source.len() / 512 * 512]);
        slots.run(&format!("size {disk} 0"), &format!("{disk} has 0 bytes"));
        slots.run(&format!("read {disk}"), &format!("{disk} is not read"));
    }
    // Another into the slot of the first.
    slots.plug("three", &images[1], "0x1");
    slots.run(&format!("size vdb {}", 20 << 20), &format!("vdb has {} bytes", 20 << 20));
    slots.run("copy vdb", "vdb copied");
    slots.monitor.type_line("end");
    slots.monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(slots.monitor.wait(), 0);
}

/// A guest that does with its memory what it is told (tools/linux/tests/memory).
struct Guest {
    monitor: Monitor,
    qmp: Qmp,
    ready: usize,
}

impl Guest {
    const MIB: u64 = 512;

    fn start(balloon: &str, more: &[&str]) -> Guest {
        let memory = format!("{}M", Guest::MIB);
        let options = [&["-m", &memory, "-balloon", balloon], more].concat();
        let monitor = Monitor::start("vmlinuz", "loopvisor.script=memory loglevel=5", &options);
        let qmp = monitor.qmp();
        let (ready, _) = monitor.wait_for("memory: ready", 0);
        Guest { monitor, qmp, ready }
    }

    /// Has a command carried out.
    fn run(&mut self, command: &str) {
        self.monitor.type_line(command);
        self.ready = self.monitor.wait_for("memory: ready", self.ready).0;
    }

    /// What it says of its memory, in KiB: total, free, available, cached.
    fn mem(&mut self) -> [u64; 4] {
        self.run("mem");
        let lines = self.monitor.lines("mem: ");
        let numbers: Vec<u64> = lines.last().unwrap().split(' ').map(|word| word.parse().unwrap()).collect();
        numbers.try_into().unwrap()
    }

    fn resident_kib(&self) -> u64 {
        self.monitor.status_kib("RssAnon")
    }

    /// Waits until what QMP says of the balloon is as it should be.
    fn until(&mut self, what: &str, mut is: impl FnMut(&Value) -> bool) -> Value {
        let until = std::time::Instant::now() + monitor::LIMIT;
        loop {
            let detail = self.qmp.run("query-balloon-detail");
            if is(&detail) {
                return detail;
            }
            assert!(std::time::Instant::now() < until, "{what}: {detail}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// Sets the target and waits until it is reached.
    fn balloon(&mut self, mib: u64) {
        self.qmp.run_with("balloon", &json!({ "value": mib << 20 }));
        self.until("the target", |detail| detail["actual"] == mib << 20);
    }

    fn end(mut self) {
        self.monitor.type_line("end");
        self.monitor.wait_for("loopvisor guest is done", 0);
        assert_eq!(self.monitor.wait(), 0);
    }
}

/// Within two parts in a hundred of all the guest's memory.
#[track_caller]
fn assert_about(what: &str, found: i64, expected: i64) {
    let allowed = (Guest::MIB << 10) as i64 / 50;
    println!("{what}: {found} KiB, expected {expected}");
    assert!((found - expected).abs() <= allowed, "{what}: {found} KiB and not {expected}, give or take {allowed}");
}

/// Rules D3.1, D3.8, D3.9 and the hard half of D3.10.
#[test]
fn rule_d3_1_half_of_linux_goes_back_to_the_host_and_comes_again_and_without_deflate_on_oom_a_hog_dies() {
    let mut guest = Guest::start("deflate-on-oom=false,free-page-reporting=off", &[]);
    // All of it has been used once, so all of it is the host's to lose.
    guest.run("fill 420");
    let (before, resident) = (guest.mem(), guest.resident_kib());
    guest.balloon(256);
    let (half, half_resident) = (guest.mem(), guest.resident_kib());
    let change = |from: u64, to: u64| to as i64 - from as i64;
    assert_about("MemTotal falls", change(before[0], half[0]), -(256 << 10));
    assert_about("MemFree falls", change(before[1], half[1]), -(256 << 10));
    assert_about("resident falls", change(resident, half_resident), -(256 << 10));
    let detail = guest.qmp.run("query-balloon-detail");
    assert_about("reclaimed", (detail["reclaimed-bytes"].as_u64().unwrap() >> 10) as i64, 256 << 10);
    guest.qmp.run_with("balloon-stats-interval", &json!({"seconds": 1}));
    guest.balloon(512);
    let again = guest.mem();
    assert_about("MemTotal comes back", change(before[0], again[0]), 0);
    guest.run("fill 420");
    assert_about("resident comes back", change(resident, guest.resident_kib()), 0);

    // What the guest says through the device is what it says itself.
    let stale = guest.qmp.run("query-balloon-stats")["last-update"].as_u64().unwrap();
    let until = std::time::Instant::now() + monitor::LIMIT;
    let stats = loop {
        let stats = guest.qmp.run("query-balloon-stats");
        if stats["last-update"].as_u64().unwrap() > stale {
            break stats["stats"].clone();
        }
        assert!(std::time::Instant::now() < until, "no statistics: {stats}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let now = guest.mem();
    for (place, name) in
        ["stat-total-memory", "stat-free-memory", "stat-available-memory", "stat-disk-caches"].iter().enumerate()
    {
        assert_about(name, (stats[*name].as_u64().unwrap() >> 10) as i64, now[place] as i64);
    }
    assert!(stats["stat-minor-faults"].as_u64().unwrap() > 1000, "{stats}");

    guest.balloon(200);
    guest.run("hog 300");
    assert_eq!(guest.monitor.lines("hog: "), ["killed"]);
    assert!(guest.monitor.console().contains("Out of memory: Killed process"));
    assert_eq!(guest.qmp.run("query-balloon")["actual"], 200 << 20, "nothing came out of the balloon");
    guest.end();
}

/// Free page reporting, and the soft half of rule D3.10.
#[test]
fn rule_d3_10_a_hog_lives_with_deflate_on_oom_and_what_linux_frees_goes_back_without_being_asked_for() {
    let directory = Directory::new();
    let drive = format!("id=vda,file={},direct=off", directory.image("disk.img", 256 << 20));
    let mut guest = Guest::start("deflate-on-oom=true", &["-drive", &drive]);
    guest.run("drop");
    let quiet = |guest: &mut Guest| {
        // Linux reports two seconds after it has freed something.
        let mut last = 0;
        guest.until("the reports end", |detail| {
            std::thread::sleep(std::time::Duration::from_secs(4));
            std::mem::replace(&mut last, detail["reported-bytes"].as_u64().unwrap()) == last
        })
    };
    quiet(&mut guest);
    let empty = guest.resident_kib();
    guest.run("cache 256");
    let full = guest.resident_kib();
    assert!(full > empty + (240 << 10), "{empty} to {full} KiB");
    guest.run("drop");
    let detail = quiet(&mut guest);
    let left = guest.resident_kib();
    println!("resident: {empty} KiB, with the cache {full}, without {left}; {detail}");
    assert!(left < empty + (256 << 10) / 5, "four fifths of the cache at least are back: {empty}, {full}, {left}");
    assert_eq!(detail["actual"], Guest::MIB << 20, "nothing is missing from the guest");

    guest.balloon(200);
    guest.run("hog 300");
    assert_eq!(guest.monitor.lines("hog: "), ["lives"]);
    assert!(!guest.monitor.console().contains("Out of memory"));
    let detail = guest.until("what it took", |detail| detail["actual"].as_u64().unwrap() > 250 << 20);
    assert_eq!(detail["target"], 200 << 20);
    assert!(detail["residual-bytes"].as_u64().unwrap() > 50 << 20, "{detail}");
    guest.end();
}

/// A client of the console's socket.
struct Login {
    stream: UnixStream,
    seen: String,
}

impl Login {
    fn new(socket: &str) -> Login {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(monitor::LIMIT)).unwrap();
        stream.set_write_timeout(Some(monitor::LIMIT)).unwrap();
        Login { stream, seen: String::new() }
    }

    fn type_line(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Reads up to this text: what came before it.
    fn wait_for(&mut self, text: &str) -> String {
        loop {
            if let Some((before, after)) = self.seen.split_once(text) {
                let before = before.to_string();
                self.seen = after.to_string();
                return before;
            }
            let mut bytes = [0; 65536];
            let count =
                self.stream.read(&mut bytes).unwrap_or_else(|e| panic!("{text:?} does not come: {e}: {}", self.seen));
            assert_ne!(count, 0, "the connection ended: {}", self.seen);
            self.seen += &String::from_utf8_lossy(&bytes[..count]);
        }
    }

    /// What a command says.
    fn run(&mut self, command: &str) -> String {
        self.type_line(&format!("{command}; echo end."));
        self.wait_for("end.").trim().to_string()
    }
}

#[test]
fn linux_has_a_console_that_clients_come_to_and_leave_and_that_keeps_no_guest_waiting_whoever_does_not_read() {
    let directory = Directory::new();
    let socket = directory.file("console");
    let chardev = format!("socket,id=con0,path={socket},server,nowait");
    let device = "virtconsole,chardev=con0,id=con0";
    let options = ["-chardev", &chardev, "-device", "virtio-serial-device", "-device", device];
    let mut monitor = Monitor::start("vmlinuz", "console=hvc0 loopvisor.script=console", &options);
    let mut qmp = monitor.qmp();
    // What was said before anybody came is there.
    let mut login = Login::new(&socket);
    login.wait_for("console: a line of the kernel");
    login.wait_for("console: ready");
    assert_eq!(login.run("echo here $((6 * 7))"), "here 42");
    assert_eq!(login.run("tty"), "/dev/hvc0");

    // The size that the terminal has on the other side.
    for (columns, rows) in [(132, 43), (80, 25)] {
        qmp.run_with("chardev-resize", &json!({"id": "con0", "cols": columns, "rows": rows}));
        let until = std::time::Instant::now() + monitor::LIMIT;
        while login.run("stty size") != format!("{rows} {columns}") {
            assert!(std::time::Instant::now() < until, "the size is still {}", login.run("stty size"));
        }
    }

    // A paste arrives whole, and so does long output.
    let paste: Vec<u8> = noise(100_000).iter().map(|byte| b'a' + byte % 26).collect();
    login.type_line("stty raw; echo ready; head -c 100000 >/tmp/paste; stty sane -echo; echo came");
    login.wait_for("ready");
    login.stream.write_all(&paste).unwrap();
    login.wait_for("came");
    assert_eq!(login.run("wc -c </tmp/paste"), "100000");
    let shown = login.run("stty -opost; cat /tmp/paste; stty opost");
    assert!(shown.as_bytes() == paste, "{} bytes of {}", shown.len(), paste.len());

    // Another client finds the same shell.
    login.run("x=kept");
    drop(login);
    let mut login = Login::new(&socket);
    assert_eq!(login.run("echo $x"), "kept");

    // Nobody reads 400 kB: more than the sockets and the monitor hold.
    login.type_line("for i in 1 2 3 4; do cat /tmp/paste; done; echo console: flooded >/dev/ttyS0");
    monitor.wait_for("console: flooded", 0);
    qmp.run("query-status");
    let lost = qmp.run("query-chardev")[0]["lost-bytes"].as_u64().unwrap();
    assert!(lost > 0, "{lost} bytes were dropped");
    assert!(login.run("echo and $((1 + 1))").ends_with("and 2"));
    login.type_line("exit");
    monitor.wait_for("loopvisor guest is done", 0);
    assert_eq!(monitor.wait(), 0);
    assert_no_trouble(&monitor);
}

#[test]
fn linux_pings_and_moves_a_bulk_of_data_both_ways_across_stops_on_both_pairs_of_a_nic() {
    // On a thread of its own: it leaves the network of the others for good.
    let outcome = std::thread::spawn(net::all).join();
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn the_power_button_switches_linux_off_in_order() {
    let mut monitor =
        Monitor::start("vmlinuz", "loglevel=4 loopvisor.script=power", &["-smp", &monitor::cpus().to_string()]);
    let mut qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest waits for the power button", 0);
    qmp.run("system_powerdown");
    assert_eq!(monitor.wait(), 0);
    assert_eq!(qmp.finish(), [("POWERDOWN".to_string(), Value::Null), shutdown(true, "guest-shutdown")]);
    assert!(monitor.console().contains("the power button was pressed"));
}

#[test]
fn linux_tells_of_its_panic_which_is_the_end() {
    let mut monitor = Monitor::start_that_reboots("vmlinuz", "loglevel=4 loopvisor.script=panic", &[]);
    let qmp = monitor.qmp();
    monitor.wait_for("loopvisor guest panics", 0);
    assert_eq!(monitor.wait(), 0);
    let panicked = ("GUEST_PANICKED".to_string(), json!({ "action": "poweroff" }));
    assert_eq!(qmp.finish(), [panicked, shutdown(true, "guest-panic")]);
    assert!(monitor.console().contains("Kernel panic - not syncing: sysrq triggered crash"));
}
