//! One description of a machine, and the command line by which each monitor is asked for it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::programs::Programs;

/// Guest memory in MiB, where there is no balloon.
pub const MEMORY_MIB: u64 = 256;

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// The smallest program that creates the VM and runs the guest: what KVM itself costs.
    Floor,
    /// Ours.
    Loopvisor,
    /// QEMU's microvm without what it can leave out.
    Qemu,
}

/// Which way a disk takes to its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// `direct=off`: through the host's page cache.
    Cached,
    /// `direct=on`.
    Direct,
}

/// A disk of the machine.
#[derive(Clone, Debug)]
pub struct Drive {
    pub file: PathBuf,
    pub cache: Cache,
    pub read_only: bool,
    /// The number of the iothread that serves it, which others may share; the main thread if none.
    pub iothread: Option<usize>,
    /// Requests a second that it is limited to; zero is no limit.
    pub iops: u64,
}

/// What is asked for: one vCPU, 256 MiB if nothing is said, the serial port on standard input and output.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// The guest's words.
    pub words: String,
    pub drives: Vec<Drive>,
    pub qmp: Option<PathBuf>,
    /// A NIC on the tap of that name; ours on an iothread if so said.
    pub tap: Option<(String, bool)>,
    /// A balloon, in a guest of so many MiB.
    pub balloon_mib: Option<u64>,
}

impl Machine {
    fn memory_mib(&self) -> u64 {
        self.balloon_mib.unwrap_or(MEMORY_MIB)
    }

    /// The numbers of the iothreads that its drives name.
    fn iothreads(&self) -> BTreeSet<usize> {
        self.drives.iter().filter_map(|drive| drive.iothread).collect()
    }
}

impl Monitor {
    /// How it is called in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Monitor::Floor => "floor",
            Monitor::Loopvisor => "loopvisor",
            Monitor::Qemu => "QEMU",
        }
    }

    /// Its fastest way to a file on tmpfs: QEMU does better with native AIO than through any thread.
    pub fn way_to_tmpfs(self) -> Cache {
        if self == Monitor::Qemu { Cache::Direct } else { Cache::Cached }
    }

    /// The command that runs `machine`. The floor has no devices.
    pub fn command(self, programs: &Programs, machine: &Machine) -> Command {
        match self {
            Monitor::Floor => {
                let mut command = Command::new(&programs.bench);
                command.arg("floor").arg(&programs.guest).arg(&machine.words);
                command
            }
            Monitor::Loopvisor => loopvisor(programs, machine),
            Monitor::Qemu => qemu(programs, machine),
        }
    }
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

fn loopvisor(programs: &Programs, machine: &Machine) -> Command {
    let mut command = Command::new(&programs.loopvisor);
    command.env("RUST_LOG", "warn");
    command.arg("-m").arg(format!("{}M", machine.memory_mib())).arg("-kernel").arg(&programs.guest);
    command.args(["-append", &machine.words, "-serial", "stdio", "-no-reboot"]);
    for number in machine.iothreads() {
        command.arg("-iothread").arg(format!("id=io{number}"));
    }
    for (i, drive) in machine.drives.iter().enumerate() {
        let direct = on(drive.cache == Cache::Direct);
        let mut text = format!("id=d{i},file={},readonly={},direct={direct}", show(&drive.file), on(drive.read_only));
        if let Some(number) = drive.iothread {
            text += &format!(",iothread=io{number}");
        }
        if drive.iops != 0 {
            text += &format!(",iops={}", drive.iops);
        }
        command.arg("-drive").arg(text);
    }
    if let Some((tap, iothread)) = &machine.tap {
        let home = if *iothread { ",iothread=net" } else { "" };
        command.args(["-iothread", "id=net", "-netdev"]).arg(format!("id=n0,netdev={tap}{home}"));
    }
    if machine.balloon_mib.is_some() {
        command.arg("-balloon");
    }
    if let Some(path) = &machine.qmp {
        command.arg("-qmp").arg(format!("unix:{},server,nowait", show(path)));
    }
    command
}

fn qemu(programs: &Programs, machine: &Machine) -> Command {
    let mut command = Command::new(&programs.qemu);
    // `-cpu host` aborts on a software-only KVM, and PNI it would only warn of.
    command.args([
        "-M",
        "microvm,accel=kvm,acpi=off,x-option-roms=off,pit=off,rtc=off,isa-serial=on,auto-kernel-cmdline=on",
        "-cpu",
        "qemu64,pni=off",
        "-global",
        "virtio-mmio.force-legacy=false",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-name",
        "bench,debug-threads=on",
        "-serial",
        "stdio",
    ]);
    command.arg("-m").arg(machine.memory_mib().to_string()).arg("-kernel").arg(&programs.guest);
    command.args(["-append", &machine.words]);
    for number in machine.iothreads() {
        command.arg("-object").arg(format!("iothread,id=io{number}"));
    }
    for (i, drive) in machine.drives.iter().enumerate() {
        // Its fastest of each kind.
        let way = match drive.cache {
            Cache::Cached => "cache=writeback,aio=io_uring",
            Cache::Direct => "cache=none,aio=native",
        };
        let file = show(&drive.file);
        let read_only = on(drive.read_only);
        let mut text = format!("id=d{i},if=none,format=raw,file={file},readonly={read_only},{way}");
        if drive.iops != 0 {
            text += &format!(",throttling.iops-total={}", drive.iops);
        }
        command.arg("-drive").arg(text);
        let mut device = format!("virtio-blk-device,drive=d{i}");
        if let Some(number) = drive.iothread {
            device += &format!(",iothread=io{number}");
        }
        command.arg("-device").arg(device);
    }
    // It knows no iothread for a NIC.
    if let Some((tap, _)) = &machine.tap {
        let netdev = format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost=off");
        command.arg("-netdev").arg(netdev).args(["-device", "virtio-net-device,netdev=n0"]);
    }
    if machine.balloon_mib.is_some() {
        command.args(["-device", "virtio-balloon-device,free-page-reporting=on"]);
    }
    if let Some(path) = &machine.qmp {
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", show(path)));
    }
    command
}

fn show(path: &Path) -> std::path::Display<'_> {
    path.display()
}
