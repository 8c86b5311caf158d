//! The registers of a virtio-mmio device of version 2 (virtio 1.2, 4.2.2) and the dance that brings one up.

use crate::clock::Patience;
use crate::memory::Registers;
use crate::text::Outcome;
use crate::virtio::ring::Ring;
use crate::words::{Slot, Words};

pub const MAGIC: u64 = 0x000;
pub const VERSION: u64 = 0x004;
pub const DEVICE_ID: u64 = 0x008;
pub const DEVICE_FEATURES: u64 = 0x010;
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
pub const DRIVER_FEATURES: u64 = 0x020;
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
pub const QUEUE_SEL: u64 = 0x030;
pub const QUEUE_NUM_MAX: u64 = 0x034;
pub const QUEUE_NUM: u64 = 0x038;
pub const QUEUE_READY: u64 = 0x044;
pub const QUEUE_NOTIFY: u64 = 0x050;
pub const INTERRUPT_STATUS: u64 = 0x060;
pub const INTERRUPT_ACK: u64 = 0x064;
pub const STATUS: u64 = 0x070;
pub const QUEUE_DESC: u64 = 0x080;
pub const QUEUE_DRIVER: u64 = 0x090;
pub const QUEUE_DEVICE: u64 = 0x0a0;
pub const CONFIG_GENERATION: u64 = 0x0fc;
pub const CONFIG: u64 = 0x100;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;

pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

/// One virtio-mmio device.
#[derive(Clone, Copy)]
pub struct Device {
    pub registers: Registers,
    pub irq: u32,
    /// What kind of device it is (virtio 1.2, 5): 2 is a disk, 0 is an empty slot.
    pub id: u32,
}

impl Device {
    /// The device in `slot`, if there is one of version 2.
    pub fn find(slot: Slot) -> Option<Device> {
        let registers = Registers::new(slot.address);
        let is_ours = registers.read32(MAGIC) == u32::from_le_bytes(*b"virt") && registers.read32(VERSION) == 2;
        let id = if is_ours { registers.read32(DEVICE_ID) } else { 0 };
        (id != 0).then_some(Device { registers, irq: slot.irq, id })
    }

    /// All devices the command line names.
    pub fn all(words: Words) -> impl Iterator<Item = Device> {
        words.slots().filter_map(Device::find)
    }

    pub fn status(&self) -> u32 {
        self.registers.read32(STATUS)
    }

    pub fn needs_reset(&self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    /// Resets the device and waits until it says it is done.
    pub fn reset(&self) -> Outcome {
        self.registers.write32(STATUS, 0);
        let mut patience = Patience::new(5_000_000_000);
        while self.status() != 0 {
            if patience.is_over() {
                fail!("device at {:#x}: reset does not end, status {:#x}", self.registers.base(), self.status());
            }
        }
        Ok(())
    }

    /// The features the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.registers.write32(DEVICE_FEATURES_SEL, select);
            u64::from(self.registers.read32(DEVICE_FEATURES))
        };
        half(1) << 32 | half(0)
    }

    /// Resets the device and accepts `features`: everything up to FEATURES_OK (virtio 1.2, 3.1.1).
    pub fn negotiate(&self, features: u64) -> Outcome {
        self.reset()?;
        self.registers.write32(STATUS, ACKNOWLEDGE);
        self.registers.write32(STATUS, ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.registers.write32(DRIVER_FEATURES_SEL, select);
            self.registers.write32(DRIVER_FEATURES, half);
        }
        self.registers.write32(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            fail!("device at {:#x} refuses the features {features:#x}", self.registers.base());
        }
        Ok(())
    }

    /// The largest size of queue `index`; 0 is no such queue.
    pub fn queue_max(&self, index: u32) -> u32 {
        self.registers.write32(QUEUE_SEL, index);
        self.registers.read32(QUEUE_NUM_MAX)
    }

    /// Tells the device where queue `index` is, and makes it ready.
    pub fn set_queue(&self, index: u32, ring: &Ring) {
        self.registers.write32(QUEUE_SEL, index);
        self.registers.write32(QUEUE_NUM, u32::from(ring.size()));
        for (register, address) in
            [(QUEUE_DESC, ring.desc()), (QUEUE_DRIVER, ring.driver()), (QUEUE_DEVICE, ring.device())]
        {
            self.set_address(register, address);
        }
        self.registers.write32(QUEUE_READY, 1);
    }

    /// Writes the two halves of a queue address of the selected queue.
    pub fn set_address(&self, register: u64, address: u64) {
        self.registers.write32(register, address as u32);
        self.registers.write32(register + 4, (address >> 32) as u32);
    }

    /// The driver is ready: the device may work.
    pub fn go(&self) {
        self.registers.write32(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Says that queue `index` has something.
    pub fn notify(&self, index: u32) {
        self.registers.write32(QUEUE_NOTIFY, index);
    }
}
