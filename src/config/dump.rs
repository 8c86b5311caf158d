//! A [`VmSpec`] as the text of a file for `-config`: what `-dump-config` prints.
//!
//! What is as it is when nothing is said is left out, except the number of vCPUs and the memory. The keys are those that
//! `file` reads, and what is read back is the same machine. Main thread; nothing is started after it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::chardev::{ChardevSpec, ConsoleSpec};
use super::net::{NicSpec, QUEUE_SIZE};
use super::rng::RngSpec;
use super::spec::{Access, Aio, AutoSpec, Cache, DriveSpec, KernelFormat, LogSpec, SerialSpec, VmSpec};
use super::vsock::Carrier;
use crate::qos::{Limits, Quantity, Spelling};

/// The members of one object, in the order added.
#[derive(Default)]
struct Members(Map<String, Value>);

impl Members {
    fn add(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Adds what is there.
    fn add_some(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.add(key, value);
        }
    }

    /// Adds what is not empty.
    fn add_list(&mut self, key: &str, list: Vec<Value>) {
        if !list.is_empty() {
            self.add(key, list);
        }
    }

    fn add_object(&mut self, key: &str, object: Members) {
        if !object.0.is_empty() {
            self.add(key, object.0);
        }
    }

    fn add_flag(&mut self, key: &str, flag: bool) {
        if flag {
            self.add(key, true);
        }
    }
}

/// The file that asks for this machine, which is one that `check` lets through.
pub fn dump(spec: &VmSpec) -> String {
    let mut file = Members::default();
    let mut boot = Members::default();
    boot.add("kernel_image_path", path(&spec.kernel));
    boot.add_some("boot_args", Some(spec.append.as_str()).filter(|words| !words.is_empty()));
    boot.add_some("initrd_fs_path", spec.initrd.as_deref().map(path));
    file.add_object("boot-source", boot);
    file.add_object("machine-config", machine(spec));
    file.add_list("iothread", spec.iothreads.iter().map(|iothread| json!({ "id": iothread.id })).collect());
    file.add_list("drive", spec.drives.iter().map(drive).collect());
    file.add_list("net", spec.nics.iter().map(nic).collect());
    add_consoles(&mut file, spec);
    if let Some(asked) = spec.vsocks.first() {
        let mut vsock = Members::default();
        vsock.add("vsock_id", asked.id.as_str());
        vsock.add("guest_cid", asked.cid);
        match &asked.carrier {
            Carrier::Sockets(socket) => vsock.add("uds_path", path(socket)),
            Carrier::Kernel(fd) => vsock.add_some("vhost_fd", *fd),
        }
        file.add_object("vsock", vsock);
    }
    if let Some(asked) = spec.balloons.first() {
        let mut balloon = Members::default();
        balloon.add("deflate_on_oom", asked.deflate_on_oom);
        balloon.add("free_page_reporting", asked.free_page_reporting);
        if let Some(AutoSpec { floor_bytes, pressure }) = &asked.auto {
            balloon.add("auto", true);
            balloon.add("floor", format!("{}M", floor_bytes >> 20));
            balloon.add("pressure", path(pressure));
        }
        file.add_object("balloon", balloon);
    }
    let sources = spec.rng_sources.iter().map(|source| json!({ "id": source.id, "filename": path(&source.file) }));
    file.add_list("rng_source", sources.collect());
    file.add_some("rng", spec.rngs.first().map(rng));
    file.add_some("serial", (spec.serial == SerialSpec::Stdio).then(|| json!({ "stdio": true })));
    file.add_some("name", Some(spec.name.as_str()).filter(|name| !name.is_empty()));
    file.add_list("qmp", spec.qmp.iter().map(|socket| path(socket).into()).collect());
    if let LogSpec::File(log) = &spec.log {
        file.add("log", path(log));
    }
    file.add_some("pidfile", spec.pidfile.as_deref().map(path));
    file.add_flag("daemonize", spec.daemonize);
    file.add_flag("freeze", spec.freeze);
    file.add_flag("no_reboot", spec.no_reboot);
    format!("{:#}\n", Value::Object(file.0))
}

/// What was read as text is text.
fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn machine(spec: &VmSpec) -> Members {
    let mut machine = Members::default();
    machine.add("type", "MicroVm");
    machine.add("vcpu_count", spec.cpus);
    machine.add("mem_size", spec.memory_bytes);
    machine.add_some("mem_path", spec.mem_path.as_deref().map(path));
    machine.add_flag("mem_share", spec.mem_share);
    machine.add_some("dump_guest_core", (!spec.dump_guest_core).then_some(false));
    machine.add_some("disk_slots", spec.disk_slots);
    machine.add_some("nic_slots", spec.nic_slots);
    machine.add_some(
        "kernel_format",
        match spec.kernel_format {
            KernelFormat::Auto => None,
            KernelFormat::Bzimage => Some("bzimage"),
            KernelFormat::Elf => Some("elf"),
            KernelFormat::Flat => Some("flat"),
        },
    );
    machine.add_some("auto_kernel_cmdline", spec.kernel_words);
    machine.add_some("pmu", (!spec.pmu).then_some(false));
    machine
}

fn drive(asked: &DriveSpec) -> Value {
    let mut drive = Members::default();
    drive.add("drive_id", asked.id.as_str());
    drive.add("path_on_host", path(&asked.file));
    // The original wants both.
    drive.add("read_only", asked.access == Access::ReadOnly);
    drive.add("direct", asked.cache == Cache::Direct);
    drive.add_some("serial_num", asked.serial.as_deref());
    drive.add_some("logical_block_size", asked.logical_block);
    drive.add_some("physical_block_size", asked.physical_block);
    drive.add_some("iothread", asked.iothread.as_deref());
    drive.add_some(
        "aio",
        match asked.aio {
            Aio::Auto => None,
            Aio::IoUring => Some("io_uring"),
            Aio::Threads => Some("threads"),
        },
    );
    let mut throttling = limits(&asked.limits, Spelling::File);
    throttling.add_some("group", asked.group.as_deref());
    drive.add_object("throttling", throttling);
    drive.0.into()
}

fn nic(asked: &NicSpec) -> Value {
    let mut nic = Members::default();
    nic.add("iface_id", asked.id.as_str());
    nic.add_some("host_dev_name", asked.tap.name.as_deref());
    nic.add_some("mac", asked.mac.map(|mac| mac.to_string()));
    nic.add_some("iothread", asked.iothread.as_deref());
    nic.add_list("tap_fds", asked.tap.fds.iter().map(|&fd| fd.into()).collect());
    nic.add_some("queues", Some(asked.tap.queue_pairs).filter(|&pairs| pairs > 1 && asked.tap.fds.is_empty()));
    nic.add_some("queue_size", Some(asked.queue_size).filter(|&size| size != QUEUE_SIZE));
    nic.add_object("throttling", limits(&asked.tap.limits, Spelling::NicFile));
    nic.0.into()
}

fn limits(limits: &Limits, spelling: Spelling) -> Members {
    let mut members = Members::default();
    let mut add = |key: &str, value: Option<u64>| {
        members.add_some(key.trim_start_matches("throttling."), value.filter(|&value| value > 0));
    };
    for quantity in Quantity::ALL {
        let limit = limits.of(quantity);
        add(&spelling.rate(quantity), Some(limit.rate));
        add(&spelling.max(quantity), Some(limit.max));
        add(&spelling.max_length(quantity), limit.max_length);
    }
    add(spelling.iops_size(), Some(limits.iops_size));
    members
}

fn rng(asked: &RngSpec) -> Value {
    let mut rng = Members::default();
    rng.add("random_file", path(&asked.source));
    rng.add_some("bytes_per_sec", asked.bytes_per_second);
    rng.add_some("rng_id", Some(asked.id.as_str()).filter(|&id| id != RngSpec::default().id));
    rng.0.into()
}

/// Consoles with the sockets that are their own, as the original writes them; or apart, where they go otherwise together.
fn add_consoles(file: &mut Members, spec: &VmSpec) {
    let pairs = || spec.consoles.iter().zip(&spec.chardevs);
    if pairs().all(|(console, chardev)| console.id == chardev.id && console.chardev == chardev.id) {
        let both = |(console, chardev): (&ConsoleSpec, &ChardevSpec)| json!({ "console_id": console.id, "socket_path": path(&chardev.path) });
        file.add_list("console", pairs().map(both).collect());
        return;
    }
    let chardevs = spec.chardevs.iter().map(|chardev| json!({ "id": chardev.id, "socket_path": path(&chardev.path) }));
    file.add_list("chardev", chardevs.collect());
    let consoles = spec.consoles.iter();
    let consoles = consoles.map(|console| json!({ "console_id": console.id, "chardev": console.chardev }));
    file.add_list("console", consoles.collect());
}

#[cfg(test)]
#[path = "dump_test.rs"]
mod tests;
