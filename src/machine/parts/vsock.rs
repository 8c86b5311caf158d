//! From the specification of a vsock to its device: the socket that clients connect to is made here. Main thread.

use std::sync::Arc;

use crate::config::vsock::VsockSpec;
use crate::devices::vsock::{MAX_CONNECTIONS, Vsock};
use crate::error::{Context, Result};
use crate::machine::inventory;
use crate::memory::GuestRam;
use crate::sys::socket::PrivateListener;
use crate::sys::tune;

/// The device.
///
/// # Errors
/// The socket's path is taken, or its folder does not let us.
pub fn vsock(asked: &VsockSpec, ram: &Arc<GuestRam>) -> Result<(Vsock, inventory::Vsock)> {
    // A connection takes two.
    tune::allow_descriptors(2 * MAX_CONNECTIONS as u64);
    let listener = PrivateListener::bind(&asked.path).context(|| format!("-device vsock,id={}", asked.id))?;
    let device = Vsock::new(&asked.id, asked.cid, listener, ram.clone());
    let part = inventory::Vsock { spec: asked.clone(), counters: device.counters() };
    Ok((device, part))
}
