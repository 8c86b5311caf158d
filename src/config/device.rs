//! `-device TYPE,...`: each type's keys to its part of a [`VmSpec`].
//!
//! A type is an arm here; what its keys mean stands with the kind of device that it is. Main thread, before anything is
//! started.

use super::spec::VmSpec;
use super::{chardev, net, rng, vsock};
use crate::error::{Error, Result};

/// The types there are, for who asks for another.
const TYPES: [&str; 5] = ["virtconsole", "virtio-net-device", "virtio-rng-device", "virtio-serial-device", "vsock"];

/// `-device TYPE[,KEY=VALUE,...]`, written into `spec`.
///
/// # Errors
/// A mistake of the user's: an unknown type, or what is wrong with its keys.
pub fn device(text: &str, spec: &mut VmSpec) -> Result<()> {
    let kind = text.split(',').next().unwrap_or_default();
    match kind.trim_start_matches("driver=") {
        "virtconsole" => chardev::virtconsole(text, spec)?,
        "virtio-net-device" => net::device(text, spec)?,
        "virtio-serial-device" => chardev::virtio_serial(text)?,
        "virtio-rng-device" => spec.rngs.push(rng::device(text, &spec.rng_sources)?),
        "vsock" => spec.vsocks.push(vsock::device(text)?),
        _ => {
            let accepted = TYPES.join(", ");
            return Err(Error::usage(format!("-device {text}: no such type {kind:?}; accepted: {accepted}")));
        }
    }
    Ok(())
}
