//! Short formatted text without an allocator, and what a failed test returns.

use core::fmt;

/// At most 200 bytes of text; what is longer is cut.
pub struct Text {
    bytes: [u8; 200],
    len: usize,
}

impl Text {
    /// The formatted text.
    pub fn new(arguments: fmt::Arguments) -> Self {
        let mut text = Text { bytes: [0; 200], len: 0 };
        // Cutting is the only way to fail, and is meant.
        let _ = fmt::write(&mut text, arguments);
        text
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        for byte in part.bytes() {
            *self.bytes.get_mut(self.len).ok_or(fmt::Error)? = byte;
            self.len += 1;
        }
        Ok(())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("(cut text)"))
    }
}

/// Why a test failed: the words after `guest: FAILED`.
pub type Outcome<T = ()> = Result<T, Text>;

/// Returns from the function with a formatted reason.
#[macro_export]
macro_rules! fail {
    ($($part:tt)*) => { return Err($crate::text::Text::new(format_args!($($part)*))) };
}
