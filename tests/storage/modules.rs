//! Loads the modules of the nested host's kernel.

use std::fs;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::monitor::skipped;

/// The names of the modules in loading order: `storage_modules` of `tools/linux-image`.
const LIST: &str = "/lib/modules/storage";

/// What each module is told; the others are told nothing.
const PARAMETERS: [(&str, &[&str]); 6] = [
    ("loop", &["max_loop=4"]),
    ("brd", &["rd_nr=1", "rd_size=16384"]),
    ("zram", &["num_devices=1"]),
    ("nbd", &["nbds_max=1"]),
    ("null_blk", &["nr_devices=0"]),
    // A disk of 16 MiB with a write cache, that can be unmapped in blocks of 4096 bytes.
    ("scsi_debug", &["dev_size_mb=16", "lbpu=1", "lbpws=1", "physblk_exp=3", "opt_xferlen_exp=7", "delay=0"]),
];

/// Loads all of them once, and gives the test's thread mounts of its own; says so if this is no nested host.
pub fn ready() -> bool {
    static LOADED: Mutex<bool> = Mutex::new(false);
    if !std::env::var("LOOPVISOR_HOST").is_ok_and(|host| host == "nested") {
        skipped("it loads modules and makes block devices, for which it wants the nested host");
        return false;
    }
    crate::host::make_mounts_private().unwrap();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*loaded {
        for file in fs::read_to_string(LIST).unwrap().lines() {
            let name = file.rsplit('/').next().unwrap().trim_end_matches(".ko").replace('-', "_");
            let words = PARAMETERS.iter().find(|(module, _)| *module == name).map_or(&[][..], |(_, words)| words);
            let output = Command::new("busybox").arg("insmod").arg(file).args(words).output().unwrap();
            // Some of them KVM has brought along.
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() || told.contains("File exists"), "{file}: {told}");
        }
        *loaded = true;
    }
    true
}
