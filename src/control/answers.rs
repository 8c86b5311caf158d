//! The answers to the `query-` commands about the machine: from the inventory and the run state to QMP's shapes.
//!
//! Nothing here asks another thread: what is counted is read from words that its owner publishes, so an answer takes
//! microseconds whatever the devices are doing. Main thread.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;
use serde_json::Value;

use super::{net, vsock};
use crate::config::spec::{Access, Cache, MAX_CPUS};
use crate::devices::block::Kind;
use crate::error::{Context, Result};
use crate::event::{Counters, Remote};
use crate::kvm::vcpu::VcpuHandle;
use crate::machine::{DiskSlot, Drive, Inventory};
use crate::qmp::block::{
    BlockDeviceInfo, BlockDeviceIoStatus, BlockDeviceStats, BlockInfo, BlockStats, BlockdevCacheInfo,
    BlockdevDetectZeroesOptions, ImageInfo,
};
use crate::qmp::command::Command;
use crate::qmp::reply::{
    CpuInfo, CpuInfoArch, CpuInfoFast, CpuInstanceProperties, IOThreadInfo, KvmInfo, LoopCounters, LoopWakes,
    MachineInfo, NameInfo, RunState, StatusInfo, SysEmuTarget,
};
use crate::qmp::schema::Empty;
use crate::qos::Quantity::{Bps, BpsRead, BpsWrite, Iops, IopsRead, IopsWrite};

/// Answers a query, at `now_ns`. The commands that change something are Control's own.
pub(super) fn answer(query: &Command, state: RunState, inventory: &Inventory, now_ns: u64) -> Result<Value> {
    match query {
        Command::QueryStatus => {
            value(StatusInfo { running: state == RunState::Running, singlestep: false, status: state })
        }
        Command::QueryKvm => value(KvmInfo { enabled: true, present: true }),
        Command::QueryName => value(NameInfo { name: Some(inventory.name.clone()).filter(|name| !name.is_empty()) }),
        Command::QueryCpus => value((0..).zip(inventory.vcpus.iter()).map(cpu).collect::<Vec<_>>()),
        Command::QueryCpusFast => value((0..).zip(inventory.vcpus.iter()).map(cpu_fast).collect::<Vec<_>>()),
        Command::QueryIothreads => value(inventory.iothreads.iter().map(iothread).collect::<Vec<_>>()),
        Command::QueryBlock => value((0..).zip(&inventory.disks).map(slot).collect::<Vec<_>>()),
        Command::QueryBlockstats => {
            let drives = inventory.disks.iter().filter_map(|disk| disk.drive.as_ref());
            value(drives.map(|drive| blockstats(drive, now_ns)).collect::<Vec<_>>())
        }
        Command::QueryNetstats => value(inventory.nics.iter().filter_map(net::stats).collect::<Vec<_>>()),
        Command::QueryVsock => value(inventory.vsocks.iter().map(vsock::info).collect::<Vec<_>>()),
        Command::QueryMachines => value([MachineInfo {
            name: "microvm".into(),
            is_default: Some(true),
            cpu_max: MAX_CPUS.into(),
            hotpluggable_cpus: false,
            numa_mem_supported: false,
            deprecated: false,
        }]),
        // Control's own, which never come here.
        Command::Stop
        | Command::Cont
        | Command::SystemPowerdown
        | Command::SystemReset
        | Command::Quit
        | Command::BlockSetIoThrottle(_)
        | Command::NetdevSetThrottle(_)
        | Command::SetLink(_)
        | Command::BlockdevAdd(_)
        | Command::DeviceAdd(_)
        | Command::BlockResize(_)
        | Command::DeviceDel(_)
        | Command::BlockdevDel(_)
        | Command::NetdevAdd(_)
        | Command::NetdevDel(_)
        | Command::Getfd(_)
        | Command::Closefd(_)
        | Command::Balloon(_)
        | Command::QueryBalloon
        | Command::QueryBalloonDetail
        | Command::QueryBalloonStats
        | Command::BalloonStatsInterval(_)
        | Command::QueryChardev
        | Command::ChardevAdd(_)
        | Command::ChardevRemove(_)
        | Command::ChardevResize(_) => value(Empty {}),
    }
}

pub(super) fn value(reply: impl Serialize) -> Result<Value> {
    serde_json::to_value(reply).context(|| "QMP: write the answer")
}

/// The path under which QEMU's clients know a device.
pub(super) fn qom_path(drive: &str) -> String {
    format!("/machine/peripheral/{drive}")
}

/// Where a vCPU stands: cores of one socket, as its CPUID says.
fn props(index: u32) -> CpuInstanceProperties {
    CpuInstanceProperties { socket_id: 0, core_id: index, thread_id: 0 }
}

fn cpu((index, vcpu): (u32, &VcpuHandle)) -> CpuInfo {
    CpuInfo {
        cpu: index,
        current: index == 0,
        halted: false,
        qom_path: format!("/machine/unattached/device[{index}]"),
        thread_id: vcpu.tid().cast_unsigned(),
        props: props(index),
        arch: CpuInfoArch::X86,
    }
}

fn cpu_fast((index, vcpu): (u32, &VcpuHandle)) -> CpuInfoFast {
    CpuInfoFast {
        cpu_index: index,
        qom_path: format!("/machine/unattached/device[{index}]"),
        thread_id: vcpu.tid().cast_unsigned(),
        props: props(index),
        target: SysEmuTarget::X86_64,
    }
}

fn iothread((id, remote): &(String, Remote)) -> IOThreadInfo {
    IOThreadInfo {
        id: id.clone(),
        thread_id: remote.thread_id().cast_unsigned(),
        poll_max_ns: 0,
        poll_grow: 0,
        poll_shrink: 0,
        counters: counters(&remote.counters()),
    }
}

fn counters(c: &Counters) -> LoopCounters {
    LoopCounters {
        turns: c.turns,
        wakes: LoopWakes { signal: c.wakes_signal, timer: c.wakes_timer, stream: c.wakes_stream, post: c.wakes_post },
        events: c.events,
        stale: c.stale,
        stuck: c.stuck,
        failed: c.failed,
        longest_handler_ns: c.longest_handler_ns,
        asleep_ns: c.asleep_ns,
    }
}

fn slot((number, slot): (usize, &DiskSlot)) -> BlockInfo {
    let addr = format!("{number:#x}");
    match &slot.drive {
        Some(drive) => block(drive, addr),
        None => BlockInfo {
            device: String::new(),
            qdev: None,
            kind: "unknown".into(),
            removable: true,
            locked: false,
            io_status: None,
            addr,
            inserted: None,
        },
    }
}

fn block(drive: &Drive, addr: String) -> BlockInfo {
    let spec = &drive.spec;
    let file = spec.file.display().to_string();
    let failed = drive.counters.kinds.iter().any(|kind| kind.failed.load(Relaxed) > 0);
    let limit = |quantity| drive.limits.of(quantity);
    let some = |value: u64| Some(value).filter(|&value| value > 0);
    let max = |quantity| some(limit(quantity).max);
    let max_length = |quantity| max(quantity).map(|_| limit(quantity).max_length.unwrap_or(1));
    BlockInfo {
        device: drive.device.clone(),
        qdev: Some(drive.device.clone()),
        kind: "unknown".into(),
        removable: false,
        locked: false,
        addr,
        io_status: Some(if failed { BlockDeviceIoStatus::Failed } else { BlockDeviceIoStatus::Ok }),
        inserted: Some(BlockDeviceInfo {
            file: file.clone(),
            node_name: Some(spec.id.clone()),
            ro: spec.access == Access::ReadOnly,
            drv: "raw".into(),
            backing_file_depth: 0,
            encrypted: false,
            detect_zeroes: BlockdevDetectZeroesOptions::Off,
            bps: limit(Bps).rate,
            bps_rd: limit(BpsRead).rate,
            bps_wr: limit(BpsWrite).rate,
            iops: limit(Iops).rate,
            iops_rd: limit(IopsRead).rate,
            iops_wr: limit(IopsWrite).rate,
            bps_max: max(Bps),
            bps_rd_max: max(BpsRead),
            bps_wr_max: max(BpsWrite),
            iops_max: max(Iops),
            iops_rd_max: max(IopsRead),
            iops_wr_max: max(IopsWrite),
            bps_max_length: max_length(Bps),
            bps_rd_max_length: max_length(BpsRead),
            bps_wr_max_length: max_length(BpsWrite),
            iops_max_length: max_length(Iops),
            iops_rd_max_length: max_length(IopsRead),
            iops_wr_max_length: max_length(IopsWrite),
            iops_size: some(drive.limits.iops_size),
            group: spec.group.clone(),
            image: ImageInfo {
                filename: file,
                format: "raw".into(),
                virtual_size: drive.size_bytes,
                dirty_flag: Some(false),
            },
            cache: BlockdevCacheInfo { writeback: true, direct: spec.cache == Cache::Direct, no_flush: false },
            write_threshold: 0,
        }),
    }
}

fn blockstats(drive: &Drive, now_ns: u64) -> BlockStats {
    let [read, write, flush, unmap] =
        [Kind::Read, Kind::Write, Kind::Flush, Kind::Unmap].map(|kind| &drive.counters.kinds[kind as usize]);
    let get = |counter: &AtomicU64| counter.load(Relaxed);
    let held = &drive.counters.held;
    let [iops_last_second, bps_last_second] = drive.counters.recent.last_second(now_ns);
    BlockStats {
        device: Some(drive.device.clone()),
        qdev: Some(drive.device.clone()),
        node_name: Some(drive.spec.id.clone()),
        stats: BlockDeviceStats {
            rd_bytes: get(&read.bytes),
            wr_bytes: get(&write.bytes),
            unmap_bytes: get(&unmap.bytes),
            rd_operations: get(&read.operations),
            wr_operations: get(&write.operations),
            flush_operations: get(&flush.operations),
            unmap_operations: get(&unmap.operations),
            rd_total_time_ns: get(&read.time_ns),
            wr_total_time_ns: get(&write.time_ns),
            flush_total_time_ns: get(&flush.time_ns),
            unmap_total_time_ns: get(&unmap.time_ns),
            wr_highest_offset: 0,
            rd_merged: 0,
            wr_merged: 0,
            unmap_merged: 0,
            failed_rd_operations: get(&read.failed),
            failed_wr_operations: get(&write.failed),
            failed_flush_operations: get(&flush.failed),
            failed_unmap_operations: get(&unmap.failed),
            invalid_rd_operations: get(&read.invalid),
            invalid_wr_operations: get(&write.invalid),
            invalid_flush_operations: get(&flush.invalid),
            invalid_unmap_operations: get(&unmap.invalid),
            account_invalid: false,
            account_failed: false,
            timed_stats: Vec::new(),
            in_flight_operations: get(&drive.counters.in_flight),
            throttled_operations: get(&held.operations),
            throttle_total_time_ns: get(&held.total_ns),
            throttle_longest_time_ns: get(&held.longest_ns),
            iops_last_second,
            bps_last_second,
        },
    }
}
