//! The answer to `query-vsock`: what the vsock's thread publishes, in QMP's shape. Main thread.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::config::vsock::Carrier;
use crate::devices::vsock::VsockCounters;
use crate::machine::Vsock;
use crate::qmp::vsock::{VsockBackend, VsockInfo};

/// One vsock as a client sees it.
pub(super) fn info(vsock: &Vsock) -> VsockInfo {
    let (backend, path) = match &vsock.spec.carrier {
        Carrier::Sockets(path) => (VsockBackend::Sockets, Some(path)),
        Carrier::Kernel(_) => (VsockBackend::Kernel, None),
    };
    let count = |of: fn(&VsockCounters) -> &AtomicU64| vsock.counters.as_deref().map(|all| of(all).load(Relaxed));
    VsockInfo {
        id: vsock.spec.id.clone(),
        guest_cid: vsock.spec.cid,
        backend,
        uds_path: path.map(|path| path.display().to_string()),
        connections: count(|all| &all.open),
        opened: count(|all| &all.opened),
        refused: count(|all| &all.refused),
        rx_bytes: count(|all| &all.to_guest),
        tx_bytes: count(|all| &all.from_guest),
    }
}
