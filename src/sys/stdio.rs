//! Standard input and output as files of their own: unbuffered, and closed without closing the originals.
//!
//! Main thread.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// A duplicate of standard output.
///
/// # Errors
/// EMFILE, or EBADF where there is none.
pub fn output() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}

/// A duplicate of standard input.
///
/// # Errors
/// As [`output`].
pub fn input() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}
