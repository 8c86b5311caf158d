//! virtio-vsock (virtio 1.2, section 5.10) whose packets the host's kernel moves: its module vhost_vsock.
//!
//! The rings of packets are lent to the kernel whenever the device runs; the kernel's calls are `sys::vhost`'s, and when they
//! are made is the worker's to say. What is left here is the context id and the queue of events, of which there are none: its
//! buffers are kept. How the packets are carried without the kernel is `vsock`. Runs in the main loop (rule D1.3), and no
//! call waits longer than the kernel takes for the batch that it is at.

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use crate::error::{Context, Error, Result};
use crate::event::{Cx, Event};
use crate::sys::vhost::{self, Vring};
use crate::virtio::{Chain, Completions, Device, Lent, Page, RingSetup, Verdict};

/// VIRTIO_VSOCK_F_STREAM (section 5.10.3): what the kernel has always carried, and has no bit for.
const F_STREAM: u64 = 1;
/// VIRTIO_VSOCK_F_SEQPACKET: offered where the kernel does.
const F_SEQPACKET: u64 = 1 << 1;
/// Packets to the guest, packets from it, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// The device.
pub struct VhostVsock {
    id: String,
    cid: u32,
    vhost: vhost::VhostVsock,
    /// What the kernel knows.
    known: u64,
    /// What the driver has agreed on.
    agreed: u64,
}

impl VhostVsock {
    /// A device called `id` for the guest with that context id, which the kernel has been told of.
    ///
    /// # Errors
    /// The kernel does not say what it knows.
    pub fn new(id: &str, cid: u32, vhost: vhost::VhostVsock) -> Result<Self> {
        let known = vhost.features().context(|| format!("device \"{id}\": ask the kernel for its features"))?;
        Ok(VhostVsock { id: id.to_owned(), cid, vhost, known, agreed: 0 })
    }
}

/// A ring in the kernel's terms.
fn ring<'a>(lent: &Lent<'a>) -> Vring<'a> {
    let RingSetup { size, descriptors, available, used, .. } = lent.setup;
    Vring { size, descriptors, available, used, next: lent.next, kick: lent.kick, call: lent.call, broken: lent.broken }
}

impl Device for VhostVsock {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM | self.known & F_SEQPACKET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Section 5.10.4.
    fn write_config(&self, page: &Page) {
        page.set_config(0, &u64::from(self.cid).to_le_bytes());
    }

    fn begin(&mut self, features: u64, _page: &Page, _now_ns: u64) {
        self.agreed = features;
    }

    fn lends(&self) -> usize {
        vhost::QUEUES
    }

    fn hand_over(&mut self, rings: &[Lent<'_>]) -> Result<()> {
        let [to_guest, from_guest] = rings else {
            return Err(Error::host(
                "the driver has set up one of the queues 0 and 1, and the kernel serves both or none",
            ));
        };
        let started = self.vhost.start(self.agreed & self.known, &[ring(to_guest), ring(from_guest)]);
        started.context(|| "hand the queues to the host's kernel")
    }

    fn take_back(&mut self) -> Result<Vec<(usize, u16)>> {
        let next = self.vhost.stop().context(|| "take the queues back from the host's kernel")?;
        Ok(next.into_iter().enumerate().collect())
    }

    fn attach(&mut self, _cx: &mut Cx<'_>) -> Result<()> {
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        false
    }

    /// Events tell of migration, of which there is none: the buffers are kept.
    fn process(&mut self, _queue: usize, _chain: &Chain, _now_ns: u64) -> Verdict {
        Verdict::Pending
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {}

    /// Buffers for events keep nobody from a pause or a reset.
    fn in_flight(&self) -> usize {
        0
    }
}
