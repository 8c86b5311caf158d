//! The 16550 at port 0x3f8, polled: whole lines out, single bytes in. Any processor may print; a line stays whole.

use crate::cpu;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

/// Transmit and receive register; interrupt enable and line status follow at 1 and 5.
const PORT: u16 = 0x3f8;

static BUSY: AtomicBool = AtomicBool::new(false);

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // Line status bit 5: the transmitter takes a byte. A port that is not there reads all ones, so this ends.
            while cpu::in8(PORT + 5) & 0x20 == 0 {}
            cpu::out8(PORT, byte);
        }
        Ok(())
    }
}

/// Prints one line.
pub fn print(line: fmt::Arguments) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = Serial.write_fmt(line).and_then(|()| Serial.write_str("\n"));
    BUSY.store(false, Ordering::Release);
}

/// The next byte of input, if there is one.
pub fn input() -> Option<u8> {
    let status = cpu::in8(PORT + 5);
    (status != 0xff && status & 1 != 0).then(|| cpu::in8(PORT))
}

/// Lets received bytes raise interrupt line 4 (OUT2 is the gate of the line on a PC).
pub fn enable_interrupt() {
    cpu::out8(PORT + 4, 0x0b);
    cpu::out8(PORT + 1, 1);
}

/// Prints one formatted line.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => { $crate::serial::print(format_args!($($part)*)) };
}
