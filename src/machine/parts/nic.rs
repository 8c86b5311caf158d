//! From a NIC's specification to its device: the tap that it is on, and its address; and what stands where none is plugged
//! in. Main thread, but for [`cable`].

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::info;

use crate::config::net::{Mac, NicSpec, QUEUE_SIZE, TapSpec};
use crate::devices::net::{Cable, Net, Setup};
use crate::error::{Context, Error, Result};
use crate::machine::inventory::{Nic, NicSlot};
use crate::memory::GuestRam;
use crate::qos::{Bucket, Limits};
use crate::sys::tap::Tap;

/// The largest packet unless somebody says otherwise: Ethernet's.
const ETHERNET_MTU: u16 = 1500;
/// The largest packet that a guest is told of: what an IP packet can have.
const MAX_MTU: u32 = 65535;

/// The device of one NIC, and what the control plane knows of it.
pub fn net(nic: &NicSpec, ram: &Arc<GuestRam>) -> Result<(Net, NicSlot)> {
    let taps = open(&nic.id, &nic.tap)?;
    let (mut name, mut mtu) = (None, u32::from(ETHERNET_MTU));
    if let Some(tap) = taps.first() {
        let what = || format!("netdev \"{}\": look at its tap", nic.id);
        name = Some(tap.name().context(what)?);
        // The descriptor of a tap in another network namespace says nothing of it.
        mtu = tap.mtu().unwrap_or(mtu);
    }
    let mac = nic.mac.unwrap_or_else(made_up);
    info!("netdev \"{}\": tap {}, {mac}, MTU {mtu}", nic.id, name.as_deref().unwrap_or("none"));
    let setup = Setup {
        id: nic.id.clone(),
        mac: mac.0,
        mtu: mtu.min(MAX_MTU) as u16,
        pairs: nic.tap.queue_pairs.into(),
        queue_size: nic.queue_size,
    };
    let device = Net::new(setup, taps, Bucket::new(&nic.tap.limits), ram.clone());
    let part = Nic {
        device: nic.id.clone(),
        netdev: nic.id.clone(),
        tap: name,
        limits: nic.tap.limits,
        counters: device.counters(),
        outlives_device: false,
    };
    let (queue_pairs, orders) = (nic.tap.queue_pairs, device.orders());
    Ok((device, NicSlot { mac, queue_pairs, orders, nic: Some(part), busy: false }))
}

/// The NIC of slot number `slot` without a cable, and the slot.
pub fn vacant(slot: usize, ram: &Arc<GuestRam>) -> (Net, NicSlot) {
    let mac = made_up();
    let setup = Setup { id: vacant_id(slot), mac: mac.0, mtu: ETHERNET_MTU, pairs: 1, queue_size: QUEUE_SIZE };
    let device = Net::new(setup, Vec::new(), Bucket::new(&Limits::default()), ram.clone());
    let slot = NicSlot { mac, queue_pairs: 1, orders: device.orders(), nic: None, busy: false };
    (device, slot)
}

/// What the NIC of slot number `slot` is called while nothing is plugged into it.
pub fn vacant_id(slot: usize) -> String {
    format!("NIC slot {slot:#x}")
}

/// Opens the tap called `name` for a later plug, or takes over one that was handed to us: without limits and without an
/// iothread (rule D1.5). It takes a lock of the kernel's, so it is called on a thread of its own.
///
/// # Errors
/// What the host refuses, with the way out.
pub fn cable(id: &str, name: Option<&str>, fd: Option<OwnedFd>) -> Result<(Cable, String)> {
    let tap = match (fd, name) {
        (Some(fd), _) => Tap::own(fd).map_err(|e| {
            let why = "the descriptor is none of a tap with a virtio header";
            let text = format!("netdev \"{id}\": {why}; accepted: one opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR");
            Error::host(text).because(e)
        })?,
        (None, name) => {
            let name = name.unwrap_or_default();
            Tap::open(name, false).map_err(|e| refused(id, name, false, e))?
        }
    };
    let name = tap.name().context(|| format!("netdev \"{id}\": look at its tap"))?;
    let mtu = tap.mtu().unwrap_or(ETHERNET_MTU.into()).min(MAX_MTU) as u16;
    Ok((Cable { id: id.to_owned(), tap, mtu, counters: Arc::default() }, name))
}

/// An address that nobody was given, of those that anybody may use: QEMU's.
fn made_up() -> Mac {
    let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_le_bytes();
    Mac([0x52, 0x54, 0x00, a, b, c])
}

/// The tap's queues, one a pair.
fn open(id: &str, spec: &TapSpec) -> Result<Vec<Tap>> {
    if spec.fds.is_empty() {
        let name = spec.name.as_deref().unwrap_or_default();
        let several = spec.queue_pairs > 1;
        let open = |_| Tap::open(name, several).map_err(|e| refused(id, name, several, e));
        return (0..spec.queue_pairs).map(open).collect();
    }
    let mut taps = Vec::with_capacity(spec.fds.len());
    let mut first: Option<String> = spec.name.clone();
    for &fd in &spec.fds {
        let what = || format!("netdev \"{id}\": fds={fd}");
        let tap = Tap::adopt(fd).map_err(|e| {
            let why = "is no open descriptor of a tap with a virtio header";
            let text = format!("{} {why}; accepted: one opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR", what());
            Error::host(text).because(e)
        })?;
        let name = tap.name().context(what)?;
        if let Some(first) = first.as_ref().filter(|first| **first != name) {
            return Err(Error::host(format!(
                "{} belongs to tap {name:?}, and the NIC is on {first:?}; accepted: descriptors of one tap",
                what()
            )));
        }
        first = Some(name);
        taps.push(tap);
    }
    Ok(taps)
}

/// What the host says to a tap, and the way out.
fn refused(id: &str, name: &str, several: bool, error: io::Error) -> Error {
    let make = if several { format!("{name} mode tap multi_queue") } else { format!("{name} mode tap") };
    let text = match error.raw_os_error() {
        Some(libc::ENODEV) => format!("there is no such interface; make it with \"ip tuntap add dev {make}\""),
        Some(libc::ENOENT) => "this host has no /dev/net/tun; load the kernel's module tun".to_owned(),
        Some(libc::EBUSY) => "another program has it; end that program, or use another tap".to_owned(),
        Some(libc::EPERM | libc::EACCES) => format!(
            "it belongs to somebody else; make it with \"ip tuntap add dev {make} user NAME\", or run as a user who may \
             use it and /dev/net/tun"
        ),
        Some(libc::EINVAL) if several => {
            format!("it is no tap of several queues; make it with \"ip tuntap add dev {make}\", or ask for queues=1")
        }
        Some(libc::EINVAL) => format!("it is no tap; make one with \"ip tuntap add dev {make}\""),
        Some(libc::E2BIG) => "it has no more queues to give; ask for fewer".to_owned(),
        _ => "open it".to_owned(),
    };
    Error::host(format!("netdev \"{id}\": tap {name}: {text}")).because(error)
}
