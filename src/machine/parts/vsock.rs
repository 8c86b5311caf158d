//! From the specification of a vsock to its device: the socket that clients connect to is made here, or the host's kernel
//! told whose packets it is to move. Main thread.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use crate::config::vsock::{Carrier, VsockSpec};
use crate::devices::vhost_vsock::VhostVsock;
use crate::devices::vsock::{MAX_CONNECTIONS, Vsock};
use crate::error::{Context, Error, Result};
use crate::machine::inventory;
use crate::memory::GuestRam;
use crate::sys::socket::PrivateListener;
use crate::sys::{tune, vhost};
use crate::virtio::Device;

/// The device.
///
/// # Errors
/// The socket's path is taken, or its folder does not let us; the kernel has no such device, or has given it, or the context
/// id, to somebody else.
pub fn vsock(asked: &VsockSpec, ram: &Arc<GuestRam>) -> Result<(Box<dyn Device>, inventory::Vsock)> {
    let (device, counters): (Box<dyn Device>, _) = match &asked.carrier {
        Carrier::Sockets(path) => {
            let device = sockets(asked, path, ram)?;
            let counters = device.counters();
            (Box::new(device), Some(counters))
        }
        Carrier::Kernel(fd) => (Box::new(kernel(asked, *fd, ram)?), None),
    };
    Ok((device, inventory::Vsock { spec: asked.clone(), counters }))
}

fn sockets(asked: &VsockSpec, path: &Path, ram: &Arc<GuestRam>) -> Result<Vsock> {
    // A connection takes two.
    tune::allow_descriptors(2 * MAX_CONNECTIONS as u64);
    let listener = PrivateListener::bind(path).context(|| format!("-device vsock,id={}", asked.id))?;
    Ok(Vsock::new(&asked.id, asked.cid, listener, ram.clone()))
}

fn kernel(asked: &VsockSpec, fd: Option<RawFd>, ram: &Arc<GuestRam>) -> Result<VhostVsock> {
    let (id, cid) = (&asked.id, asked.cid);
    let file = match fd {
        Some(fd) => vhost::adopt(fd).map_err(|e| not_one(id, fd, e))?,
        None => open(id)?,
    };
    let refused = |e: io::Error| {
        match (e.raw_os_error(), fd) {
        (Some(libc::EADDRINUSE), _) => Error::host(format!(
            "-device vsock,id={id},guest-cid={cid}: another machine on this host has this context id; accepted: one that is \
             free (where the kernel carries the packets, they are the host's), or uds_path=PATH in place of the kernel"
        ))
        .because(e),
        (Some(libc::EBUSY), Some(fd)) => Error::host(format!(
            "-device vsock,id={id},vhostfd={fd}: the kernel works for another machine through it; accepted: a descriptor of \
             {} that has not been used",
            vhost::PATH
        ))
        .because(e),
        (_, Some(fd)) => not_one(id, fd, e),
        (_, None) => Error::host(format!("-device vsock,id={id}: set up {}", vhost::PATH)).because(e),
    }
    };
    let vhost = vhost::VhostVsock::new(file, ram.clone()).map_err(refused)?;
    vhost.set_cid(cid).map_err(refused)?;
    VhostVsock::new(id, cid, vhost)
}

fn not_one(id: &str, fd: RawFd, error: io::Error) -> Error {
    let text = format!(
        "-device vsock,id={id},vhostfd={fd}: is no open descriptor of a vhost-vsock device; accepted: one of {}, opened for \
         reading and writing",
        vhost::PATH
    );
    Error::usage(text).because(error)
}

fn open(id: &str) -> Result<OwnedFd> {
    vhost::open().map_err(|e| {
        let text = match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "this host has none; load the kernel's module with \"modprobe \
                                                                vhost_vsock\", or do without the kernel: uds_path=PATH"
            }
            Some(libc::EACCES | libc::EPERM) => {
                "this user may not open it; join the group that owns it, be handed a \
                                                 descriptor (vhostfd=N), or do without the kernel: uds_path=PATH"
            }
            _ => "open it",
        };
        Error::host(format!("-device vsock,id={id}: {}: {text}", vhost::PATH)).because(e)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::memory;

    fn refusal(fd: Option<RawFd>) -> Error {
        let asked = VsockSpec { id: "v".into(), cid: 3, carrier: Carrier::Kernel(fd) };
        let ram = memory::allocate(1 << 20, false, true).unwrap();
        vsock(&asked, &ram).map(drop).expect_err("is refused")
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused_as_a_mistake() {
        let file = File::open("/dev/null").unwrap();
        for fd in [file.as_raw_fd(), 1 << 20] {
            let refused = refusal(Some(fd));
            assert_eq!(refused.exit_code(), 2);
            let sentence =
                format!("-device vsock,id=v,vhostfd={fd}: is no open descriptor of a vhost-vsock device; accepted: ");
            assert!(refused.to_string().starts_with(&sentence), "{refused}");
        }
    }

    #[test]
    fn a_host_without_the_module_is_told_its_name_and_the_way_without_it() {
        if Path::new(vhost::PATH).exists() {
            println!("skipped: this host has {}", vhost::PATH);
            return;
        }
        let refused = refusal(None);
        assert_eq!(refused.exit_code(), 1);
        let told = refused.to_string();
        assert!(told.contains("modprobe vhost_vsock") && told.contains("uds_path=PATH"), "{told}");
    }
}
