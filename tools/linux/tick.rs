//! Has the nested host's real-time clock interrupt once a second, for ever. tools/linux-image compiles it.
//!
//! QEMU's emulated SVM loses an interrupt now and then: VMRUN and #VMEXIT change the word of pending interrupts without the
//! lock under which another thread sets a bit in it. The local APIC still has the interrupt, but a halted processor does not
//! look there before the next one. Where the lost one was that of its timer, there is no next one, unless another device
//! interrupts.

use std::fs::File;
use std::io::{self, Error, Read};
use std::os::fd::AsRawFd;

/// Switches on the interrupt of each second (rtc(4)).
const RTC_UIE_ON: u64 = 0x7003;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

fn main() -> io::Result<()> {
    let mut clock = File::open("/dev/rtc0")?;
    // SAFETY: the request has no argument.
    if unsafe { ioctl(clock.as_raw_fd(), RTC_UIE_ON) } != 0 {
        return Err(Error::last_os_error());
    }
    loop {
        clock.read_exact(&mut [0; 8])?;
    }
}
