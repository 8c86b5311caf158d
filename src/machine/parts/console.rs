//! From a console's specification to its device and its socket. Main thread.

use std::sync::Arc;

use crate::config::chardev::ConsoleSpec;
use crate::config::spec::VmSpec;
use crate::devices::console::Console;
use crate::error::{Context, Error, Result};
use crate::machine::inventory;
use crate::memory::GuestRam;
use crate::sys::socket::PrivateListener;

/// The socket of a console.
pub fn listen(asked: &ConsoleSpec, spec: &VmSpec) -> Result<PrivateListener> {
    let chardev = spec.chardevs.iter().find(|chardev| chardev.id == asked.chardev);
    let chardev = chardev.ok_or_else(|| Error::usage(format!("chardev \"{}\" is missing", asked.chardev)))?;
    PrivateListener::bind(&chardev.path).context(|| format!("chardev \"{}\"", chardev.id))
}

/// The console, whose clients come to `listener`.
pub fn console(asked: &ConsoleSpec, listener: PrivateListener, ram: &Arc<GuestRam>) -> (Console, inventory::Console) {
    let path = listener.path().to_path_buf();
    let device = Console::new(&asked.id, ram.clone(), listener);
    let part = inventory::Console {
        chardev: asked.chardev.clone(),
        path: Some(path),
        state: device.state(),
        open: device.open(),
        orders: device.orders(),
    };
    (device, part)
}
