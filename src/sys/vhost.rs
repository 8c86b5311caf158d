//! vhost-vsock (`/dev/vhost-vsock`): a virtio-vsock device's two data queues, served by the host's kernel.
//!
//! The calls are those of linux/vhost.h and linux/vhost_types.h, of which no crate of ours has the numbers. The kernel
//! reads and writes guest memory at our addresses, so what has handed it over keeps it mapped, and ends the kernel's work
//! first. What is in a packet is the kernel's business and the guest's. No call waits longer than the kernel needs for the
//! batch that it is at. Any thread.

use std::ffi::{c_int, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// Where the kernel's module shows itself.
pub const PATH: &str = "/dev/vhost-vsock";

/// The queues that the kernel serves: packets to the guest, packets from it.
pub const QUEUES: usize = 2;

const fn request<T>(direction: c_uint, number: c_uint) -> c_ulong {
    // VHOST_VIRTIO is the letter of all of them.
    ioctl_expr(direction, 0xaf, number, size_of::<T>() as c_uint)
}

const GET_FEATURES: c_ulong = request::<u64>(_IOC_READ, 0x00);
const SET_FEATURES: c_ulong = request::<u64>(_IOC_WRITE, 0x00);
const SET_OWNER: c_ulong = request::<()>(_IOC_NONE, 0x01);
/// Its size is that of the table's head, whatever follows.
const SET_MEM_TABLE: c_ulong = request::<u64>(_IOC_WRITE, 0x03);
const SET_VRING_NUM: c_ulong = request::<State>(_IOC_WRITE, 0x10);
const SET_VRING_ADDR: c_ulong = request::<Addresses>(_IOC_WRITE, 0x11);
const SET_VRING_BASE: c_ulong = request::<State>(_IOC_WRITE, 0x12);
const GET_VRING_BASE: c_ulong = request::<State>(_IOC_READ | _IOC_WRITE, 0x12);
const SET_VRING_KICK: c_ulong = request::<Descriptor>(_IOC_WRITE, 0x20);
const SET_VRING_CALL: c_ulong = request::<Descriptor>(_IOC_WRITE, 0x21);
const SET_VRING_ERR: c_ulong = request::<Descriptor>(_IOC_WRITE, 0x22);
const SET_GUEST_CID: c_ulong = request::<u64>(_IOC_WRITE, 0x60);
const SET_RUNNING: c_ulong = request::<c_int>(_IOC_WRITE, 0x61);

/// VHOST_FILE_UNBIND: no descriptor.
const NONE: RawFd = -1;

/// `struct vhost_vring_state`.
#[repr(C)]
struct State {
    index: c_uint,
    num: c_uint,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct Descriptor {
    index: c_uint,
    fd: c_int,
}

/// `struct vhost_vring_addr`, whose addresses are this process's.
#[repr(C)]
struct Addresses {
    index: c_uint,
    flags: c_uint,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory` as it is for a machine: one piece of memory, or two with the gap between them.
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    regions: [Region; 2],
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest: u64,
    bytes: u64,
    address: u64,
    padding: u64,
}

/// One ring as its driver has set it up, and where the kernel goes on in it.
pub struct Vring<'a> {
    /// Descriptors: a power of two.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// The index of the available ring where it goes on.
    pub next: u16,
    /// Rung by the driver.
    pub kick: &'a dyn AsRawFd,
    /// Rung by the kernel when the driver wants an interrupt.
    pub call: &'a dyn AsRawFd,
    /// Rung by the kernel when it cannot make sense of the ring, or of what is in it.
    pub broken: &'a dyn AsRawFd,
}

/// The kernel's half of one vsock.
pub struct VhostVsock {
    // Closed before the memory may be unmapped.
    file: OwnedFd,
    ram: Arc<GuestMemoryMmap>,
}

/// Opens the kernel's device.
///
/// # Errors
/// ENOENT and ENODEV where the module is not loaded, EACCES.
pub fn open() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(PATH)?.into())
}

/// Takes over a descriptor of the kernel's device that somebody has opened.
///
/// # Errors
/// EBADF for a number that is no open descriptor, ENOTTY for one of something else, which is left as it was.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved; a number that is no descriptor is refused.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    let mut features = 0u64;
    // SAFETY: the kernel writes one such number, if it knows the request.
    if unsafe { libc::ioctl(fd, GET_FEATURES as _, &raw mut features) } != 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOTTY));
    }
    // SAFETY: no memory is involved. It must not be left to a child.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: an open descriptor that was handed to us by its number, and is used under no other name.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl VhostVsock {
    /// Makes the device behind `file` that of the guest with this memory: the kernel works for this process from now on.
    ///
    /// # Errors
    /// EBUSY where it works for another.
    pub fn new(file: OwnedFd, ram: Arc<GuestMemoryMmap>) -> io::Result<Self> {
        let vhost = VhostVsock { file, ram };
        vhost.ioctl(SET_OWNER, &mut ())?;
        let mut table = Table { count: 0, padding: 0, regions: Default::default() };
        for (place, region) in table.regions.iter_mut().zip(vhost.ram.iter()) {
            let (guest, address) = (region.start_addr().raw_value(), region.as_ptr() as u64);
            *place = Region { guest, bytes: region.len(), address, padding: 0 };
            table.count += 1;
        }
        if table.count as usize != vhost.ram.num_regions() {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        vhost.ioctl(SET_MEM_TABLE, &mut table)?;
        Ok(vhost)
    }

    /// Gives the guest its context id.
    ///
    /// # Errors
    /// EADDRINUSE for one that is taken, EINVAL for one that is reserved, something else for a vhost device that is no vsock.
    pub fn set_cid(&self, cid: u32) -> io::Result<()> {
        self.ioctl(SET_GUEST_CID, &mut u64::from(cid))
    }

    /// The feature bits that the kernel knows.
    ///
    /// # Errors
    /// None that a vhost device has.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0;
        self.ioctl(GET_FEATURES, &mut features)?;
        Ok(features)
    }

    /// Has the kernel serve the rings by these features. Each is looked at once, whether or not it was kicked.
    ///
    /// # Errors
    /// What the kernel says of features, rings or descriptors; it serves none then, and has let go of the descriptors.
    pub fn start(&self, features: u64, rings: &[Vring<'_>; QUEUES]) -> io::Result<()> {
        let started = self.set_up(features, rings).and_then(|()| self.set_running(true));
        if started.is_err() {
            self.let_go();
            return started;
        }
        // A kick that came before the kernel ran was not heard.
        rings.iter().try_for_each(|ring| ring_once(ring.kick))
    }

    fn set_up(&self, mut features: u64, rings: &[Vring<'_>; QUEUES]) -> io::Result<()> {
        self.ioctl(SET_FEATURES, &mut features)?;
        for (index, ring) in (0..).zip(rings) {
            self.ioctl(SET_VRING_NUM, &mut State { index, num: ring.size.into() })?;
            self.ioctl(SET_VRING_BASE, &mut State { index, num: ring.next.into() })?;
            let mut addresses = Addresses {
                index,
                flags: 0,
                descriptors: self.here(ring.descriptors)?,
                used: self.here(ring.used)?,
                available: self.here(ring.available)?,
                log: 0,
            };
            self.ioctl(SET_VRING_ADDR, &mut addresses)?;
            for (request, fd) in
                [(SET_VRING_CALL, ring.call), (SET_VRING_ERR, ring.broken), (SET_VRING_KICK, ring.kick)]
            {
                self.ioctl(request, &mut Descriptor { index, fd: fd.as_raw_fd() })?;
            }
        }
        Ok(())
    }

    /// Has the kernel serve the rings no more: for each, the index of the available ring where to go on. When it returns,
    /// nothing touches them, all interrupts that were due have been asked for, and the descriptors are let go of.
    ///
    /// # Errors
    /// None that the kernel has for a device of our own.
    pub fn stop(&self) -> io::Result<[u16; QUEUES]> {
        self.set_running(false)?;
        let mut bases = [0; QUEUES];
        for (index, base) in (0..).zip(&mut bases) {
            let mut state = State { index, num: 0 };
            self.ioctl(GET_VRING_BASE, &mut state)?;
            *base = state.num as u16;
        }
        self.let_go();
        Ok(bases)
    }

    fn let_go(&self) {
        for index in 0..QUEUES as c_uint {
            for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                // It had none, or has none now: nothing else can be refused.
                let _ = self.ioctl(request, &mut Descriptor { index, fd: NONE });
            }
        }
    }

    fn set_running(&self, running: bool) -> io::Result<()> {
        self.ioctl(SET_RUNNING, &mut c_int::from(running))
    }

    /// Where this address of the guest's is in this process.
    fn here(&self, address: u64) -> io::Result<u64> {
        let place = self.ram.get_host_address(GuestAddress(address));
        place.map(|place| place as u64).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))
    }

    fn ioctl<T>(&self, request: c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes what the request reads and writes. The memory that the table and the rings name is
        // mapped for as long as the kernel serves them, for `ram` lives longer.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, &raw mut *argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for VhostVsock {
    fn drop(&mut self) {
        // Whoever opened the descriptor may have it still, and then our end is not the kernel's.
        let _ = self.set_running(false);
    }
}

/// Rings an eventfd.
fn ring_once(eventfd: &dyn AsRawFd) -> io::Result<()> {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the kernel reads these bytes.
    let written = unsafe { libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a C compiler has them, of the header.
    #[test]
    fn the_numbers_are_those_of_the_header() {
        let expected = [
            (GET_FEATURES, 0x8008_af00),
            (SET_FEATURES, 0x4008_af00),
            (SET_OWNER, 0xaf01),
            (SET_MEM_TABLE, 0x4008_af03),
            (SET_VRING_NUM, 0x4008_af10),
            (SET_VRING_ADDR, 0x4028_af11),
            (SET_VRING_BASE, 0x4008_af12),
            (GET_VRING_BASE, 0xc008_af12),
            (SET_VRING_KICK, 0x4008_af20),
            (SET_VRING_CALL, 0x4008_af21),
            (SET_VRING_ERR, 0x4008_af22),
            (SET_GUEST_CID, 0x4008_af60),
            (SET_RUNNING, 0x4004_af61),
        ];
        for (ours, theirs) in expected {
            assert_eq!(ours, theirs, "{ours:#x}");
        }
    }

    #[test]
    fn a_number_that_is_no_descriptor_of_the_device_is_refused_and_left_open() {
        let file = File::open("/dev/null").unwrap();
        let error = |fd| adopt(fd).unwrap_err().raw_os_error();
        assert_eq!((error(-1), error(1 << 20)), (Some(libc::EBADF), Some(libc::EBADF)));
        assert_eq!(error(file.as_raw_fd()), Some(libc::ENOTTY));
        assert!(file.metadata().is_ok(), "it was closed");
    }
}
