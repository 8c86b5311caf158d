//! Registers used out of order, at wrong widths, or with values that cannot be.

use super::{Answer, Case, Victim, served};
use crate::text::Outcome;
use crate::virtio::mmio::*;
use crate::virtio::ring::Ring;

pub const CASES: &[Case] = &[
    ("queue-size-changed-after-driver-ok", |v| Ok(v.poke(&[(QUEUE_SEL, 0), (QUEUE_NUM, 1)]))),
    ("queue-size-changed-to-the-largest", |v| Ok(v.poke(&[(QUEUE_SEL, 0), (QUEUE_NUM, u32::MAX)]))),
    ("queue-address-changed-after-ready", |v| Ok(v.poke(&MOVED_QUEUE))),
    ("queue-ready-cleared-while-live", |v| Ok(v.poke(&[(QUEUE_SEL, 0), (QUEUE_READY, 0)]))),
    ("queue-ready-written-again", |v| Ok(v.poke(&[(QUEUE_SEL, 0), (QUEUE_READY, 1)]))),
    ("queue-select-out-of-range", |v| Ok(v.poke(&[(QUEUE_SEL, 0xffff_ffff), (QUEUE_NUM, 8), (QUEUE_READY, 1)]))),
    ("features-changed-after-driver-ok", |v| Ok(v.poke(&[(DRIVER_FEATURES_SEL, 0), (DRIVER_FEATURES, 0)]))),
    ("features-select-out-of-range", |v| Ok(v.poke(&[(DRIVER_FEATURES_SEL, 77), (DRIVER_FEATURES, u32::MAX)]))),
    ("status-bits-cleared", |v| Ok(v.poke(&[(STATUS, ACKNOWLEDGE)]))),
    ("status-all-ones", |v| Ok(v.poke(&[(STATUS, 0xffff_ffff)]))),
    ("interrupt-ack-all-ones", |v| Ok(v.poke(&[(INTERRUPT_ACK, 0xffff_ffff)]))),
    ("notify-of-no-queue", |v| Ok(v.poke(&[(QUEUE_NOTIFY, 1), (QUEUE_NOTIFY, 0xffff), (QUEUE_NOTIFY, 0xffff_ffff)]))),
    ("notify-storm", notify_storm),
    ("config-at-every-width", config_sweep),
    ("registers-at-every-width", register_sweep),
    ("notify-before-driver-ok", |v| v.half_way(|v| v.disk.device.notify(0))),
    ("driver-ok-without-a-queue", |v| v.half_way(|v| v.disk.device.go())),
    ("queue-size-zero", |v| v.half_way(|v| v.bad_queue(Some(0), None, 0))),
    ("queue-size-not-a-power-of-two", |v| v.half_way(|v| v.bad_queue(Some(3), None, 0))),
    ("queue-size-above-the-largest", |v| v.half_way(|v| v.bad_queue(Some(0x8000), None, 0))),
    ("descriptor-table-outside-ram", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DESC), NOWHERE))),
    ("driver-area-outside-ram", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DRIVER), NOWHERE))),
    ("device-area-outside-ram", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DEVICE), NOWHERE))),
    ("descriptor-table-wrapping", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DESC), u64::MAX - 15))),
    ("device-area-over-the-end-of-ram", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DEVICE), v.ram_end - 8))),
    ("descriptor-table-misaligned", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DESC), v.memory.at(1)))),
    ("device-area-misaligned", |v| v.half_way(|v| v.bad_queue(None, Some(QUEUE_DEVICE), v.memory.at(0x8002)))),
    ("driver-ok-without-features-ok", driver_ok_at_once),
    ("features-not-offered", features_not_offered),
    ("version-1-refused", without_version_1),
];

/// An address where no machine has memory.
const NOWHERE: u64 = 0x7f_ffff_f000;
const MOVED_QUEUE: [(u64, u32); 3] = [(QUEUE_SEL, 0), (QUEUE_DESC, 0xffff_f000), (QUEUE_DESC + 4, 0x7f)];
const STORM: u32 = 10_000;

impl Victim {
    /// Writes these registers of the live device, and tries a proper read.
    fn poke(&mut self, writes: &[(u64, u32)]) -> Answer {
        for &(register, value) in writes {
            self.disk.device.registers.write32(register, value);
        }
        self.proper_read()
    }

    /// Resets, negotiates, does `act`, and tries a proper read on whatever queue there is then.
    fn half_way(&mut self, act: fn(&Victim)) -> Outcome<Answer> {
        self.disk.device.negotiate(self.disk.features)?;
        self.disk.ring = self.disk.ring.renew();
        act(self);
        Ok(self.proper_read())
    }

    /// Sets the queue up with one thing wrong, and says DRIVER_OK.
    fn bad_queue(&self, size: Option<u32>, register: Option<u64>, address: u64) {
        let device = &self.disk.device;
        let ring: &Ring = &self.disk.ring;
        device.registers.write32(QUEUE_SEL, 0);
        device.registers.write32(QUEUE_NUM, size.unwrap_or(ring.size().into()));
        for (at, right) in [(QUEUE_DESC, ring.desc()), (QUEUE_DRIVER, ring.driver()), (QUEUE_DEVICE, ring.device())] {
            device.set_address(at, if register == Some(at) { address } else { right });
        }
        device.registers.write32(QUEUE_READY, 1);
        device.go();
    }
}

fn notify_storm(v: &mut Victim) -> Outcome<Answer> {
    (0..STORM).for_each(|_| v.disk.device.notify(0));
    Ok(v.proper_read())
}

/// Reads and writes each offset of the configuration space, and past it, in each width.
fn config_sweep(v: &mut Victim) -> Outcome<Answer> {
    let registers = v.disk.device.registers;
    for offset in CONFIG..0x200 {
        registers.write::<u8>(offset, registers.read::<u8>(offset));
        registers.write::<u16>(offset, !registers.read::<u16>(offset));
        registers.write::<u32>(offset, !registers.read::<u32>(offset));
        registers.write::<u64>(offset, !registers.read::<u64>(offset));
    }
    Ok(v.proper_read())
}

/// Reads each register at each offset and width, and writes zeros where a driver reads only.
fn register_sweep(v: &mut Victim) -> Outcome<Answer> {
    let registers = v.disk.device.registers;
    for offset in MAGIC..CONFIG {
        registers.read::<u8>(offset);
        registers.read::<u16>(offset);
        registers.read::<u32>(offset);
        registers.read::<u64>(offset);
    }
    for offset in [MAGIC, VERSION, DEVICE_ID, DEVICE_FEATURES, QUEUE_NUM_MAX, INTERRUPT_STATUS, CONFIG_GENERATION] {
        registers.write::<u8>(offset, 0);
        registers.write::<u16>(offset, 0);
        registers.write::<u32>(offset, 0);
        registers.write::<u64>(offset, 0);
    }
    Ok(v.proper_read())
}

/// DRIVER_OK with nothing before it.
fn driver_ok_at_once(v: &mut Victim) -> Outcome<Answer> {
    v.disk.device.reset()?;
    v.disk.ring = v.disk.ring.renew();
    v.disk.device.registers.write32(STATUS, DRIVER_OK);
    v.disk.device.set_queue(0, &v.disk.ring);
    Ok(v.proper_read())
}

/// All 64 features. Says `status:0` when the device keeps FEATURES_OK and serves, whatever that means.
fn features_not_offered(v: &mut Victim) -> Outcome<Answer> {
    negotiate_by_force(v, u64::MAX)
}

/// The features the device offers, less VERSION_1, which it may insist on.
fn without_version_1(v: &mut Victim) -> Outcome<Answer> {
    let features = v.disk.features & !F_VERSION_1;
    negotiate_by_force(v, features)
}

fn negotiate_by_force(v: &mut Victim, features: u64) -> Outcome<Answer> {
    let refused = v.disk.device.negotiate(features).is_err();
    v.disk.ring = v.disk.ring.renew();
    v.disk.device.set_queue(0, &v.disk.ring);
    v.disk.device.go();
    let answer = v.proper_read();
    say!("hostile: features={features:#x} refused={refused} served={}", served(&answer));
    Ok(answer)
}
