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

/// What takes the place of a type that others have.
fn instead_of(kind: &str) -> Option<String> {
    match kind.strip_suffix("-pci") {
        Some(name) => Some(format!("{name}-device: there is no PCI, all devices are virtio-mmio")),
        None => (kind == "vhost-user-fs-device").then(|| "a disk image, or a file system over the network".to_owned()),
    }
}

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
            let accepted = instead_of(kind).unwrap_or_else(|| TYPES.join(", "));
            return Err(Error::usage(format!("-device {text}: no such type {kind:?}; accepted: {accepted}")));
        }
    }
    Ok(())
}
