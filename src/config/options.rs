//! What the value of each option means: its text in, its part of a [`VmSpec`] out.
//!
//! Every function takes the value as typed and refuses what it does not understand; none looks at the host or at
//! another option (that is `check`). Main thread, before anything is started.

use std::path::PathBuf;

use super::keyvalue::{KeyValues, decimal};
use super::spec::{
    Access, Aio, AutoSpec, BalloonSpec, Cache, DriveSpec, IothreadSpec, KernelFormat, LOGICAL_BLOCKS, MAX_CPUS,
    MAX_MEMORY_BYTES, MAX_NAME_CHARS, MAX_PATH_BYTES, MAX_PHYSICAL_BLOCK, MAX_SERIAL_BYTES, MAX_SOCKET_PATH_BYTES,
    MAX_VIRTIO_DEVICES, MIN_BALLOON_BYTES, MIN_MEMORY_BYTES, PRESSURE, SerialSpec, VmSpec,
};
use crate::error::{Error, Result};
use crate::qos::{Limit, Limits, MAX_BPS, MAX_BURST_SECONDS, MAX_IOPS, Quantity, Spelling};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// `-name TEXT`, or `-name [guest=]TEXT[,debug-threads=on|off]` as for QEMU.
pub fn name(text: &str) -> Result<String> {
    let keys = ["guest", "debug-threads", "process"];
    let is_key = |item: &str| item.split_once('=').is_some_and(|(key, _)| keys.contains(&key));
    if !text.split(',').enumerate().all(|(place, item)| place == 0 && !text.starts_with('=') || is_key(item))
        || !text.split(',').any(is_key)
    {
        return plain_name(text);
    }
    let pairs = KeyValues::read("-name", text, &keys, |place, item| (place == 0).then_some(("guest", item)))?;
    // Each thread has its name anyway.
    pairs.get_bool("debug-threads")?;
    if pairs.get("process", "", Some)?.is_some() {
        return Err(pairs.mistake("the process keeps its name; accepted: without process="));
    }
    plain_name(pairs.require("guest", "NAME", Some)?)
}

fn plain_name(text: &str) -> Result<String> {
    short_text(text).ok_or_else(|| {
        let length = text.chars().count();
        Error::usage(format!("-name: the name has {length} characters; accepted: 1 to {MAX_NAME_CHARS}"))
    })
}

/// `-machine [type=]microvm[,accel=kvm][,usb=off][,dump-guest-core=on|off][,mem-share=on|off][,disk-slots=N][,nic-slots=N]
/// [,kernel-format=auto|bzimage|elf|flat][,reboot=on|off][,auto-kernel-cmdline=on|off]`, written into `spec`.
pub fn machine(text: &str, spec: &mut VmSpec) -> Result<()> {
    let keys = [
        "type",
        "accel",
        "usb",
        "dump-guest-core",
        "mem-share",
        "disk-slots",
        "nic-slots",
        "kernel-format",
        "reboot",
        "auto-kernel-cmdline",
    ];
    let pairs = KeyValues::read("-machine", text, &keys, |place, item| (place == 0).then_some(("type", item)))?;
    machine_of(&pairs, spec)
}

/// What these pairs say of a machine, written into `spec`; what they do not say stays as it is there.
pub(super) fn machine_of(pairs: &KeyValues<'_>, spec: &mut VmSpec) -> Result<()> {
    pairs.get("type", "microvm", |name| name.eq_ignore_ascii_case("microvm").then_some(()))?;
    // Both say what is so anyway; later versions of the original write them.
    pairs.get("accel", "kvm", |accel| matches!(accel, "kvm" | "kvm:tcg").then_some(()))?;
    pairs.get("usb", "off", |usb| (usb == "off").then_some(()))?;
    if let Some(dumped) = pairs.get_bool("dump-guest-core")? {
        spec.dump_guest_core = dumped;
    }
    if let Some(shared) = pairs.get_bool("mem-share")? {
        spec.mem_share = shared;
    }
    if let Some(reboot) = pairs.get_bool("reboot")? {
        spec.no_reboot = !reboot;
    }
    spec.kernel_words = pairs.get_bool("auto-kernel-cmdline")?.or(spec.kernel_words);
    let slots = |key| {
        pairs.get(key, &format!("a number from 0 to {MAX_VIRTIO_DEVICES} (rule D3.4)"), |number| {
            usize::try_from(decimal(number)?).ok().filter(|number| *number <= MAX_VIRTIO_DEVICES)
        })
    };
    spec.disk_slots = slots("disk-slots")?.or(spec.disk_slots);
    spec.nic_slots = slots("nic-slots")?.or(spec.nic_slots);
    let format = pairs.get("kernel-format", "auto, bzimage, elf, flat", |format| match format {
        "auto" => Some(KernelFormat::Auto),
        "bzimage" => Some(KernelFormat::Bzimage),
        "elf" => Some(KernelFormat::Elf),
        "flat" => Some(KernelFormat::Flat),
        _ => None,
    })?;
    spec.kernel_format = format.unwrap_or(spec.kernel_format);
    // Only a file for -config has this key here; on the command line it belongs to -cpu.
    spec.pmu = pairs.get_bool("pmu")?.unwrap_or(spec.pmu);
    Ok(())
}

/// What a topology consists of, from the outside.
const TOPOLOGY: [&str; 5] = ["sockets", "dies", "clusters", "cores", "threads"];

/// `-smp [cpus=]N[,maxcpus=N][,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]`. A topology is only counted: the guest
/// has one socket with a core for each vCPU.
pub fn cpus(text: &str) -> Result<u8> {
    let keys: Vec<&str> = ["cpus", "maxcpus"].into_iter().chain(TOPOLOGY).collect();
    let pairs = KeyValues::read("-smp", text, &keys, |place, item| (place == 0).then_some(("cpus", item)))?;
    let (cpus, most) = (count_of(&pairs, "cpus")?, count_of(&pairs, "maxcpus")?);
    let parts = TOPOLOGY.iter().map(|key| count_of(&pairs, key)).collect::<Result<Vec<_>>>()?;
    let product = parts.iter().flatten().map(|part| u64::from(*part)).product::<u64>();
    let cpus = match cpus.or(most) {
        Some(cpus) => cpus,
        None if parts.iter().all(Option::is_none) => return Err(pairs.missing("cpus", &pairs.pair("cpus", "N"))),
        None => u8::try_from(product).ok().filter(|product| *product <= MAX_CPUS).ok_or_else(|| {
            pairs.mistake(format!("the topology has {product} CPUs; use one with at most {MAX_CPUS}"))
        })?,
    };
    if most.is_some_and(|most| most != cpus) {
        return Err(pairs.mistake(format!("CPUs cannot be hot-plugged; accepted: maxcpus={cpus}")));
    }
    // With sockets, cores and threads the topology is complete; a part that is left out is as large as it must be.
    let is_whole = [0, 3, 4].iter().all(|&part| parts[part].is_some());
    if is_whole && product != u64::from(cpus) {
        let sentence = format!("the topology has {product} CPUs, and there are {cpus}; leave the topology out");
        return Err(pairs.mistake(sentence));
    }
    if !u64::from(cpus).is_multiple_of(product) {
        let sentence =
            format!("{cpus} CPUs are not a multiple of the {product} in the topology; leave the topology out");
        return Err(pairs.mistake(sentence));
    }
    Ok(cpus)
}

fn count_of(pairs: &KeyValues<'_>, key: &str) -> Result<Option<u8>> {
    pairs.get(key, &format!("a number from 1 to {MAX_CPUS}"), |count| {
        let count = u8::try_from(decimal(count)?).ok()?;
        (1..=MAX_CPUS).contains(&count).then_some(count)
    })
}

/// The vCPUs.
pub(super) fn cpus_of(pairs: &KeyValues<'_>) -> Result<Option<u8>> {
    count_of(pairs, "cpus")
}

/// `-m [size=]N[m|M|MiB|g|G|GiB]`, in bytes.
pub fn memory_bytes(text: &str) -> Result<u64> {
    let pairs = KeyValues::read("-m", text, &["size"], |place, item| (place == 0).then_some(("size", item)))?;
    memory_of(&pairs)?.ok_or_else(|| pairs.missing("size", &pairs.pair("size", "N")))
}

/// The memory, in bytes.
pub(super) fn memory_of(pairs: &KeyValues<'_>) -> Result<Option<u64>> {
    let accepted = "16M to 512G in whole MiB, written 512 or 512M (MiB), 2G (GiB), \
                    or in bytes from 1048576 up without a unit";
    pairs.get("size", accepted, |size| {
        let (number, unit) = number_and_unit(size)?;
        let unit_bytes = match unit {
            // The original's early versions count bytes, the later ones MiB: no sensible size is both.
            "" if number >= MIB => 1,
            "" | "m" | "M" | "MiB" => MIB,
            "g" | "G" | "GiB" => GIB,
            _ => return None,
        };
        let bytes = number.checked_mul(unit_bytes)?;
        ((MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) && bytes % MIB == 0).then_some(bytes)
    })
}

/// `-accel kvm`.
pub fn accel(text: &str) -> Result<()> {
    match text {
        "kvm" => Ok(()),
        _ => Err(Error::usage(format!("-accel {text}: only the processor runs guests here; accepted: kvm"))),
    }
}

/// `-cpu host[,pmu=on|off]`: whether the guest has performance counters.
pub fn cpu(text: &str) -> Result<Option<bool>> {
    let pairs =
        KeyValues::read("-cpu", text, &["model", "pmu"], |place, item| (place == 0).then_some(("model", item)))?;
    pairs.require("model", "host", |model| (model == "host").then_some(()))?;
    pairs.get_bool("pmu")
}

/// `-mon chardev=NAME[,id=NAME][,mode=control]`: QMP on the socket of that `-chardev`, which is no console's then.
pub fn monitor(text: &str, spec: &mut VmSpec) -> Result<()> {
    let pairs = KeyValues::read("-mon", text, &["chardev", "id", "mode"], |_, _| None)?;
    let name = pairs.require("chardev", "the id of a -chardev socket", short_text)?;
    pairs.get("id", "NAME (1 to 255 characters)", short_text)?;
    pairs.get("mode", "control (QMP)", |mode| (mode == "control").then_some(()))?;
    match spec.chardevs.iter().position(|chardev| chardev.id == name) {
        Some(place) => {
            spec.qmp.push(spec.chardevs.remove(place).path);
            Ok(())
        }
        None => Err(pairs.mistake(format!(
            "there is no chardev {name:?}; accepted: with -chardev socket,id={name},path=PATH,server,nowait"
        ))),
    }
}

/// `-balloon [deflate-on-oom=B][,free-page-reporting=B][,auto=B,floor=SIZE[,pressure=FILE]]`, which may be empty (rule
/// D3.6).
pub fn balloon(text: &str) -> Result<BalloonSpec> {
    if text.is_empty() {
        return Ok(BalloonSpec::default());
    }
    balloon_of(&KeyValues::read("-balloon", text, &BALLOON_KEYS, |_, _| None)?)
}

const BALLOON_KEYS: [&str; 5] = ["deflate-on-oom", "free-page-reporting", "auto", "floor", "pressure"];

/// `-device virtio-balloon-device[,id=NAME]` and the same keys.
pub fn balloon_device(text: &str) -> Result<BalloonSpec> {
    let keys: Vec<&str> = ["driver", "id"].into_iter().chain(BALLOON_KEYS).collect();
    let pairs = KeyValues::read("-device", text, &keys, |place, item| (place == 0).then_some(("driver", item)))?;
    // There is one, which needs no name.
    pairs.get("id", "NAME (1 to 255 characters)", short_text)?;
    balloon_of(&pairs)
}

/// The balloon of these pairs.
pub(super) fn balloon_of(pairs: &KeyValues<'_>) -> Result<BalloonSpec> {
    let mut balloon = BalloonSpec::default();
    balloon.deflate_on_oom = pairs.get_bool("deflate-on-oom")?.unwrap_or(balloon.deflate_on_oom);
    balloon.free_page_reporting = pairs.get_bool("free-page-reporting")?.unwrap_or(balloon.free_page_reporting);
    let auto = pairs.get_bool("auto")?.unwrap_or(false);
    let floor = format!("the memory that the guest keeps, from {}M up, written 512M or 2G", MIN_BALLOON_BYTES >> 20);
    let floor_bytes = pairs.get("floor", &floor, |size| {
        let (number, unit) = number_and_unit(size)?;
        let unit_bytes = match unit {
            "M" => MIB,
            "G" => GIB,
            _ => return None,
        };
        number.checked_mul(unit_bytes).filter(|bytes| *bytes >= MIN_BALLOON_BYTES)
    })?;
    let pressure = pairs.get("pressure", "FILE (at most 4095 bytes)", file_path)?;
    balloon.auto = match (auto, floor_bytes) {
        (true, Some(floor_bytes)) => {
            Some(AutoSpec { floor_bytes, pressure: pressure.unwrap_or_else(|| PRESSURE.into()) })
        }
        (true, None) => {
            let floor = pairs.pair("floor", &floor);
            return Err(pairs.mistake(format!("\"auto\" needs to know how far it may go; accepted: {floor}")));
        }
        (false, _) if floor_bytes.is_some() || pressure.is_some() => {
            let auto = pairs.pair("auto", "on");
            let sentence = format!("\"floor\" and \"pressure\" say how \"auto\" works; accepted: with {auto}");
            return Err(pairs.mistake(sentence));
        }
        (false, _) => None,
    };
    Ok(balloon)
}

/// `-drive id=,file=,...`.
pub fn drive(text: &str) -> Result<DriveSpec> {
    let throttling = throttling_keys();
    let keys: Vec<&str> = DRIVE_KEYS.into_iter().chain(throttling.iter().map(String::as_str)).collect();
    drive_of(&KeyValues::read("-drive", text, &keys, |_, _| None)?, THROTTLING)
}

/// The drive of these pairs, whose limits are spelled in that way.
pub(super) fn drive_of(pairs: &KeyValues<'_>, spelling: Spelling) -> Result<DriveSpec> {
    let mut drive = DriveSpec::new(
        pairs.require("id", "NAME (1 to 255 characters)", short_text)?,
        pairs.require("file", "FILE (at most 4095 bytes)", file_path)?,
    );
    if pairs.get_bool("readonly")? == Some(true) {
        drive.access = Access::ReadOnly;
    }
    if pairs.get_bool("direct")? == Some(false) {
        drive.cache = Cache::Buffered;
    }
    drive.serial = pairs.get("serial", "text of at most 20 bytes", serial_number)?;
    (drive.logical_block, drive.physical_block) = block_sizes(pairs)?;
    drive.iothread = pairs.get("iothread", "the id of an -iothread", short_text)?;
    let aio = pairs.get("aio", "io_uring, threads, native", |aio| match aio {
        "io_uring" => Some(Aio::IoUring),
        "threads" => Some(Aio::Threads),
        // The original's word for asynchronous I/O in the kernel, whatever its interface.
        "native" => Some(Aio::Auto),
        _ => None,
    })?;
    drive.aio = aio.unwrap_or(drive.aio);
    // Both say what is so anyway; later versions of the original write them.
    pairs.get("format", "raw", |format| (format == "raw").then_some(()))?;
    pairs.get("if", "none", |interface| (interface == "none").then_some(()))?;
    drive.limits = limits(pairs, spelling, requests(pairs, "iops")?)?;
    drive.group = pairs.get("throttling.group", "NAME (1 to 255 characters)", short_text)?;
    Ok(drive)
}

/// `logical_block_size=` and `physical_block_size=`, in bytes.
pub(super) fn block_sizes(pairs: &KeyValues<'_>) -> Result<(Option<u32>, Option<u32>)> {
    let parse = |text| u32::try_from(decimal(text)?).ok();
    let logical = pairs
        .get("logical_block_size", "512, 4096", |text| parse(text).filter(|bytes| LOGICAL_BLOCKS.contains(bytes)))?;
    let accepted = format!("a power of two from 512 to {MAX_PHYSICAL_BLOCK}");
    let physical = pairs.get("physical_block_size", &accepted, |text| {
        parse(text).filter(|bytes| bytes.is_power_of_two() && (512..=MAX_PHYSICAL_BLOCK).contains(bytes))
    })?;
    Ok((logical, physical))
}

/// The keys of a drive but for the `throttling.` ones.
const DRIVE_KEYS: [&str; 12] = [
    "id",
    "file",
    "readonly",
    "direct",
    "serial",
    "logical_block_size",
    "physical_block_size",
    "iothread",
    "aio",
    "format",
    "if",
    "iops",
];

const THROTTLING: Spelling = Spelling::CommandLine;

fn throttling_keys() -> Vec<String> {
    let others = [THROTTLING.iops_size().to_owned(), "throttling.group".to_owned()];
    limit_keys(THROTTLING).into_iter().chain(others).collect()
}

/// The keys of the limits that every device has that can be limited.
pub(super) fn limit_keys(spelling: Spelling) -> Vec<String> {
    let rates = |of| [spelling.rate(of), spelling.max(of), spelling.max_length(of)];
    Quantity::ALL.into_iter().flat_map(rates).collect()
}

/// The limits of a device: `throttling.*`, and the `iops=N` of a drive (rule D2.6) if it was given.
pub(super) fn limits(pairs: &KeyValues<'_>, spelling: Spelling, short: Option<u64>) -> Result<Limits> {
    let mut limits = Limits::default();
    for (quantity, limit) in Quantity::ALL.into_iter().zip(&mut limits.each) {
        let rate = spelling.rate(quantity);
        let amount = if quantity.is_bytes() { bytes } else { requests };
        let short = short.filter(|_| quantity == Quantity::Iops);
        let long = amount(pairs, &rate)?;
        if short.is_some() && long.is_some() {
            return Err(pairs.mistake(format!("\"iops\" and {rate:?} are one limit; accepted: one of the two")));
        }
        let max = amount(pairs, &spelling.max(quantity))?.unwrap_or(0);
        let accepted = format!("a number of seconds from 1 to {MAX_BURST_SECONDS}");
        let max_length = pairs.get(&spelling.max_length(quantity), &accepted, |seconds| {
            decimal(seconds).filter(|seconds| (1..=MAX_BURST_SECONDS).contains(seconds))
        })?;
        // A burst lasts a second if nothing is said; saying so makes no other limits of them.
        let max_length = max_length.or((max > 0).then_some(1));
        *limit = Limit { rate: short.or(long).unwrap_or(0), max, max_length };
    }
    limits.iops_size = bytes(pairs, spelling.iops_size())?.unwrap_or(0);
    limits.check(spelling).map_err(|refusal| pairs.mistake(refusal))?;
    Ok(limits)
}

/// A number of requests (rule D2.3).
fn requests(pairs: &KeyValues<'_>, key: &str) -> Result<Option<u64>> {
    let accepted = format!("a number from 0 to {MAX_IOPS}");
    pairs.get(key, &accepted, |number| decimal(number).filter(|number| *number <= MAX_IOPS))
}

/// A number of bytes: `N`, or `N` with K, M or G.
fn bytes(pairs: &KeyValues<'_>, key: &str) -> Result<Option<u64>> {
    let accepted = format!("a number of bytes from 0 to {MAX_BPS}, written 65536, 64K, 10M or 1G (powers of 1024)");
    pairs.get(key, &accepted, |size| {
        let (number, unit) = number_and_unit(size)?;
        let unit_bytes = match unit {
            "" => 1,
            "K" => KIB,
            "M" => MIB,
            "G" => GIB,
            _ => return None,
        };
        number.checked_mul(unit_bytes).filter(|bytes| *bytes <= MAX_BPS)
    })
}

/// `-iothread id=NAME` (rule D1.7).
pub fn iothread(text: &str) -> Result<IothreadSpec> {
    iothread_of(&KeyValues::read("-iothread", text, &["id"], |_, _| None)?)
}

/// `-object iothread,id=NAME`: the same.
pub fn iothread_object(text: &str) -> Result<IothreadSpec> {
    iothread_of(&KeyValues::read("-object", text, &["qom-type", "id"], |place, item| {
        (place == 0).then_some(("qom-type", item))
    })?)
}

/// The iothread of these pairs.
pub(super) fn iothread_of(pairs: &KeyValues<'_>) -> Result<IothreadSpec> {
    Ok(IothreadSpec { id: pairs.require("id", "NAME (1 to 255 characters)", short_text)? })
}

/// `-serial stdio`.
pub fn serial(text: &str) -> Result<SerialSpec> {
    match text {
        "stdio" => Ok(SerialSpec::Stdio),
        _ => Err(Error::usage(format!("-serial {text}: {text:?} is not accepted; accepted: stdio"))),
    }
}

/// `-qmp unix:PATH,server[,nowait]`.
///
/// The monitor always listens and never waits for a client; `server` says the first and may not be left out, because
/// without it the same words ask others to connect to PATH.
pub fn qmp(text: &str) -> Result<PathBuf> {
    let (path, listens) = socket("-qmp", text)?;
    if !listens {
        return Err(Error::usage(format!(
            "-qmp {text}: the word \"server\" is missing, and connecting to a socket is not supported; \
             accepted: unix:PATH,server,nowait"
        )));
    }
    Ok(path)
}

/// `-api-channel unix:PATH[,server][,nowait]`.
pub fn api_channel(text: &str) -> Result<PathBuf> {
    socket("-api-channel", text).map(|(path, _)| path)
}

/// The path of a file for `option` that takes nothing else.
pub fn file(option: &str, text: &str) -> Result<PathBuf> {
    file_path(text).ok_or_else(|| {
        let length = text.len();
        Error::usage(format!("{option}: the path has {length} bytes; accepted: 1 to {MAX_PATH_BYTES}"))
    })
}

/// The path of a Unix socket, and whether the word `server` stands behind it.
fn socket(option: &str, text: &str) -> Result<(PathBuf, bool)> {
    let (address, words) = text.split_once(',').map_or((text, None), |(address, words)| (address, Some(words)));
    let Some(path) = address.strip_prefix("unix:") else {
        return Err(Error::usage(format!(
            "{option} {text}: {address:?} is not the address of a Unix socket; accepted: unix:PATH,server,nowait"
        )));
    };
    let length = path.len();
    let path = socket_path(path).ok_or_else(|| {
        Error::usage(format!(
            "{option} {text}: the socket's path has {length} bytes; accepted: 1 to {MAX_SOCKET_PATH_BYTES}"
        ))
    })?;
    let Some(words) = words else { return Ok((path, false)) };
    let pairs = KeyValues::read(option, words, &["server", "wait"], |_, word| match word {
        "server" => Some(("server", "on")),
        "nowait" => Some(("wait", "off")),
        _ => None,
    })?;
    let listens = pairs.get("server", "on (the monitor listens)", |value| (value == "on").then_some(()))?;
    pairs.get("wait", "off (the machine starts without a client)", |value| (value == "off").then_some(()))?;
    Ok((path, listens.is_some()))
}

/// The number that `text` begins with, and what stands behind it.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    Some((decimal(number)?, unit))
}

pub(super) fn short_text(text: &str) -> Option<String> {
    (1..=MAX_NAME_CHARS).contains(&text.chars().count()).then(|| text.to_owned())
}

pub(super) fn serial_number(text: &str) -> Option<String> {
    (text.len() <= MAX_SERIAL_BYTES).then(|| text.to_owned())
}

pub(super) fn socket_path(text: &str) -> Option<PathBuf> {
    (1..=MAX_SOCKET_PATH_BYTES).contains(&text.len()).then(|| text.into())
}

pub(super) fn file_path(text: &str) -> Option<PathBuf> {
    (1..=MAX_PATH_BYTES).contains(&text.len()).then(|| text.into())
}

#[cfg(test)]
#[path = "options_test.rs"]
mod tests;
