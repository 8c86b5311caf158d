//! `PrivateListener`: a Unix socket that listens at a path, and whose file belongs to this process.
//!
//! The file has mode 0600 from the moment it exists. A dead one is replaced, one behind which somebody listens is left
//! alone, and ours is removed at the end if it is still ours. Neither a protocol nor a client: those are its owner's. Any
//! thread.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::own_file::OwnFile;
use crate::error::{Context, Error, Result};

/// Clients that may wait to be accepted; further ones are refused by the kernel.
const BACKLOG: i32 = 128;

/// A listening socket and its file.
pub struct PrivateListener {
    listener: UnixListener,
    file: OwnFile,
}

impl PrivateListener {
    /// Makes the socket. It never blocks.
    ///
    /// # Errors
    /// The path is taken by a live socket or by something else, or its folder does not let us.
    pub fn bind(path: &Path) -> Result<Self> {
        let name = || path.display().to_string();
        let listener = match listen(path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                remove_dead(path)?;
                listen(path)
            }
            listener => listener,
        };
        let listener = listener.context(name)?;
        let file = OwnFile::new(path).context(name)?;
        Ok(PrivateListener { listener, file })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The next client, whose stream does not block either.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; otherwise what accept(2) says: EMFILE for example.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl AsFd for PrivateListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Removes a socket that was left behind by a process that was killed.
fn remove_dead(path: &Path) -> Result<()> {
    let name = || path.display().to_string();
    if !fs::symlink_metadata(path).context(name)?.file_type().is_socket() {
        return Err(Error::host(format!("{}: the path exists and is no socket: choose another or remove it", name())));
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let sentence = format!("{}: another process listens there: end it, or choose another path", name());
            Err(Error::host(sentence))
        }
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).context(name),
        Err(e) => {
            let sentence = format!("{}: the socket that exists there cannot be asked who listens", name());
            Err(Error::host(sentence).because(e))
        }
    }
}

/// Binds and listens. The file is given the mode of the socket, which is set before; the mode mask of the process, which
/// other threads share, stays as it is.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = address(path)?;
    let socket = stream_socket()?;
    // SAFETY: no memory is involved.
    checked(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes, which is the whole of the address.
    checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: no memory is involved.
    checked(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(UnixListener::from(socket))
}

/// Connects to who listens at a path, without waiting for them to have room for us.
///
/// # Errors
/// What connect(2) says: `WouldBlock` if as many as may wait for them already do, `ConnectionRefused` if nobody listens.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = address(path)?;
    let socket = stream_socket()?;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: as in `listen`.
    checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(UnixStream::from(socket))
}

/// A path as the kernel takes it.
fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let bytes = path.as_os_str().as_bytes();
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::from(ErrorKind::InvalidInput));
    }
    for (to, &from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(address)
}

/// A socket that does not block and is not our children's.
fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved.
    let fd = checked(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: a new descriptor that is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use std::path::PathBuf;

    use super::*;

    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("loopvisor-{name}-{}", std::process::id()))
    }

    #[test]
    fn the_file_is_its_owners_alone_and_goes_with_the_listener() {
        let path = place("private");
        let listener = PrivateListener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        let told = PrivateListener::bind(&path).err().unwrap().to_string();
        assert!(told.contains("another process listens"), "{told}");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_another_file_is_not() {
        let path = place("dead");
        drop(UnixListener::bind(&path).unwrap());
        drop(PrivateListener::bind(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        let told = PrivateListener::bind(&path).err().unwrap().to_string();
        assert!(told.contains("no socket"), "{told}");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_not_ours_any_more_is_left_alone() {
        let path = place("others");
        let listener = PrivateListener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_path_longer_than_an_address_is_an_error() {
        let told = PrivateListener::bind(Path::new(&"/x".repeat(60))).err().unwrap().to_string();
        assert!(told.contains("invalid"), "{told}");
    }
}
