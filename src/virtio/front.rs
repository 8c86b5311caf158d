//! `Front`: the vCPU half of a virtio device: selectors, addresses, and the status machine (virtio 1.2, section 3.1).
//!
//! It lives in a bus slot and runs on whichever vCPU touched the device's registers. It knows the device as a few
//! numbers only; what the driver agreed on is posted to the worker. The configuration of a queue is frozen from
//! DRIVER_OK to reset. The register layout is in `mmio`.

use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::command::{Activation, Command};
use super::device::Device;
use super::fault::FaultLog;
use super::interrupt::Interrupt;
use super::page::{CONFIG_BYTES, Page};
use super::ring::{Ring, RingSetup};
use crate::error::Result;
use crate::event::{Done, Sender, Signal};
use crate::memory::GuestRam;
use crate::sys::clock;

/// What the transport and the ring offer with every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The order in which a driver raises the status bits; each needs those before it.
const LADDER: [u32; 4] =
    [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK];

/// Makes the ioeventfd through which the driver kicks a queue.
pub type KickMaker = Box<dyn FnMut(u32) -> Result<Signal> + Send>;

/// The registers of one device.
pub struct Front {
    name: String,
    pub(super) kind: u32,
    pub(super) page: Arc<Page>,
    interrupt: Interrupt,
    worker: Sender<Command>,
    ram: Arc<GuestRam>,
    make_kick: KickMaker,
    queue_max: Vec<u16>,
    pub(super) offered: u64,
    /// The bytes of the configuration space that the driver may write.
    pub(super) driver_writes: &'static [Range<usize>],
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    agreed: u64,
    status: u32,
    pub(super) queue_sel: u32,
    queues: Vec<RingSetup>,
    log: FaultLog,
}

impl Front {
    /// The front of `device`, whose worker listens to `worker`.
    pub fn new(
        device: &dyn Device,
        page: Arc<Page>,
        interrupt: Interrupt,
        worker: Sender<Command>,
        ram: Arc<GuestRam>,
        make_kick: KickMaker,
    ) -> Self {
        let queue_max = device.queue_sizes().to_vec();
        Front {
            name: device.id().to_string(),
            kind: device.kind(),
            page,
            interrupt,
            worker,
            ram,
            make_kick,
            queues: queue_max.iter().map(|&size| RingSetup { size, ..RingSetup::default() }).collect(),
            queue_max,
            offered: device.features() | TRANSPORT_FEATURES,
            driver_writes: device.driver_writes(),
            device_features_sel: 0,
            driver_features_sel: 0,
            agreed: 0,
            status: 0,
            queue_sel: 0,
            log: FaultLog::default(),
        }
    }

    fn live(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// The device status as the driver reads it.
    pub(super) fn status(&self) -> u32 {
        if self.page.needs_reset() { self.status | VIRTIO_CONFIG_S_NEEDS_RESET } else { self.status }
    }

    /// The configuration's generation. The worker may be waiting for the driver to have read what it announced.
    pub(super) fn read_generation(&self) -> u32 {
        let generation = self.page.generation();
        if self.page.generation_read() {
            // A worker that is gone announces nothing more.
            let _ = self.worker.send(Command::ConfigRead(generation));
        }
        generation
    }

    /// The selected queue's greatest size; zero where there is no such queue.
    pub(super) fn queue_max(&self) -> u16 {
        self.queue_max.get(self.queue_sel as usize).copied().unwrap_or(0)
    }

    /// The selected queue's registers.
    pub(super) fn queue(&self) -> Option<&RingSetup> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue's registers for a write; none while the device is live.
    pub(super) fn queue_mut(&mut self) -> Option<&mut RingSetup> {
        if self.live() { None } else { self.queues.get_mut(self.queue_sel as usize) }
    }

    /// Half of the driver's features; ignored once they are agreed on.
    pub(super) fn set_driver_features(&mut self, half: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            match self.driver_features_sel {
                0 => self.agreed = self.agreed & !0xffff_ffff | u64::from(half),
                1 => self.agreed = self.agreed & 0xffff_ffff | u64::from(half) << 32,
                _ => {}
            }
        }
    }

    /// A write to the device status: one rung up the ladder, FAILED, or zero, which is a reset.
    pub(super) fn set_status(&mut self, status: u32) {
        if status == 0 {
            self.reset();
            return;
        }
        if status & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            return;
        }
        let raised = status & !self.status;
        for (rung, &bit) in LADDER.iter().enumerate() {
            let below = LADDER[..rung].iter().all(|bit| self.status & bit != 0);
            if raised & bit == 0 || !below || self.status & VIRTIO_CONFIG_S_FAILED != 0 {
                continue;
            }
            match bit {
                // Features that were not offered leave the bit clear, which is how the driver learns of it
                // (section 3.1.1, step 6). A driver without VERSION_1 is a legacy one.
                VIRTIO_CONFIG_S_FEATURES_OK
                    if self.agreed & !self.offered != 0 || self.agreed & 1 << VIRTIO_F_VERSION_1 == 0 => {}
                VIRTIO_CONFIG_S_DRIVER_OK => {
                    self.status |= bit;
                    self.activate();
                }
                _ => self.status |= bit,
            }
        }
    }

    /// Tells the worker of the configuration, or the driver that it will not do.
    fn activate(&mut self) {
        match self.activation() {
            Ok(activation) => {
                // A worker that is gone has failed and said so; its device stays silent.
                let _ = self.worker.send(Command::Activate(activation));
            }
            Err(why) => {
                self.log.warn(clock::monotonic_ns(), &self.name, &why);
                self.page.set_needs_reset();
                self.interrupt.config();
            }
        }
    }

    fn activation(&mut self) -> std::result::Result<Activation, String> {
        let event_idx = self.agreed & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = Vec::with_capacity(self.queues.len());
        let mut kicks = Vec::with_capacity(self.queues.len());
        for (queue, (setup, &max)) in self.queues.iter().zip(&self.queue_max).enumerate() {
            if !setup.ready {
                rings.push(None);
                continue;
            }
            let ring = Ring::new(setup, max, event_idx, self.ram.clone())
                .map_err(|fault| format!("queue {queue}: {fault}"))?;
            rings.push(Some(ring));
            let queue = queue as u32;
            // The host's doing, and yet logged at the guest's rate: it may ask again as often as it likes.
            let kick = (self.make_kick)(queue).map_err(|e| e.to_string())?;
            kicks.push((queue, kick));
        }
        Ok(Activation { features: self.agreed, rings, kicks })
    }

    /// Back to the beginning. The one place where a vCPU waits for a loop (invariant I2): when this returns, nothing
    /// of the old life touches guest memory any more.
    fn reset(&mut self) {
        if self.live() {
            let (done, waiter) = Done::waited();
            if self.worker.send(Command::Reset(done)).is_ok() {
                // Lost: the worker is gone, and with it all that was in flight.
                let _ = waiter.wait();
            }
        }
        self.reset_registers();
    }

    /// Every register as at power-on. If the device was live, its worker has been reset.
    pub(super) fn reset_registers(&mut self) {
        self.page.reset();
        for bytes in self.driver_writes {
            self.page.write(bytes.start, &[0; CONFIG_BYTES][bytes.clone()]);
        }
        self.status = 0;
        self.agreed = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        for (setup, &size) in self.queues.iter_mut().zip(&self.queue_max) {
            *setup = RingSetup { size, ..RingSetup::default() };
        }
    }
}
