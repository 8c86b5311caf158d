//! The control queue of a NIC with several pairs of queues (virtio 1.2, section 5.1.6.5): how many the driver uses.
//!
//! There is one command, because nothing else is offered: no filters, for the tap hands over what is the guest's, and no
//! change of offloads. The NIC's thread.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_F_MQ};
use vm_memory::Bytes;

use super::Net;
use crate::virtio::{Chain, Verdict, gather};

/// The answers (section 5.1.6.5).
const OK: u8 = 0;
const ERROR: u8 = 1;

impl Net {
    /// One command: class, command, and its data; its answer is one byte.
    pub(super) fn control(&mut self, chain: &Chain, now_ns: u64) -> Verdict {
        let mut command = [0; 4];
        let len = gather(&self.ram, chain.readable(), 0, &mut command);
        let asked = [command[0], command[1]].map(u32::from);
        let pairs = usize::from(u16::from_le_bytes([command[2], command[3]]));
        let known = len == command.len() && asked == [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET];
        let good = known && self.has(VIRTIO_NET_F_MQ) && (1..=self.pairs.len()).contains(&pairs);
        if good {
            self.use_pairs(pairs);
        }
        let answer = if good { OK } else { ERROR };
        let place = chain.writable().iter().find(|buffer| buffer.len > 0);
        match place.map(|buffer| self.ram.write_obj(answer, buffer.address)) {
            Some(Ok(())) => Verdict::Used(1),
            _ => {
                self.log.warn(now_ns, &self.setup.id, &"a control command without a place for its answer");
                Verdict::Used(0)
            }
        }
    }
}
