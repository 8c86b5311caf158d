//! `-device vsock`: AF_VSOCK connections of the guest's, carried over Unix sockets of the host's.
//!
//! Whether the sockets can be made is found out when the machine is built. Main thread, before anything is started.

use std::path::PathBuf;

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
    /// Where clients connect; what the guest connects to is this with an underscore and the port behind it.
    pub path: PathBuf,
}

/// `-device vsock,id=NAME,guest-cid=N,uds_path=PATH`.
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
    if pairs.get("vhostfd", "", |_| Some(()))?.is_some() {
        return Err(pairs.mistake(format!(
            "{:?} is a device of the host's kernel, and this one is served by the monitor over Unix sockets; accepted: {} \
             in its place",
            pairs.name("vhostfd"),
            pairs.pair("uds_path", "PATH")
        )));
    }
    let path = format!("PATH (1 to {MAX_UDS_PATH_BYTES} bytes), where clients on the host connect");
    Ok(VsockSpec {
        id: pairs.require("id", "NAME (1 to 255 characters)", short_text)?,
        cid: pairs.require("guest-cid", &format!("a number from {MIN_CID} to {MAX_CID}"), |cid| {
            let cid = u32::try_from(decimal(cid)?).ok()?;
            (MIN_CID..=MAX_CID).contains(&cid).then_some(cid)
        })?,
        path: pairs
            .require("uds_path", &path, |path| (1..=MAX_UDS_PATH_BYTES).contains(&path.len()).then(|| path.into()))?,
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
        assert_eq!(spec, VsockSpec { id: "v".into(), cid: 3, path: "/run/v.sock".into() });
        assert!(refusal("vsock,guest-cid=3,uds_path=p").contains("key \"id\" is missing"));
        assert!(refusal("vsock,id=v,uds_path=p").contains("key \"guest-cid\" is missing"));
        assert!(refusal("vsock,id=v,guest-cid=3").contains("key \"uds_path\" is missing; accepted: uds_path=PATH"));
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
    fn a_device_of_the_hosts_kernel_is_refused_with_the_way_out() {
        let refused = refusal("vsock,id=v,guest-cid=3,vhostfd=5");
        assert!(refused.ends_with("accepted: uds_path=PATH in its place"), "{refused}");
    }
}
