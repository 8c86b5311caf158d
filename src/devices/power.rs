//! ACPI's sleep registers, of which one value does something: power off.
//!
//! Sleep control and sleep status of a hardware-reduced machine (ACPI 6.5, 4.8.3.7). A vCPU's thread; what power-off
//! means is decided by whoever is told.

use crate::bus::Slot;

/// What the ACPI tables call S5, soft off, in the control register's sleep type.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The control register: the sleep type in bits 2 to 4, and bit 5 to make it so. The other bits are reserved.
const CONTROL: u64 = 0;
const SLEEP_TYPE: u8 = 0b111 << 2;
const SLEEP_ENABLE: u8 = 1 << 5;
const POWER_OFF: u8 = SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE;

/// The two registers, a byte each.
pub struct Power {
    on_power_off: Box<dyn Fn() + Send>,
}

impl Power {
    /// Registers that call `on_power_off` on the vCPU's thread, each time that the guest powers itself off.
    pub fn new(on_power_off: impl Fn() + Send + 'static) -> Power {
        Power { on_power_off: Box::new(on_power_off) }
    }
}

impl Slot for Power {
    /// The machine never sleeps, so it never woke either: both registers read as zero.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (CONTROL, &[value]) = (offset, data)
            && value & (SLEEP_TYPE | SLEEP_ENABLE) == POWER_OFF
        {
            (self.on_power_off)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_sleep_type_s5_with_sleep_enable_powers_off() {
        let offs = Arc::new(AtomicUsize::new(0));
        let counter = offs.clone();
        let mut power = Power::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        for (offset, data) in [(0, &[0x14][..]), (0, &[0x20]), (0, &[0x3c]), (1, &[0x34]), (0, &[0x34, 0])] {
            power.write(offset, data);
        }
        assert_eq!(offs.load(Ordering::Relaxed), 0);
        power.write(0, &[0x34]);
        power.write(0, &[0xf7]);
        assert_eq!(offs.load(Ordering::Relaxed), 2, "the reserved bits mean nothing");
        let mut status = [0xff; 2];
        power.read(0, &mut status);
        assert_eq!(status, [0, 0]);
    }
}
