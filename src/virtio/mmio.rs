//! The register layout of virtio-mmio version 2 (virtio 1.2, section 4.2.2): offsets to what [`Front`] does.
//!
//! Registers are read and written as aligned 32-bit words; anything else reads as zero and writes nothing, but for the
//! configuration space, which is read in any width, and written where its device lets the driver write. The notification
//! register never comes here for a live queue: its ioeventfd takes it in the kernel. Runs on vCPU threads.

use super::front::Front;
use crate::bus::Slot;

/// Where the configuration space begins.
const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No vendor: there is no registry of them for virtio-mmio.
const VENDOR: u32 = 0;

impl Front {
    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.kind,
            0x0c => VENDOR,
            0x10 => match self.device_features_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            0x34 => u32::from(self.queue_max()),
            0x44 => u32::from(self.queue().is_some_and(|queue| queue.ready)),
            0x60 => self.page.interrupt_status(),
            0x70 => self.status(),
            // No shared memory region has any length (section 4.2.2: all ones).
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.read_generation(),
            _ => 0,
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let end = offset.saturating_add(data.len());
        if self.driver_writes.iter().any(|bytes| bytes.start <= offset && end <= bytes.end) {
            self.page.write(offset, data);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        fn low(address: &mut u64, value: u32) {
            *address = *address & !0xffff_ffff | u64::from(value);
        }
        fn high(address: &mut u64, value: u32) {
            *address = *address & 0xffff_ffff | u64::from(value) << 32;
        }
        match offset {
            0x14 => self.device_features_sel = value,
            0x20 => self.set_driver_features(value),
            0x24 => self.driver_features_sel = value,
            0x30 => self.queue_sel = value,
            0x64 => self.page.acknowledge(value),
            0x70 => self.set_status(value),
            _ => {
                let Some(queue) = self.queue_mut() else { return };
                match offset {
                    // A size beyond 16 bits is refused with the rest at DRIVER_OK: zero is no size.
                    0x38 => queue.size = u16::try_from(value).unwrap_or(0),
                    0x44 => queue.ready = value & 1 != 0,
                    0x80 => low(&mut queue.descriptors, value),
                    0x84 => high(&mut queue.descriptors, value),
                    0x90 => low(&mut queue.available, value),
                    0x94 => high(&mut queue.available, value),
                    0xa0 => low(&mut queue.used, value),
                    0xa4 => high(&mut queue.used, value),
                    _ => {}
                }
            }
        }
    }
}

impl Slot for Front {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.page.config((offset - CONFIG) as usize, data);
            self.page.config_read();
        } else if let (Ok(word), 0) = (<&mut [u8; 4]>::try_from(&mut *data), offset % 4) {
            *word = self.read_register(offset).to_le_bytes();
        } else {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.write_config((offset - CONFIG) as usize, data);
        } else if let (Ok(word), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    /// The worker's half is asked for by `Command::Reset`, and its answer awaited, before: the main loop does not wait.
    fn reset(&mut self) {
        self.reset_registers();
    }
}
