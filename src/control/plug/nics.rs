//! The NICs' part of hot-plug: taps into the slots of NICs, and out of them.
//!
//! A slot's NIC is always there and keeps its address, its queues and what the guest has put into them; a plug gives it a
//! tap, and so a link. Opening and closing a tap takes a lock of the kernel's, so errands do it. Main thread.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::json;

use super::{Answer, Deleted, News, Occupant, Plug, REMEMBERED, check_free, check_name, choose, occupant, under_way};
use crate::config::net::MAX_TAP_BYTES;
use crate::config::spec::MAX_VIRTIO_DEVICES;
use crate::control::run::Message;
use crate::devices::net::{self, Cable, NetCounters, Order};
use crate::error::{Error, Kind, Result};
use crate::event::{Done, Lost};
use crate::machine::{self, Inventory, Nic};
use crate::qmp::plug::{DeviceAdd, NetdevAdd};
use crate::qos::Limits;
use crate::sys::tap::Tap;

/// What an errand, or a NIC, has to say.
pub enum NicNews {
    /// A tap was opened, or not: its id, the cable and the tap's name, and who asked.
    Opened(String, Result<(Box<Cable>, String)>, Answer),
    /// A tap was closed.
    Closed(String, Answer),
    /// A slot has taken a cable, or not.
    Plugged(usize, Box<Nic>, std::result::Result<net::Plugged, Lost>, Answer),
    /// A slot has let its taps go, or not.
    Unplugged(usize, std::result::Result<Vec<Tap>, Lost>, Answer),
    /// The taps that were in a slot are closed.
    Done(usize, Box<Nic>, Answer),
}

/// A tap that is in no slot.
struct Netdev {
    cable: Box<Cable>,
    tap: String,
}

/// The taps that are in no slot.
#[derive(Default)]
pub(super) struct Netdevs {
    waiting: Vec<Netdev>,
    under_way: Vec<String>,
    /// Those that went with their device, the last few: who then deletes them is told that it is done.
    gone: VecDeque<String>,
}

impl Plug {
    /// `netdev_add`: opens a tap, or takes one over.
    pub(in crate::control) fn add_netdev(
        &mut self,
        asked: &NetdevAdd,
        fd: Option<OwnedFd>,
        inventory: &Inventory,
        done: Answer,
    ) {
        if let Err(error) = self.check_netdev(asked, fd.is_some(), inventory) {
            return done.end(Err(error));
        }
        let (id, name) = (asked.id.clone(), asked.ifname.clone());
        self.netdevs.under_way.push(id.clone());
        self.send_on_errand(Box::new(move || {
            let opened = machine::cable(&id, name.as_deref(), fd).map(|(cable, tap)| (Box::new(cable), tap));
            News::Nic(NicNews::Opened(id, opened, done))
        }));
    }

    fn check_netdev(&self, asked: &NetdevAdd, has_fd: bool, inventory: &Inventory) -> Result<()> {
        let id = &asked.id;
        check_name("id", id)?;
        let plugged = inventory.nics.iter().filter_map(|slot| slot.nic.as_ref()).map(|nic| &nic.netdev);
        let waiting = self.netdevs.waiting.iter().map(|netdev| &netdev.cable.id);
        if plugged.chain(waiting).chain(&self.netdevs.under_way).any(|other| other == id) {
            return Err(Error::usage(format!("Parameter 'id': there is a netdev '{id}' already")));
        }
        match (&asked.ifname, has_fd) {
            (None, false) => {
                return Err(Error::usage("Parameter 'ifname' is missing: the tap's name; accepted too: 'fd'"));
            }
            (Some(_), true) => {
                return Err(Error::usage("Parameters 'ifname' and 'fd' are two taps; accepted: one of the two"));
            }
            (Some(name), false) if !(1..=MAX_TAP_BYTES).contains(&name.len()) => {
                let told = format!("Parameter 'ifname' takes the name of a tap, 1 to {MAX_TAP_BYTES} bytes");
                return Err(Error::usage(told));
            }
            _ => {}
        }
        if asked.queues.is_some_and(|queues| queues != 1) {
            return Err(Error::usage(
                "Parameter 'queues': a slot has its queues from the start, one pair; accepted: 1, or a NIC of the command line",
            ));
        }
        if asked.vhost == Some(true) {
            return Err(Error::usage(
                "Parameter 'vhost': the kernel's vhost is not supported, packets go through this program; accepted: false",
            ));
        }
        if self.netdevs.waiting.len() + self.netdevs.under_way.len() >= MAX_VIRTIO_DEVICES {
            return Err(Error::usage(format!(
                "{MAX_VIRTIO_DEVICES} netdevs wait for a device, and no machine has more slots; use device_add or netdev_del \
                 first"
            )));
        }
        Ok(())
    }

    /// `netdev_del`: closes a tap that no device has.
    pub(in crate::control) fn delete_netdev(&mut self, id: &str, inventory: &Inventory, done: Answer) {
        let mut plugged = inventory.nics.iter().filter_map(|slot| slot.nic.as_ref());
        if let Some(nic) = plugged.find(|nic| nic.netdev == id) {
            let device = &nic.device;
            let told = format!("Netdev '{id}' is in use by device '{device}'; use device_del first");
            return done.end(Err(Error::usage(told)));
        }
        if self.netdevs.under_way.iter().any(|other| other == id) {
            return done.end(Err(under_way("Netdev", id)));
        }
        if let Some(place) = self.netdevs.gone.iter().position(|gone| gone == id) {
            self.netdevs.gone.remove(place);
            return done.end(Ok(json!({})));
        }
        let Some(place) = self.netdevs.waiting.iter().position(|netdev| netdev.cable.id == id) else {
            return done.end(Err(Error::new(Kind::NotFound, format!("Netdev '{id}' not found"))));
        };
        let netdev = self.netdevs.waiting.remove(place);
        let id = id.to_owned();
        self.netdevs.under_way.push(id.clone());
        self.send_on_errand(Box::new(move || {
            drop(netdev);
            News::Nic(NicNews::Closed(id, done))
        }));
    }

    /// `device_add` of a NIC: a tap into a slot.
    pub(super) fn add_nic(&mut self, asked: &DeviceAdd, inventory: &mut Inventory, done: Answer) {
        let (number, place) = match self.plan_nic(asked, inventory) {
            Ok(plan) => plan,
            Err(error) => return done.end(Err(error)),
        };
        let Netdev { mut cable, tap } = self.netdevs.waiting.remove(place);
        // Counted from its plug on.
        cable.counters = Arc::new(NetCounters::default());
        let nic = Box::new(Nic {
            device: asked.id.clone(),
            netdev: cable.id.clone(),
            tap: Some(tap),
            limits: Limits::default(),
            counters: cable.counters.clone(),
            outlives_device: asked.netdev.as_ref().is_some_and(|netdev| *netdev != asked.id),
        });
        let slot = &mut inventory.nics[number];
        slot.busy = true;
        self.netdevs.under_way.push(cable.id.clone());
        let sender = self.sender.clone();
        let plugged = Done::posted(move |plugged| {
            // Control lives as long as the loop.
            let _ = sender.send(Message::Plug(Box::new(News::Nic(NicNews::Plugged(number, nic, plugged, done)))));
        });
        // A NIC that is gone drops the slip, which is posted all the same.
        let _ = slot.orders.send(Order::Plug(cable, plugged));
    }

    /// Into which slot, and which tap.
    fn plan_nic(&self, asked: &DeviceAdd, inventory: &Inventory) -> Result<(usize, usize)> {
        check_name("id", &asked.id)?;
        check_free(&asked.id, inventory)?;
        let disks = [
            ("lun", asked.lun.is_some()),
            ("drive", asked.drive.is_some()),
            ("serial", asked.serial.is_some()),
            ("logical_block_size", asked.logical_block_size.is_some()),
            ("physical_block_size", asked.physical_block_size.is_some()),
        ];
        if let Some((name, _)) = disks.iter().find(|(_, given)| *given) {
            return Err(Error::usage(format!("Parameter '{name}' is only for disks; use 'addr' and 'netdev'")));
        }
        let wanted = asked.netdev.as_ref().unwrap_or(&asked.id);
        let place = self.netdevs.waiting.iter().position(|netdev| netdev.cable.id == *wanted);
        let place = place.ok_or_else(|| {
            let mut plugged = inventory.nics.iter().filter_map(|slot| slot.nic.as_ref());
            match plugged.find(|nic| nic.netdev == *wanted) {
                Some(nic) => Error::usage(format!("Netdev '{wanted}' is in use by device '{}'", nic.device)),
                None if self.netdevs.under_way.contains(wanted) => under_way("Netdev", wanted),
                None => Error::new(Kind::NotFound, format!("Netdev '{wanted}' not found; use netdev_add first")),
            }
        })?;
        let slots: Vec<Occupant<'_>> =
            inventory.nics.iter().map(|slot| occupant(slot.nic.as_ref().map(|nic| &nic.device), slot.busy)).collect();
        let number = choose("NIC", asked, None, &slots)?;
        let pairs = inventory.nics[number].queue_pairs;
        if pairs != 1 {
            return Err(Error::usage(format!(
                "The NIC slot {number:#x} has {pairs} pairs of queues, and a tap that is plugged has one; accepted: another slot"
            )));
        }
        Ok((number, place))
    }

    /// `device_del` of a NIC, or of nothing.
    pub(super) fn delete_nic(&mut self, id: &str, inventory: &mut Inventory, done: Answer) {
        let mut slots = inventory.nics.iter_mut().enumerate();
        let Some((number, slot)) = slots.find(|(_, slot)| slot.nic.as_ref().is_some_and(|nic| nic.device == id)) else {
            return done.end(Err(Error::new(Kind::NotFound, format!("Device '{id}' not found"))));
        };
        if slot.busy {
            let refusal = format!("Device '{id}' is being unplugged already");
            return done.end(Err(Error::new(Kind::NotActive, refusal)));
        }
        slot.busy = true;
        let sender = self.sender.clone();
        let unplugged = Done::posted(move |unplugged| {
            let _ = sender.send(Message::Plug(Box::new(News::Nic(NicNews::Unplugged(number, unplugged, done)))));
        });
        let _ = slot.orders.send(Order::Unplug(machine::vacant_id(number), unplugged));
    }

    /// What an errand or a NIC has to say.
    pub(super) fn hear_nic(&mut self, news: NicNews, inventory: &mut Inventory) -> Option<Deleted> {
        match news {
            NicNews::Opened(id, opened, done) => {
                self.netdevs.under_way.retain(|other| *other != id);
                done.end(opened.map(|(cable, tap)| {
                    self.netdevs.gone.retain(|gone| *gone != id);
                    self.netdevs.waiting.push(Netdev { cable, tap });
                    json!({})
                }));
            }
            NicNews::Closed(id, done) => {
                self.netdevs.under_way.retain(|other| *other != id);
                done.end(Ok(json!({})));
            }
            NicNews::Plugged(number, nic, plugged, done) => {
                self.netdevs.under_way.retain(|other| *other != nic.netdev);
                let slot = &mut inventory.nics[number];
                slot.busy = false;
                done.end(match plugged {
                    Ok(Ok(())) => {
                        slot.nic = Some(*nic);
                        Ok(json!({}))
                    }
                    Ok(Err((cable, error))) => {
                        let what = format!("Device '{}' cannot be plugged", nic.device);
                        self.netdevs.waiting.push(Netdev { cable, tap: nic.tap.unwrap_or_default() });
                        Err(Error::host(what).because(error))
                    }
                    Err(Lost) => Err(failed(number)),
                });
            }
            NicNews::Unplugged(number, unplugged, done) => self.nic_unplugged(number, unplugged, inventory, done),
            NicNews::Done(number, nic, done) => {
                inventory.nics[number].busy = false;
                self.netdevs.under_way.retain(|other| *other != nic.netdev);
                if !nic.outlives_device {
                    self.netdevs.gone.push_back(nic.netdev);
                    if self.netdevs.gone.len() > REMEMBERED {
                        self.netdevs.gone.pop_front();
                    }
                }
                return Some(Deleted { device: nic.device, done, answer: Ok(json!({})) });
            }
        }
        None
    }

    /// A slot has let its taps go: they are closed, unless the one is kept for another device.
    fn nic_unplugged(
        &mut self,
        number: usize,
        unplugged: std::result::Result<Vec<Tap>, Lost>,
        inventory: &mut Inventory,
        done: Answer,
    ) {
        let slot = &mut inventory.nics[number];
        let (Ok(mut taps), Some(nic)) = (unplugged, slot.nic.take()) else {
            slot.busy = false;
            return done.end(Err(failed(number)));
        };
        self.netdevs.under_way.push(nic.netdev.clone());
        if nic.outlives_device
            && let Some(tap) = taps.pop()
        {
            let mtu = tap.mtu().ok().and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(1500);
            let cable = Box::new(Cable { id: nic.netdev.clone(), tap, mtu, counters: nic.counters.clone() });
            self.netdevs.waiting.push(Netdev { cable, tap: nic.tap.clone().unwrap_or_default() });
        }
        let nic = Box::new(nic);
        self.send_on_errand(Box::new(move || {
            drop(taps);
            News::Nic(NicNews::Done(number, nic, done))
        }));
    }
}

fn failed(number: usize) -> Error {
    Error::new(Kind::NotActive, format!("NIC slot {number:#x} has failed and is not served any more"))
}
