//! `Error`: trouble of the host's or the operator's making.
//!
//! An error names the thing, the cause and the way out, and ends as an exit code or a QMP error class. It is either
//! logged or returned, never both. It is *not* for what a guest does wrong: that is a `Fault` (in `virtio`), answered
//! on the device and never seen by the operator as an error. Any thread may make one.

use std::fmt;

/// What the caller of the program, or of a QMP command, is told to do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line asks for something that cannot be: exit code 2, QMP class `GenericError`.
    Usage,
    /// The host refused something (a file, KVM, memory): exit code 1, QMP class `GenericError`.
    Host,
    /// A name that no device, drive or iothread carries: QMP class `DeviceNotFound`.
    NotFound,
    /// The thing is there and not in a state to do that: QMP class `DeviceNotActive`.
    NotActive,
    /// No such QMP command: QMP class `CommandNotFound`.
    NoCommand,
}

/// One sentence about the thing and the way out, and the chain of causes below it.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    sentence: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of anything that can fail for the host's or the operator's reasons.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of the given kind that says `sentence`.
    pub fn new(kind: Kind, sentence: impl Into<String>) -> Self {
        Error { kind, sentence: sentence.into(), cause: None }
    }

    /// A mistake on the command line: names the option, the word, and what would be accepted.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Error::new(Kind::Usage, sentence)
    }

    /// Trouble of the host's making.
    pub fn host(sentence: impl Into<String>) -> Self {
        Error::new(Kind::Host, sentence)
    }

    /// The same error with its cause below it.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// What is to be done about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The exit code that this error ends the program with: 2 for a mistake in what was typed, 1 for all else.
    pub fn exit_code(&self) -> u8 {
        if self.kind == Kind::Usage { 2 } else { 1 }
    }
}

impl fmt::Display for Error {
    /// The sentence and every cause below it, joined by colons.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)?;
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            // An `Error` prints the causes below it itself.
            next = if cause.is::<Error>() { None } else { cause.source() };
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn std::error::Error + 'static))
    }
}

/// Puts a sentence above somebody else's error.
pub trait Context<T> {
    /// The same result; an error becomes the cause of `Error::host(sentence())`.
    fn context<S: Into<String>>(self, sentence: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, sentence: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::host(sentence()).because(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_prints_its_whole_chain_once() {
        let io = std::io::Error::from_raw_os_error(libc::ENOENT);
        let inner: Result<()> = Err(io).context(|| "open \"a.img\"");
        let outer = inner.context(|| "drive \"vda\"").expect_err("is an error");
        assert_eq!(outer.to_string(), "drive \"vda\": open \"a.img\": No such file or directory (os error 2)");
    }

    #[test]
    fn only_a_mistake_in_what_was_typed_exits_with_two() {
        assert_eq!(Error::usage("x").exit_code(), 2);
        for kind in [Kind::Host, Kind::NotFound, Kind::NotActive, Kind::NoCommand] {
            assert_eq!(Error::new(kind, "x").exit_code(), 1);
        }
    }
}
