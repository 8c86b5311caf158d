//! Where the programs are that are measured: in the source tree, unless the environment says otherwise.

use std::env;
use std::path::{Path, PathBuf};

use super::Result;

/// The root of the source tree.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const RELEASE: &str = "target/x86_64-unknown-linux-gnu/release";

/// The programs and the guest.
pub struct Programs {
    /// Ours: `LOOPVISOR`.
    pub loopvisor: PathBuf,
    /// `QEMU`, by default the one on the PATH.
    pub qemu: PathBuf,
    /// The bare-metal guest: `LOOPVISOR_GUEST`.
    pub guest: PathBuf,
    /// This program, which is the floor as well.
    pub bench: PathBuf,
}

impl Programs {
    /// Finds them.
    ///
    /// # Errors
    /// One of ours is not there.
    pub fn find() -> Result<Programs> {
        let root = Path::new(ROOT);
        let ours = |variable: &str, default: PathBuf| -> Result<PathBuf> {
            let path = env::var_os(variable).map_or(default, PathBuf::from);
            match path.canonicalize() {
                Ok(path) => Ok(path),
                Err(error) => Err(format!("{path:?}: {error}: build it, or name another one by {variable}=").into()),
            }
        };
        Ok(Programs {
            loopvisor: ours("LOOPVISOR", root.join(RELEASE).join("loopvisor"))?,
            qemu: env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into()).into(),
            guest: ours("LOOPVISOR_GUEST", root.join("tests/guest").join(RELEASE).join("loopguest"))?,
            bench: env::current_exe()?,
        })
    }
}
