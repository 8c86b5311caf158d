//! Small virtio drivers: the registers of virtio-mmio version 2, one split ring, a block device, a pool of requests,
//! a NIC, a vsock.

pub mod blk;
pub mod mmio;
pub mod net;
pub mod pool;
pub mod ring;
pub mod vsock;
