//! The transport as a driver meets it: register by register, through the bus.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

use super::Command;
use super::testing::*;

/// A guest with a device of two queues, of 8 and 4 descriptors.
fn guest() -> (Guest, Held) {
    let (device, held) = Holding::new(&[8, 4]);
    (Guest::new(device, ram()), held)
}

/// What the device offers of its own.
const DEVICE_BITS: u64 = 1 << 5 | 1 << 40;

#[test]
fn a_driver_finds_the_device_by_its_first_registers() {
    let (guest, _held) = guest();
    assert_eq!([0x00, 0x04, 0x08, 0x0c].map(|register| guest.read(register)), [0x7472_6976, 2, 42, 0]);
    assert_eq!(guest.offered(), VERSION_1 | EVENT_IDX | INDIRECT_DESC | DEVICE_BITS);
    guest.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.read(reg::DEVICE_FEATURES), 0);
    // There are no shared memory regions: each is of length -1.
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|register| guest.read(register)), [u32::MAX; 4]);
}

#[test]
fn features_that_were_not_offered_refuse_features_ok_and_better_ones_pass() {
    let (guest, _held) = guest();
    guest.write(reg::STATUS, ACKNOWLEDGE);
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    for wrong in [VERSION_1 | 1 << 6, VERSION_1 | 1 << 63, u64::MAX] {
        guest.accept(wrong);
        guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER, "{wrong:#x}");
    }
    guest.accept(VERSION_1 | DEVICE_BITS);
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_driver_without_version_1_is_a_legacy_one_and_refused() {
    let (guest, _held) = guest();
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    guest.accept(EVENT_IDX | DEVICE_BITS);
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_cannot_change_once_they_are_agreed_on() {
    let (mut guest, held) = guest();
    guest.negotiate(VERSION_1);
    guest.accept(VERSION_1 | EVENT_IDX);
    let mut vring = guest.set_up(0, 8, false);
    guest.driver_ok();
    guest.turn();
    // Without EVENT_IDX the device says by a flag that it wants a kick; with it, it would have moved avail_event.
    vring.add(&[Desc::writable(DATA, 1)]);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
    assert_eq!(guest.get(vring.used + 4 + 8 * 8, 2), [0, 0]);
}

#[test]
fn each_status_bit_needs_those_below_it() {
    let ladder = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    for rung in 1..4 {
        let (guest, _held) = guest();
        guest.accept(VERSION_1);
        for skipped in ladder.iter().take(rung - 1) {
            guest.write(reg::STATUS, guest.status() | skipped);
        }
        let before = guest.status();
        guest.write(reg::STATUS, before | ladder[rung]);
        assert_eq!(guest.status(), before, "rung {rung}");
    }
}

#[test]
fn a_driver_may_climb_several_rungs_with_one_write() {
    let (guest, _held) = guest();
    guest.accept(VERSION_1);
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn status_bits_are_taken_back_by_a_reset_and_by_nothing_else() {
    let (mut guest, _held) = guest();
    let _ = guest.start(0, 8);
    let live = guest.status();
    guest.write(reg::STATUS, ACKNOWLEDGE);
    guest.write(reg::STATUS, NEEDS_RESET);
    assert_eq!(guest.status(), live);
    guest.reset();
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_driver_that_has_failed_gets_no_further_until_it_resets() {
    let (mut guest, held) = guest();
    guest.negotiate(VERSION_1);
    guest.write(reg::STATUS, guest.status() | FAILED);
    guest.driver_ok();
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED);
    guest.reset();
    let mut vring = guest.start(0, 8);
    vring.add(&[Desc::writable(DATA, 1)]);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
}

#[test]
fn the_configuration_of_a_live_queue_is_frozen_until_the_reset() {
    // CVE-2026-5747: a size that was written after the checks led outside the rings.
    let (mut guest, held) = guest();
    let mut vring = guest.start(0, 4);
    guest.write(reg::QUEUE_SEL, 0);
    guest.write(reg::QUEUE_NUM, 8);
    guest.write(reg::QUEUE_NUM, 0);
    guest.write(reg::QUEUE_READY, 0);
    for area in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        guest.write_address(area, 0xffff_ffff_ffff_fff0);
    }
    assert_eq!(guest.read(reg::QUEUE_READY), 1);
    for _ in 0..9 {
        vring.add(&[Desc::writable(DATA, 1)]);
        guest.run(0);
        held.finish_all();
        guest.turn();
        assert_eq!(vring.take_used().len(), 1);
    }
    guest.reset();
    assert_eq!(guest.read(reg::QUEUE_READY), 0);
    let mut vring = guest.start(0, 8);
    vring.add(&[Desc::writable(DATA, 1)]);
    guest.run(0);
    assert_eq!(held.held().len(), 1);
}

#[test]
fn a_reset_restores_every_register() {
    let (mut guest, _held) = guest();
    let registers = |guest: &Guest| (0..0x200).step_by(4).map(|at| guest.read(at)).collect::<Vec<_>>();
    let fresh = registers(&guest);
    let _ = guest.set_up(1, 4, false);
    let _ = guest.start(EVENT_IDX, 8);
    guest.write(reg::DEVICE_FEATURES_SEL, 1);
    guest.write(reg::DRIVER_FEATURES_SEL, 1);
    guest.write(reg::QUEUE_SEL, 1);
    guest.page.raise(3);
    guest.page.set_needs_reset();
    guest.write_bytes(reg::CONFIG, &[0xee; 8]);
    assert_ne!(registers(&guest), fresh);
    guest.reset();
    assert_eq!(registers(&guest), fresh);
    // The features that were agreed on are forgotten too.
    guest.write(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

/// What a driver sees whose queues will not do: NEEDS_RESET, told by a configuration interrupt, and silence.
fn assert_refused(guest: &mut Guest, held: &Held, why: &str) {
    guest.driver_ok();
    guest.turn();
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET, "{why}");
    assert_eq!((guest.interrupts(), guest.read(reg::INTERRUPT_STATUS)), (1, 2), "{why}");
    assert!(held.taken().is_empty(), "{why}");
    guest.reset();
    assert_eq!((guest.status(), guest.read(reg::INTERRUPT_STATUS)), (0, 0), "{why}");
}

#[test]
fn a_queue_size_that_is_no_power_of_two_up_to_the_maximum_is_refused_when_the_driver_says_go() {
    let (mut guest, held) = guest();
    for size in [0, 3, 7, 16, 256, 0x8000, 0x1_0000, 0x1_0004, u32::MAX] {
        guest.negotiate(VERSION_1);
        let _ = guest.set_up(0, 8, false);
        guest.write(reg::QUEUE_NUM, size);
        assert_refused(&mut guest, &held, &format!("size {size}"));
    }
    for size in [1, 2, 4, 8] {
        let _ = guest.start(0, size);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        guest.reset();
    }
}

#[test]
fn rings_that_are_misaligned_or_outside_memory_are_refused_when_the_driver_says_go() {
    let (mut guest, held) = guest();
    // Of eight descriptors: 128 bytes, 22 bytes, 70 bytes.
    let cases = [
        (reg::QUEUE_DESC, RINGS + 8),
        (reg::QUEUE_DRIVER, RINGS + 1),
        (reg::QUEUE_DEVICE, RINGS + 2),
        (reg::QUEUE_DESC, LOW_BYTES - 112),
        (reg::QUEUE_DRIVER, LOW_BYTES - 20),
        (reg::QUEUE_DEVICE, LOW_BYTES - 68),
        (reg::QUEUE_DESC, HIGH - 16),
        (reg::QUEUE_DESC, HIGH + HIGH_BYTES),
        (reg::QUEUE_DRIVER, 0),
        (reg::QUEUE_DESC, u64::MAX - 15),
        (reg::QUEUE_DRIVER, u64::MAX - 1),
        (reg::QUEUE_DEVICE, u64::MAX - 3),
    ];
    for (register, address) in cases {
        guest.negotiate(VERSION_1);
        let _ = guest.set_up(0, 8, false);
        guest.write_address(register, address);
        assert_refused(&mut guest, &held, &format!("register {register:#x} with {address:#x}"));
    }
}

#[test]
fn rings_that_end_with_memory_are_accepted() {
    let (mut guest, held) = guest();
    guest.negotiate(VERSION_1);
    let mut vring = guest.set_up(0, 8, false);
    (vring.descriptors, vring.available, vring.used) = (LOW_BYTES - 128, HIGH, HIGH + HIGH_BYTES - 72);
    guest.configure(0, &vring);
    guest.driver_ok();
    guest.turn();
    vring.add(&[Desc::writable(DATA, 1)]);
    guest.run(0);
    held.finish_all();
    guest.turn();
    assert_eq!(vring.take_used(), [(0, 1)]);
}

#[test]
fn one_bad_queue_refuses_the_whole_device() {
    let (mut guest, held) = guest();
    guest.negotiate(VERSION_1);
    let _ = guest.set_up(0, 8, false);
    let _ = guest.set_up(1, 4, false);
    guest.write(reg::QUEUE_NUM, 8);
    assert_refused(&mut guest, &held, "queue 1 has four descriptors at most");
}

#[test]
fn a_host_without_descriptors_is_a_device_that_needs_a_reset() {
    let (device, held) = Holding::new(&[8]);
    let mut guest = Guest::with_kicks(device, ram(), no_kicks(), Kicks::default());
    guest.negotiate(VERSION_1);
    let _ = guest.set_up(0, 8, false);
    assert_refused(&mut guest, &held, "no kick can be made");
}

#[test]
fn a_queue_that_is_not_there_has_no_size_and_takes_no_writes() {
    let (guest, _held) = guest();
    for (queue, size) in [(0, 8), (1, 4), (2, 0), (0x1_0000, 0), (u32::MAX, 0)] {
        guest.write(reg::QUEUE_SEL, queue);
        guest.write(reg::QUEUE_READY, 1);
        assert_eq!(guest.read(reg::QUEUE_NUM_MAX), size);
        assert_eq!(guest.read(reg::QUEUE_READY), u32::from(size > 0));
    }
}

#[test]
fn the_configuration_is_read_at_every_offset_and_in_every_width() {
    let (guest, _held) = guest();
    for width in [1, 2, 4, 8] {
        for offset in 0..=256 - width {
            let mut read = vec![0xaa; width];
            guest.read_bytes(reg::CONFIG + offset as u64, &mut read);
            assert_eq!(read, (offset..offset + width).map(|at| at as u8).collect::<Vec<_>>(), "{width} at {offset}");
        }
    }
}

#[test]
fn a_driver_cannot_write_to_a_configuration_that_is_the_devices() {
    let (mut guest, _held) = guest();
    for (offset, bytes) in [(0, &[0xee; 8][..]), (3, &[0xee]), (254, &[0xee; 2])] {
        guest.write_bytes(reg::CONFIG + offset, bytes);
    }
    assert_eq!(guest.event_loop.turn(crate::event::Wait::Poll).unwrap(), 0, "nothing was posted");
    let mut read = [0; 8];
    guest.read_bytes(reg::CONFIG, &mut read);
    assert_eq!(read, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn the_generation_tells_a_driver_that_the_configuration_changed_while_it_read() {
    let (guest, _held) = guest();
    let before = guest.read(reg::CONFIG_GENERATION);
    guest.page.set_config(0, &[9]);
    assert_ne!(guest.read(reg::CONFIG_GENERATION), before);
}

#[test]
fn accesses_that_are_not_aligned_words_read_zero_and_write_nothing() {
    let (guest, _held) = guest();
    guest.write(reg::STATUS, ACKNOWLEDGE);
    for (offset, len) in [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x6e, 4), (0x72, 2), (0x73, 1)] {
        guest.write_bytes(offset, &vec![0xff; len]);
        let mut read = vec![0xaa; len];
        guest.read_bytes(offset, &mut read);
        assert_eq!(read, vec![0; len], "{len} bytes at {offset:#x}");
    }
    assert_eq!(guest.status(), ACKNOWLEDGE);
}

#[test]
fn interrupt_bits_stay_until_the_driver_acknowledges_them() {
    let (guest, _held) = guest();
    guest.page.raise(3);
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 3);
    guest.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 2);
    guest.write(reg::INTERRUPT_ACK, u32::MAX);
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 0);
    guest.write(reg::INTERRUPT_STATUS, 3);
    assert_eq!(guest.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn an_activation_that_nobody_listens_to_harms_nobody() {
    let (mut guest, _held) = guest();
    guest.event_loop = crate::event::EventLoop::stepped(guest.clock.clone()).unwrap();
    let _ = guest.start(0, 8);
    guest.reset();
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.clock.load(SeqCst), 1);
}

proptest! {
    /// Whatever a guest writes where, the registers answer, and after a reset the device works.
    #[test]
    fn no_sequence_of_register_accesses_breaks_the_device(
        accesses in prop::collection::vec((0..0x200u64, prop::sample::select(vec![1, 2, 4, 8usize]), any::<u64>()), 0..200),
    ) {
        let (mut guest, held) = guest();
        for (offset, len, value) in accesses {
            // A write of zero to the status waits for the loop, which is this thread's.
            if offset == reg::STATUS && value as u32 == 0 {
                continue;
            }
            // Registers are rare among the offsets.
            let offset = if value % 3 == 0 { offset } else { offset % 0xb0 / 4 * 4 };
            let value = if value % 5 == 0 { value } else { value % 16 };
            if offset == reg::STATUS && value as u32 == 0 {
                continue;
            }
            guest.write_bytes(offset, &value.to_le_bytes()[..len]);
            guest.read_bytes(offset, &mut [0; 8][..len]);
            guest.turn();
        }
        guest.reset();
        let mut vring = guest.start(0, 8);
        vring.add(&[Desc::writable(DATA, 1)]);
        guest.run(0);
        prop_assert_eq!(held.held().len(), 1);
    }
}

#[test]
fn a_reset_of_the_machine_puts_back_every_register_once_the_worker_has_let_go_and_the_next_driver_begins_afresh() {
    let (mut guest, held) = guest();
    for _ in 0..3 {
        let mut vring = guest.start(EVENT_IDX, 8);
        vring.add(&[Desc::writable(DATA, 1)]);
        guest.run(0);
        assert_eq!(held.held().len(), 1);
        guest.write(reg::QUEUE_SEL, 1);
        guest.write(reg::DEVICE_FEATURES_SEL, 1);
        guest.page.raise(1);
        // As Control does it: the worker first, whose answer nobody waits for with a lock held.
        let ended = guest.command(Command::Reset);
        guest.turn();
        assert_eq!(ended.load(SeqCst), 0, "a request is in flight");
        held.finish_all();
        guest.turn();
        assert_eq!(ended.load(SeqCst), 1);
        assert!(!guest.has_kick(0));
        guest.bus.reset();
        for (register, value) in [
            (reg::STATUS, 0),
            (reg::INTERRUPT_STATUS, 0),
            (reg::QUEUE_READY, 0),
            (reg::QUEUE_NUM_MAX, 8),
            (reg::DEVICE_FEATURES, (VERSION_1 as u32) | INDIRECT_DESC as u32 | EVENT_IDX as u32 | DEVICE_BITS as u32),
        ] {
            assert_eq!(guest.read(register), value, "{register:#x}");
        }
    }
}
