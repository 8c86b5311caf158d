//! `Pressure`: whether the host is short of memory, as its kernel's pressure stall information says (PSI).
//!
//! A trigger on /proc/pressure/memory, or on the memory.pressure of a cgroup, has the kernel wake us when programs have
//! stood still for want of memory for a twentieth of the time. Where a trigger is refused (permissions, an older kernel, a
//! file that somebody else writes) the sum in the file is read once a second instead. Main thread.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use log::{info, warn};

use crate::error::{Context, Error, Result};
use crate::event::{Cx, Interest};

/// Stalls of some program, 100 ms in any 2 s: the shortest window that is granted without privileges.
const TRIGGER: &[u8] = b"some 100000 2000000\0";
/// The same for the sum, which is in microseconds, per second.
const STALLED_US: u64 = 50_000;
const SECOND_NS: u64 = 1_000_000_000;
/// How long the host counts as pressed after the last sign: a trigger fires once in its window.
const HOLD_NS: u64 = 3 * SECOND_NS;

/// A source of memory pressure.
pub(super) struct Pressure {
    file: File,
    trigger: bool,
    /// When the sum was read last, and what it was.
    seen: Option<(u64, u64)>,
    until_ns: u64,
}

impl Pressure {
    /// Opens the file and asks for a trigger.
    ///
    /// # Errors
    /// It cannot be read, or says nothing of stalls.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("-balloon pressure={}", path.display());
        let trigger = open_trigger(path);
        if let Err(e) = &trigger {
            info!("{}: no trigger ({e}), so it is read once a second", what());
        }
        let (file, trigger) = match trigger {
            Ok(file) => (file, true),
            Err(_) => (File::open(path).context(what)?, false),
        };
        let pressure = Pressure { file, trigger, seen: None, until_ns: 0 };
        match pressure.stalled_us().context(what)? {
            Some(_) => Ok(pressure),
            None => Err(Error::host(format!(
                "{}: no line \"some ... total=N\" in it; accepted: a file as \
                /proc/pressure/memory, which is there if the kernel has CONFIG_PSI and no psi=0",
                what()
            ))),
        }
    }

    /// Has the trigger told under this tag.
    pub fn watch(&self, tag: u32, cx: &mut Cx<'_>) -> Result<()> {
        if self.trigger {
            cx.watch(&self.file, Interest::PRIORITY, tag)?;
        }
        Ok(())
    }

    /// Whether the kernel tells of it by itself.
    pub fn is_trigger(&self) -> bool {
        self.trigger
    }

    /// Whether the host is short of memory.
    pub fn is_high(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }

    /// The trigger has fired, or is `gone` with its control group.
    pub fn rang(&mut self, gone: bool, now_ns: u64) {
        if gone {
            warn!("balloon: the host tells of its memory pressure no more: the file of -balloon pressure= is gone");
            self.trigger = false;
        } else {
            self.until_ns = now_ns + HOLD_NS;
        }
    }

    /// A second is over: looks at the sum if nobody else does.
    pub fn look(&mut self, now_ns: u64) {
        if self.trigger {
            return;
        }
        match self.stalled_us() {
            Ok(Some(sum)) => {
                if let Some((then_ns, before)) = self.seen.replace((now_ns, sum)) {
                    let allowed = STALLED_US.saturating_mul(now_ns.saturating_sub(then_ns)) / SECOND_NS;
                    if sum.saturating_sub(before) > allowed {
                        self.until_ns = now_ns + HOLD_NS;
                    }
                }
            }
            // It was there; without it the host counts as well.
            Ok(None) => self.seen = None,
            Err(e) => {
                if self.seen.take().is_some() {
                    warn!("balloon: read the host's memory pressure: {e}");
                }
            }
        }
    }

    /// How long programs have stood still for want of memory, summed, in microseconds.
    fn stalled_us(&self) -> io::Result<Option<u64>> {
        let mut bytes = [0; 512];
        let count = self.file.read_at(&mut bytes, 0)?;
        Ok(total(&String::from_utf8_lossy(&bytes[..count])))
    }
}

/// The `total=` of the line that begins with `some`.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split(' ').find_map(|word| word.strip_prefix("total="))?.parse().ok()
}

fn open_trigger(path: &Path) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    // The kernel's own files have no length. Any other is not ours to write to.
    if file.metadata()?.len() > 0 {
        return Err(io::Error::other("not the kernel's own file"));
    }
    file.write_all(TRIGGER)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_the_line_that_says_some() {
        let text =
            "some avg10=0.00 avg60=1.25 avg300=0.00 total=123456\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(total(text), Some(123_456));
        for text in ["", "full total=7", "some avg10=0.00", "some total=x", "some total=-1"] {
            assert_eq!(total(text), None, "{text}");
        }
    }

    #[test]
    fn a_file_that_grows_by_a_twentieth_of_the_time_is_pressure_and_it_passes() {
        let path = std::env::temp_dir().join(format!("loopvisor-pressure-{}", std::process::id()));
        let write = |total: u64| std::fs::write(&path, format!("some avg10=0.00 total={total}\n")).unwrap();
        write(1000);
        let mut pressure = Pressure::open(&path).unwrap();
        assert!(!pressure.is_trigger());
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("some avg10"), "it is not written to");
        let mut high = Vec::new();
        for (second, total) in [1000, 51_000, 101_001, 101_001, 101_001, 101_001, 20, 60_000].into_iter().enumerate() {
            write(total);
            let now_ns = second as u64 * SECOND_NS;
            pressure.look(now_ns);
            high.push(pressure.is_high(now_ns));
        }
        assert_eq!(high, [false, false, true, true, true, false, false, true]);
        std::fs::remove_file(&path).unwrap();
        assert!(
            Pressure::open(&path).is_err_and(|e| e.to_string().ends_with("No such file or directory (os error 2)"))
        );
        let told = Pressure::open(Path::new("/proc/version")).err().unwrap().to_string();
        assert!(told.contains("no line \"some ... total=N\""), "{told}");
    }

    #[test]
    fn the_kernels_own_file_takes_a_trigger_where_there_is_one() {
        match Pressure::open(Path::new("/proc/pressure/memory")) {
            Ok(mut pressure) => {
                pressure.look(SECOND_NS);
                assert!(!pressure.is_high(SECOND_NS));
                pressure.rang(false, SECOND_NS);
                assert!(pressure.is_high(3 * SECOND_NS) && !pressure.is_high(4 * SECOND_NS));
                pressure.rang(true, 5 * SECOND_NS);
                assert!(!pressure.is_high(5 * SECOND_NS) && !pressure.is_trigger());
            }
            Err(e) => eprintln!("skipped: {e}"),
        }
    }
}
