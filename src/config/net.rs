//! NICs: what `-netdev` and `-device virtio-net-device` say of them, in either of two spellings.
//!
//! The early spelling says all in one option: `-netdev id=NAME,netdev=TAP,...`. The later one parts the host's side from
//! the guest's: `-netdev tap,id=NAME,ifname=TAP` and `-device virtio-net-device,netdev=NAME,...`. Both end as one
//! [`NicSpec`]. Whether there is such a tap is found out when the machine is built. Main thread, before anything is started.

use super::keyvalue::{KeyValues, decimal};
use super::options::{limit_keys, limits, short_text};
use super::spec::VmSpec;
use crate::error::{Error, Result};
use crate::qos::{Limits, Spelling};

/// The most pairs of queues of one NIC.
pub const MAX_QUEUE_PAIRS: u16 = 16;
/// The longest name of a tap, in bytes: the kernel's IFNAMSIZ without its NUL.
pub const MAX_TAP_BYTES: usize = 15;
/// Descriptors of a queue unless something else is asked for.
pub const QUEUE_SIZE: u16 = 256;
const MAX_QUEUE_SIZE: u16 = 4096;
/// The other types of QEMU's `-netdev`.
const OTHER_KINDS: [&str; 14] = [
    "af-xdp",
    "bridge",
    "dgram",
    "hubport",
    "l2tpv3",
    "netmap",
    "passt",
    "socket",
    "stream",
    "user",
    "vde",
    "vhost-user",
    "vhost-vdpa",
    "vmnet-shared",
];
const THROTTLING: Spelling = Spelling::NicCommandLine;

/// The address of a NIC (MAC, EUI-48).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Six pairs of hexadecimal digits with colons between them, and no group of NICs.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn read(text: &str) -> std::result::Result<Mac, String> {
        let pairs: Vec<&str> = text.split(':').collect();
        let byte = |pair: &&str| {
            let digits = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
        let Some(bytes) = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) else {
            return Err(format!(
                "{text:?} is no MAC address; accepted: six pairs of hexadecimal digits, such as 52:54:00:12:34:56"
            ));
        };
        if bytes[0] & 1 != 0 {
            return Err(format!(
                "{text:?} is the address of a group of NICs (its first byte is odd); accepted: one with an even first byte"
            ));
        }
        if bytes == [0; 6] {
            return Err(format!("{text:?} is no NIC's address; accepted: one that is not all zeros"));
        }
        Ok(Mac(bytes))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The host's side of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapSpec {
    /// `netdev=`, `ifname=`: the tap's name.
    pub name: Option<String>,
    /// `fds=`: descriptors that are open already and attached to the tap, one a pair of queues.
    pub fds: Vec<i32>,
    /// `queues=`: pairs of queues; as many as descriptors if there are any.
    pub queue_pairs: u16,
    /// `throttling.*=`: read is what the guest receives, write what it sends.
    pub limits: Limits,
}

/// `-netdev`: a virtio-net device and the tap behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicSpec {
    /// The name that QMP and messages use; unique among devices.
    pub id: String,
    /// The host's side.
    pub tap: TapSpec,
    /// `mac=`; one is made up if there is none.
    pub mac: Option<Mac>,
    /// The id of the iothread that serves it (rules D1.3, D1.6, D1.8); the main loop if none.
    pub iothread: Option<String>,
    /// `queue-size=`: descriptors of each queue.
    pub queue_size: u16,
}

/// `-netdev tap,...`: the host's side, which waits for its `-device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetdevSpec {
    /// The name that `-device` uses.
    pub id: String,
    /// The host's side.
    pub tap: TapSpec,
}

/// `-netdev id=,netdev=TAP,...` or `-netdev tap,id=,ifname=TAP,...`, written into `spec`.
///
/// # Errors
/// A mistake of the user's, by its key.
pub fn netdev(text: &str, spec: &mut VmSpec) -> Result<()> {
    let first = text.split(',').next().unwrap_or_default();
    let kind = first.strip_prefix("type=").unwrap_or(first);
    if OTHER_KINDS.contains(&kind) {
        return Err(Error::usage(format!(
            "-netdev {text}: a network of the kind {kind:?} is not supported; accepted: a tap, which `ip tuntap add dev TAP mode \
             tap` makes: -netdev tap,id=NAME,ifname=TAP with -device virtio-net-device,netdev=NAME"
        )));
    }
    let throttling = limit_keys(THROTTLING);
    let throttling = throttling.iter().map(String::as_str);
    let split = text.split(',').next().is_some_and(|word| word == "tap" || word.starts_with("type="));
    let keys: &[&str] = if split {
        &["type", "id", "ifname", "script", "downscript", "fd", "fds", "queues", "vhost", "vhostfd", "vhostfds"]
    } else {
        &["id", "netdev", "mac", "iothread", "fds", "queues", "queue-size", "vhost", "vhostfd", "vhostfds"]
    };
    let keys: Vec<&str> = keys.iter().copied().chain(throttling).collect();
    let pairs = KeyValues::read("-netdev", text, &keys, |place, item| (place == 0).then_some(("type", item)))?;
    if split {
        pairs.get("type", "tap", |kind| (kind == "tap").then_some(()))?;
        for script in ["script", "downscript"] {
            pairs.get(script, "no: the tap is set up before the start", |value| (value == "no").then_some(()))?;
        }
        spec.netdevs.push(NetdevSpec { id: id(&pairs)?, tap: tap(&pairs, "ifname", THROTTLING)? });
    } else {
        spec.nics.push(nic_of(&pairs, THROTTLING)?);
    }
    Ok(())
}

/// The NIC of these pairs, which say all of it and whose limits are spelled in that way.
pub(super) fn nic_of(pairs: &KeyValues<'_>, spelling: Spelling) -> Result<NicSpec> {
    Ok(NicSpec {
        id: id(pairs)?,
        tap: tap(pairs, "netdev", spelling)?,
        mac: mac(pairs)?,
        iothread: iothread(pairs)?,
        queue_size: queue_size(pairs)?,
    })
}

fn id(pairs: &KeyValues<'_>) -> Result<String> {
    pairs.require("id", "NAME (1 to 255 characters)", short_text)
}

/// `-device virtio-net-device,netdev=,id=,...`, written into `spec`.
///
/// # Errors
/// A mistake of the user's, by its key: a netdev that nobody made, or that another device has.
pub fn device(text: &str, spec: &mut VmSpec) -> Result<()> {
    let keys = ["driver", "netdev", "id", "mac", "iothread", "mq", "queue-size"];
    let pairs = KeyValues::read("-device", text, &keys, |place, item| (place == 0).then_some(("driver", item)))?;
    let netdev = pairs.require("netdev", "the id of a -netdev tap", short_text)?;
    let Some(place) = spec.netdevs.iter().position(|other| other.id == netdev) else {
        let ids: Vec<&str> = spec.netdevs.iter().map(|netdev| netdev.id.as_str()).collect();
        let accepted = if ids.is_empty() { format!("with -netdev tap,id={netdev},ifname=TAP") } else { ids.join(", ") };
        return Err(pairs.mistake(format!("no -netdev tap that is free has the id {netdev:?}; accepted: {accepted}")));
    };
    let tap = spec.netdevs[place].tap.clone();
    let several = pairs.get_bool("mq")?;
    if several == Some(false) && tap.queue_pairs > 1 {
        return Err(pairs.mistake(format!(
            "its netdev has {} pairs of queues, and mq=off asks for one; accepted: mq=on, or queues=1 there",
            tap.queue_pairs
        )));
    }
    let nic = NicSpec {
        id: pairs.get("id", "NAME (1 to 255 characters)", short_text)?.unwrap_or_else(|| netdev.clone()),
        tap,
        mac: mac(&pairs)?,
        iothread: iothread(&pairs)?,
        queue_size: queue_size(&pairs)?,
    };
    spec.netdevs.remove(place);
    spec.nics.push(nic);
    Ok(())
}

/// The host's side; the tap's name stands under `name`.
fn tap(pairs: &KeyValues<'_>, name: &str, spelling: Spelling) -> Result<TapSpec> {
    let accepted = format!("the name of a tap (1 to {MAX_TAP_BYTES} bytes, no / and no blank)");
    let tap_name = pairs.get(name, &accepted, |text| {
        let good = (1..=MAX_TAP_BYTES).contains(&text.len())
            && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
            && !matches!(text, "." | "..");
        good.then(|| text.to_owned())
    })?;
    let descriptors = |text: &str| {
        let fds = text.split(':').map(|fd| decimal(fd).and_then(|fd| i32::try_from(fd).ok()));
        fds.collect::<Option<Vec<i32>>>().filter(|fds| fds.len() <= MAX_QUEUE_PAIRS.into())
    };
    let accepted = format!("N or N:N:... (1 to {MAX_QUEUE_PAIRS} open descriptors of one tap)");
    let one = pairs.get("fd", "an open descriptor of a tap", |text| descriptors(text).filter(|fds| fds.len() == 1))?;
    let fds = pairs.get("fds", &accepted, descriptors)?;
    if one.is_some() && fds.is_some() {
        let (fd, fds) = (pairs.name("fd"), pairs.name("fds"));
        return Err(pairs.mistake(format!("{fd:?} and {fds:?} are one thing; accepted: one of the two")));
    }
    let fds = one.or(fds).unwrap_or_default();
    let mut sorted = fds.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|two| two[0] == two[1]) {
        return Err(pairs.mistake(format!("descriptor {} is named twice; accepted: once", twice[0])));
    }
    if tap_name.is_none() && fds.is_empty() {
        return Err(pairs.missing(name, &format!("{}, or {}", pairs.pair(name, "TAP"), pairs.pair("fds", "N"))));
    }
    let accepted = format!("a number of pairs of queues from 1 to {MAX_QUEUE_PAIRS}");
    let queues = pairs.get("queues", &accepted, |count| {
        let count = u16::try_from(decimal(count)?).ok()?;
        (1..=MAX_QUEUE_PAIRS).contains(&count).then_some(count)
    })?;
    if let Some(queues) = queues.filter(|&queues| !fds.is_empty() && usize::from(queues) != fds.len()) {
        return Err(pairs.mistake(format!(
            "{queues} pairs of queues, and {} descriptors; accepted: one descriptor a pair, and no \"queues\"",
            fds.len()
        )));
    }
    refuse_vhost(pairs)?;
    let queue_pairs = queues.unwrap_or(fds.len().max(1) as u16);
    Ok(TapSpec { name: tap_name, fds, queue_pairs, limits: limits(pairs, spelling, None)? })
}

/// The packets go through this program, which limits and counts them; the kernel's own way is not taken.
fn refuse_vhost(pairs: &KeyValues<'_>) -> Result<()> {
    const WHY: &str = "the kernel's vhost is not supported, packets go through this program";
    if pairs.get_bool("vhost")? == Some(true) {
        let (off, name) = (pairs.pair("vhost", "off"), pairs.name("vhost"));
        return Err(pairs.mistake(format!("{WHY}; accepted: {off}, or no {name:?}")));
    }
    for key in ["vhost-type", "vhostfd", "vhostfds"] {
        if pairs.get(key, "", Some)?.is_some() {
            return Err(pairs.mistake(format!("{WHY}; accepted: no {:?}", pairs.name(key))));
        }
    }
    Ok(())
}

fn mac(pairs: &KeyValues<'_>) -> Result<Option<Mac>> {
    let text = pairs.get("mac", "", Some)?;
    text.map(|text| Mac::read(text).map_err(|refusal| pairs.mistake(refusal))).transpose()
}

fn iothread(pairs: &KeyValues<'_>) -> Result<Option<String>> {
    pairs.get("iothread", "the id of an -iothread", short_text)
}

fn queue_size(pairs: &KeyValues<'_>) -> Result<u16> {
    let accepted = format!("a power of two from {QUEUE_SIZE} to {MAX_QUEUE_SIZE}");
    let size = pairs.get("queue-size", &accepted, |size| {
        let size = u16::try_from(decimal(size)?).ok()?;
        ((QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) && size.is_power_of_two()).then_some(size)
    })?;
    Ok(size.unwrap_or(QUEUE_SIZE))
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;
