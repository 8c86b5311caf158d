//! `query-chardev`, `chardev-add`, `chardev-remove` and `chardev-resize`: the sockets of the consoles.
//!
//! A console is there from the start; what clients connect to may be taken from it and given to it again. The socket is
//! made here and handed to the console, which lives in the same loop. Main thread.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::answers;
use crate::config::spec::MAX_SOCKET_PATH_BYTES;
use crate::devices::console::Order;
use crate::error::{Error, Kind, Result};
use crate::event::{Done, Lost};
use crate::machine::Console;
use crate::qmp::chardev::{ChardevAdd, ChardevInfo, ChardevResize};
use crate::sys::socket::PrivateListener;

/// All chardevs.
pub(super) fn query(consoles: &[Console]) -> Result<Value> {
    let infos = consoles.iter().map(|console| {
        let connected = console.state.connected.load(Relaxed);
        let filename = match &console.path {
            None => "null".into(),
            // QEMU's words.
            Some(path) if connected => format!("unix:{},server=on", path.display()),
            Some(path) => format!("disconnected:unix:{},server=on", path.display()),
        };
        ChardevInfo {
            label: console.chardev.clone(),
            filename,
            frontend_open: console.open.load(Relaxed),
            lost_bytes: console.state.lost_bytes.load(Relaxed),
        }
    });
    answers::value(infos.collect::<Vec<_>>())
}

/// Has a console whose chardev was removed listen at a socket.
pub(super) fn add(asked: &ChardevAdd, consoles: &mut [Console], done: Done<Result<Value>>) {
    match plan(asked, consoles) {
        Ok((console, listener)) => {
            console.path = Some(listener.path().to_path_buf());
            listen(console, Some(listener), done);
        }
        Err(error) => done.end(Err(error)),
    }
}

fn plan<'c>(asked: &ChardevAdd, consoles: &'c mut [Console]) -> Result<(&'c mut Console, PrivateListener)> {
    let ChardevAdd { id, backend } = asked;
    let path = &backend.data.addr.data.path;
    if backend.data.server == Some(false) || backend.data.wait == Some(true) {
        return Err(Error::usage(
            "Parameter 'backend' takes a socket on which the monitor listens without waiting; accepted: server true (or \
             absent) and wait false (or absent)",
        ));
    }
    if path.is_empty() || path.len() > MAX_SOCKET_PATH_BYTES {
        let len = path.len();
        return Err(Error::usage(format!(
            "Parameter 'backend.data.addr.data.path' has {len} bytes; accepted: 1 to {MAX_SOCKET_PATH_BYTES}"
        )));
    }
    let removed: Vec<&str> =
        consoles.iter().filter(|console| console.path.is_none()).map(|console| console.chardev.as_str()).collect();
    let removed = if removed.is_empty() { "none at the moment".into() } else { removed.join(", ") };
    let Some(console) = consoles.iter_mut().find(|console| console.chardev == *id) else {
        return Err(Error::new(
            Kind::NotFound,
            format!(
                "No console has the chardev '{id}', and a console cannot be plugged into a machine that runs; accepted: the \
                 chardev of a console from which it was removed ({removed})"
            ),
        ));
    };
    if console.path.is_some() {
        return Err(Error::usage(format!("Chardev '{id}' already exists; accepted: after chardev-remove")));
    }
    let listener = PrivateListener::bind(Path::new(path))?;
    Ok((console, listener))
}

/// Takes the chardev from its console, which goes on without.
pub(super) fn remove(id: &str, consoles: &mut [Console], done: Done<Result<Value>>) {
    match consoles.iter_mut().find(|console| console.chardev == id && console.path.is_some()) {
        Some(console) => {
            console.path = None;
            listen(console, None, done);
        }
        None => done.end(Err(not_found(id))),
    }
}

/// Tells the guest how large the terminal is.
pub(super) fn resize(asked: &ChardevResize, consoles: &[Console]) -> Result<Value> {
    let console = consoles.iter().find(|console| console.chardev == asked.id).ok_or_else(|| not_found(&asked.id))?;
    let order = Order::Resize { columns: asked.columns, rows: asked.rows };
    console.orders.send(order).map_err(|_| gone(&asked.id))?;
    Ok(json!({}))
}

/// The answer is the console's: it comes when that is so.
fn listen(console: &Console, listener: Option<PrivateListener>, done: Done<Result<Value>>) {
    let id = console.chardev.clone();
    let listens = Done::posted(move |listens: std::result::Result<Result<()>, Lost>| {
        done.end(listens.unwrap_or_else(|Lost| Err(gone(&id))).map(|()| json!({})));
    });
    // A console that is gone drops the slip, which is posted all the same.
    let _ = console.orders.send(Order::Listen(listener, listens));
}

fn not_found(id: &str) -> Error {
    Error::new(Kind::NotFound, format!("Chardev '{id}' not found"))
}

fn gone(id: &str) -> Error {
    Error::new(Kind::NotActive, format!("The console of chardev '{id}' has failed and is not served any more"))
}
