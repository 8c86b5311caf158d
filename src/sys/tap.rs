//! Taps: a network interface of the host whose other end is a file (`/dev/net/tun`), one packet a call.
//!
//! Every packet is preceded by a virtio-net header of [`HEADER_BYTES`], so that checksums and segmentation are left to who
//! can do them cheapest. What is in a packet, and whose it is, is the device's business. The calls on packets never wait;
//! those that change the tap take the kernel's lock for network interfaces. Any thread.

#![allow(unsafe_code)] // The one place where taps are opened, asked and set.

use std::ffi::{CStr, CString, c_int, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::io::{IoVec, MAX_IOVECS};
use super::pieces::Pieces;

/// The longest name of an interface, in bytes: the kernel's IFNAMSIZ without its NUL.
pub const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;
/// Bytes of the header before each packet: `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
pub const HEADER_BYTES: usize = 12;
/// What every tap of ours is: whole frames, without the kernel's own header, with virtio's.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Packets that are thrown away at most at a time: twice what the kernel queues unless told otherwise.
const MAX_DISCARDED: usize = 2000;

/// Work that the other end may leave to us on what we read: `TUN_F_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets may come with a checksum that is still to be made.
    pub checksum: bool,
    /// ... and TCP over IPv4 in more than one segment.
    pub tso4: bool,
    /// ... and TCP over IPv6.
    pub tso6: bool,
    /// ... and those with congestion marks.
    pub ecn: bool,
    /// ... and UDP in more than one fragment.
    pub ufo: bool,
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether this network namespace has an interface of that name.
pub fn exists(name: &CStr) -> bool {
    // SAFETY: a C string.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

impl Tap {
    /// Opens a queue of the tap called `name`, which has at most [`MAX_NAME_BYTES`]. `several` asks for one of several
    /// queues; a tap that has several gives a single one too.
    ///
    /// # Errors
    /// Those of `/dev/net/tun` itself; ENODEV where there is no such interface, which is not made; EINVAL for one that is
    /// no tap, or has no further queue to give; EBUSY for one that is in use; EPERM.
    pub fn open(name: &str, several: bool) -> io::Result<Tap> {
        let c_name = CString::new(name)?;
        // The kernel would make one, and take it away again at our end.
        if !exists(&c_name) {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let tap = Tap { file: file.into() };
        let mut request = request(name);
        let queues: &[c_int] = if several { &[libc::IFF_MULTI_QUEUE] } else { &[0, libc::IFF_MULTI_QUEUE] };
        let mut attached = Ok(());
        for queue in queues {
            request.ifr_ifru.ifru_flags = (FLAGS | queue) as libc::c_short;
            attached = tap.ioctl(libc::TUNSETIFF as c_ulong, &raw mut request as c_ulong);
            // EINVAL: its number of queues is said wrongly, or it is no tap.
            if !matches!(&attached, Err(e) if e.raw_os_error() == Some(libc::EINVAL)) {
                break;
            }
        }
        attached?;
        tap.prepare()
    }

    /// Takes over a descriptor that somebody has opened and attached to a tap.
    ///
    /// # Errors
    /// EBADF for a number that is no open descriptor, EINVAL for one that is no tap or has no virtio header.
    pub fn adopt(fd: RawFd) -> io::Result<Tap> {
        let refused = |error| Err(io::Error::from_raw_os_error(error));
        // SAFETY: no memory is involved; a number that is no descriptor is refused.
        let status = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if fd < 0 || status < 0 {
            return refused(libc::EBADF);
        }
        // SAFETY: it has just been found to be open; nobody closes it meanwhile.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        // It is closed at our end only if it is what it is to be.
        let Ok(facts) = facts(borrowed) else { return refused(libc::EINVAL) };
        if flags(&facts) & FLAGS != FLAGS {
            return refused(libc::EINVAL);
        }
        // SAFETY: as above. It must neither block us nor be left to a child.
        unsafe {
            libc::fcntl(fd, libc::F_SETFL, status | libc::O_NONBLOCK);
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        // SAFETY: an open descriptor that was handed to us by its number, and is used under no other name.
        Tap { file: unsafe { OwnedFd::from_raw_fd(fd) } }.prepare()
    }

    /// Takes over a descriptor that is ours already; it is closed if it is not what it is to be.
    ///
    /// # Errors
    /// As [`Tap::adopt`].
    pub fn own(fd: OwnedFd) -> io::Result<Tap> {
        let tap = Tap::adopt(fd.as_raw_fd())?;
        // It is the tap's now.
        let _ = fd.into_raw_fd();
        Ok(tap)
    }

    fn prepare(self) -> io::Result<Tap> {
        let size = HEADER_BYTES as c_int;
        self.ioctl(libc::TUNSETVNETHDRSZ as c_ulong, &raw const size as c_ulong)?;
        Ok(self)
    }

    fn ioctl(&self, request: c_ulong, argument: c_ulong) -> io::Result<()> {
        ioctl(self.as_fd(), request, argument)
    }

    /// The name of its interface.
    ///
    /// # Errors
    /// EBADFD when it is gone.
    pub fn name(&self) -> io::Result<String> {
        let facts = facts(self.as_fd())?;
        let bytes = facts.ifr_name.map(|byte| byte.cast_unsigned());
        let name = CStr::from_bytes_until_nul(&bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// The largest packet that its interface carries, in bytes behind the Ethernet header.
    ///
    /// # Errors
    /// ENODEV when it is gone, or in another network namespace.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name()?);
        // SAFETY: no memory is involved.
        let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that we have just opened.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: the kernel reads and writes one struct ifreq.
        if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has written the MTU.
        Ok(unsafe { request.ifr_ifru.ifru_mtu }.cast_unsigned())
    }

    /// Says what the host may leave undone in packets that we read.
    ///
    /// # Errors
    /// EINVAL for work that this kernel does not leave to others; it does it then.
    pub fn set_offloads(&self, wanted: Offloads) -> io::Result<()> {
        let bit = |wanted: bool, bit: c_uint| if wanted { bit } else { 0 };
        let bits = bit(wanted.checksum, libc::TUN_F_CSUM)
            | bit(wanted.tso4, libc::TUN_F_TSO4)
            | bit(wanted.tso6, libc::TUN_F_TSO6)
            | bit(wanted.ecn, libc::TUN_F_TSO_ECN)
            | bit(wanted.ufo, libc::TUN_F_UFO);
        self.ioctl(libc::TUNSETOFFLOAD as c_ulong, bits.into())
    }

    /// Has the kernel put packets into this queue of several, or not.
    ///
    /// # Errors
    /// EINVAL for a queue that is so already, and a tap that has one only.
    pub fn set_used(&self, used: bool) -> io::Result<()> {
        let mut request = request("");
        request.ifr_ifru.ifru_flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE } as _;
        self.ioctl(libc::TUNSETQUEUE as c_ulong, &raw mut request as c_ulong)
    }

    /// Shows the host a cable that is plugged in, or is not.
    ///
    /// # Errors
    /// EINVAL from a kernel before 5.0, EBADFD when the tap is gone.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        let on = c_int::from(on);
        self.ioctl(libc::TUNSETCARRIER as c_ulong, &raw const on as c_ulong)
    }

    /// Throws away what is waiting to be read, up to [`MAX_DISCARDED`] packets; how many.
    pub fn discard(&self) -> usize {
        let mut byte = 0u8;
        let mut count = 0;
        // What a packet is longer than the buffer is dropped; one that is not even long enough for the header is refused
        // and gone all the same.
        let read = |byte: &mut u8| {
            // SAFETY: one byte of ours.
            let result = unsafe { libc::read(self.file.as_raw_fd(), (&raw mut *byte).cast(), 1) };
            result >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
        };
        while count < MAX_DISCARDED && read(&mut byte) {
            count += 1;
        }
        count
    }

    /// Reads one packet with its header into the first `count` of `pieces` and what they have no room for into their
    /// overflow; its length, which is cut at that of both.
    ///
    /// # Errors
    /// EAGAIN when there is none, EBADFD when the tap is gone.
    pub fn read(&self, pieces: &mut Pieces, count: usize) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        pieces.with_overflow(count, |iov| {
            // SAFETY: `Pieces` keeps the memory mapped, and only it reaches the overflow, which it lends us.
            let read = unsafe { libc::readv(fd, IoVec::as_raw(iov.as_ptr()), iov.len().min(MAX_IOVECS) as c_int) };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        })
    }

    /// Writes one packet with its header from all of `pieces`.
    ///
    /// # Errors
    /// EAGAIN when there is no room, EINVAL for what is no packet, EIO when the interface is down, EBADFD when it is gone.
    pub fn write(&self, pieces: &Pieces) -> io::Result<usize> {
        let iov = pieces.all();
        let count = iov.len().min(MAX_IOVECS) as c_int;
        // SAFETY: `Pieces` keeps the memory mapped.
        let written = unsafe { libc::writev(self.file.as_raw_fd(), IoVec::as_raw(iov.as_ptr()), count) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

/// For tests: something that keeps packets apart like a tap, and its other end. It has no interface.
#[cfg(test)]
pub fn pair() -> (Tap, std::os::unix::net::UnixDatagram) {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two descriptors, which are ours.
    let made = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) == 0
            && libc::fcntl(fds[0], libc::F_SETFL, libc::O_NONBLOCK) == 0
    };
    assert!(made);
    // SAFETY: as above.
    let [tap, other] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    (Tap { file: tap }, other.into())
}

fn ioctl(fd: BorrowedFd<'_>, request: c_ulong, argument: c_ulong) -> io::Result<()> {
    // SAFETY: every caller passes what the request takes: a number, or the address of what it reads and writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Name and flags of the interface that the file is attached to.
fn facts(fd: BorrowedFd<'_>) -> io::Result<libc::ifreq> {
    let mut request = request("");
    ioctl(fd, libc::TUNGETIFF as c_ulong, &raw mut request as c_ulong)?;
    Ok(request)
}

fn flags(facts: &libc::ifreq) -> c_int {
    // SAFETY: the kernel has written flags, in the place of any of its integers.
    c_int::from(unsafe { facts.ifr_ifru.ifru_flags }.cast_unsigned())
}

/// A request about the interface of that name, which is cut at [`MAX_NAME_BYTES`].
fn request(name: &str) -> libc::ifreq {
    // SAFETY: zeros are one: an empty name and no flags.
    let mut request = unsafe { MaybeUninit::<libc::ifreq>::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(MAX_NAME_BYTES)) {
        *to = from.cast_signed();
    }
    request
}
