//! `VmSpec`: one virtual machine as its user described it, checked in itself and not yet against the host.
//!
//! Every spelling (the command line now, a file later) ends here, and everything that is built starts from here. The
//! rules that a whole machine must keep are in `check`; the values that are used when nothing is said are in `new`.

use std::path::PathBuf;

use super::chardev::{ChardevSpec, ConsoleSpec};
use super::net::{NetdevSpec, NicSpec};
use super::rng::{RngSource, RngSpec};
use super::vsock::VsockSpec;
use crate::qos::Limits;

/// The most iothreads a machine may have (rule D1.2).
pub const MAX_IOTHREADS: usize = 8;
/// The most vCPUs a machine may have: their local APIC ids and the I/O APIC's fit eight bits.
pub const MAX_CPUS: u8 = 254;
/// The least guest memory, in bytes: below it no kernel we know of unpacks itself.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// The most guest memory, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 512 << 30;
/// The least memory that a balloon may leave the guest, in bytes (rule D3.11).
pub const MIN_BALLOON_BYTES: u64 = 32 << 20;
/// Where the host tells of its memory pressure.
pub const PRESSURE: &str = "/proc/pressure/memory";
/// Guest memory when `-m` is not given, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;
/// The longest name of a machine, drive or iothread, in characters.
pub const MAX_NAME_CHARS: usize = 255;
/// The longest serial number of a disk, in bytes: the answer to VIRTIO_BLK_T_GET_ID (virtio 1.2, section 5.2.6).
pub const MAX_SERIAL_BYTES: usize = 20;
/// The logical blocks that a disk may have, in bytes: the first is the default.
pub const LOGICAL_BLOCKS: [u32; 2] = [512, 4096];
/// The largest physical block of a disk, in bytes, as in QEMU.
pub const MAX_PHYSICAL_BLOCK: u32 = 2 << 20;
/// The longest path of a file, in bytes: the kernel's PATH_MAX without its NUL.
pub const MAX_PATH_BYTES: usize = 4095;
/// The longest path of a Unix socket, in bytes: `sun_path` without its NUL (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The most virtio devices of all kinds together: interrupts 5 to 15 (rule D3.4).
pub const MAX_VIRTIO_DEVICES: usize = 11;

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// `-name`: what `query-name` answers; empty when not given.
    pub name: String,
    /// `-smp`: 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// `-m`: bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// `-machine dump-guest-core=`: whether guest memory is part of a core dump of the monitor.
    pub dump_guest_core: bool,
    /// `-machine mem-share=`: whether guest memory is mapped shared.
    pub mem_share: bool,
    /// `-machine disk-slots=`: slots for disks, filled and empty ones; [`VmSpec::slots`] if nothing is said.
    pub disk_slots: Option<usize>,
    /// `-machine nic-slots=`: the same for NICs.
    pub nic_slots: Option<usize>,
    /// `-mem-path`: the file that guest memory is, or the folder for one without a name.
    pub mem_path: Option<PathBuf>,
    /// `-kernel`.
    pub kernel: PathBuf,
    /// `-machine kernel-format=`: what it is.
    pub kernel_format: KernelFormat,
    /// `-machine auto-kernel-cmdline=`: whether the kernel's command line names the virtio devices; if `None`, `machine::boot`
    /// decides.
    pub kernel_words: Option<bool>,
    /// `-cpu host,pmu=`: whether the guest has the host's performance counters, as far as KVM can show them.
    pub pmu: bool,
    /// `-initrd`.
    pub initrd: Option<PathBuf>,
    /// `-append`: the words as given, joined by blanks; the monitor adds its own (`machine::boot::command_line`).
    pub append: String,
    /// `-drive`, in the order given: `/dev/vda`, `/dev/vdb`, ...
    pub drives: Vec<DriveSpec>,
    /// The NICs, in the order given: `eth0`, `eth1`, ...
    pub nics: Vec<NicSpec>,
    /// `-netdev tap`s that no `-device` has taken.
    pub netdevs: Vec<NetdevSpec>,
    /// `-iothread`, in the order given.
    pub iothreads: Vec<IothreadSpec>,
    /// `-balloon`, as often as it was given: once at most (rule D3.5).
    pub balloons: Vec<BalloonSpec>,
    /// `-rng` and `-device virtio-rng-device`, as often as they were given: once at most.
    pub rngs: Vec<RngSpec>,
    /// `-object rng-random`: what those of `-device` name.
    pub rng_sources: Vec<RngSource>,
    /// `-chardev`, in the order given.
    pub chardevs: Vec<ChardevSpec>,
    /// The consoles, in the order given: `/dev/hvc0`, `/dev/hvc1`, ...
    pub consoles: Vec<ConsoleSpec>,
    /// `-device vsock`, as often as it was given: once at most.
    pub vsocks: Vec<VsockSpec>,
    /// `-serial`: what the first serial port is connected to.
    pub serial: SerialSpec,
    /// The management sockets: that of `-api-channel`, then those of `-qmp` in the order given.
    pub qmp: Vec<PathBuf>,
    /// `-D`: where the log goes.
    pub log: LogSpec,
    /// `-pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `-daemonize`.
    pub daemonize: bool,
    /// `-freeze`, `-S`: the vCPUs wait for the first `cont`.
    pub freeze: bool,
    /// `-no-reboot`, `-machine reboot=off`: a reset ends the machine.
    pub no_reboot: bool,
    /// Options that were accepted and mean nothing here, for the log.
    pub ignored: Vec<String>,
}

impl VmSpec {
    /// A machine that boots `kernel`, with everything else as it is when not asked for.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        VmSpec {
            name: String::new(),
            cpus: 1,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            dump_guest_core: true,
            mem_share: false,
            disk_slots: None,
            nic_slots: None,
            mem_path: None,
            kernel: kernel.into(),
            kernel_format: KernelFormat::Auto,
            kernel_words: None,
            pmu: true,
            initrd: None,
            append: String::new(),
            drives: Vec::new(),
            nics: Vec::new(),
            netdevs: Vec::new(),
            iothreads: Vec::new(),
            balloons: Vec::new(),
            rngs: Vec::new(),
            rng_sources: Vec::new(),
            chardevs: Vec::new(),
            consoles: Vec::new(),
            vsocks: Vec::new(),
            serial: SerialSpec::None,
            qmp: Vec::new(),
            log: LogSpec::Stderr,
            pidfile: None,
            daemonize: false,
            freeze: false,
            no_reboot: false,
            ignored: Vec::new(),
        }
    }

    /// What limits `drive`: its own limits, or those of its group, whichever of the members was given them.
    pub fn limits_of(&self, drive: &DriveSpec) -> Limits {
        let group = self.drives.iter().filter(|member| member.shares_limits_with(drive)).map(|member| member.limits);
        let mut all = std::iter::once(drive.limits).chain(group);
        all.find(|limits| !limits.is_none()).unwrap_or_default()
    }
}

/// What a kernel's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// `auto`: what its content says; flat, if that says nothing and its name ends with `.bin`.
    Auto,
    /// `bzimage`: what distributions ship.
    Bzimage,
    /// `elf`: an ELF vmlinux.
    Elf,
    /// `flat`: memory from 16 MiB on, as `objcopy -O binary vmlinux vmlinux.bin` writes it.
    Flat,
}

/// `-drive`: a virtio-blk device and the file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveSpec {
    /// The name that QMP and messages use; unique among devices.
    pub id: String,
    /// A regular file or block device.
    pub file: PathBuf,
    /// `readonly=`.
    pub access: Access,
    /// `direct=`.
    pub cache: Cache,
    /// What the guest reads as the disk's serial number: at most 20 bytes.
    pub serial: Option<String>,
    /// `logical_block_size=`: the unit of the guest's requests in bytes, 512 or 4096; 512 if not given.
    pub logical_block: Option<u32>,
    /// `physical_block_size=` in bytes: a power of two from the logical block to [`MAX_PHYSICAL_BLOCK`]; what the host's
    /// device reports if not given.
    pub physical_block: Option<u32>,
    /// The id of the iothread that serves it (rules D1.6, D1.8); the main loop if none.
    pub iothread: Option<String>,
    /// `aio=`.
    pub aio: Aio,
    /// `iops=`, `throttling.*=`: what was given with this drive. What limits it is [`VmSpec::limits_of`].
    pub limits: Limits,
    /// `throttling.group=`: the drives of a group share one set of limits.
    pub group: Option<String>,
}

impl DriveSpec {
    /// A writable drive with direct I/O, served by the main loop and without limits.
    pub fn new(id: impl Into<String>, file: impl Into<PathBuf>) -> Self {
        DriveSpec {
            id: id.into(),
            file: file.into(),
            access: Access::ReadWrite,
            cache: Cache::Direct,
            serial: None,
            logical_block: None,
            physical_block: None,
            iothread: None,
            aio: Aio::Auto,
            limits: Limits::default(),
            group: None,
        }
    }

    /// A warning, if the guest reads only the beginning of the id as the serial number: two drives may then look the same.
    pub fn cut_serial(&self) -> Option<String> {
        let cut = self.serial.is_none() && self.id.len() > MAX_SERIAL_BYTES;
        cut.then(|| {
            format!(
                "drive \"{}\": the guest reads the first {MAX_SERIAL_BYTES} bytes of the id as the serial number; use serial= \
                 for one of its own",
                self.id
            )
        })
    }

    /// Whether both are in one group.
    pub fn shares_limits_with(&self, other: &DriveSpec) -> bool {
        self.group.is_some() && self.group == other.group
    }
}

/// Whether the guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `readonly=on`
    ReadOnly,
    /// `readonly=off`
    ReadWrite,
}

/// Whether the host's page cache stands between guest and disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// `direct=on`: O_DIRECT.
    Direct,
    /// `direct=off`: through the page cache.
    Buffered,
}

/// How requests reach the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// io_uring where the host's kernel has it, threads elsewhere (the default).
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A small pool of threads.
    Threads,
}

/// `-iothread`: one event loop of its own thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IothreadSpec {
    /// The thread's name on the host, and what a device names (rule D1.7).
    pub id: String,
}

/// `-balloon`: memory that the guest gives back (rules D3.1 to D3.11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonSpec {
    /// `deflate-on-oom=`: whether a guest that runs out of memory may take it back by itself (rule D3.10).
    pub deflate_on_oom: bool,
    /// `free-page-reporting=`: whether the guest may report pages that are free anyway.
    pub free_page_reporting: bool,
    /// `auto=on`: whether the monitor itself moves the target.
    pub auto: Option<AutoSpec>,
}

impl Default for BalloonSpec {
    fn default() -> Self {
        BalloonSpec { deflate_on_oom: false, free_page_reporting: true, auto: None }
    }
}

/// `-balloon auto=on,...`: how far the monitor may go, and by what it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AutoSpec {
    /// `floor=`: the guest is left so many bytes.
    pub floor_bytes: u64,
    /// `pressure=`: the file that tells of the host's memory pressure.
    pub pressure: PathBuf,
}

/// What the serial port is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialSpec {
    /// Nothing: no `-serial`.
    None,
    /// `-serial stdio`.
    Stdio,
}

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogSpec {
    /// Standard error: no `-D`, or `-D` without a file while standard output is the serial port's.
    Stderr,
    /// Standard output: `-D` without a file.
    Stdout,
    /// `-D FILE`: appended to, mode 0640.
    File(PathBuf),
}
