//! Facts about a block device, its users on this host, and the one request that only block devices have: discard.
//!
//! Any thread may call anything; [`discard`] waits for the device.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

/// Not in the `libc` crate: `BLKROGET` and `BLKDISCARD` of linux/fs.h.
const BLKROGET: libc::c_ulong = 0x125e;
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Sizes in bytes; 0 if the device does not report one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// The smallest write that the device does without reading first.
    pub physical_block: u32,
    /// The preferred granularity of random requests.
    pub minimum_io: u32,
    /// The preferred size of long requests.
    pub optimal_io: u32,
}

/// Makes a request by which the kernel writes a C `int` or `unsigned int`.
fn number(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: each of the requests made here writes one 32-bit number.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut value) } {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the device refuses writes (`BLKROGET`). An open for writing succeeds even then.
///
/// # Errors
/// Those of ioctl(2).
pub fn is_read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(number(fd, BLKROGET)? != 0)
}

/// The device's geometry.
///
/// # Errors
/// Those of ioctl(2).
pub fn geometry(fd: BorrowedFd<'_>) -> io::Result<Geometry> {
    Ok(Geometry {
        physical_block: number(fd, libc::BLKPBSZGET as _)?,
        minimum_io: number(fd, libc::BLKIOMIN as _)?,
        optimal_io: number(fd, libc::BLKIOOPT as _)?,
    })
}

/// Discards `len` bytes from `offset` on.
///
/// Not by fallocate(2): on a block device that writes zeros, which a device that can discard may not support.
///
/// # Errors
/// `EOPNOTSUPP` if the device cannot discard, `EINVAL` if the range is not made of whole logical blocks, and others of
/// ioctl(2).
pub fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the kernel reads two 64-bit numbers.
    match unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The user on this host of the device that `facts` describe, or of one of its partitions: a mount, swap or another block
/// device, in words for an error.
pub fn user_of(facts: &Metadata) -> Option<String> {
    user_of_number(facts.rdev()).or_else(|| {
        let folder = format!("/sys/dev/block/{}:{}", libc::major(facts.rdev()), libc::minor(facts.rdev()));
        fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
            // Only a partition's folder has this file.
            fs::metadata(entry.path().join("partition")).ok()?;
            let number = fs::read_to_string(entry.path().join("dev")).ok()?;
            let (major, minor) = number.trim_end().split_once(':')?;
            let user = user_of_number(libc::makedev(major.parse().ok()?, minor.parse().ok()?))?;
            Some(format!("partition {} is {user}", entry.file_name().to_str()?))
        })
    })
}

fn user_of_number(number: libc::dev_t) -> Option<String> {
    let is_it = |path: &str| fs::metadata(path).is_ok_and(|other| other.rdev() == number);
    let (major, minor) = (libc::major(number), libc::minor(number));
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    if let Some(place) = mounts.lines().find_map(|line| mounted_at(line, &format!("{major}:{minor}"), is_it)) {
        return Some(format!("mounted on {place}"));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(is_it) {
        return Some("used for swap".to_owned());
    }
    let holders = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders")).ok()?;
    let holder = holders.flatten().next()?.file_name().into_string().ok()?;
    let name = fs::read_to_string(format!("/sys/class/block/{holder}/dm/name")).unwrap_or_default();
    Some(match name.trim_end() {
        "" => format!("part of /dev/{holder}"),
        name => format!("part of /dev/mapper/{name}"),
    })
}

/// The mount point in a line of mountinfo (proc_pid_mountinfo(5)), if it is a mount of the device. Btrfs has device numbers of
/// its own there, so the source is compared too.
fn mounted_at<'l>(line: &'l str, number: &str, is_it: impl Fn(&str) -> bool) -> Option<&'l str> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(2);
    let same = fields.next()? == number;
    let place = fields.nth(1)?;
    (same || is_it(after.split(' ').nth(1)?)).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_or_source() {
        let line = "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mounted_at(line, "98:0", |_| false), Some("/mnt/a\\040b"));
        assert_eq!(mounted_at(line, "98:1", |_| false), None);
        assert_eq!(mounted_at(line, "98:1", |source| source == "/dev/root"), Some("/mnt/a\\040b"));
        assert_eq!(mounted_at("nonsense", "98:0", |_| true), None);
    }
}
