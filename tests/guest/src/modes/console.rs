//! `console`: a driver of a virtio-console (virtio 1.2, 5.3) whose bytes are known.
//!
//! `op=echo` sends back what it is sent; `op=flood` sends the known sequence, `bytes=N` of it or without end, and reads
//! nothing; `op=check` finds the known sequence in what it is sent, and tells when it has `bytes=N`. `size=` and `depth=`
//! say how long a buffer is and how many there are, `console=N` which console it is. Typed on the serial port: `q` ends it,
//! `r` resets the device with whatever is under way and brings it up again, `p` and `g` have it pause and go on.
//! `reads=N` has it read the first disk as often, one look at the console in between. `hostile=on` first does everything that a driver must not do.

use crate::clock::{self, Patience};
use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::memory::{self, Dma};
use crate::serial;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, Layout, T_IN};
use crate::virtio::mmio::{CONFIG, Device, F_VERSION_1};
use crate::virtio::ring::{Desc, NEXT, Ring, WRITE};
use crate::words::Words;

const DEVICE_ID: u32 = 3;
const F_SIZE: u64 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Between two looks at the serial port and the configuration, which cost an exit each.
const LOOK_NS: u64 = 1_000_000;
/// How long the processor sleeps between two looks when there is nothing to do.
const NAP_NS: u64 = 20_000_000;
/// A buffer that is sent comes back within this time, of time the processor ran.
const SILENCE_NS: u64 = 30_000_000_000;

/// The byte at a place of the known sequence.
fn known(place: u64) -> u8 {
    let mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Echo,
    Flood,
    Check,
}

/// Whose a buffer is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Idle,
    /// The device fills it.
    Receiving,
    /// The device reads it.
    Sending,
}

struct Driver {
    device: Device,
    operation: Operation,
    rings: [Ring; 2],
    size: u64,
    buffers: Dma,
    places: &'static mut [Place],
    received: u64,
    sent: u64,
    /// Bytes of the sequence that are to be sent, or are awaited.
    bytes: u64,
}

pub fn run(words: Words) -> Outcome {
    let mut consoles = Device::all(words).filter(|device| device.id == DEVICE_ID);
    let Some(device) = consoles.nth(words.number("console", 0) as usize) else { fail!("no such console") };
    interrupt::start();
    interrupt::route(device.irq, Trigger::Edge, Some(device.registers));
    let mut driver = Driver::new(device, words)?;
    if words.is("hostile", "on") {
        driver.misbehave()?;
    }
    driver.bring_up()?;
    let (mut disk, mut reads) = (None, words.number("reads", 0));
    if reads > 0 {
        let Some((number, device)) = blk::disks(words).next() else { fail!("no disk") };
        disk = Some((Disk::start(number, device, blk::KNOWN, 8)?, memory::take(4096)));
    }
    say!("console: begin");
    let (mut look, mut terminal, mut told, mut resets, mut pauses) = (0, 0, false, 0, false);
    let mut patience = Patience::new(SILENCE_NS);
    loop {
        if clock::now() - look >= LOOK_NS {
            look = clock::now();
            match serial::input() {
                Some(b'q') => break,
                Some(b'r') => {
                    driver.device.reset()?;
                    driver.collect()?;
                    driver.bring_up()?;
                    resets += 1;
                    say!("console: reset {resets}");
                }
                Some(b'p') => pauses = true,
                Some(b'g') => pauses = false,
                _ => {}
            }
            let now = driver.device.registers.read32(CONFIG);
            if now != terminal {
                terminal = now;
                say!("console: terminal {}x{}", now & 0xffff, now >> 16);
            }
        }
        if let Some((disk, data)) = &mut disk
            && reads > 0
        {
            disk.must(T_IN, 0, core::slice::from_ref(data), Layout::Direct)?;
            reads -= 1;
            if reads == 0 {
                say!("console: reads done");
            }
        }
        let moved = !pauses && driver.step()?;
        if driver.bytes != 0 && !told && driver.is_done() {
            told = true;
            say!("console: done received={} sent={}", driver.received, driver.sent);
        }
        if moved || driver.places.iter().all(|place| *place != Place::Sending) {
            patience = Patience::new(SILENCE_NS);
        }
        if patience.is_over() {
            fail!("what was sent does not come back");
        }
        if !moved {
            driver.nap();
        }
    }
    say!("console: end received={} sent={}", driver.received, driver.sent);
    Ok(())
}

impl Driver {
    fn new(device: Device, words: Words) -> Outcome<Driver> {
        let name = words.get("op").unwrap_or("echo");
        let operation = match name {
            "echo" => Operation::Echo,
            "flood" => Operation::Flood,
            "check" => Operation::Check,
            _ => fail!("op={name} is not echo, flood or check"),
        };
        device.negotiate(F_VERSION_1 | F_SIZE)?;
        let rings = [0, 1].map(|queue| Ring::new(device.queue_max(queue) as u16, false));
        let depth = words.number("depth", 16).min(rings[0].size().into());
        let size = words.number("size", 4096);
        Ok(Driver {
            device,
            operation,
            rings,
            size,
            buffers: memory::take(depth * size),
            places: memory::table(depth as usize, Place::Idle),
            received: 0,
            sent: 0,
            bytes: words.number("bytes", 0),
        })
    }

    /// From the reset on. What was under way is forgotten.
    fn bring_up(&mut self) -> Outcome {
        self.device.negotiate(F_VERSION_1 | F_SIZE)?;
        for queue in 0..2 {
            self.rings[queue] = self.rings[queue].renew();
            self.device.set_queue(queue as u32, &self.rings[queue]);
        }
        self.device.go();
        self.places.fill(Place::Idle);
        Ok(())
    }

    /// Takes what came before a reset: it has been received all the same.
    fn collect(&mut self) -> Outcome {
        for _ in 0..self.rings[RECEIVE].used_waiting() {
            let used = self.rings[RECEIVE].take_used();
            if self.operation == Operation::Check {
                self.check(used.head as u16, used.len.into())?;
            }
            self.received += u64::from(used.len);
        }
        Ok(())
    }

    fn buffer(&self, head: u16) -> Dma {
        self.buffers.piece(self.size * u64::from(head), self.size)
    }

    fn offer(&mut self, queue: usize, head: u16, len: u64) {
        let (flags, place) = if queue == RECEIVE { (WRITE, Place::Receiving) } else { (0, Place::Sending) };
        let desc = Desc { address: self.buffer(head).at(0), len: len as u32, flags, next: 0 };
        desc.write(&self.rings[queue].table(), head);
        self.rings[queue].offer(head);
        self.places[usize::from(head)] = place;
    }

    /// Takes what has come back, and gives the device what it can have next. False if there was nothing to do.
    fn step(&mut self) -> Outcome<bool> {
        let mut moved = false;
        for _ in 0..self.rings[TRANSMIT].used_waiting() {
            let used = self.rings[TRANSMIT].take_used();
            let Some(place @ Place::Sending) = self.places.get_mut(used.head as usize) else {
                fail!("buffer {} comes back and was not sent", used.head);
            };
            *place = Place::Idle;
            moved = true;
        }
        for _ in 0..self.rings[RECEIVE].used_waiting() {
            let used = self.rings[RECEIVE].take_used();
            let (head, len) = (used.head as u16, u64::from(used.len));
            if self.places.get(usize::from(head)) != Some(&Place::Receiving) || len == 0 || len > self.size {
                fail!("buffer {head} comes with {len} bytes");
            }
            self.places[usize::from(head)] = Place::Idle;
            if self.operation == Operation::Check {
                self.check(head, len)?;
            }
            self.received += len;
            if self.operation == Operation::Echo {
                self.offer(TRANSMIT, head, len);
                self.sent += len;
            }
            moved = true;
        }
        for head in 0..self.places.len() as u16 {
            if self.places[usize::from(head)] != Place::Idle {
                continue;
            }
            if self.operation == Operation::Flood {
                let left = if self.bytes == 0 { self.size } else { self.bytes - self.sent };
                if left > 0 {
                    self.send_known(head, left.min(self.size));
                }
            } else {
                self.offer(RECEIVE, head, self.size);
            }
        }
        for queue in [RECEIVE, TRANSMIT] {
            if self.rings[queue].publish() {
                self.device.notify(queue as u32);
            }
        }
        Ok(moved)
    }

    fn send_known(&mut self, head: u16, len: u64) {
        let buffer = self.buffer(head);
        for at in 0..len {
            buffer.write8(at, known(self.sent + at));
        }
        self.offer(TRANSMIT, head, len);
        self.sent += len;
    }

    fn check(&self, head: u16, len: u64) -> Outcome {
        let buffer = self.buffer(head);
        for at in 0..len {
            let (found, expected) = (buffer.read8(at), known(self.received + at));
            if found != expected {
                fail!("byte {} is {found:#x} and not {expected:#x}", self.received + at);
            }
        }
        Ok(())
    }

    /// All bytes that the words ask for have come, or have gone and their buffers are back.
    fn is_done(&self) -> bool {
        let all = if self.operation == Operation::Flood { self.sent } else { self.received };
        all >= self.bytes && self.places.iter().all(|place| *place != Place::Sending)
    }

    /// Sleeps until something comes back, and not for long.
    fn nap(&mut self) {
        self.rings.iter_mut().for_each(|ring| ring.ask_interrupt(true));
        cpu::full_fence();
        if self.rings.iter().all(|ring| ring.used_waiting() == 0) {
            interrupt::start_timer(NAP_NS);
            cpu::wait_for_interrupt();
        }
        self.rings.iter_mut().for_each(|ring| ring.ask_interrupt(false));
    }

    /// Buffers outside memory, empty ones, ones of the wrong direction, gigabytes at once, chains that go round, and
    /// kicks for nothing; each on a device that is brought up again afterwards.
    fn misbehave(&mut self) -> Outcome {
        let inside = self.buffers.at(0);
        let bad: [[Desc; 2]; 7] = [
            [(u64::MAX - 8, 4096, 0), (1 << 45, u32::MAX, 0)],
            [(inside, 0, 0), (1 << 45, 0, 0)],
            [(inside, 16, WRITE), (inside, 0, WRITE)],
            [(0, u32::MAX, 0), (0, u32::MAX, 0)],
            [(inside, 16, 0), (inside, 16, WRITE)],
            [(u64::MAX - 8, 4096, WRITE), (1 << 45, u32::MAX, WRITE)],
            [(inside, 0, WRITE), (u64::MAX, 0, WRITE)],
        ]
        .map(|pair| pair.map(|(address, len, flags)| Desc { address, len, flags, next: 0 }));
        for queue in [TRANSMIT, RECEIVE] {
            for [first, second] in bad {
                self.bring_up()?;
                let table = self.rings[queue].table();
                for chain in 0..8 {
                    let next = 2 * chain + 1;
                    Desc { flags: first.flags | NEXT, next, ..first }.write(&table, 2 * chain);
                    second.write(&table, next);
                    self.rings[queue].offer(2 * chain);
                }
                self.rings[queue].publish();
                for _ in 0..100 {
                    self.device.notify(queue as u32);
                }
            }
            self.bring_up()?;
            let first = Desc { address: inside, len: 1, flags: NEXT, next: 0 };
            first.write(&self.rings[queue].table(), 0);
            self.rings[queue].offer(0);
            self.rings[queue].publish();
            self.device.notify(queue as u32);
            let mut patience = Patience::new(5_000_000_000);
            while !self.device.needs_reset() {
                if patience.is_over() {
                    fail!("a chain that goes round is no fault");
                }
            }
        }
        for _ in 0..2000 {
            self.device.notify(0);
            self.device.notify(1);
        }
        Ok(())
    }
}
