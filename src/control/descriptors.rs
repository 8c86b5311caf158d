//! The descriptors that a client has sent beside its requests (SCM_RIGHTS): those that have arrived, and those that `getfd`
//! gave a name.
//!
//! They belong to the client's session and go with it; what a command takes by its name is the command's. How many are kept
//! is bounded, whatever the client sends. Main thread.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use crate::error::{Error, Kind, Result};
use crate::qmp::plug::NetdevAdd;

/// The most descriptors that one client has kept here.
const MAX_NAMED: usize = 32;

/// One client's descriptors.
#[derive(Default)]
pub(super) struct Descriptors {
    /// Those of the last message that brought any, in their order; at most as many as one read takes.
    arrived: Vec<OwnedFd>,
    named: BTreeMap<String, OwnedFd>,
}

impl Descriptors {
    /// Takes in what came with a message. What came before and was given no name is closed.
    pub(super) fn arrive(&mut self, fds: Vec<OwnedFd>) {
        if !fds.is_empty() {
            self.arrived = fds;
        }
    }

    /// `getfd`: gives the next that has arrived a name. One that had the name is closed.
    pub(super) fn name(&mut self, name: &str) -> Result<()> {
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Error::usage("Parameter 'fdname' takes a name that does not begin with a digit"));
        }
        if self.arrived.is_empty() {
            return Err(Error::usage(
                "No descriptor came with this request; send it as SCM_RIGHTS with the request's bytes",
            ));
        }
        let fd = self.arrived.remove(0);
        if self.named.len() == MAX_NAMED && !self.named.contains_key(name) {
            return Err(Error::usage(format!(
                "{MAX_NAMED} descriptors are kept for this client already; use one, or closefd"
            )));
        }
        self.named.insert(name.to_owned(), fd);
        Ok(())
    }

    /// `closefd`.
    pub(super) fn close(&mut self, name: &str) -> Result<()> {
        self.named.remove(name).map(drop).ok_or_else(|| not_found(name))
    }

    /// The descriptor that a netdev is to be, if it is to be one: it is the netdev's from here on.
    pub(super) fn asked_for(&mut self, asked: &NetdevAdd) -> Result<Option<OwnedFd>> {
        let name = match (&asked.fd, &asked.fds) {
            (None, None) => return Ok(None),
            (Some(name), None) | (None, Some(name)) => name,
            (Some(_), Some(_)) => {
                return Err(Error::usage("Parameters 'fd' and 'fds' are one; accepted: one of the two"));
            }
        };
        // As clients of the system we replace have it, whose number before the colon means nothing.
        let name = name.rsplit(':').next().unwrap_or_default();
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Error::usage(format!(
                "'{name}' is a descriptor's number in this process, and might be anybody's; accepted: the name that getfd gave it"
            )));
        }
        self.named.remove(name).map(Some).ok_or_else(|| not_found(name))
    }
}

fn not_found(name: &str) -> Error {
    Error::new(Kind::NotFound, format!("Descriptor '{name}' not found; getfd gives one its name"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A descriptor, and whether it is still open somewhere.
    fn descriptor() -> (OwnedFd, impl Fn() -> bool) {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        // What nobody can write to any more is at its end; the other is only empty.
        (there.into(), move || (&here).read(&mut [0]).is_err())
    }

    fn some() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_descriptor_lives_under_its_name_until_it_is_replaced_closed_or_the_session_ends() {
        let mut descriptors = Descriptors::default();
        let [(a, a_open), (b, b_open), (c, c_open)] = [(); 3].map(|()| descriptor());
        for (fd, name) in [(a, "one"), (b, "one"), (c, "two")] {
            descriptors.arrive(vec![fd]);
            descriptors.name(name).unwrap();
        }
        assert_eq!((a_open(), b_open(), c_open()), (false, true, true), "the first was replaced");
        descriptors.close("one").unwrap();
        assert_eq!((b_open(), c_open()), (false, true));
        assert_eq!(descriptors.close("one").unwrap_err().kind(), Kind::NotFound);
        drop(descriptors);
        assert!(!c_open());
    }

    #[test]
    fn what_is_given_no_name_is_closed_when_others_arrive_and_not_by_a_message_without_any() {
        let mut descriptors = Descriptors::default();
        let [(a, a_open), (b, b_open)] = [(); 2].map(|()| descriptor());
        descriptors.arrive(vec![a]);
        descriptors.arrive(vec![]);
        assert!(a_open());
        descriptors.arrive(vec![b]);
        assert_eq!((a_open(), b_open()), (false, true));
        descriptors.name("b").unwrap();
        assert!(descriptors.name("c").unwrap_err().to_string().contains("SCM_RIGHTS"));
    }

    #[test]
    fn a_client_has_as_many_kept_as_the_bound_says_and_the_next_is_closed() {
        let mut descriptors = Descriptors::default();
        for n in 0..MAX_NAMED {
            descriptors.arrive(vec![some()]);
            descriptors.name(&format!("fd{n}")).unwrap();
        }
        let (fd, is_open) = descriptor();
        descriptors.arrive(vec![fd]);
        assert!(descriptors.name("more").unwrap_err().to_string().contains("closefd"));
        assert!(!is_open());
        descriptors.arrive(vec![some()]);
        descriptors.name("fd0").unwrap();
        for name in ["", "0", "7up"] {
            assert!(descriptors.name(name).unwrap_err().to_string().contains("digit"), "{name:?}");
        }
    }
}
