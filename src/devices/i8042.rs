//! The keyboard controller, reduced to what a machine without a keyboard needs of it: its reset line.
//!
//! A kernel that restarts by it writes 0xfe to the command port. A vCPU's thread; what a reset means is decided by
//! whoever is told.

use crate::bus::Slot;

/// The usual command that pulses the reset line. A command from 0xf0 on pulses the lines whose bits are clear, and bit 0 is the
/// reset line, so every even one does.
pub const RESET: u8 = 0xfe;

/// A mask, and the value under it of each command that pulses the reset line.
const PULSES_RESET: (u8, u8) = (0xf1, 0xf0);
/// The command after which the next byte written to the data port sets all output lines.
const WRITE_OUTPUT: u8 = 0xd1;
/// The output line that resets while it is low.
const NOT_RESET: u8 = 1 << 0;

/// Offset of the data port, and of the command and status port.
const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status bit 1: the controller has not taken the last byte written yet.
const INPUT_FULL: u8 = 1 << 1;

/// Ports 0x60 to 0x64.
pub struct I8042 {
    on_reset: Box<dyn Fn() + Send>,
    /// The next byte written to the data port sets the output lines.
    sets_output: bool,
}

impl I8042 {
    /// A controller that calls `on_reset` on the vCPU's thread, each time that the guest asks for a reset.
    pub fn new(on_reset: impl Fn() + Send + 'static) -> I8042 {
        I8042 { on_reset: Box::new(on_reset), sets_output: false }
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
        let resets = match (offset, data) {
            (COMMAND, &[command]) => {
                self.sets_output = command == WRITE_OUTPUT;
                command & PULSES_RESET.0 == PULSES_RESET.1
            }
            (DATA, &[lines]) => std::mem::take(&mut self.sets_output) && lines & NOT_RESET == 0,
            _ => false,
        };
        if resets {
            (self.on_reset)();
        }
    }

    fn reset(&mut self) {
        self.sets_output = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn controller() -> (I8042, Arc<AtomicUsize>) {
        let resets = Arc::new(AtomicUsize::new(0));
        let counter = resets.clone();
        let controller = I8042::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        (controller, resets)
    }

    #[test]
    fn only_a_command_that_pulls_the_reset_line_resets() {
        let (mut controller, resets) = controller();
        for (offset, data) in [
            (0, &[RESET][..]),
            (4, &[0xd1]),
            (0, &[0xdf]),
            // The command before was complete.
            (0, &[0]),
            (4, &[0xd1]),
            (4, &[0x20]),
            (0, &[0]),
            (4, &[RESET, 0]),
            (4, &[0xff]),
            (4, &[0xe0]),
            (3, &[0, RESET]),
        ] {
            controller.write(offset, data);
        }
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        for (writes, count) in [(&[(4, RESET)][..], 1), (&[(4, 0xf0)], 2), (&[(4, 0xd1), (0, 0xfe)], 3)] {
            writes.iter().for_each(|&(offset, byte)| controller.write(offset, &[byte]));
            assert_eq!(resets.load(Ordering::Relaxed), count, "{writes:x?}");
        }
    }

    #[test]
    fn a_command_of_an_earlier_life_is_forgotten() {
        let (mut controller, resets) = controller();
        controller.write(4, &[0xd1]);
        controller.reset();
        controller.write(0, &[0]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
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
