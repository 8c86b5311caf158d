//! A read from a Unix socket that takes the descriptors, too, which came with the bytes (unix(7), SCM_RIGHTS). Any thread.
//!
//! Lengths of control messages are `size_t` in glibc and `socklen_t` in musl: `as _` is whichever it is.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// The most descriptors that one read takes; the kernel closes what is beyond.
const MAX_FDS: usize = 16;
/// Room for one control message of so many, in words: a header, and the descriptors.
const CONTROL_WORDS: usize = (size_of::<libc::cmsghdr>() + MAX_FDS * size_of::<RawFd>()).div_ceil(8);

/// Reads once: the number of bytes, and the descriptors that came with them (SCM_RIGHTS), which are closed on exec.
///
/// # Errors
/// What recvmsg(2) says.
pub fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut range = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zeroes are a message header without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut range;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header names `bytes` and `control` with their lengths, and both live until the call is over.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel has written whole control messages into `control` and their length into the header.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: not null, so it is a header inside `control`, aligned as such.
        let &libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type, .. } = unsafe { &*header };
        if (cmsg_level, cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: as above; the data follows its header.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            let len: usize = cmsg_len as _;
            let count = len.saturating_sub(size_of::<libc::cmsghdr>()) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the message's length says that it is there, and the kernel has just made the descriptor ours.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((count, fds))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    /// Sends a byte with so many descriptors.
    fn send(stream: &UnixStream, fds: &[RawFd]) {
        let mut control = vec![0u64; 2 + fds.len()];
        let mut range = libc::iovec { iov_base: b"x".as_ptr().cast_mut().cast(), iov_len: 1 };
        // SAFETY: as in `receive`.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut range;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: only a sum.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of_val(fds) as u32) } as _;
        // SAFETY: `control` has room for a header and all descriptors, and lives until the call is over.
        let sent = unsafe {
            let header = &mut *libc::CMSG_FIRSTHDR(&raw const message);
            (header.cmsg_level, header.cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
            header.cmsg_len = libc::CMSG_LEN(size_of_val(fds) as u32) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(header).cast(), fds.len());
            libc::sendmsg(stream.as_raw_fd(), &raw const message, 0)
        };
        assert_eq!(sent, 1, "{}", io::Error::last_os_error());
    }

    #[test]
    fn what_came_with_the_bytes_is_ours_and_not_our_childrens_and_no_more_than_fits() {
        let (mut from, to) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        from.write_all(b"none").unwrap();
        let mut bytes = [0; 100];
        let (count, fds) = receive(&to, &mut bytes).unwrap();
        assert_eq!((&bytes[..count], fds.len()), (&b"none"[..], 0));
        for sent in [1, 2, MAX_FDS, MAX_FDS + 5] {
            send(&from, &vec![file.as_fd().as_raw_fd(); sent]);
            let (count, fds) = receive(&to, &mut bytes).unwrap();
            assert_eq!((count, fds.len()), (1, sent.min(MAX_FDS)));
            for fd in fds {
                // SAFETY: a question about an open descriptor.
                assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
            }
        }
        drop(from);
        assert_eq!(receive(&to, &mut bytes).unwrap().0, 0);
    }
}
