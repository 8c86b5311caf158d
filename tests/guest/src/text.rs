//! Formatted text without an allocator, and what a failed test returns.

use crate::memory;
use core::fmt;

/// Longest text; what is longer is cut.
const LONGEST: usize = 200;

/// A buffer that is being written.
struct Buffer {
    bytes: &'static mut [u8],
    len: usize,
}

impl fmt::Write for Buffer {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        for byte in part.bytes() {
            *self.bytes.get_mut(self.len).ok_or(fmt::Error)? = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// The formatted text, in memory taken for it: it is for the few that are made.
pub fn format(arguments: fmt::Arguments) -> &'static str {
    let mut buffer = Buffer { bytes: memory::table(LONGEST, 0), len: 0 };
    // Cutting is the only way to fail, and is meant.
    let _ = fmt::write(&mut buffer, arguments);
    let (text, _) = buffer.bytes.split_at(buffer.len);
    core::str::from_utf8(text).unwrap_or("(cut text)")
}

/// The error is why a test failed: the words after `guest: FAILED`.
pub type Outcome<T = ()> = Result<T, &'static str>;

/// Returns from the function with a formatted reason.
#[macro_export]
macro_rules! fail {
    ($($part:tt)*) => { return Err($crate::text::format(format_args!($($part)*))) };
}
