//! `Board`: the eleven slots that virtio devices are plugged into while a machine is being built.
//!
//! Plugging cuts a device in two: its front into the MMIO bus, its worker into a loop; between them a page, a channel
//! and an interrupt line. What a device does is nothing to the board. Main thread, before the guest runs.

use std::sync::{Arc, Mutex};

use super::layout::{self, VirtioSlot};
use crate::bus::Range;
use crate::config::spec::MAX_VIRTIO_DEVICES;
use crate::error::{Error, Result};
use crate::event::{Done, EventLoop, Key, Remote, Sender, Signal, Waiter, channel};
use crate::kvm::irq::Irq;
use crate::kvm::kick::Kick;
use crate::kvm::vm::Vm;
use crate::memory::GuestRam;
use crate::virtio::{Command, Device, Front, Interrupt, Page, Worker};

/// Where a device's notification register lies in its slot (virtio 1.2, section 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// The slots, filled from the first on.
pub struct Board {
    vm: Arc<Vm>,
    slots: Vec<VirtioSlot>,
    soldered: Soldered,
    /// Workers on their way to an iothread: whose, and where its answer comes.
    adopted: Vec<(String, Waiter<Result<Key>>)>,
}

/// What the slots hold once every device is in its place.
#[derive(Default)]
pub struct Soldered {
    /// The fronts.
    pub mmio: Vec<Range>,
    /// The interrupt lines, which KVM knows while these live.
    pub lines: Vec<Irq>,
    /// The way to each worker.
    pub workers: Vec<Sender<Command>>,
}

impl Board {
    /// An empty board of `vm`.
    pub fn new(vm: Arc<Vm>) -> Self {
        Board { vm, slots: Vec::new(), soldered: Soldered::default(), adopted: Vec::new() }
    }

    /// The slots that are filled.
    pub fn slots(&self) -> Vec<VirtioSlot> {
        self.slots.clone()
    }

    /// The memory of its machine.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// Puts a device into the next slot; its worker goes to `iothread`, or to `main` if there is none. The way to the
    /// worker.
    ///
    /// # Errors
    /// The twelfth device (rule D3.4), or what the host refuses.
    pub fn plug(
        &mut self,
        device: Box<dyn Device>,
        iothread: Option<&Remote>,
        main: &mut EventLoop,
    ) -> Result<Sender<Command>> {
        let slot = layout::virtio_slot(self.slots.len()).ok_or_else(|| {
            Error::usage(format!(
                "device \"{}\": one virtio device too many; accepted: at most {MAX_VIRTIO_DEVICES} of all kinds together, \
                 an interrupt line each (rule D3.4)",
                device.id()
            ))
        })?;
        let name = device.id().to_string();
        let page = Arc::new(Page::default());
        let line = Irq::new(&self.vm, slot.irq)?;
        let (sender, receiver) = channel();
        let vm = self.vm.clone();
        let make_kick = Box::new(move |queue| {
            let kick = Kick::new(&vm, slot.base + QUEUE_NOTIFY, queue)?;
            Ok(Box::new(kick) as Signal)
        });
        let front = Front::new(
            &*device,
            page.clone(),
            Interrupt::new(page.clone(), line.eventfd()),
            sender.clone(),
            self.vm.ram().clone(),
            make_kick,
        );
        let worker = Box::new(Worker::new(device, page.clone(), Interrupt::new(page, line.eventfd()), receiver));
        match iothread {
            Some(remote) => {
                let (done, waiter) = Done::waited();
                remote.adopt(worker, done);
                self.adopted.push((name, waiter));
            }
            None => {
                main.add(worker)?;
            }
        }
        self.soldered.mmio.push(Range { base: slot.base, len: slot.len, slot: Arc::new(Mutex::new(front)) });
        self.soldered.lines.push(line);
        self.soldered.workers.push(sender.clone());
        self.slots.push(slot);
        Ok(sender)
    }

    /// Waits until every iothread has taken in its devices.
    ///
    /// # Errors
    /// What a device could not set up there.
    pub fn finish(self) -> Result<Soldered> {
        for (name, waiter) in self.adopted {
            match waiter.wait() {
                Ok(attached) => attached.map(drop)?,
                Err(_) => return Err(Error::host(format!("device \"{name}\": its iothread has ended"))),
            }
        }
        Ok(self.soldered)
    }
}
