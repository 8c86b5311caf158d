//! The bus: which device answers at an address.
//!
//! Two of them exist, one for port I/O and one for memory-mapped I/O. Each is made once, before the first vCPU runs,
//! and never changes; every vCPU thread holds a clone, which is one pointer. The lookup takes no lock; the slot that
//! was found is locked for that one access (invariant I7). It is *not* guest memory: what is RAM never comes here.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// A device's registers, as a vCPU sees them.
///
/// Called on the thread of the vCPU that made the access, once per access, with the slot's mutex held. An access is
/// 1, 2, 4 or 8 bytes long and lies wholly inside the range that the slot was given; `offset` counts from its start.
/// Both must answer at once and for any offset and length: the guest chooses them.
pub trait Slot: Send {
    /// Fills `data` with what the guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// The machine is reset: its registers are as at power-on. No vCPU runs, and what a loop does for it has ended.
    fn reset(&mut self) {}
}

/// A range of addresses and who answers there.
pub struct Range {
    /// The first address.
    pub base: u64,
    /// How many addresses, at least 1.
    pub len: u64,
    /// Who answers.
    pub slot: Arc<Mutex<dyn Slot>>,
}

/// An address space of devices.
#[derive(Clone)]
pub struct Bus {
    /// Sorted by base, no two overlap, none empty, none reaches past the last address.
    ranges: Arc<[Range]>,
}

impl Bus {
    /// A bus with these ranges, in any order.
    ///
    /// # Errors
    ///
    /// Two ranges overlap, or one is empty or reaches past the end of the address space.
    pub fn new(mut ranges: Vec<Range>) -> Result<Bus> {
        ranges.sort_by_key(|range| range.base);
        let mut free_from = Some(0);
        for range in &ranges {
            let end = range.base.checked_add(range.len).filter(|_| range.len > 0);
            if end.is_none() || free_from.is_none_or(|free| range.base < free) {
                let (base, len) = (range.base, range.len);
                return Err(Error::host(format!("bus: the {len} addresses at {base:#x} are not free")));
            }
            free_from = end;
        }
        Ok(Bus { ranges: ranges.into() })
    }

    /// What the guest reads at `address`: all ones where nobody answers, as on real hardware.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, slot)) => slot.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// What the guest writes at `address`; dropped where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, slot)) = self.find(address, data.len()) {
            slot.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// Resets everybody. Main thread, with all vCPUs parked: so no slot is locked for long by anybody else.
    pub fn reset(&self) {
        for range in self.ranges.iter() {
            range.slot.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
    }

    /// Who answers for all of `len` bytes at `address`. An access that leaves a range is nobody's.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn Slot>)> {
        let behind = self.ranges.partition_point(|range| range.base <= address);
        let range = self.ranges.get(behind.checked_sub(1)?)?;
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= range.len).then(|| (offset, &*range.slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it was asked and answers with its number.
    struct Probe {
        number: u8,
        seen: Vec<(u64, Vec<u8>)>,
    }

    impl Slot for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.seen.push((offset, Vec::new()));
            data.fill(self.number);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            assert_ne!(data, b"die", "the probe was told to");
            self.seen.push((offset, data.to_vec()));
        }

        fn reset(&mut self) {
            self.seen.clear();
        }
    }

    fn probe(number: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { number, seen: Vec::new() }))
    }

    fn range(base: u64, len: u64, slot: &Arc<Mutex<Probe>>) -> Range {
        Range { base, len, slot: slot.clone() }
    }

    fn read_u8(bus: &Bus, address: u64) -> u8 {
        let mut byte = [0];
        bus.read(address, &mut byte);
        byte[0]
    }

    #[test]
    fn an_access_reaches_the_slot_it_lies_in_with_its_offset() {
        let (one, two) = (probe(1), probe(2));
        let bus = Bus::new(vec![range(0x20, 8, &two), range(0x10, 8, &one)]).unwrap();
        assert_eq!((read_u8(&bus, 0x10), read_u8(&bus, 0x17)), (1, 1));
        assert_eq!((read_u8(&bus, 0x20), read_u8(&bus, 0x27)), (2, 2));
        bus.write(0x12, &[7, 8]);
        assert_eq!(one.lock().unwrap().seen, [(0, vec![]), (7, vec![]), (2, vec![7, 8])]);
    }

    #[test]
    fn where_nobody_answers_reads_are_all_ones_and_writes_are_dropped() {
        let one = probe(1);
        let bus = Bus::new(vec![range(0x10, 8, &one)]).unwrap();
        for address in [0, 0xf, 0x18, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
        assert!(one.lock().unwrap().seen.is_empty());
    }

    #[test]
    fn an_access_that_crosses_the_end_of_a_slot_is_nobodys() {
        let (one, two) = (probe(1), probe(2));
        let bus = Bus::new(vec![range(0x10, 8, &one), range(0x18, 8, &two)]).unwrap();
        let mut data = [0; 4];
        bus.read(0x16, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(0x16, &data);
        assert!(one.lock().unwrap().seen.is_empty() && two.lock().unwrap().seen.is_empty());
    }

    #[test]
    fn ranges_that_overlap_or_hold_nothing_are_refused() {
        let one = probe(1);
        for (a, b) in [((0x10, 8), (0x17, 1)), ((0x10, 8), (0x10, 8)), ((0, 1), (5, 0)), ((0, 1), (u64::MAX, 2))] {
            let refused = Bus::new(vec![range(a.0, a.1, &one), range(b.0, b.1, &one)]);
            assert!(refused.is_err(), "{a:x?} {b:x?}");
        }
        assert!(Bus::new(vec![range(0x10, 8, &one), range(0x18, 1, &one), range(0x0f, 1, &one)]).is_ok());
    }

    #[test]
    fn a_reset_reaches_every_slot() {
        let (one, two) = (probe(1), probe(2));
        let bus = Bus::new(vec![range(0x10, 8, &one), range(0x20, 8, &two)]).unwrap();
        bus.write(0x10, &[1]);
        bus.write(0x20, &[1]);
        bus.reset();
        assert!([one, two].iter().all(|slot| slot.lock().unwrap().seen.is_empty()));
    }

    #[test]
    fn a_slot_that_once_panicked_still_answers() {
        let one = probe(1);
        let bus = Bus::new(vec![range(0, 8, &one)]).unwrap();
        let clone = bus.clone();
        std::thread::spawn(move || clone.write(0, b"die")).join().unwrap_err();
        assert!(one.is_poisoned());
        assert_eq!(read_u8(&bus, 0), 1);
    }
}
