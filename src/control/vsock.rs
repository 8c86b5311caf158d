//! The answer to `query-vsock`: what the vsock's thread publishes, in QMP's shape. Main thread.

use std::sync::atomic::Ordering::Relaxed;

use crate::machine::Vsock;
use crate::qmp::vsock::VsockInfo;

/// One vsock as a client sees it.
pub(super) fn info(vsock: &Vsock) -> VsockInfo {
    let counters = &vsock.counters;
    VsockInfo {
        id: vsock.spec.id.clone(),
        guest_cid: vsock.spec.cid,
        uds_path: vsock.spec.path.display().to_string(),
        connections: counters.open.load(Relaxed),
        opened: counters.opened.load(Relaxed),
        refused: counters.refused.load(Relaxed),
        rx_bytes: counters.to_guest.load(Relaxed),
        tx_bytes: counters.from_guest.load(Relaxed),
    }
}
