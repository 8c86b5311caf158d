//! Hot-plug: disks and NICs into the slots of a running machine, and out of them. What is special about NICs is in `nics`.
//!
//! A part of Control. What may wait for a file (opening, closing, making longer) is done by a thread of its own for each
//! time, and comes back as [`News`]; the exchange itself is the worker's, in the slot's loop. So no command holds up the main
//! loop, and each is answered when all of it has been done. A slot that is under way refuses everything else. The shapes of
//! the commands are `qmp::plug`'s. Main thread, but for the errands.

mod nics;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use log::warn;
use serde_json::{Value, json};

use self::nics::{Netdevs, NicNews};
use super::run::Message;
use crate::config::spec::{
    Access, Aio, Cache, DriveSpec, LOGICAL_BLOCKS, MAX_NAME_CHARS, MAX_PATH_BYTES, MAX_SERIAL_BYTES, MAX_VIRTIO_DEVICES,
};
use crate::devices::block::{Order, QUEUE_SIZE};
use crate::error::{Error, Kind, Result};
use crate::event::{Done, Lost, Sender};
use crate::machine::{DiskSlot, Drive, DriveMaker, Inventory};
use crate::qmp::plug::{BlockResize, BlockdevAdd, BlockdevAioOptions, DeviceAdd};
use crate::virtio::{Command, Device, Exchanged};

/// A reply slip of a QMP command.
type Answer = Done<Result<Value>>;

/// What an errand, or a slot's loop, has to say.
pub enum News {
    /// A drive was opened, or not: its id, and who asked.
    Opened(String, Result<(Box<dyn Device>, Drive)>, Answer),
    /// A drive was closed.
    Closed(String, Answer),
    /// A slot has taken a drive in, or not.
    Plugged(usize, Box<Drive>, std::result::Result<Exchanged, Lost>, Answer),
    /// A slot has let its drive go, or not.
    Unplugged(usize, std::result::Result<Exchanged, Lost>, Answer),
    /// What the guest wrote to the drive that was in a slot is on its disk, or not.
    Flushed(Flushed, Result<()>, Answer),
    /// The drive's file has so many bytes now, or not.
    Grown(String, Result<u64>, Answer),
    /// What there is to say of NICs.
    Nic(NicNews),
}

/// A drive that has left its slot.
pub struct Flushed {
    slot: usize,
    device: String,
    node: String,
    /// It is kept for another device.
    kept: Option<Node>,
}

/// A device that is gone, with who asked for that and what there is to answer.
pub(super) struct Deleted {
    pub(super) device: String,
    pub(super) done: Answer,
    pub(super) answer: Result<Value>,
}

type Errand = Box<dyn FnOnce() -> News + Send>;

/// A drive that is in no slot.
struct Node {
    device: Box<dyn Device>,
    drive: Drive,
}

/// The drives that are in no slot, and the way back from errands.
pub(super) struct Plug {
    nodes: Vec<Node>,
    /// Ids of drives that are on their way: being opened, or closed.
    under_way: Vec<String>,
    /// Drives that went with their device, the last few: who then deletes them is told that it is done.
    gone: VecDeque<String>,
    netdevs: Netdevs,
    sender: Sender<Message>,
}

/// How many drives that are gone are remembered.
const REMEMBERED: usize = 32;
/// Errands do not go deep.
const STACK_BYTES: usize = 256 << 10;

impl Plug {
    /// No drive; errands come back through `sender`.
    pub(super) fn new(sender: Sender<Message>) -> Self {
        Plug { nodes: Vec::new(), under_way: Vec::new(), gone: VecDeque::new(), netdevs: Netdevs::default(), sender }
    }

    /// `blockdev-add`: opens and locks a file.
    pub(super) fn add_node(&mut self, asked: &BlockdevAdd, inventory: &Inventory, done: Answer) {
        let spec = match self.node_spec(asked, inventory) {
            Ok(spec) => spec,
            Err(error) => return done.end(Err(error)),
        };
        self.under_way.push(spec.id.clone());
        let auto_read_only = asked.auto_read_only == Some(true);
        let maker = inventory.maker.clone();
        self.send_on_errand(Box::new(move || {
            let opened = open(&maker, &spec, auto_read_only);
            News::Opened(spec.id, opened, done)
        }));
    }

    /// What is asked, if it can be.
    fn node_spec(&self, asked: &BlockdevAdd, inventory: &Inventory) -> Result<DriveSpec> {
        let id = &asked.node_name;
        check_name("node-name", id)?;
        let filename = &asked.file.filename;
        if !(1..=MAX_PATH_BYTES).contains(&filename.len()) {
            return Err(Error::usage(format!("Parameter 'file.filename' takes a path of 1 to {MAX_PATH_BYTES} bytes")));
        }
        let cache = asked.cache.as_ref();
        if cache.and_then(|cache| cache.no_flush) == Some(true) {
            return Err(Error::usage(
                "Parameter 'cache.no-flush': a guest that flushes wants to keep its data; accepted: false",
            ));
        }
        if asked.aio.is_some() && asked.file.aio.is_some() && asked.aio != asked.file.aio {
            return Err(Error::usage("Parameters 'aio' and 'file.aio' are one; accepted: one of the two"));
        }
        let taken = drives(inventory).chain(self.nodes.iter().map(|node| &node.drive)).map(|drive| &drive.spec.id);
        if taken.chain(&self.under_way).any(|other| other == id) {
            return Err(Error::usage(format!("Parameter 'node-name': there is a node '{id}' already")));
        }
        if self.nodes.len() + self.under_way.len() >= MAX_VIRTIO_DEVICES {
            return Err(Error::usage(format!(
                "{MAX_VIRTIO_DEVICES} nodes wait for a device, and no machine has more slots; use device_add or blockdev-del \
                 first"
            )));
        }
        let mut spec = DriveSpec::new(id, PathBuf::from(filename));
        if asked.read_only == Some(true) {
            spec.access = Access::ReadOnly;
        }
        if cache.and_then(|cache| cache.direct) == Some(false) {
            spec.cache = Cache::Buffered;
        }
        spec.aio = match asked.aio.or(asked.file.aio) {
            Some(BlockdevAioOptions::Threads) => Aio::Threads,
            Some(BlockdevAioOptions::IoUring) => Aio::IoUring,
            Some(BlockdevAioOptions::Native) | None => Aio::Auto,
        };
        Ok(spec)
    }

    /// `blockdev-del`: closes a file that no device has.
    pub(super) fn delete_node(&mut self, id: &str, inventory: &Inventory, done: Answer) {
        if let Some(drive) = drives(inventory).find(|drive| drive.spec.id == *id) {
            let device = &drive.device;
            return done
                .end(Err(Error::usage(format!("Node '{id}' is in use by device '{device}'; use device_del first"))));
        }
        if self.under_way.iter().any(|other| other == id) {
            return done.end(Err(under_way("Node", id)));
        }
        if let Some(place) = self.gone.iter().position(|gone| gone == id) {
            self.gone.remove(place);
            return done.end(Ok(json!({})));
        }
        let Some(place) = self.nodes.iter().position(|node| node.drive.spec.id == *id) else {
            return done.end(Err(Error::new(Kind::NotFound, format!("Node '{id}' not found"))));
        };
        let Node { device, drive } = self.nodes.remove(place);
        // Nothing was written since it was flushed, if it ever was in a slot; closing may wait all the same.
        let id = id.to_owned();
        self.under_way.push(id.clone());
        self.send_on_errand(Box::new(move || {
            drop((device, drive));
            News::Closed(id, done)
        }));
    }

    /// `device_add`: a drive into a slot.
    pub(super) fn add_device(&mut self, asked: &DeviceAdd, inventory: &mut Inventory, done: Answer) {
        if asked.driver.contains("net") {
            return self.add_nic(asked, inventory, done);
        }
        let (slot, node) = match self.plan(asked, inventory) {
            Ok(plan) => plan,
            Err(error) => return done.end(Err(error)),
        };
        let Node { device, mut drive } = self.nodes.remove(node);
        drive.device.clone_from(&asked.id);
        // Kata's StratoVirt driver gives both the same name, and never deletes the node.
        drive.outlives_device = asked.drive.as_ref().is_some_and(|node| *node != asked.id);
        drive.spec.serial.clone_from(&asked.serial);
        if let Some(warning) = drive.spec.cut_serial() {
            warn!("{warning}");
        }
        let serial = asked.serial.clone().unwrap_or_else(|| drive.spec.id.clone());
        // In effect before the guest's first request: the drive reads its orders when it is added to a loop.
        let _ = drive.orders.send(Order::Identify(serial));
        let disk = &mut inventory.disks[slot];
        disk.busy = true;
        self.under_way.push(drive.spec.id.clone());
        let sender = self.sender.clone();
        let drive = Box::new(drive);
        let exchanged = Done::posted(move |exchanged| {
            // Control lives as long as the loop.
            let _ = sender.send(Message::Plug(Box::new(News::Plugged(slot, drive, exchanged, done))));
        });
        // A worker that is gone drops the slip, which is posted all the same.
        let _ = disk.worker.send(Command::Exchange(device, exchanged));
    }

    /// Into which slot, and which node.
    fn plan(&self, asked: &DeviceAdd, inventory: &Inventory) -> Result<(usize, usize)> {
        let DeviceAdd { id, driver, .. } = asked;
        if !driver.contains("blk") {
            return Err(Error::usage(format!(
                "Parameter 'driver' does not accept value '{driver}'; accepted: 'virtio-blk-mmio', \
                 'virtio-net-mmio', and whatever has 'blk' or 'net' in its name"
            )));
        }
        check_name("id", id)?;
        check_free(id, inventory)?;
        if asked.netdev.is_some() {
            return Err(Error::usage("Parameter 'netdev' is only for NICs; use 'drive'"));
        }
        if let Some(size) = asked.logical_block_size.filter(|&size| size != LOGICAL_BLOCKS[0]) {
            return Err(Error::usage(format!(
                "Parameter 'logical_block_size' does not accept value '{size}': a hot-plugged disk has the {}-byte blocks \
                 that the driver has read from the empty slot; use -drive ...,logical_block_size={size} at the start",
                LOGICAL_BLOCKS[0]
            )));
        }
        let fixed = [("num-queues", asked.num_queues, 1), ("queue-size", asked.queue_size, QUEUE_SIZE)];
        if let Some((name, _, only)) = fixed.iter().find(|(_, size, only)| size.is_some_and(|size| size != *only)) {
            return Err(Error::usage(format!(
                "Parameter '{name}' takes {only} only: the slot has its queue from the start; leave it out"
            )));
        }
        if asked.serial.as_ref().is_some_and(|serial| serial.len() > MAX_SERIAL_BYTES) {
            return Err(Error::usage(format!("Parameter 'serial' takes text of at most {MAX_SERIAL_BYTES} bytes")));
        }
        let wanted = asked.drive.as_ref().unwrap_or(id);
        let place = self.nodes.iter().position(|node| node.drive.spec.id == *wanted);
        let node = place.ok_or_else(|| match drives(inventory).find(|drive| drive.spec.id == *wanted) {
            Some(drive) => Error::usage(format!("Node '{wanted}' is in use by device '{}'", drive.device)),
            None if self.under_way.contains(wanted) => under_way("Node", wanted),
            None => Error::new(Kind::NotFound, format!("Node '{wanted}' not found; use blockdev-add first")),
        })?;
        Ok((free_slot(asked, &inventory.disks)?, node))
    }

    /// `device_del`: a drive out of its slot.
    pub(super) fn delete_device(&mut self, id: &str, inventory: &mut Inventory, done: Answer) {
        let of = |disk: &DiskSlot| disk.drive.as_ref().is_some_and(|drive| drive.device == *id);
        let Some(slot) = inventory.disks.iter().position(of) else {
            return self.delete_nic(id, inventory, done);
        };
        let disk = &mut inventory.disks[slot];
        if disk.busy {
            let refusal = format!("Device '{id}' is being unplugged already");
            return done.end(Err(Error::new(Kind::NotActive, refusal)));
        }
        disk.busy = true;
        let sender = self.sender.clone();
        let exchanged = Done::posted(move |exchanged| {
            let _ = sender.send(Message::Plug(Box::new(News::Unplugged(slot, exchanged, done))));
        });
        let _ = disk.worker.send(Command::Exchange(inventory.maker.vacant(slot), exchanged));
    }

    /// `block_resize`: makes the file of a drive in a slot longer.
    pub(super) fn resize(&mut self, asked: &BlockResize, inventory: &Inventory, done: Answer) {
        let found = match (&asked.device, &asked.node_name) {
            (Some(id), None) => (id, drives(inventory).find(|drive| drive.device == *id)),
            (None, Some(id)) => (id, drives(inventory).find(|drive| drive.spec.id == *id)),
            _ => return done.end(Err(Error::usage("accepted: one of the parameters 'device' and 'node-name'"))),
        };
        let (id, Some(drive)) = found else {
            return done.end(Err(Error::new(Kind::NotFound, format!("No slot has a disk '{}'", found.0))));
        };
        let (backing, bytes) = (drive.backing.clone(), asked.size);
        let (node, what) = (drive.spec.id.clone(), format!("Disk '{id}' cannot be made {bytes} bytes long"));
        self.send_on_errand(Box::new(move || {
            let grown = backing.grow(bytes).map_err(|e| Error::new(e.kind(), what).because(e));
            News::Grown(node, grown, done)
        }));
    }

    /// What an errand or a slot has to say. A device that is gone is for Control to tell of.
    pub(super) fn hear(&mut self, news: News, inventory: &mut Inventory) -> Option<Deleted> {
        match news {
            News::Opened(id, opened, done) => {
                self.under_way.retain(|other| *other != id);
                match opened {
                    Ok((device, drive)) => {
                        self.gone.retain(|gone| *gone != id);
                        self.nodes.push(Node { device, drive });
                        done.end(Ok(json!({})));
                    }
                    Err(error) => done.end(Err(error)),
                }
            }
            News::Closed(id, done) => {
                self.under_way.retain(|other| *other != id);
                done.end(Ok(json!({})));
            }
            News::Plugged(slot, drive, exchanged, done) => {
                self.under_way.retain(|other| *other != drive.spec.id);
                let disk = &mut inventory.disks[slot];
                disk.busy = false;
                done.end(match exchanged {
                    Ok(Ok(_vacant)) => {
                        disk.drive = Some(*drive);
                        Ok(json!({}))
                    }
                    Ok(Err((device, error))) => {
                        let what = format!("Device '{}' cannot be plugged", drive.device);
                        self.nodes.push(Node { device, drive: *drive });
                        Err(Error::host(what).because(error))
                    }
                    Err(Lost) => Err(failed(slot)),
                });
            }
            News::Unplugged(slot, exchanged, done) => self.unplugged(slot, exchanged, inventory, done),
            News::Flushed(Flushed { slot, device, node, kept }, flushed, done) => {
                self.under_way.retain(|other| *other != node);
                inventory.disks[slot].busy = false;
                match kept {
                    Some(kept) => self.nodes.push(kept),
                    None => self.remember(node),
                }
                let answer = flushed.map(|()| json!({})).map_err(|e| {
                    let what =
                        format!("Device '{device}' is unplugged, and what the guest wrote to it last may be lost");
                    Error::host(what).because(e)
                });
                return Some(Deleted { device, done, answer });
            }
            News::Grown(id, grown, done) => grow(&id, grown, inventory, done),
            News::Nic(news) => return self.hear_nic(news, inventory),
        }
        None
    }

    /// A slot has let its drive go: it is flushed, and closed unless it is kept.
    fn unplugged(
        &mut self,
        slot: usize,
        exchanged: std::result::Result<Exchanged, Lost>,
        inventory: &mut Inventory,
        done: Answer,
    ) {
        let disk = &mut inventory.disks[slot];
        let (mut device, drive) = match (exchanged, disk.drive.take()) {
            (Ok(Ok(device)), Some(drive)) => (device, drive),
            (exchanged, drive) => {
                disk.drive = drive;
                disk.busy = false;
                let error = match exchanged {
                    Ok(Err((_vacant, error))) => Error::host("the device cannot be unplugged").because(error),
                    _ => failed(slot),
                };
                return done.end(Err(error));
            }
        };
        self.under_way.push(drive.spec.id.clone());
        self.send_on_errand(Box::new(move || {
            let flushed = device.flush();
            let (device_id, node) = (drive.device.clone(), drive.spec.id.clone());
            // One that is not kept is closed here, where that may wait.
            let kept = drive.outlives_device.then_some(Node { device, drive });
            News::Flushed(Flushed { slot, device: device_id, node, kept }, flushed, done)
        }));
    }

    /// Takes note of a drive that went with its device.
    fn remember(&mut self, node: String) {
        self.gone.push_back(node);
        if self.gone.len() > REMEMBERED {
            self.gone.pop_front();
        }
    }

    /// Has `errand` done by a thread of its own, and its news told to Control.
    fn send_on_errand(&self, errand: Errand) {
        let errand = Arc::new(Mutex::new(Some(errand)));
        let (theirs, sender) = (errand.clone(), self.sender.clone());
        let thread = thread::Builder::new().name("errand".into()).stack_size(STACK_BYTES);
        if let Err(e) = thread.spawn(move || run(&theirs, &sender)) {
            // Rather late than never: the loop waits for the file.
            warn!("hot-plug: start a thread: {e}");
            run(&errand, &self.sender);
        }
    }
}

/// Does an errand that nobody has begun.
fn run(errand: &Mutex<Option<Errand>>, sender: &Sender<Message>) {
    let errand = errand.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(errand) = errand {
        // Control lives as long as the loop.
        let _ = sender.send(Message::Plug(Box::new(errand())));
    }
}

/// Opens a drive; for reading only if that is all there is and it would do.
fn open(maker: &DriveMaker, spec: &DriveSpec, auto_read_only: bool) -> Result<(Box<dyn Device>, Drive)> {
    match maker.open(spec) {
        Err(_) if auto_read_only && spec.access == Access::ReadWrite => {
            maker.open(&DriveSpec { access: Access::ReadOnly, ..spec.clone() })
        }
        opened => opened,
    }
}

/// Tells the guest that the drive called `id` has become longer, and then who asked for it.
fn grow(id: &str, grown: Result<u64>, inventory: &mut Inventory, done: Answer) {
    let bytes = match grown {
        Ok(bytes) => bytes,
        Err(error) => return done.end(Err(error)),
    };
    let mut drives = inventory.disks.iter_mut().filter_map(|disk| disk.drive.as_mut());
    let Some(drive) = drives.find(|drive| drive.spec.id == *id) else {
        // Unplugged meanwhile; the file is as long as was asked.
        return done.end(Ok(json!({})));
    };
    drive.size_bytes = bytes;
    let told =
        Done::posted(move |told: std::result::Result<(), Lost>| done.end(told.map(|()| json!({})).map_err(gone)));
    let _ = drive.orders.send(Order::Grow(told));
}

fn drives(inventory: &Inventory) -> impl Iterator<Item = &Drive> {
    inventory.disks.iter().filter_map(|disk| disk.drive.as_ref())
}

/// The error for a node or netdev that is being opened, plugged, unplugged or closed.
fn under_way(what: &str, id: &str) -> Error {
    Error::new(
        Kind::NotActive,
        format!("{what} '{id}' is busy with another command; try again when that has been answered"),
    )
}

fn gone(_: Lost) -> Error {
    Error::new(Kind::NotActive, "the disk has left its slot meanwhile, or its slot has failed")
}

fn failed(slot: usize) -> Error {
    Error::new(Kind::NotActive, format!("Disk slot {slot:#x} has failed and is not served any more"))
}

/// No device of any kind has that id.
fn check_free(id: &str, inventory: &Inventory) -> Result<()> {
    let nics = inventory.nics.iter().filter_map(|slot| slot.nic.as_ref());
    if drives(inventory).map(|drive| &drive.device).chain(nics.map(|nic| &nic.device)).any(|device| device == id) {
        return Err(Error::usage(format!("Parameter 'id': there is a device '{id}' already")));
    }
    Ok(())
}

fn check_name(parameter: &str, name: &str) -> Result<()> {
    if (1..=MAX_NAME_CHARS).contains(&name.chars().count()) {
        return Ok(());
    }
    Err(Error::usage(format!("Parameter '{parameter}' takes a name of 1 to {MAX_NAME_CHARS} characters")))
}

/// What a slot is like to who looks for a free one.
#[derive(Clone, Copy)]
enum Occupant<'a> {
    Nobody,
    Device(&'a str),
    /// Something is on its way into it or out of it.
    UnderWay,
}

fn occupant<'a>(device: Option<&'a String>, busy: bool) -> Occupant<'a> {
    match (device, busy) {
        (Some(device), _) => Occupant::Device(device),
        (None, true) => Occupant::UnderWay,
        (None, false) => Occupant::Nobody,
    }
}

/// The slot for disks that is asked for by `addr` or `lun`, or else the first that is free.
fn free_slot(asked: &DeviceAdd, disks: &[DiskSlot]) -> Result<usize> {
    let device = |disk: &'_ DiskSlot| disk.drive.as_ref().map(|drive| drive.device.clone());
    let devices: Vec<_> = disks.iter().map(|disk| (device(disk), disk.busy)).collect();
    let slots: Vec<_> = devices.iter().map(|(device, busy)| occupant(device.as_ref(), *busy)).collect();
    choose("disk", asked, asked.lun.map(|lun| lun as usize + 1), &slots)
}

/// One of the slots of a kind: that of `addr` or `lun`, or else the first that is free.
fn choose(kind: &str, asked: &DeviceAdd, by_lun: Option<usize>, slots: &[Occupant<'_>]) -> Result<usize> {
    let is_free = |slot: &Occupant<'_>| matches!(slot, Occupant::Nobody);
    let free: Vec<String> =
        (0..).zip(slots).filter(|(_, slot)| is_free(slot)).map(|(n, _)| format!("{n:#x}")).collect();
    let accepted = match (slots.len(), free.is_empty()) {
        (0, _) => format!(
            "none, for the machine was started without; start it with -machine microvm,{}-slots=N",
            kind.to_lowercase()
        ),
        (count, true) => format!("none of the {count}, which all are in use; use device_del first (rule D3.4)"),
        _ => format!("one that is free: {}", free.join(", ")),
    };
    let refuse = |what: String| Err(Error::usage(format!("{what}; accepted: {accepted}")));
    let by_addr = match &asked.addr {
        None => None,
        Some(addr) => match number(addr) {
            None => {
                return refuse(format!("Parameter 'addr' takes the number of a slot, 0x0 is the first, not '{addr}'"));
            }
            number => number,
        },
    };
    let slot = match (by_addr, by_lun) {
        (Some(addr), Some(lun)) if addr != lun => {
            return refuse(format!("Parameters 'addr' and 'lun' name two slots, {addr:#x} and {lun:#x}"));
        }
        (Some(slot), _) | (None, Some(slot)) => slot,
        (None, None) => match slots.iter().position(is_free) {
            None if slots.is_empty() => return refuse(format!("No {kind} slot is free")),
            None => {
                let count = slots.len();
                return Err(Error::usage(format!(
                    "All {count} {kind} slots are in use; use device_del first (rule D3.4)"
                )));
            }
            Some(slot) => slot,
        },
    };
    let what = match slots.get(slot) {
        None => format!("There is no {kind} slot {slot:#x}"),
        Some(Occupant::Nobody) => return Ok(slot),
        Some(Occupant::Device(device)) => format!("The {kind} slot {slot:#x} has device '{device}'"),
        Some(Occupant::UnderWay) => format!("The {kind} slot {slot:#x} is under way"),
    };
    refuse(what)
}

/// A number as `addr` has it: `0x1`, or `1`.
fn number(text: &str) -> Option<usize> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| usize::from_str_radix(digits, radix).ok()).flatten()
}
