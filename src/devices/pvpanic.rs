//! The port by which a guest's kernel says that it has panicked: QEMU's pvpanic, which Linux knows (`pvpanic-mmio`).
//!
//! One byte. Reading says what is understood, and each bit written is an event (QEMU, docs/specs/pvpanic). A vCPU's thread;
//! what a panic means for the machine is decided by whoever is told.

use crate::bus::Slot;

/// The kernel has panicked, and it is for the host to do something about it.
const PANICKED: u8 = 1 << 0;
/// It has, and takes care of that itself: a crash kernel is started.
const CRASH_LOADED: u8 = 1 << 1;

/// What a guest's kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPanic {
    /// It can do no more.
    Panicked,
    /// It goes on by itself.
    CrashLoaded,
}

/// The port.
pub struct Pvpanic {
    on_panic: Box<dyn Fn(GuestPanic) + Send>,
    /// The events that have been told of since the last reset: each once, however often the guest says it.
    told: u8,
}

impl Pvpanic {
    /// A port that calls `on_panic` on the vCPU's thread, at most once for each event until the machine is reset.
    pub fn new(on_panic: impl Fn(GuestPanic) + Send + 'static) -> Pvpanic {
        Pvpanic { on_panic: Box::new(on_panic), told: 0 }
    }
}

impl Slot for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Some(events) = data.first().map(|events| events & !self.told) else { return };
        self.told |= events;
        for (bit, what) in [(CRASH_LOADED, GuestPanic::CrashLoaded), (PANICKED, GuestPanic::Panicked)] {
            if events & bit != 0 {
                (self.on_panic)(what);
            }
        }
    }

    fn reset(&mut self) {
        self.told = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn each_event_is_told_once_until_the_machine_is_reset_and_other_bits_say_nothing() {
        let (tell, told) = channel();
        let mut port = Pvpanic::new(move |what| tell.send(what).unwrap());
        let heard = |port: &mut Pvpanic, events: &[u8]| {
            events.iter().for_each(|&byte| port.write(0, &[byte]));
            told.try_iter().collect::<Vec<_>>()
        };
        assert_eq!(heard(&mut port, &[0, 0xfc]), []);
        assert_eq!(heard(&mut port, &[2, 2, 1, 3, 1]), [GuestPanic::CrashLoaded, GuestPanic::Panicked]);
        port.reset();
        assert_eq!(heard(&mut port, &[1]), [GuestPanic::Panicked]);
        port.write(0, &[]);
    }

    #[test]
    fn a_kernel_reads_which_events_are_understood() {
        let mut port = Pvpanic::new(|_| {});
        let mut byte = [0xff];
        port.read(0, &mut byte);
        assert_eq!(byte, [3]);
    }
}
