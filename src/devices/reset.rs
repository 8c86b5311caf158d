//! The chipset's reset registers: one bit of each restarts the machine when the guest sets it.
//!
//! The reset control register of a PCI chipset (port 0xcf9; Intel ICH, 13.7.5) and system control port A (0x92; ICH, 13.7.2).
//! The keyboard controller's reset line is `i8042`'s. Runs on a vCPU's thread; the callback does the reset.

use crate::bus::Slot;

/// One register of a byte. A bit that goes from 0 to 1 is an edge, as on the real chips: a guest that writes back what it has
/// read restarts nothing.
pub struct ResetRegister {
    value: u8,
    at_reset: u8,
    /// The bits that keep what is written; the others read as 0.
    writable: u8,
    /// The bit whose rising edge restarts the machine.
    trigger: u8,
    on_reset: Box<dyn Fn() + Send>,
}

impl ResetRegister {
    /// Port 0xcf9: bit 2 restarts the machine. Bits 1 and 3 select the kind of reset, and all kinds are the same here.
    pub fn reset_control(on_reset: impl Fn() + Send + 'static) -> ResetRegister {
        ResetRegister { value: 0, at_reset: 0, writable: 0x0e, trigger: 1 << 2, on_reset: Box::new(on_reset) }
    }

    /// Port 0x92: bit 0 restarts the machine. Bit 1 is the A20 gate, which is open and does nothing.
    pub fn port_a(on_reset: impl Fn() + Send + 'static) -> ResetRegister {
        ResetRegister { value: 2, at_reset: 2, writable: 3, trigger: 1 << 0, on_reset: Box::new(on_reset) }
    }
}

impl Slot for ResetRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Some(written) = data.first() else { return };
        let was = std::mem::replace(&mut self.value, written & self.writable);
        if self.value & !was & self.trigger != 0 {
            (self.on_reset)();
        }
    }

    fn reset(&mut self) {
        self.value = self.at_reset;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A register, and how often it has asked for a reset.
    fn counted(make: fn(Box<dyn Fn() + Send>) -> ResetRegister) -> (ResetRegister, Arc<AtomicUsize>) {
        let resets = Arc::new(AtomicUsize::new(0));
        let counter = resets.clone();
        let register = make(Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }));
        (register, resets)
    }

    fn read(register: &mut ResetRegister) -> u8 {
        let mut byte = [0xaa];
        register.read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn only_a_rising_edge_of_the_reset_bit_restarts() {
        for (make, steps, first) in [
            (
                ResetRegister::reset_control as fn(Box<dyn Fn() + Send>) -> _,
                // The value written, the value read afterwards, and the resets so far.
                &[(2, 2, 0), (0xfb, 0x0a, 0), (0x06, 0x06, 1), (0x0e, 0x0e, 1), (0, 0, 1), (4, 4, 2)][..],
                0,
            ),
            (ResetRegister::port_a, &[(2, 2, 0), (0xfe, 2, 0), (3, 3, 1), (1, 1, 1), (0, 0, 1), (1, 1, 2)], 2),
        ] {
            let (mut register, resets) = counted(make);
            assert_eq!(read(&mut register), first);
            for &(written, value, count) in steps {
                register.write(0, &[written]);
                assert_eq!((read(&mut register), resets.load(Ordering::Relaxed)), (value, count), "{written:#x}");
            }
            register.reset();
            assert_eq!(read(&mut register), first);
        }
    }

    #[test]
    fn a_reset_lowers_the_bit_so_that_the_next_life_can_restart_too() {
        let (mut register, resets) = counted(ResetRegister::reset_control);
        for life in 1..=3 {
            register.write(0, &[0x0e]);
            assert_eq!(resets.load(Ordering::Relaxed), life);
            register.reset();
        }
    }
}
