//! A QMP socket: where clients connect.
//!
//! The socket's file belongs to this process: it is made with mode 0600, a dead one is replaced, one behind which
//! somebody listens is left alone, and ours is removed at the end, if it is still ours. A handler of the main loop.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::warn;

use super::run::Message;
use super::session::Session;
use crate::error::{Context, Error, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Key, Sender};
use crate::sys::socket;

/// Clients of one socket at a time. More are let go at once: each costs descriptors and up to half a megabyte.
const MAX_CLIENTS: usize = 32;
/// How long nobody is accepted after one could not be, for want of descriptors for example.
const REST_NS: u64 = 1_000_000_000;
const SOCKET: u32 = 0;
const REST: u32 = 1;

/// One listening socket.
pub struct Listener {
    name: String,
    path: PathBuf,
    /// Device and inode of the file that was made, so that another's is never removed.
    file: (u64, u64),
    listener: UnixListener,
    /// The watch on the socket, and the timer that ends a rest.
    watches: Option<(Key, Key)>,
    control: Sender<Message>,
    tickets: Arc<()>,
}

impl Listener {
    /// Makes the socket. Before any thread is started.
    ///
    /// # Errors
    /// The path is taken by a live socket or by something else, or its folder does not let us.
    pub fn bind(path: &Path, control: Sender<Message>) -> Result<Self> {
        let name = format!("QMP socket {}", path.display());
        let listener = listen(path).map_err(|e| Error::host(name.clone()).because(e))?;
        let file = fs::symlink_metadata(path).context(|| name.clone())?;
        listener.set_nonblocking(true).context(|| name.clone())?;
        let file = (file.dev(), file.ino());
        Ok(Listener { name, path: path.to_path_buf(), file, listener, watches: None, control, tickets: Arc::new(()) })
    }

    /// Leaves the socket alone for a while: another try at once would be in vain, and a flood of the log.
    fn rest(&self, cx: &mut Cx<'_>) -> Result<Flow> {
        if let Some((socket, rest)) = self.watches {
            cx.set_interest(socket, Interest::NONE)?;
            cx.arm(rest, cx.now_ns() + REST_NS)?;
        }
        Ok(Flow::Done)
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    match socket::listen_private(path) {
        Err(e) if e.kind() == ErrorKind::AddrInUse => {}
        listener => return Ok(listener?),
    }
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(Error::host("the path exists and is no socket: choose another or remove it"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::host("another process listens there: end it, or choose another path")),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            // Left behind by a process that was killed.
            fs::remove_file(path)?;
            Ok(socket::listen_private(path)?)
        }
        Err(e) => Err(Error::host("the socket that exists there cannot be asked who listens").because(e)),
    }
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        Error::host(e.to_string())
    }
}

impl Handler for Listener {
    fn name(&self) -> &str {
        &self.name
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.watches = Some((cx.watch(&self.listener, Interest::READ, SOCKET)?, cx.timer(REST)?));
        Ok(())
    }

    /// Takes one client a call; while more are waiting the socket stays ready.
    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        if event.tag == REST {
            if let Some((socket, _)) = self.watches {
                cx.set_interest(socket, Interest::READ)?;
            }
            return Ok(Flow::Done);
        }
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(Flow::Idle);
            }
            Err(e) => {
                warn!("{}: accept a client: {e}", self.name);
                return self.rest(cx);
            }
        };
        if Arc::strong_count(&self.tickets) > MAX_CLIENTS {
            warn!("{}: {MAX_CLIENTS} clients are connected; another was let go", self.name);
            return Ok(Flow::Done);
        }
        let added = stream
            .set_nonblocking(true)
            .context(|| self.name.clone())
            .and_then(|()| cx.add(Box::new(Session::new(stream, self.control.clone(), self.tickets.clone()))));
        if let Err(e) = added {
            // The client is let go; the next may have more luck.
            warn!("{}: {e}", self.name);
            return self.rest(cx);
        }
        Ok(Flow::Done)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            warn!("{}: remove: {e}", self.name);
        }
    }
}
