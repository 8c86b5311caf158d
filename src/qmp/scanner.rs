//! Cuts a stream of bytes into JSON values, however the bytes arrive.
//!
//! It counts brackets and follows strings, and nothing more: whether a value is well-formed inside is for the JSON
//! parser that reads it. Each byte is looked at once, and at most [`MESSAGE_MAX_BYTES`] are kept.
//!
//! After a mistake the stream is picked up again like this. A value that is too long or too deep is answered when it
//! becomes so and dropped up to its own end. A byte that can stand in no JSON text (a control character, or one of
//! 0xC0, 0xC1, 0xF5 to 0xFF, which UTF-8 never has), and anything at the top level that is not an object, array or
//! string, is answered once; then everything is skipped up to the next `{` or the end of the line. So a client that
//! has lost its place sends 0xFF or a line feed inside a string, and starts afresh.

use crate::error::{Error, Result};

/// The longest request, in bytes.
pub const MESSAGE_MAX_BYTES: usize = 1 << 20;
/// The deepest nesting of objects and arrays in a request.
pub const NESTING_MAX: usize = 64;
/// What an idle scanner keeps allocated at most, in bytes.
const IDLE_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Between two values.
    Between,
    /// In an object or array, outside of strings.
    Nested,
    /// In a string.
    String,
    /// In a string, behind a backslash.
    Escape,
    /// Looking for the next `{` or the end of the line.
    Skip,
}

/// The scanner of one client's stream.
#[derive(Debug)]
pub struct Scanner {
    place: Place,
    /// Open brackets.
    depth: usize,
    /// The value so far.
    message: Vec<u8>,
    /// The value at hand was refused already: it is followed to its end and not kept.
    refused: bool,
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner { place: Place::Between, depth: 0, message: Vec::new(), refused: false }
    }
}

impl Scanner {
    /// Takes bytes off the front of `input` until a value is complete (an object, or an array or string that the
    /// caller refuses) or a mistake is found; `None` when `input` is used up before that.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<&[u8]>> {
        if self.place == Place::Between {
            self.message.clear();
            self.message.shrink_to(IDLE_BYTES);
        }
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            match self.step(byte) {
                Ok(false) => {}
                Ok(true) => return Some(Ok(&self.message)),
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    /// Bytes held of a value that is not complete.
    pub fn held_bytes(&self) -> usize {
        self.message.capacity()
    }

    /// One byte; true if it completes a value.
    fn step(&mut self, byte: u8) -> Result<bool> {
        match (self.place, byte) {
            (Place::Skip, b'\n') => {
                self.place = Place::Between;
                Ok(false)
            }
            (Place::Between, b' ' | b'\t' | b'\r' | b'\n') => Ok(false),
            (Place::Between | Place::Skip, b'{') | (Place::Between, b'[') => {
                self.start(Place::Nested);
                self.open(byte)
            }
            (Place::Between, b'"') => {
                self.start(Place::String);
                self.keep(byte)
            }
            (Place::Skip, _) => Ok(false),
            (Place::Between, _) => {
                self.place = Place::Skip;
                Err(not_an_object())
            }
            (Place::Nested, b'\t' | b'\r' | b'\n') => self.keep(byte),
            (_, 0..0x20 | 0xc0 | 0xc1 | 0xf5..) => self.stray(byte),
            (Place::Nested, b'{' | b'[') => self.open(byte),
            (Place::Nested, b'}' | b']') => {
                self.depth -= 1;
                self.close(byte)
            }
            (Place::Nested, b'"') => {
                self.place = Place::String;
                self.keep(byte)
            }
            (Place::String, b'"') => {
                self.place = Place::Nested;
                self.close(byte)
            }
            (Place::String, b'\\') => {
                self.place = Place::Escape;
                self.keep(byte)
            }
            (Place::Escape, _) => {
                self.place = Place::String;
                self.keep(byte)
            }
            (Place::Nested | Place::String, _) => self.keep(byte),
        }
    }

    fn start(&mut self, place: Place) {
        self.message.clear();
        self.refused = false;
        self.place = place;
    }

    fn open(&mut self, byte: u8) -> Result<bool> {
        self.depth += 1;
        if self.depth > NESTING_MAX {
            return self.refuse(|| format!("JSON nesting depth limit of {NESTING_MAX} exceeded"));
        }
        self.keep(byte)
    }

    fn keep(&mut self, byte: u8) -> Result<bool> {
        if self.message.len() == MESSAGE_MAX_BYTES {
            return self.refuse(|| format!("QMP input is longer than {MESSAGE_MAX_BYTES} bytes"));
        }
        if !self.refused {
            self.message.push(byte);
        }
        Ok(false)
    }

    /// Drops the value at hand; says why the first time.
    fn refuse(&mut self, why: impl FnOnce() -> String) -> Result<bool> {
        self.message = Vec::new();
        if std::mem::replace(&mut self.refused, true) { Ok(false) } else { Err(Error::usage(why())) }
    }

    /// The closing bracket or quote; true if it completes a value that was not refused.
    fn close(&mut self, byte: u8) -> Result<bool> {
        let top = self.depth == 0;
        if top {
            self.place = Place::Between;
        }
        self.keep(byte)?;
        Ok(top && !self.refused)
    }

    /// A byte that no JSON text has where it stands: the value at hand is given up.
    fn stray(&mut self, byte: u8) -> Result<bool> {
        self.place = if byte == b'\n' { Place::Between } else { Place::Skip };
        self.depth = 0;
        if self.refused {
            return Ok(false);
        }
        Err(Error::usage(format!("JSON parse error, stray byte 0x{byte:02x}: write it as an escape, in UTF-8")))
    }
}

/// The answer to a value that is something else than an object.
pub(super) fn not_an_object() -> Error {
    Error::usage("QMP input must be a JSON object")
}

#[cfg(test)]
#[path = "scanner_test.rs"]
mod tests;
