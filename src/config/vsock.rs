//! `-device vsock`, `-device vhost-vsock-device`: the guest's AF_VSOCK connections, carried by the monitor over Unix sockets
//! of the host's, or by the host's kernel.
//!
//! Whether the sockets can be made, and whether the kernel has such a device, is found out when the machine is built. Main
//! thread, before anything is started.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::keyvalue::{KeyValues, decimal};
use super::options::short_text;
use super::spec::MAX_SOCKET_PATH_BYTES;
use crate::error::Result;

/// The least context id of a guest: the smaller ones mean the host, or nobody.
pub const MIN_CID: u32 = 3;
/// The greatest: all ones mean anybody.
pub const MAX_CID: u32 = u32::MAX - 1;
/// The longest `uds_path`: with an underscore and any port behind it, it is still a path of a socket.
pub const MAX_UDS_PATH_BYTES: usize = MAX_SOCKET_PATH_BYTES - "_4294967295".len();

/// The device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// What messages and QMP call it.
    pub id: String,
    /// The guest's context id, [`MIN_CID`] to [`MAX_CID`].
    pub cid: u32,
    /// Who carries its packets.
    pub carrier: Carrier,
}

/// Who carries a guest's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The monitor. Clients connect to this path; what the guest connects to is who listens at it with an underscore and the
    /// port behind it.
    Sockets(PathBuf),
    /// The host's kernel, through this open descriptor of its device; one that the monitor opens, if none.
    Kernel(Option<RawFd>),
}

impl Carrier {
    /// The path of the socket, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Carrier::Sockets(path) => Some(path),
            Carrier::Kernel(_) => None,
        }
    }
}

/// `-device vsock,id=NAME,guest-cid=N,uds_path=PATH`, or `-device vhost-vsock-device,id=NAME,guest-cid=N[,vhostfd=N]`, of
/// which `vsock` without `uds_path` is another name.
///
/// # Errors
/// A mistake of the user's.
pub fn device(text: &str) -> Result<VsockSpec> {
    let keys = ["driver", "id", "guest-cid", "uds_path", "vhostfd"];
    let pairs = KeyValues::read("-device", text, &keys, |place, item| (place == 0).then_some(("driver", item)))?;
    vsock_of(&pairs)
}

/// The device of these pairs.
pub(super) fn vsock_of(pairs: &KeyValues<'_>) -> Result<VsockSpec> {
    let of_kernel = pairs.get("driver", "", Some)? == Some("vhost-vsock-device");
    let accepted = format!("PATH (1 to {MAX_UDS_PATH_BYTES} bytes), where clients on the host connect");
    let path =
        pairs.get("uds_path", &accepted, |path| (1..=MAX_UDS_PATH_BYTES).contains(&path.len()).then(|| path.into()))?;
    let fd = pairs.get("vhostfd", "the number of an open descriptor of /dev/vhost-vsock", |fd| {
        RawFd::try_from(decimal(fd)?).ok()
    })?;
    let carrier = match path {
        Some(_) if of_kernel || fd.is_some() => {
            let (path, fd) = (pairs.name("uds_path"), pairs.name("vhostfd"));
            return Err(pairs.mistake(format!(
                "with {path:?} the monitor carries the packets, and with \"vhost-vsock-device\" or {fd:?} the host's kernel \
                 does; accepted: a vsock with {path:?}, or either without it"
            )));
        }
        Some(path) => Carrier::Sockets(path),
        None => Carrier::Kernel(fd),
    };
    Ok(VsockSpec {
        id: pairs.require("id", "NAME (1 to 255 characters)", short_text)?,
        cid: pairs.require("guest-cid", &format!("a number from {MIN_CID} to {MAX_CID}"), |cid| {
            let cid = u32::try_from(decimal(cid)?).ok()?;
            (MIN_CID..=MAX_CID).contains(&cid).then_some(cid)
        })?,
        carrier,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refusal(text: &str) -> String {
        let error = device(text).expect_err("is refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn it_has_a_name_a_number_and_a_path() {
        let spec = device("vsock,id=v,guest-cid=3,uds_path=/run/v.sock").unwrap();
        assert_eq!(spec, VsockSpec { id: "v".into(), cid: 3, carrier: Carrier::Sockets("/run/v.sock".into()) });
        assert!(refusal("vsock,guest-cid=3,uds_path=p").contains("key \"id\" is missing"));
        assert!(refusal("vsock,id=v,uds_path=p").contains("key \"guest-cid\" is missing"));
    }

    #[test]
    fn the_guests_number_is_none_that_means_somebody_else() {
        let with = |cid: &str| format!("vsock,id=v,uds_path=p,guest-cid={cid}");
        assert_eq!(device(&with("4294967294")).unwrap().cid, MAX_CID);
        for cid in ["0", "1", "2", "4294967295", "4294967296", "-1", "three"] {
            assert!(refusal(&with(cid)).ends_with("accepted: a number from 3 to 4294967294"), "{cid}");
        }
    }

    #[test]
    fn the_path_leaves_room_for_a_port() {
        let with = |len: usize| format!("vsock,id=v,guest-cid=3,uds_path={}", "p".repeat(len));
        device(&with(96)).unwrap();
        assert!(refusal(&with(97)).contains("PATH (1 to 96 bytes)"));
    }

    #[test]
    fn without_a_path_it_is_the_hosts_kernels_by_either_name() {
        for (text, fd) in [
            ("vhost-vsock-device,id=v,guest-cid=3,vhostfd=5", Some(5)),
            ("driver=vhost-vsock-device,id=v,guest-cid=3", None),
            ("vsock,id=v,guest-cid=3,vhostfd=5", Some(5)),
            ("vsock,id=v,guest-cid=3", None),
        ] {
            let expected = VsockSpec { id: "v".into(), cid: 3, carrier: Carrier::Kernel(fd) };
            assert_eq!(device(text).unwrap(), expected, "{text}");
        }
        for fd in ["-1", "2147483648", "vsock"] {
            let refused = refusal(&format!("vsock,id=v,guest-cid=3,vhostfd={fd}"));
            assert!(refused.ends_with("accepted: the number of an open descriptor of /dev/vhost-vsock"), "{refused}");
        }
        assert!(refusal("vhost-vsock-device,id=v,vhostfd=5").contains("key \"guest-cid\" is missing"));
        assert!(refusal("vhost-vsock-device,guest-cid=3").contains("key \"id\" is missing"));
        assert!(refusal("vhost-vsock-device,id=v,guest-cid=2").ends_with("accepted: a number from 3 to 4294967294"));
    }

    #[test]
    fn a_path_and_the_hosts_kernel_are_two_ways_for_one_device() {
        for text in [
            "vsock,id=v,guest-cid=3,uds_path=p,vhostfd=5",
            "vhost-vsock-device,id=v,guest-cid=3,uds_path=p",
            "driver=vhost-vsock-device,id=v,guest-cid=3,uds_path=p",
        ] {
            let refused = refusal(text);
            assert!(refused.ends_with("accepted: a vsock with \"uds_path\", or either without it"), "{refused}");
        }
    }
}
