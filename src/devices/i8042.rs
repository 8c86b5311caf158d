//! The keyboard controller, reduced to what a machine without a keyboard needs of it: its reset line.
//!
//! A kernel that restarts by it writes 0xfe to the command port. A vCPU's thread; what a reset means is decided by
//! whoever is told.

use crate::bus::Slot;

/// The command that pulls the reset line.
pub const RESET: u8 = 0xfe;

/// Offset of the command and status port from the data port.
const COMMAND: u64 = 4;

/// Status bit 1: the controller has not taken the last byte written yet.
const INPUT_FULL: u8 = 1 << 1;

/// Ports 0x60 to 0x64.
pub struct I8042 {
    on_reset: Box<dyn Fn() + Send>,
}

impl I8042 {
    /// A controller that calls `on_reset` on the vCPU's thread, each time that the guest asks for a reset.
    pub fn new(on_reset: impl Fn() + Send + 'static) -> I8042 {
        I8042 { on_reset: Box::new(on_reset) }
    }
}

impl Slot for I8042 {
    /// All ones, as from a port where nothing answers, less the bit that a kernel waits for before it writes: with
    /// it a restart would take 65536 reads. With "a byte is there" always set, a kernel that looks for a keyboard
    /// gives up after seventeen reads.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (COMMAND, [status]) = (offset, data) {
            *status &= !INPUT_FULL;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (COMMAND, &[RESET]) {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_the_reset_command_resets() {
        let resets = Arc::new(AtomicUsize::new(0));
        let counter = resets.clone();
        let mut controller = I8042::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        for (offset, data) in [(0, &[RESET][..]), (4, &[0xd1]), (4, &[RESET, 0]), (3, &[0, RESET])] {
            controller.write(offset, data);
        }
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        controller.write(4, &[RESET]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_kernel_neither_waits_for_the_controller_nor_finds_one() {
        let mut controller = I8042::new(|| {});
        let mut status = [0];
        controller.read(4, &mut status);
        assert_eq!(status[0] & INPUT_FULL, 0, "free to be written to");
        assert_eq!(status[0] & 1, 1, "never out of bytes, so it cannot be a controller");
    }
}
