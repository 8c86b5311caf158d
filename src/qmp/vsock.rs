//! The shape of what is told of a vsock. Ours: QEMU tells nothing of its own.

use crate::qmp::schema::object;

object! {
    /// `query-vsock`.
    pub struct VsockInfo {
        /// The device.
        "id" => id: String,
        /// The guest's context id.
        "guest-cid" => guest_cid: u32,
        /// Where clients connect.
        "uds-path" => uds_path: String,
        /// Connections at the moment, clients that have not said a port among them.
        "connections" => connections: u64,
        /// Connections that were open on both sides, since the start.
        "opened" => opened: u64,
        /// Connections that were refused, by either side or for want of room.
        "refused" => refused: u64,
        /// Bytes of data that went to the guest.
        "rx-bytes" => rx_bytes: u64,
        /// Bytes of data that came from it.
        "tx-bytes" => tx_bytes: u64,
    }
}
