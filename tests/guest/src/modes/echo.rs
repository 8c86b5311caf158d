//! `echo`: prints each byte of serial input, until a `q`.

use crate::serial;
use crate::text::Outcome;

pub fn run() -> Outcome {
    say!("echo: begin");
    loop {
        if let Some(byte) = serial::input() {
            say!("echo: {byte:02x}");
            if byte == b'q' {
                return Ok(());
            }
        }
    }
}
