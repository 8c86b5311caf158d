//! The shapes of the answers about the machine as a whole: names and members are QEMU's, of the dialect of 5.0.
//!
//! Members that QEMU does not have are marked *ours*. Disks are in `block`.

use crate::qmp::schema::{names, object};

names! {
    /// What the machine is doing.
    pub enum RunState {
        /// The vCPUs wait for the first `cont`.
        "prelaunch" => Prelaunch,
        /// The guest runs.
        "running" => Running,
        /// Stopped by `stop`.
        "paused" => Paused,
        /// The guest has ended, the monitor not yet.
        "shutdown" => Shutdown,
        /// The guest's kernel has panicked, and the monitor ends.
        "guest-panicked" => GuestPanicked,
        /// A vCPU failed in a way that it cannot go on from.
        "internal-error" => InternalError,
    }

    /// The processor architecture, in the spelling of `query-cpus`.
    pub enum CpuInfoArch {
        /// x86, 32 and 64 bits.
        "x86" => X86,
    }

    /// The processor architecture, in the spelling of `query-cpus-fast`.
    pub enum SysEmuTarget {
        /// x86 with 64 bits.
        "x86_64" => X86_64,
    }
}

object! {
    /// `query-status`.
    pub struct StatusInfo {
        /// Whether the vCPUs run: true in the state `running` only.
        "running" => running: bool,
        /// Always false; kept because clients of this dialect require the member.
        "singlestep" => singlestep: bool,
        /// The state.
        "status" => status: RunState,
    }

    /// Three numbers of a version.
    pub struct VersionTriple {
        /// The first.
        "major" => major: u32,
        /// The second.
        "minor" => minor: u32,
        /// The third.
        "micro" => micro: u32,
    }

    /// `query-version`, and part of the greeting.
    pub struct VersionInfo {
        /// The QEMU version whose dialect is spoken.
        "qemu" => qemu: VersionTriple,
        /// This program and its own version.
        "package" => package: String,
    }

    /// `query-kvm`.
    pub struct KvmInfo {
        /// Whether KVM runs the guest: always true.
        "enabled" => enabled: bool,
        /// Whether KVM is there: always true.
        "present" => present: bool,
    }

    /// `query-name`.
    pub struct NameInfo {
        /// The machine's name, if it was given one.
        "name" => name: Option<String>,
    }

    /// Where a vCPU stands in the topology that the guest sees.
    pub struct CpuInstanceProperties {
        /// Socket, from 0.
        "socket-id" => socket_id: u32,
        /// Core in the socket, from 0.
        "core-id" => core_id: u32,
        /// Thread in the core, from 0.
        "thread-id" => thread_id: u32,
    }

    /// One vCPU in `query-cpus`.
    pub struct CpuInfo {
        /// Index, from 0.
        "CPU" => cpu: u32,
        /// True for vCPU 0.
        "current" => current: bool,
        /// Always false: a halted vCPU sleeps in KVM, unseen.
        "halted" => halted: bool,
        /// `/machine/unattached/device[CPU]`.
        "qom_path" => qom_path: String,
        /// The host's thread id.
        "thread_id" => thread_id: u32,
        /// Topology.
        "props" => props: CpuInstanceProperties,
        /// Architecture.
        "arch" => arch: CpuInfoArch,
    }

    /// One vCPU in `query-cpus-fast`.
    pub struct CpuInfoFast {
        /// Index, from 0.
        "cpu-index" => cpu_index: u32,
        /// `/machine/unattached/device[cpu-index]`.
        "qom-path" => qom_path: String,
        /// The host's thread id.
        "thread-id" => thread_id: u32,
        /// Topology.
        "props" => props: CpuInstanceProperties,
        /// Architecture.
        "target" => target: SysEmuTarget,
    }

    /// Why a loop woke: times slept and woken, by cause. Ours.
    pub struct LoopWakes {
        /// A signal the loop owns: a guest's kick, an eventfd.
        "signal" => signal: u64,
        /// A timer.
        "timer" => timer: u64,
        /// A socket, terminal or other stream.
        "stream" => stream: u64,
        /// A message of another thread.
        "post" => post: u64,
    }

    /// What an event loop did since it began. Ours.
    pub struct LoopCounters {
        /// Rounds of wait and dispatch.
        "turns" => turns: u64,
        /// Wakes by cause.
        "wakes" => wakes: LoopWakes,
        /// Handler calls.
        "events" => events: u64,
        /// Events for a watch that was gone by then.
        "stale" => stale: u64,
        /// Watches masked because their handler made no progress.
        "stuck" => stuck: u64,
        /// Handlers removed because they returned an error.
        "failed" => failed: u64,
        /// The longest single handler call, in nanoseconds.
        "longest-handler-ns" => longest_handler_ns: u64,
        /// Time spent waiting, in nanoseconds.
        "asleep-ns" => asleep_ns: u64,
    }

    /// One iothread in `query-iothreads`.
    pub struct IOThreadInfo {
        /// Its id, which is the thread's name too.
        "id" => id: String,
        /// The host's thread id.
        "thread-id" => thread_id: u32,
        /// Always 0: a loop sleeps when there is nothing to do.
        "poll-max-ns" => poll_max_ns: u64,
        /// Always 0.
        "poll-grow" => poll_grow: u64,
        /// Always 0.
        "poll-shrink" => poll_shrink: u64,
        /// The loop's counters. Ours.
        "loop" => counters: LoopCounters,
    }

    /// One machine type in `query-machines`.
    pub struct MachineInfo {
        /// What `-machine` takes.
        "name" => name: String,
        /// Whether it is taken when `-machine` is absent.
        "is-default" => is_default: Option<bool>,
        /// The most vCPUs.
        "cpu-max" => cpu_max: u32,
        /// Whether vCPUs can be plugged.
        "hotpluggable-cpus" => hotpluggable_cpus: bool,
        /// Whether `-numa` has `mem=`.
        "numa-mem-supported" => numa_mem_supported: bool,
        /// Whether it will go away.
        "deprecated" => deprecated: bool,
    }

    /// One command in `query-commands`.
    pub struct CommandInfo {
        /// What `execute` takes.
        "name" => name: String,
    }

    /// One event in `query-events`.
    pub struct EventInfo {
        /// What stands under `event`.
        "name" => name: String,
    }
}

/// The version this program answers with: the dialect is that of QEMU 5.0.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 5, minor: 0, micro: 1 },
        package: concat!("loopvisor ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}
