//! `Page`: the words of a device that both halves see, all atomic.
//!
//! These are the registers that the virtio specification lets change under the driver: the interrupt status, the
//! configuration space with its generation, and DEVICE_NEEDS_RESET. A vCPU reads them at once, without asking the
//! worker's thread (invariant I4). Nothing else is shared between the two, but for how far the driver has read a configuration that
//! the worker changes again as soon as it was read.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// Bytes of device configuration space that a device may have.
pub const CONFIG_BYTES: usize = 256;

/// Interrupt status: a used ring has moved (virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED: u32 = 1;
/// Interrupt status: the configuration, or the device status, has changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// How far the driver has read a configuration that must not change again before it has. It reads the generation before and
/// after, and begins again if they differ (virtio 1.2, section 2.5.2).
const UNWATCHED: u32 = 0;
const WRITTEN: u32 = 1;
const GENERATION_READ: u32 = 2;
const CONFIG_READ: u32 = 3;

/// The shared words. Their order among each other matters nowhere but in [`Page::set_config`], and none of them is on
/// the path of a request but the interrupt status, so all accesses are sequentially consistent.
pub struct Page {
    interrupt_status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    reader: AtomicU32,
    config: [AtomicU32; CONFIG_BYTES / 4],
}

impl Default for Page {
    fn default() -> Self {
        Page {
            interrupt_status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            reader: AtomicU32::new(UNWATCHED),
            config: [const { AtomicU32::new(0) }; CONFIG_BYTES / 4],
        }
    }
}

impl Page {
    /// Reads the interrupt status.
    pub fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(SeqCst)
    }

    /// Adds to the interrupt status.
    pub fn raise(&self, bits: u32) {
        self.interrupt_status.fetch_or(bits, SeqCst);
    }

    /// Takes from the interrupt status what the driver has seen.
    pub fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, SeqCst);
    }

    /// Changes with every change of the configuration.
    pub fn generation(&self) -> u32 {
        self.generation.load(SeqCst)
    }

    /// Whether the device has given up until it is reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(SeqCst)
    }

    /// Says that the device has given up.
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, SeqCst);
    }

    /// What a reset does to these words; the configuration stays.
    pub fn reset(&self) {
        self.interrupt_status.store(0, SeqCst);
        self.needs_reset.store(false, SeqCst);
    }

    /// Replaces configuration bytes from `offset` on. The generation changes before and after, so a driver that reads
    /// in between reads again (virtio 1.2, section 2.5.1). What lies beyond [`CONFIG_BYTES`] is dropped.
    pub fn set_config(&self, offset: usize, bytes: &[u8]) {
        self.generation.fetch_add(1, SeqCst);
        self.put(offset, bytes);
        self.generation.fetch_add(1, SeqCst);
    }

    /// Takes in configuration bytes that the driver writes. They are the driver's to know, so the generation stays.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.put(offset, bytes);
    }

    /// Watches whether the driver reads the configuration as it is now.
    pub fn watch_reader(&self) {
        self.reader.store(WRITTEN, SeqCst);
    }

    /// Ends the watch, if there is one.
    pub fn unwatch_reader(&self) {
        self.reader.store(UNWATCHED, SeqCst);
    }

    /// The driver reads the generation. True once for each watch: the configuration it has read before is whole, and it will
    /// not read it again.
    pub fn generation_read(&self) -> bool {
        self.reader.compare_exchange(CONFIG_READ, UNWATCHED, SeqCst, SeqCst).is_ok() || {
            let _ = self.reader.compare_exchange(WRITTEN, GENERATION_READ, SeqCst, SeqCst);
            false
        }
    }

    /// The driver reads the configuration.
    pub fn config_read(&self) {
        let _ = self.reader.compare_exchange(GENERATION_READ, CONFIG_READ, SeqCst, SeqCst);
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        for (at, &byte) in (offset..CONFIG_BYTES).zip(bytes) {
            let shift = at % 4 * 8;
            let word = &self.config[at / 4];
            // A word has one writer: the device's half, or the driver's if the device lets it.
            let old = word.load(SeqCst);
            word.store(old & !(0xff << shift) | u32::from(byte) << shift, SeqCst);
        }
    }

    /// Reads configuration bytes from `offset` on; zeros beyond [`CONFIG_BYTES`].
    pub fn config(&self, offset: usize, bytes: &mut [u8]) {
        bytes.fill(0);
        for (at, byte) in (offset..CONFIG_BYTES).zip(bytes) {
            *byte = (self.config[at / 4].load(SeqCst) >> (at % 4 * 8)) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_bytes_are_read_as_they_were_written_at_any_offset_and_never_beyond() {
        let page = Page::default();
        let pattern: Vec<u8> = (0..=255).collect();
        page.set_config(0, &pattern);
        let mut read = [0; 8];
        page.config(3, &mut read);
        assert_eq!(read, [3, 4, 5, 6, 7, 8, 9, 10]);
        page.config(252, &mut read);
        assert_eq!(read, [252, 253, 254, 255, 0, 0, 0, 0]);
        page.set_config(255, &[1, 2, 3]);
        page.config(usize::MAX - 2, &mut read);
        assert_eq!(read, [0; 8]);
    }

    #[test]
    fn the_generation_differs_before_and_after_a_change() {
        let page = Page::default();
        let before = page.generation();
        page.set_config(0, &[1]);
        assert_ne!(before, page.generation());
    }
}
