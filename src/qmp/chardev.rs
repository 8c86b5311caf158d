//! The shapes of `query-chardev`, `chardev-add`, `chardev-remove` and `chardev-resize`, as QEMU has them but for the last.

use crate::qmp::schema::{names, object};

object! {
    /// One chardev.
    pub struct ChardevInfo {
        /// Its id.
        "label" => label: String,
        /// Where its clients come, and whether one is there.
        "filename" => filename: String,
        /// Whether the guest's driver has the device.
        "frontend-open" => frontend_open: bool,
        /// Bytes of the guest's that were dropped because nobody read them, since the start. Ours.
        "lost-bytes" => lost_bytes: u64,
    }

    /// The arguments of `chardev-add`.
    pub struct ChardevAdd {
        /// The chardev's id.
        "id" => id: String,
        /// What it is.
        "backend" => backend: ChardevBackend,
    }

    /// What a chardev is.
    pub struct ChardevBackend {
        /// Its kind.
        "type" => kind: ChardevBackendKind,
        /// The rest.
        "data" => data: ChardevSocket,
    }

    /// A socket.
    pub struct ChardevSocket {
        /// Where.
        "addr" => addr: SocketAddressLegacy,
        /// Whether the monitor listens, and does not connect; yes unless given.
        "server" => server: Option<bool>,
        /// Whether it waits for a client; no unless given.
        "wait" => wait: Option<bool>,
    }

    /// Where a socket is.
    pub struct SocketAddressLegacy {
        /// Its family.
        "type" => kind: SocketAddressType,
        /// The rest.
        "data" => data: UnixSocketAddress,
    }

    /// Where a Unix socket is.
    pub struct UnixSocketAddress {
        /// Its path.
        "path" => path: String,
    }

    /// What `chardev-add` answers: nothing, for a socket.
    pub struct ChardevReturn {
        /// The name of a terminal that was made.
        "pty" => pty: Option<String>,
    }

    /// The arguments of `chardev-remove`.
    pub struct ChardevRemove {
        /// The chardev's id.
        "id" => id: String,
    }

    /// The arguments of `chardev-resize`. Ours.
    pub struct ChardevResize {
        /// The chardev's id.
        "id" => id: String,
        /// Characters of a line.
        "cols" => columns: u16,
        /// Lines.
        "rows" => rows: u16,
    }
}

names! {
    /// The kinds of chardev.
    pub enum ChardevBackendKind {
        /// A socket.
        "socket" => Socket,
    }

    /// The families of sockets.
    pub enum SocketAddressType {
        /// Unix sockets.
        "unix" => Unix,
    }
}
