//! The shape of what is told of a vsock. Ours: QEMU tells nothing of its own.

use crate::qmp::schema::{names, object};

names! {
    /// Who carries a guest's streams.
    pub enum VsockBackend {
        /// The monitor, over Unix sockets.
        "sockets" => Sockets,
        /// The host's kernel.
        "kernel" => Kernel,
    }
}

object! {
    /// `query-vsock`.
    pub struct VsockInfo {
        /// The device.
        "id" => id: String,
        /// The guest's context id.
        "guest-cid" => guest_cid: u32,
        /// Who carries its streams.
        "backend" => backend: VsockBackend,
        /// Where clients connect; absent, like all that follows, where the kernel carries the streams, which does not count.
        "uds-path" => uds_path: Option<String>,
        /// Connections at the moment, clients that have not said a port among them.
        "connections" => connections: Option<u64>,
        /// Connections that were open on both sides, since the start.
        "opened" => opened: Option<u64>,
        /// Connections that were refused, by either side or for want of room.
        "refused" => refused: Option<u64>,
        /// Bytes of data that went to the guest.
        "rx-bytes" => rx_bytes: Option<u64>,
        /// Bytes of data that came from it.
        "tx-bytes" => tx_bytes: Option<u64>,
    }
}
