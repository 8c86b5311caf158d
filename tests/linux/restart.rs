//! How Linux ends a life of its machine: each way to restart it, from each vCPU, with and without ACPI; power-off and halt.
//!
//! The guest runs `tools/linux/tests/restart`, which ends its life by what is typed, so that one monitor goes through many
//! lives. No word of the command line names a way: a distribution's image has none. `LOOPVISOR_RESTARTS=all` tries every way
//! with every kernel, on one vCPU and on four.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::{Value, json};

use crate::microvm::{self, file};
use crate::monitor::{Directory, Monitor, Qmp, cpus};
use crate::{assert_no_trouble, shutdown, tap, topology};

/// Each way that ends in a reset, in the words of the script.
const WAYS: [&str; 10] = ["reboot", "sysrq", "panic", "nmi", "kbd", "triple", "acpi", "pci", "bios", "efi"];

/// A kernel to restart.
struct Kernel {
    path: String,
    /// The way that it chooses without being told.
    choice: &'static str,
    /// It reports a panic by pvpanic, which ends the machine: only another kernel restarts by a panic.
    has_pvpanic: bool,
}

/// Debian's kernel and the microVM kernel as bzImage; if everything is to be tried, also as ELF files.
fn kernels() -> Vec<Kernel> {
    let debian = |name| Kernel { path: file("LOOPVISOR_LINUX", name), choice: "efi", has_pvpanic: false };
    let microvm = |name| Kernel { path: microvm::kernel(name), choice: "acpi", has_pvpanic: true };
    let mut kernels = vec![debian("vmlinuz"), microvm("bzImage")];
    if all() {
        kernels.extend([debian("vmlinux"), microvm("vmlinux")]);
    }
    kernels
}

/// Whether everything is to be tried, which takes a quarter of an hour in the nested host.
fn all() -> bool {
    std::env::var("LOOPVISOR_RESTARTS").is_ok_and(|value| value == "all")
}

fn is_panic(way: &str) -> bool {
    way.starts_with("panic") || way.starts_with("nmi")
}

/// A guest that has come up and waits to be told how its life ends.
struct Lives {
    monitor: Monitor,
    qmp: Qmp,
    ready: usize,
}

impl Lives {
    fn start(kernel: &str, words: &str, options: &[&str]) -> Lives {
        Lives::start_with(kernel, words, options, || ())
    }

    /// The same; `peers` runs as soon as the monitor listens.
    fn start_with(kernel: &str, words: &str, options: &[&str], peers: impl FnOnce()) -> Lives {
        let words = format!("loglevel=5 {words}");
        let monitor = Monitor::start_that_reboots(kernel, &words, options);
        let qmp = monitor.qmp();
        peers();
        let mut lives = Lives { monitor, qmp, ready: 0 };
        lives.await_ready();
        lives
    }

    fn await_ready(&mut self) {
        self.ready = self.monitor.wait_for("restart: ready", self.ready).0;
    }

    /// Ends this life by `way`, and waits for the next.
    fn restart(&mut self, way: &str) {
        println!("restart by {way}");
        self.monitor.type_line(way);
        if way == "wait" {
            self.monitor.wait_for("restart: by wait", 0);
            self.qmp.run("system_reset");
        }
        self.await_ready();
    }

    /// Powers the machine off, and compares its events with what `ways` must have caused: one each.
    #[track_caller]
    fn finish(mut self, ways: &[&str]) -> Monitor {
        self.monitor.type_line("poweroff");
        assert_eq!(self.monitor.wait(), 0);
        let reset = |guest: bool, reason: &str| ("RESET".to_owned(), json!({ "guest": guest, "reason": reason }));
        let event = |way: &&str| match *way {
            "wait" => reset(false, "host-qmp-system-reset"),
            _ => reset(true, "guest-reset"),
        };
        let mut expected: Vec<(String, Value)> = ways.iter().map(event).collect();
        expected.push(shutdown(true, "guest-shutdown"));
        let told = self.qmp.finish();
        // Others tell of balloon and plugs.
        let told: Vec<_> =
            told.into_iter().filter(|(name, _)| ["RESET", "SHUTDOWN"].contains(&name.as_str())).collect();
        assert_eq!(told, expected);
        self.monitor
    }
}

/// Answers each line that asks for it on the console whose socket is `path`, until the monitor ends.
fn answer_each_line(path: &str) {
    let stream = UnixStream::connect(path).unwrap();
    thread::spawn(move || {
        let lines = BufReader::new(&stream).lines();
        let mut questions = lines.map_while(Result::ok).filter(|line| line.contains("answer this line"));
        questions.try_for_each(|_| writeln!(&stream, "an answer"))
    });
}

/// Goes through a life for each of `ways` on `cpus` vCPUs with a disk that each must find as the last has left it.
fn go_through(kernel: &Kernel, scripts: &str, cpus: u32, ways: &[&str]) -> Monitor {
    let directory = Directory::new();
    let drive = format!("id=one,file={},direct=off,iothread=a", directory.image("a.img", 8 << 20));
    let options = ["-smp", &cpus.to_string(), "-iothread", "id=a", "-drive", &drive];
    let words = format!("loopvisor.script={scripts}");
    let mut lives = Lives::start(&kernel.path, &words, &options);
    ways.iter().for_each(|way| lives.restart(way));
    let monitor = lives.finish(ways);
    let told = monitor.lines("restart: the ");
    assert_eq!(told[0], "first life");
    assert_eq!(told[1..], vec!["disk holds what the last life has written"; ways.len()]);
    let ready = format!("ready on {cpus} vCPUs, by ");
    assert_eq!(monitor.lines(&format!("restart: {ready}")).len(), ways.len() + 1, "{ready}");
    let text = monitor.console();
    let troubles = text.lines().filter(|line| line.contains("Kernel panic")).count();
    let asked = ways.iter().filter(|way| is_panic(way)).count();
    assert_eq!(troubles, asked, "panics");
    monitor
}

#[test]
fn linux_reboots_by_every_way_and_finds_its_disk_each_time() {
    for kernel in kernels() {
        let ways = WAYS.into_iter().filter(|way| !(kernel.has_pvpanic && is_panic(way)));
        let monitor = go_through(&kernel, "restart", cpus(), &ways.chain(["wait"]).collect::<Vec<_>>());
        assert_no_trouble(&monitor);
        assert_eq!(monitor.lines(&format!("restart: ready on {} vCPUs, by ", cpus()))[0], kernel.choice);
    }
}

#[test]
fn linux_reboots_by_any_of_four_vcpus() {
    for kernel in kernels() {
        let some = ["reboot 3", "panic 1", "sysrq 2"].map(str::to_owned);
        let ways = if all() { WAYS.map(|way| format!("{way} 3")).to_vec() } else { some.to_vec() };
        let ways: Vec<&str> =
            ways.iter().map(String::as_str).filter(|way| !(kernel.has_pvpanic && is_panic(way))).collect();
        let monitor = go_through(&kernel, "report,restart", 4, &ways);
        let told: Vec<_> = monitor.lines("cpu").into_iter().map(|line| format!("cpu{line}")).collect();
        assert_eq!(told, vec![topology(4); ways.len() + 1].concat());
    }
}

/// A device on each of the eleven lines, 5 to 15, each of which has interrupted in the life before: a reset leaves nothing of
/// that in the interrupt controllers. A kernel that dies of it restarts by `panic=-1`, which is one RESET too many.
#[test]
fn linux_reboots_by_one_reset_with_a_device_on_every_line() {
    let Some(tap) = tap("lvtap2", "10.9.6.1") else {
        return println!("skipped: a tap cannot be made here by this user");
    };
    let directory = Directory::new();
    let drives: Vec<String> =
        (0..5).map(|n| format!("id=d{n},file={},direct=off", directory.image(&format!("{n}.img"), 8 << 20))).collect();
    let (console, vsock) = (directory.file("console"), directory.file("vsock"));
    let (chardev, vsock) =
        (format!("socket,id=con0,path={console},server,nowait"), format!("vsock,id=v,guest-cid=3,uds_path={vsock}"));
    let mut options = vec!["-machine", "microvm,disk-slots=5,nic-slots=2", "-balloon", "deflate-on-oom=true"];
    options.extend(["-rng", "random_file=/dev/urandom", "-chardev", &chardev, "-device", "virtio-serial-device"]);
    options.extend(["-device", "virtconsole,chardev=con0,id=con0", "-device", &vsock]);
    options.extend(drives.iter().flat_map(|drive| ["-drive", drive]));
    let mut lives = Lives::start_with("vmlinuz", "loopvisor.script=restart", &options, || answer_each_line(&console));
    let ways = ["wait", "reboot"];
    for way in ways.into_iter().chain(["poweroff"]) {
        // What comes from outside: the balloon's target, and a cable for one NIC after the other.
        lives.qmp.run_with("balloon", &json!({"value": 200 << 20}));
        for addr in ["0x0", "0x1"] {
            lives.qmp.hand_over("tap", &tap);
            lives.qmp.run_with("netdev_add", &json!({"type": "tap", "id": "net", "fd": "tap"}));
            lives.qmp.run_with("device_add", &json!({"id": "net", "driver": "virtio-net-mmio", "addr": addr}));
            lives.qmp.run_with("device_del", &json!({"id": "net"}));
        }
        if way != "poweroff" {
            lives.restart(way);
        }
    }
    let monitor = lives.finish(&ways);
    let lines = monitor.lines("restart: line ");
    assert_eq!(lines.len(), 3 * 11, "{lines:?}");
    for line in &lines {
        let (number, count) = line.split_once(' ').unwrap();
        assert!((5..=15).contains(&number.parse::<u32>().unwrap()), "{line}");
        assert_ne!(count, "0", "line {number} has not interrupted: {lines:?}");
    }
    assert!(!monitor.console().contains("Kernel panic"), "{}", monitor.console());
}

/// Without ACPI the microVM kernel finds its vCPUs in the MP table, its disk on the command line, and no pvpanic: a panic restarts it
/// too. It knows no way to switch the machine off.
#[test]
fn linux_reboots_by_every_way_without_acpi() {
    let directory = Directory::new();
    let drive = format!("id=one,file={},direct=off", directory.image("a.img", 8 << 20));
    let options = ["-smp", &cpus().to_string(), "-drive", &drive];
    let mut lives = Lives::start(&microvm::kernel("bzImage"), "acpi=off loopvisor.script=restart", &options);
    WAYS.iter().for_each(|way| lives.restart(way));
    lives.qmp.run("quit");
    assert_eq!(lives.monitor.wait(), 0);
    let reset = ("RESET".to_owned(), json!({ "guest": true, "reason": "guest-reset" }));
    let told: Vec<_> = lives.qmp.finish().into_iter().filter(|(name, _)| name == "RESET").collect();
    assert_eq!(told, vec![reset; WAYS.len()]);
    let told = lives.monitor.lines("restart: the ");
    assert_eq!(told[1..], vec!["disk holds what the last life has written"; WAYS.len()]);
    assert_eq!(lives.monitor.lines(&format!("restart: ready on {} vCPUs", cpus())).len(), WAYS.len() + 1);
    let panics = lives.monitor.console().lines().filter(|line| line.contains("Kernel panic")).count();
    assert_eq!(panics, WAYS.iter().filter(|way| is_panic(way)).count());
}

/// Without ACPI this kernel finds one vCPU, the serial port, and nothing else: it was built without MP tables and without
/// `virtio_mmio.device=`.
#[test]
fn linux_reboots_by_a_panic_without_acpi_on_the_one_vcpu_it_finds() {
    let mut lives = Lives::start("vmlinuz", "acpi=off loopvisor.script=restart", &["-smp", "2"]);
    lives.restart("panic");
    assert_eq!(lives.monitor.lines("vcpus: "), ["1 (online: 0)"; 2]);
    lives.qmp.run("quit");
    assert_eq!(lives.monitor.wait(), 0);
}

#[test]
fn a_halted_linux_stays_until_its_machine_is_told_to_end() {
    let mut monitor = Monitor::start("vmlinuz", "loglevel=5 loopvisor.script=restart", &[]);
    let mut qmp = monitor.qmp();
    monitor.wait_for("restart: ready", 0);
    monitor.type_line("halt");
    monitor.wait_for("reboot: System halted", 0);
    assert_eq!(qmp.run("query-status")["status"], "running");
    qmp.run("quit");
    assert_eq!(monitor.wait(), 0);
    assert_eq!(qmp.finish(), [shutdown(false, "host-qmp-quit")]);
}
