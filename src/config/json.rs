//! JSON with places: the text of a file of `-config`, and its values, each of which knows its line and column.
//!
//! serde_json checks the text and cuts it up, one level at a time; a value is the piece of the text that writes it, so where
//! it stands is where the piece begins. Only as many levels are opened as a configuration has, however deep the text goes.
//! What keys mean is `file`'s. Main thread, before anything is started.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Context, Error, Result};
use crate::sys::poll::Patient;
use crate::sys::sink;

/// The longest file, in bytes. The largest machine is described in a few thousand.
pub const MAX_FILE_BYTES: usize = 1 << 20;

/// The text of a file, and how messages name it.
#[derive(Debug)]
pub struct Text {
    name: String,
    text: String,
}

impl Text {
    /// Reads the file at `path`, which may also be a pipe.
    ///
    /// # Errors
    /// It cannot be read (the host's trouble), is too long, or is not UTF-8 (the user's).
    pub fn open(path: &Path) -> Result<Text> {
        let name = path.display().to_string();
        let mut bytes = Vec::new();
        // A FIFO need not have a writer yet. The read below waits for it, and reports that.
        let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).to_owned();
        let file = options.open(path).context(|| format!("-config {name}: open it"))?;
        let told =
            || format!("loopvisor: -config {name}: still waiting for a process that writes to it and closes it\n");
        let patient = Patient::new(&file, || sink::stderr_line(told().as_bytes()));
        let most = MAX_FILE_BYTES as u64 + 1;
        patient.take(most).read_to_end(&mut bytes).context(|| format!("-config {name}: read it"))?;
        Text::new(name, bytes)
    }

    /// The file of that name which holds `bytes`.
    ///
    /// # Errors
    /// Mistakes of the user's: it is too long, or not UTF-8.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Result<Text> {
        let name = name.into();
        if bytes.len() > MAX_FILE_BYTES {
            return Err(Error::usage(format!(
                "-config {name}: the file is too long; accepted: {MAX_FILE_BYTES} bytes"
            )));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Text { name, text }),
            Err(error) => {
                let good = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(&error.as_bytes()[..good]).into_owned();
                Err(Text { name, text }.mistake(good, "this is not UTF-8; accepted: UTF-8 text"))
            }
        }
    }

    /// What messages call the file: the path as typed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The one value that the text writes.
    ///
    /// # Errors
    /// It is no JSON, or something follows.
    pub fn value(&self) -> Result<Value<'_>> {
        // Editors of another system's put a mark before the first letter.
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        if text.trim().is_empty() {
            return Err(self.mistake(0, "the file is empty; accepted: a JSON object, {} at least"));
        }
        match serde_json::from_str::<&RawValue>(text) {
            Ok(raw) => Ok(Value { file: self, raw: raw.get() }),
            Err(error) => {
                let skipped = self.text.len() - text.len();
                let line = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum::<usize>();
                let at = skipped + line + error.column().saturating_sub(1);
                let whole = error.to_string();
                let sentence = whole.split(" at line ").next().unwrap_or_default();
                Err(self.mistake(at, format!("{sentence}; accepted: JSON (RFC 8259)")))
            }
        }
    }

    /// The line and column of the byte `at`, both from 1 and the column in characters.
    pub fn place(&self, at: usize) -> String {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().trim_start_matches('\u{feff}').chars().count() + 1;
        format!("-config {}:{line}:{column}", self.name)
    }

    /// A mistake of the user's at the byte `at`.
    pub fn mistake(&self, at: usize, sentence: impl fmt::Display) -> Error {
        Error::usage(format!("{}: {sentence}", self.place(at)))
    }
}

/// The kinds of values there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `{...}`
    Object,
    /// `[...]`
    Array,
    /// `"..."`
    Text,
    /// Digits, and what else a number may have.
    Number,
    /// `true` or `false`
    Bool,
    /// `null`
    Null,
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Object => "an object",
            Type::Array => "an array",
            Type::Text => "a text",
            Type::Number => "a number",
            Type::Bool => "true or false",
            Type::Null => "null",
        })
    }
}

/// One value of a file.
#[derive(Clone, Copy, Debug)]
pub struct Value<'t> {
    file: &'t Text,
    raw: &'t str,
}

/// A member of an object: its key, where the key stands, and its value.
#[derive(Debug)]
pub struct Member<'t> {
    /// The key.
    pub key: String,
    /// Where it stands.
    pub at: usize,
    /// The value.
    pub value: Value<'t>,
}

impl<'t> Value<'t> {
    /// Where it begins.
    pub fn at(&self) -> usize {
        // The piece lies in the text.
        self.raw.as_ptr() as usize - self.file.text.as_ptr() as usize
    }

    /// Its kind.
    pub fn kind(&self) -> Type {
        match self.raw.as_bytes().first() {
            Some(b'{') => Type::Object,
            Some(b'[') => Type::Array,
            Some(b'"') => Type::Text,
            Some(b't' | b'f') => Type::Bool,
            Some(b'n') => Type::Null,
            _ => Type::Number,
        }
    }

    /// A mistake of the user's in this value.
    pub fn mistake(&self, sentence: impl fmt::Display) -> Error {
        self.file.mistake(self.at(), sentence)
    }

    /// The members of an object, in the order written.
    ///
    /// # Errors
    /// A key that is no text: half a character, or one with a zero byte.
    pub fn members(&self) -> Result<Vec<Member<'t>>> {
        let Pieces(pieces) = self.pieces()?;
        let member = |[key, value]: [&'t str; 2]| {
            let key = Value { file: self.file, raw: key };
            Ok(Member { key: key.text()?, at: key.at(), value: Value { file: self.file, raw: value } })
        };
        pieces.into_iter().map(member).collect()
    }

    /// The values of an array, in the order written.
    ///
    /// # Errors
    /// As [`Value::members`].
    pub fn items(&self) -> Result<Vec<Value<'t>>> {
        let Pieces(pieces) = self.pieces()?;
        Ok(pieces.into_iter().map(|[_, value]| Value { file: self.file, raw: value }).collect())
    }

    /// What a text says, and what stands there for everything else.
    ///
    /// # Errors
    /// The text has half a character in it, or a zero byte, which no word of a command line can have.
    pub fn text(&self) -> Result<String> {
        if self.kind() != Type::Text {
            return Ok(self.raw.to_owned());
        }
        let text: String = serde_json::from_str(self.raw).map_err(|error| {
            let whole = error.to_string();
            let sentence = whole.split(" at line ").next().unwrap_or_default();
            self.mistake(format!("{sentence}; accepted: a text of whole characters"))
        })?;
        if text.contains('\0') {
            return Err(self.mistake("the text has a zero byte in it; accepted: one without"));
        }
        Ok(text)
    }

    fn pieces(&self) -> Result<Pieces<'t>> {
        // The whole text has been checked, so this goes well.
        serde_json::from_str(self.raw).map_err(|error| self.mistake(error))
    }
}

/// The pieces of text that an object or array consists of: keys (empty ones in an array) and values.
struct Pieces<'t>(Vec<[&'t str; 2]>);

impl<'de> Deserialize<'de> for Pieces<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(PiecesVisitor)
    }
}

struct PiecesVisitor;

impl<'de> Visitor<'de> for PiecesVisitor {
    type Value = Pieces<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Pieces<'de>, A::Error> {
        let mut pieces = Vec::new();
        while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
            pieces.push([key.get(), value.get()]);
        }
        Ok(Pieces(pieces))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Pieces<'de>, A::Error> {
        let mut pieces = Vec::new();
        while let Some(value) = seq.next_element::<&RawValue>()? {
            pieces.push(["", value.get()]);
        }
        Ok(Pieces(pieces))
    }
}

#[cfg(test)]
#[path = "json_test.rs"]
mod tests;
