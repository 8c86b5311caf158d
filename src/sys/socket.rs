//! A Unix socket that nobody but its owner may connect to, from the moment it exists.
//!
//! Main thread, before any other is started: the file mode mask belongs to the whole process.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Binds and listens, with the socket's mode 0600.
///
/// # Errors
/// What bind(2) says; EADDRINUSE when the path exists.
pub fn listen_private(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: umask takes a number and cannot fail.
    let old = unsafe { libc::umask(0o177) };
    let listener = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(old) };
    listener
}
