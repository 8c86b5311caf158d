//! `-device TYPE,...`: each type's keys to its part of a [`VmSpec`].
//!
//! A type is an arm here; what its keys mean stands with the kind of device that it is. Main thread, before anything is
//! started.

use super::spec::VmSpec;
use super::{chardev, disk, net, options, rng, vsock};
use crate::error::{Error, Result};

/// The types there are, for who asks for another.
const TYPES: [&str; 8] = [
    "vhost-vsock-device",
    "virtconsole",
    "virtio-balloon-device",
    "virtio-blk-device",
    "virtio-net-device",
    "virtio-rng-device",
    "virtio-serial-device",
    "vsock",
];
/// Types of the original that are not here, and what takes their place.
const ELSEWHERE: [(&str, &str); 2] = [
    ("vhost-user-fs-device", "a disk image, or a file system over the network"),
    ("virtio-blk-pci", "virtio-blk-device: there is no PCI, all devices are virtio-mmio"),
];

/// `-device TYPE[,KEY=VALUE,...]`, written into `spec`; `named` are the drives that devices have named.
///
/// # Errors
/// A mistake of the user's: an unknown type, or what is wrong with its keys.
pub fn device(text: &str, spec: &mut VmSpec, named: &mut Vec<String>) -> Result<()> {
    let kind = text.split(',').next().unwrap_or_default();
    match kind.trim_start_matches("driver=") {
        "virtconsole" => chardev::virtconsole(text, spec)?,
        "virtio-balloon-device" => spec.balloons.push(options::balloon_device(text)?),
        "virtio-blk-device" => disk::device(text, spec, named)?,
        "virtio-net-device" => net::device(text, spec)?,
        "virtio-serial-device" => chardev::virtio_serial(text)?,
        "virtio-rng-device" => spec.rngs.push(rng::device(text, &spec.rng_sources)?),
        "vhost-vsock-device" | "vsock" => spec.vsocks.push(vsock::device(text)?),
        _ => {
            let elsewhere = ELSEWHERE.iter().find(|(name, _)| *name == kind).map(|(_, instead)| (*instead).to_owned());
            let accepted = elsewhere.unwrap_or_else(|| TYPES.join(", "));
            return Err(Error::usage(format!("-device {text}: no such type {kind:?}; accepted: {accepted}")));
        }
    }
    Ok(())
}
