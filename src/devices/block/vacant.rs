//! A disk slot in which no disk is: zero sectors, until a hot-plug puts a drive in its place.
//!
//! It offers what any drive that comes later needs, because a driver agrees on features once. Each request is answered at
//! once with VIRTIO_BLK_S_IOERR, but for the question after a serial number, which is empty. It owns no descriptor and next
//! to no memory. Runs in the loop of its slot.
//!
//! After an unplug the driver reads a size of one sector first, and then of none. Linux sends udev an event for the first, and
//! udev removes the disk's links. It also reads that sector, so the read returns zeros and no error.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::Bytes;

use super::{Header, ID_BYTES, QUEUE_SIZE, SECTOR, features, write_config, write_interim_config};
use crate::disk::Topology;
use crate::error::Result;
use crate::event::{Cx, Event};
use crate::memory::GuestRam;
use crate::virtio::{Chain, Completions, Device, FaultLog, Page, Verdict};

/// A disk that is not there.
pub struct Vacant {
    id: String,
    ram: Arc<GuestRam>,
    /// The driver has read a size of one sector, and not yet that there is none.
    has_sector: bool,
    log: FaultLog,
}

impl Vacant {
    /// The stand-in of the disk slot with that number.
    pub fn new(slot: usize, ram: Arc<GuestRam>) -> Vacant {
        Vacant { id: format!("disk slot {slot:#x}"), ram, has_sector: false, log: FaultLog::default() }
    }

    /// Writes zeros where the chain wants data, at most so many. The bytes written.
    fn write_zeros(&self, chain: &Chain, most: usize) -> Option<u32> {
        let mut left = most;
        let (last, others) = chain.writable().split_last()?;
        let data = others.iter().map(|buffer| (buffer.address, buffer.len));
        for (address, len) in data.chain([(last.address, last.len.saturating_sub(1))]) {
            let len = left.min(len as usize);
            if len > 0 {
                self.ram.write_slice(&[0; SECTOR as usize][..len], address).ok()?;
                left -= len;
            }
        }
        Some((most - left) as u32)
    }
}

impl Device for Vacant {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        features(false)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn write_config(&self, page: &Page) {
        write_config(page, 0, &Topology::SECTORS);
    }

    fn write_interim_config(&self, page: &Page) -> bool {
        write_interim_config(page, 0)
    }

    fn config_read(&mut self, whole: bool) {
        self.has_sector = !whole;
    }

    fn reset(&mut self) {
        self.has_sector = false;
    }

    fn attach(&mut self, _cx: &mut Cx<'_>) -> Result<()> {
        Ok(())
    }

    fn ready(&mut self, _event: Event, _cx: &mut Cx<'_>) -> bool {
        false
    }

    fn process(&mut self, _queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let Some(header) = Header::read(&self.ram, chain) else {
            self.log.warn(now_ns, &self.id, &"a request without a header, or without a place for its status");
            return Verdict::Used(0);
        };
        // The serial number is empty; the sector is what is read of it alone.
        let wanted = chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum::<u64>();
        let zeros = match header.kind {
            VIRTIO_BLK_T_GET_ID => Some(ID_BYTES),
            VIRTIO_BLK_T_IN if self.has_sector && header.sector == 0 && wanted == SECTOR + 1 => Some(SECTOR as usize),
            _ => None,
        };
        let (status, data) = match (zeros.map(|most| self.write_zeros(chain, most)), header.kind) {
            (Some(Some(bytes)), _) => (VIRTIO_BLK_S_OK, bytes),
            (Some(None), _)
            | (
                None,
                VIRTIO_BLK_T_IN
                | VIRTIO_BLK_T_OUT
                | VIRTIO_BLK_T_FLUSH
                | VIRTIO_BLK_T_DISCARD
                | VIRTIO_BLK_T_WRITE_ZEROES,
            ) => (VIRTIO_BLK_S_IOERR, 0),
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        Verdict::Used(header.answer(&self.ram, status, data))
    }

    fn reap(&mut self, _cx: &mut Cx<'_>, _completions: &mut Completions<'_>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn is_vacant(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "announce_test.rs"]
mod announce_test;

#[cfg(test)]
#[path = "vacant_test.rs"]
mod tests;
