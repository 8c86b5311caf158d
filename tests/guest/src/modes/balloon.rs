//! `balloon`: a driver that follows its target with pages it knows, and finds every page as it must be: one that it kept as it
//! left it, one that came back as zeros.
//!
//! The heap is what is left of memory. `order=random` gives pages away in no order, `touch=off` leaves them untouched until
//! then, `check=off` leaves alone those that come back; `depth=`, `pages=` say how many chains of how many pages are under way at once,
//! `wait=halt` has the processor halted meanwhile. `used=N` is what the guest says it
//! needs, in its statistics. Typed on the serial port: `q` ends it, `u` and `d` double and halve what is used, `f` reports
//! all that is free, `s` falls asleep for ever with the target out of reach.

use crate::clock::{self, Patience};
use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::memory::{self, Dma};
use crate::modes::random::Random;
use crate::serial;
use crate::text::Outcome;
use crate::virtio::mmio::{CONFIG, Device, F_VERSION_1};
use crate::virtio::ring::{Desc, Ring, WRITE};
use crate::words::Words;

const DEVICE_ID: u32 = 5;
const F_STATS: u64 = 1 << 1;
const F_REPORTING: u64 = 1 << 5;
/// Configuration: pages wanted, and pages given.
const NUM_PAGES: u64 = CONFIG;
const ACTUAL: u64 = CONFIG + 4;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

const PAGE: u64 = 4096;
/// Between two looks at the target, which cost an exit each.
const LOOK_NS: u64 = 1_000_000;
/// How long the processor sleeps between two looks when there is nothing to do.
const NAP_NS: u64 = 20_000_000;
/// Without a completion for this long, of time the processor ran, the device has failed.
const SILENCE_NS: u64 = 30_000_000_000;
/// Bytes of one free block that is reported.
const BLOCK: u64 = 2 << 20;

/// What a head has under way: a range of `Driver::order`.
#[derive(Clone, Copy)]
struct Sent {
    first: u32,
    count: u32,
}

struct Driver {
    device: Device,
    rings: [Ring; 4],
    depth: u16,
    pages: u32,
    /// A list of page numbers for each head.
    lists: Dma,
    sent: &'static mut [Sent],
    idle: &'static mut [u16],
    idle_count: usize,
    /// Pages of the heap, as offsets into it; the first `given` are in the balloon.
    heap: Dma,
    order: &'static mut [u32],
    given: u32,
    touched: bool,
    checked: bool,
    halts: bool,
    statistics: Dma,
    used: u64,
    asked: u64,
}

pub fn run(words: Words) -> Outcome {
    let Some(device) = Device::all(words).find(|device| device.id == DEVICE_ID) else { fail!("no balloon") };
    interrupt::start();
    interrupt::route(device.irq, Trigger::Edge, Some(device.registers));
    let mut driver = Driver::start(device, words)?;
    if words.is("hostile", "on") {
        driver.misbehave()?;
    }
    let heap = driver.order.len();
    say!("balloon: begin heap={heap}");
    let mut told = 0;
    let (mut look, mut began) = (clock::now(), clock::now());
    loop {
        // More is never wanted than there is; what is beyond the heap is not to be had.
        let target = device.registers.read32(NUM_PAGES);
        let reach = target.min(heap as u32);
        if reach != driver.given {
            if driver.given == told {
                began = clock::now();
            }
            driver.step(reach, &mut look)?;
            device.registers.write32(ACTUAL, driver.given);
        }
        if reach == driver.given && told != driver.given {
            told = driver.given;
            say!("balloon: given={told} target={target} ns={}", clock::now() - began);
        }
        driver.answer_statistics();
        match serial::input() {
            Some(b'q') => break,
            Some(b'u') => driver.used *= 2,
            Some(b'd') => driver.used /= 2,
            Some(b'f') => driver.report()?,
            Some(b's') => {
                say!("balloon: asleep");
                cpu::halt();
            }
            _ if reach == driver.given => nap(),
            _ => {}
        }
    }
    driver.check_kept()?;
    say!("balloon: end given={} asked={}", driver.given, driver.asked);
    Ok(())
}

/// Sleeps until an interrupt comes, and not for long.
fn nap() {
    interrupt::start_timer(NAP_NS);
    cpu::wait_for_interrupt();
}

impl Driver {
    fn start(device: Device, words: Words) -> Outcome<Driver> {
        let features = device.offered() & (F_VERSION_1 | F_STATS | F_REPORTING);
        device.negotiate(features)?;
        let size = |queue| device.queue_max(queue).min(256) as u16;
        let rings = [0, 1, 2, 3].map(|queue| Ring::new(size(queue).max(1), false));
        let depth = words.number("depth", 1).min(rings[0].size().into()) as u16;
        let pages = words.number("pages", 256) as u32;
        let lists = memory::take(u64::from(depth) * u64::from(pages) * 4);
        let sent = memory::table(depth.into(), Sent { first: 0, count: 0 });
        let idle = memory::table(depth.into(), 0);
        let statistics = memory::take(PAGE);
        // The table of the heap's pages, and the heap behind it on a block's boundary.
        let count = memory::free() / PAGE * 1000 / 1001;
        let order = memory::table((count - BLOCK / PAGE) as usize, 0u32);
        let skip = memory::take_as_is(0).at(0).next_multiple_of(BLOCK) - memory::take_as_is(0).at(0);
        memory::take_as_is(skip);
        let heap = memory::take_as_is(order.len() as u64 * PAGE);
        (0..).zip(order.iter_mut()).for_each(|(page, place)| *place = page);
        if words.is("order", "random") {
            let mut random = Random::new(words.number("seed", 1));
            for last in (1..order.len()).rev() {
                order.swap(last, random.below(last as u64 + 1) as usize);
            }
        }
        let mut driver = Driver {
            device,
            rings,
            depth,
            pages,
            lists,
            sent,
            idle,
            idle_count: 0,
            heap,
            order,
            given: 0,
            touched: !words.is("touch", "off"),
            checked: !words.is("touch", "off") && !words.is("check", "off"),
            halts: words.is("wait", "halt"),
            statistics,
            used: words.number("used", 0),
            asked: 0,
        };
        driver.bring_up(features)?;
        if driver.touched {
            (0..driver.order.len() as u32).for_each(|page| driver.stamp(page));
        }
        Ok(driver)
    }

    fn bring_up(&mut self, features: u64) -> Outcome {
        let queues = if features & F_REPORTING != 0 { 4 } else { 3 };
        for (queue, ring) in (0..queues).zip(&self.rings) {
            if self.device.queue_max(queue) != 0 {
                self.device.set_queue(queue, ring);
            }
        }
        self.device.go();
        self.idle_count = self.depth.into();
        (0..).zip(self.idle.iter_mut()).for_each(|(head, place)| *place = head);
        for queue in [INFLATE, DEFLATE, STATS, REPORTING] {
            self.rings[queue].ask_interrupt(false);
        }
        if features & F_STATS != 0 {
            self.send_statistics();
        }
        Ok(())
    }

    /// What a page of the heap holds while the guest has it.
    fn stamp(&self, page: u32) {
        self.heap.write64(u64::from(page) * PAGE, u64::from(page) << 8 | 0xa5);
    }

    fn check(&self, page: u32, expected: u64) -> Outcome {
        let found = self.heap.read64(u64::from(page) * PAGE);
        if found != expected {
            fail!("page {page} of the heap holds {found:#x} and not {expected:#x}");
        }
        Ok(())
    }

    /// What the guest keeps it must find as it left it.
    fn check_kept(&self) -> Outcome {
        if self.checked {
            for &page in &self.order[self.given as usize..] {
                self.check(page, u64::from(page) << 8 | 0xa5)?;
            }
        }
        Ok(())
    }

    /// Gives away or takes back up to `reach`, unless the target changes meanwhile.
    fn step(&mut self, reach: u32, look: &mut u64) -> Outcome {
        let wanted = self.device.registers.read32(NUM_PAGES);
        let inflate = reach > self.given;
        let queue = if inflate { INFLATE } else { DEFLATE };
        let mut next = self.given;
        let mut stop = false;
        let mut patience = Patience::new(SILENCE_NS);
        loop {
            while next != reach && !stop && self.idle_count > 0 {
                self.idle_count -= 1;
                let head = self.idle[self.idle_count];
                let count = next.abs_diff(reach).min(self.pages);
                let first = if inflate { next } else { next - count };
                next = if inflate { next + count } else { first };
                self.send(queue, head, Sent { first, count })?;
            }
            if self.rings[queue].publish() {
                self.device.notify(queue as u32);
            }
            if self.halts && self.idle_count < self.depth.into() {
                self.rings[queue].ask_interrupt(true);
                if self.rings[queue].used_waiting() == 0 {
                    nap();
                }
            }
            for _ in 0..self.rings[queue].used_waiting() {
                let head = self.rings[queue].take_used().head as u16;
                let Sent { first, count } = self.sent[usize::from(head)];
                if !inflate && self.checked {
                    for place in first..first + count {
                        let page = self.order[place as usize];
                        self.check(page, 0)?;
                        self.stamp(page);
                    }
                }
                self.idle[self.idle_count] = head;
                self.idle_count += 1;
                patience = Patience::new(SILENCE_NS);
            }
            if self.idle_count == usize::from(self.depth) && (stop || next == reach) {
                self.given = next;
                return Ok(());
            }
            if clock::now() - *look >= LOOK_NS {
                *look = clock::now();
                stop |= self.device.registers.read32(NUM_PAGES) != wanted;
                self.answer_statistics();
            }
            if patience.is_over() {
                fail!("no completion of queue {queue}");
            }
        }
    }

    fn send(&mut self, queue: usize, head: u16, sent: Sent) -> Outcome {
        let list = self.lists.piece(u64::from(head) * u64::from(self.pages) * 4, u64::from(self.pages) * 4);
        for place in 0..sent.count {
            let page = self.order[(sent.first + place) as usize];
            if queue == INFLATE && self.checked {
                self.check(page, u64::from(page) << 8 | 0xa5)?;
            }
            list.write32(u64::from(place) * 4, (self.heap.at(0) / PAGE) as u32 + page);
        }
        self.sent[usize::from(head)] = sent;
        let desc = Desc { address: list.at(0), len: sent.count * 4, flags: 0, next: 0 };
        desc.write(&self.rings[queue].table(), head);
        self.rings[queue].offer(head);
        Ok(())
    }

    /// Leaves new statistics with the device: free, total, available, and one that nobody knows.
    fn send_statistics(&mut self) {
        let has = (self.order.len() as u64 - u64::from(self.given)) * PAGE;
        let left = has.saturating_sub(self.used);
        for (place, (tag, value)) in (0..).zip([(4, left), (5, has), (6, left), (4242, self.asked)]) {
            self.statistics.write16(place * 10, tag);
            self.statistics.write64(place * 10 + 2, value);
        }
        let desc = Desc { address: self.statistics.at(0), len: 40, flags: 0, next: 0 };
        desc.write(&self.rings[STATS].table(), 0);
        self.rings[STATS].offer(0);
        if self.rings[STATS].publish() {
            self.device.notify(STATS as u32);
        }
    }

    fn answer_statistics(&mut self) {
        while self.rings[STATS].used_waiting() != 0 {
            self.rings[STATS].take_used();
            self.asked += 1;
            self.send_statistics();
        }
    }

    /// Reports all of the heap as free, block by block; all of it must be zeros then.
    fn report(&mut self) -> Outcome {
        let blocks = (self.order.len() as u64) * PAGE / BLOCK;
        for block in 0..blocks {
            let desc = Desc { address: self.heap.at(block * BLOCK), len: BLOCK as u32, flags: WRITE, next: 0 };
            let ring = &mut self.rings[REPORTING];
            desc.write(&ring.table(), 0);
            ring.offer(0);
            ring.publish();
            self.device.notify(REPORTING as u32);
            let mut patience = Patience::new(SILENCE_NS);
            while self.rings[REPORTING].used_waiting() == 0 {
                if patience.is_over() {
                    fail!("no completion of a report");
                }
            }
            self.rings[REPORTING].take_used();
        }
        say!("balloon: reported={}", blocks * BLOCK / PAGE);
        while serial::input().is_none() {
            nap();
        }
        for page in 0..(blocks * BLOCK / PAGE) as u32 {
            self.check(page, 0)?;
            self.stamp(page);
        }
        Ok(())
    }

    /// What no driver may do, on every queue; then a reset, after which all must be well.
    fn misbehave(&mut self) -> Outcome {
        let features = self.device.offered() & (F_VERSION_1 | F_STATS | F_REPORTING);
        let list = memory::take(1 << 20);
        for round in 0..200u64 {
            for queue in [INFLATE, DEFLATE, STATS, REPORTING] {
                let mut random = Random::new(round);
                for word in 0..list.len() / 4 {
                    // Outside memory, in the hole, beyond the address space; never a page of ours.
                    list.write32(word * 4, (1 << 20) + random.below(0xfff0_0000) as u32);
                }
                let address = [list.at(0), u64::MAX - 4095, 0xd000_0000, list.at(3)][(round % 4) as usize];
                let len = [list.len() as u32, 4096, 4, 7][(round / 4 % 4) as usize];
                let flags = if queue == REPORTING && address != list.at(0) { WRITE } else { 0 };
                let ring = &mut self.rings[queue];
                Desc { address, len, flags, next: 0 }.write(&ring.table(), 0);
                ring.offer(0);
                ring.publish();
                (0..10).for_each(|_| self.device.notify(queue as u32));
            }
            if round % 10 == 9 {
                let [a, b, c, d] = [INFLATE, DEFLATE, STATS, REPORTING].map(|queue| self.rings[queue].renew());
                self.rings = [a, b, c, d];
                self.device.negotiate(features)?;
                self.bring_up(features)?;
            }
        }
        say!("balloon: misbehaved");
        Ok(())
    }
}
