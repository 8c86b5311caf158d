//! From a NIC's specification to its device: the tap that it is on, and its address. Main thread.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::Arc;

use log::info;

use crate::config::net::{Mac, NicSpec, TapSpec};
use crate::devices::net::{Net, Setup};
use crate::error::{Context, Error, Result};
use crate::machine::inventory::Nic;
use crate::memory::GuestRam;
use crate::qos::Bucket;
use crate::sys::tap::Tap;

/// The largest packet that a guest is told of: what an IP packet can have.
const MAX_MTU: u32 = 65535;

/// The device of one NIC, and what the control plane knows of it.
pub fn net(nic: &NicSpec, ram: &Arc<GuestRam>) -> Result<(Net, Nic)> {
    let taps = open(&nic.id, &nic.tap)?;
    let (mut name, mut mtu) = (None, 1500);
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
        spec: nic.clone(),
        tap: name,
        mac,
        limits: nic.tap.limits,
        counters: device.counters(),
        orders: device.orders(),
    };
    Ok((device, part))
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
