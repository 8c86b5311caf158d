//! What a reset of the machine is made of, beside its virtio workers and its vCPUs: the registers on the buses, the
//! interrupt controllers, and what is loaded into memory.
//!
//! When each step is taken is `control::reset`'s; that nothing runs meanwhile too.

use std::sync::Arc;

use log::info;
use vmm_sys_util::eventfd::EventFd;

use super::boot::{self, Boot};
use super::layout::VirtioSlot;
use super::{acpi, mptable};
use crate::error::Result;
use crate::kvm::vcpu::Buses;
use crate::kvm::vm::Vm;
use crate::kvm::x86_64::regs::Entry;
use crate::memory;

/// The hardware that is the machine's and not a vCPU's.
pub struct Hardware {
    buses: Buses,
    vm: Arc<Vm>,
    power_button: Arc<EventFd>,
}

impl Hardware {
    /// Of a machine of these buses, and of this interrupt for its power button.
    pub fn new(buses: Buses, vm: Arc<Vm>, power_button: Arc<EventFd>) -> Hardware {
        Hardware { buses, vm, power_button }
    }

    /// Presses the power button, once and not for long. A guest that has no driver for it does not notice.
    pub fn press_power_button(&self) {
        // KVM takes the count at each write, so it never grows to where a write would block.
        let _ = self.power_button.write(1);
    }

    /// All registers are as at power-on. The vCPUs are parked, and the workers of the devices have been reset. Main thread.
    ///
    /// # Errors
    /// KVM refuses to reset its interrupt controllers.
    pub fn reset(&self) -> Result<()> {
        self.buses.pio.reset();
        self.buses.mmio.reset();
        self.vm.reset_irqchips()
    }
}

/// What is in guest memory when the boot vCPU starts.
pub struct Image {
    vm: Arc<Vm>,
    boot: Boot,
    cpus: u8,
    slots: Vec<VirtioSlot>,
    /// The guest may have written to its memory.
    used: bool,
    /// It has been said that the host does not take it.
    told: bool,
}

impl Image {
    /// For a machine of so many vCPUs and of these virtio slots.
    pub fn new(vm: Arc<Vm>, boot: Boot, cpus: u8, slots: Vec<VirtioSlot>) -> Image {
        Image { vm, boot, cpus, slots, used: false, told: false }
    }

    /// Loads the kernel and what belongs to it, and the tables that describe the machine: where the boot vCPU starts. From
    /// the second time on it gives all memory back to the host before; what cannot be given back stays as it is. Main
    /// thread, then the boot vCPU's: it takes as long as the files are long.
    ///
    /// # Errors
    /// A file can no longer be read, or has changed. Memory no longer has room in its file system.
    pub fn load(&mut self) -> Result<Entry> {
        let again = std::mem::replace(&mut self.used, true);
        let zeroed = if again { self.give_back() } else { memory::is_blank(self.vm.ram()) };
        let ram = self.vm.ram();
        if again && zeroed {
            memory::reserve(ram)?;
        }
        let entry = boot::load(ram, &mut self.boot, zeroed)?;
        acpi::write(ram, self.cpus, &self.slots)?;
        mptable::write(ram, self.cpus)?;
        Ok(entry)
    }

    /// Gives all memory back to the host: whether it was taken.
    fn give_back(&mut self) -> bool {
        match memory::discard_all(self.vm.ram()) {
            Ok(()) => true,
            Err(e) => {
                if !std::mem::replace(&mut self.told, true) {
                    info!("reset: guest memory keeps what is in it, this time and the next: {e}");
                }
                false
            }
        }
    }
}
