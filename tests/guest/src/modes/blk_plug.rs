//! `blk-plug`: a driver of all disk slots, empty ones too, that hears of disks coming, growing and going by the configuration
//! interrupt, and tries each at once.
//!
//! With `load=on` it then writes block after block, each marked with its number, `depth=` at a time, until the disk is gone:
//! those that succeeded must be the first of those that were sent. `count=N` ends the load after so many. Typed on the serial
//! port: `q` ends it.

use crate::clock::{self, Patience};
use crate::memory;
use crate::serial;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, F_RO, REQUEST_NS, S_OK, SECTOR, T_GET_ID, T_IN, T_OUT};
use crate::virtio::mmio::{INTERRUPT_ACK, INTERRUPT_STATUS};
use crate::virtio::pool::Pool;
use crate::words::Words;

/// Most slots of a machine.
const MOST_DISKS: usize = 11;
const BLOCK: u64 = 4096;
/// The interrupt status: the configuration has changed.
const CONFIG_CHANGED: u32 = 2;
/// Between two looks at the interrupt status of all slots, which cost an exit each.
const LOOK_NS: u64 = 1_000_000;

/// The size that is announced between none and that of a disk.
const STEP_SECTORS: u64 = 1;

/// A slot, and the load on the disk in it.
struct Slot {
    pool: Pool,
    sectors: u64,
    /// Blocks that were sent, that succeeded and that failed, since the disk came.
    sent: u64,
    ok: u64,
    errors: u64,
    loaded: bool,
    /// The first number that failed.
    first_error: u64,
    /// What each of the pool's slots has sent.
    numbers: &'static mut [u64],
}

pub fn run(words: Words) -> Outcome {
    let mut slots: [Option<Slot>; MOST_DISKS] = [const { None }; MOST_DISKS];
    let mut count = 0;
    for ((number, device), slot) in blk::disks(words).zip(&mut slots) {
        let disk = Disk::start(number, device, blk::KNOWN, 256)?;
        let depth = words.number("depth", 4);
        let numbers = memory::table(depth as usize, 0);
        let pool = Pool::new(disk, depth, BLOCK, true)?;
        let mut new =
            Slot { pool, sectors: 0, sent: 0, ok: 0, errors: 0, loaded: false, first_error: u64::MAX, numbers };
        new.look(words)?;
        *slot = Some(new);
        count += 1;
    }
    let most = words.number("count", u64::MAX);
    say!("plug: begin disks={count}");
    let mut looked = clock::now();
    while serial::input() != Some(b'q') {
        let look = clock::now() - looked > LOOK_NS;
        if look {
            looked = clock::now();
        }
        for slot in slots.iter_mut().flatten() {
            if slot.loaded {
                slot.load(most)?;
            }
            let registers = slot.pool.disk.device.registers;
            if look && registers.read32(INTERRUPT_STATUS) & CONFIG_CHANGED != 0 {
                registers.write32(INTERRUPT_ACK, CONFIG_CHANGED);
                slot.look(words)?;
            }
        }
    }
    for slot in slots.iter().flatten() {
        slot.pool.disk.device.reset()?;
    }
    Ok(())
}

impl Slot {
    /// Looks how large the disk is now, and tries it if that has changed.
    fn look(&mut self, words: Words) -> Outcome {
        let disk = &self.pool.disk;
        let (number, sectors) = (disk.number, disk.capacity());
        if sectors == STEP_SECTORS {
            return self.step();
        }
        let before = core::mem::replace(&mut self.sectors, sectors);
        if sectors == before {
            return Ok(());
        }
        let mut patience = Patience::new(REQUEST_NS);
        while self.loaded && sectors == 0 {
            // What was under way ends first, and fails at last.
            self.load(u64::MAX)?;
            if patience.is_over() {
                fail!("disk {number}: gone, and what was sent to it does not come back");
            }
        }
        if self.loaded {
            say!("plug: disk={number} sectors={sectors}");
            return Ok(());
        }
        if sectors == 0 {
            say!("plug: disk={number} sectors=0 read={}", self.one(T_IN, 0)?);
            return Ok(());
        }
        let mut name = [0; 20];
        let identified = self.identify(&mut name)?;
        let name = text(&name);
        let last = (sectors - BLOCK.div_ceil(SECTOR).min(sectors)) & !(BLOCK / SECTOR - 1);
        let mark = sectors ^ 0x706c_7567;
        self.pool.data(0).fill(0);
        self.pool.data(0).write64(0, mark);
        let write = if self.pool.disk.has(F_RO) { S_OK } else { self.one(T_OUT, last)? };
        self.pool.data(0).fill(0x55);
        let read = self.one(T_IN, last)?;
        let same = u8::from(self.pool.data(0).read64(0) == mark);
        say!(
            "plug: disk={number} sectors={sectors} id={name} get_id={identified} write={write} read={read} same={same}"
        );
        if words.is("load", "on") {
            (self.sent, self.ok, self.errors, self.first_error) = (0, 0, 0, u64::MAX);
            self.loaded = true;
            for slot in 0..self.pool.depth() {
                self.send(slot);
            }
            self.kick();
        }
        Ok(())
    }

    /// What comes between no disk and a disk. Linux' udev asks for the serial number then.
    fn step(&mut self) -> Outcome {
        let number = self.pool.disk.number;
        if self.loaded {
            say!("plug: step disk={number}");
            return Ok(());
        }
        self.sectors = STEP_SECTORS;
        let mut name = [0; 20];
        let identified = self.identify(&mut name)?;
        say!("plug: step disk={number} id={} get_id={identified}", text(&name));
        Ok(())
    }

    /// Asks for the serial number: the status.
    fn identify(&mut self, name: &mut [u8; 20]) -> Outcome<u8> {
        let identified = self.one(T_GET_ID, 0)?;
        for (offset, byte) in (0..).zip(name) {
            *byte = self.pool.data(0).read8(offset);
        }
        Ok(identified)
    }

    /// One request on the first of the pool's slots, while there is no load: its status.
    fn one(&mut self, kind: u32, sector: u64) -> Outcome<u8> {
        self.pool.offer(0, kind, sector);
        self.kick();
        let mut patience = Patience::new(REQUEST_NS);
        while self.pool.disk.ring.used_waiting() == 0 {
            if patience.is_over() {
                fail!("disk {}: a request of type {kind} does not complete", self.pool.disk.number);
            }
        }
        Ok(self.pool.take()?.1)
    }

    fn kick(&mut self) {
        if self.pool.disk.ring.publish() {
            self.pool.disk.device.notify(0);
        }
    }

    fn send(&mut self, slot: u16) {
        let blocks = (self.sectors * SECTOR / BLOCK).max(1);
        let block = self.sent % blocks;
        self.pool.data(slot).write64(0, block + 1);
        self.pool.offer(slot, T_OUT, block * (BLOCK / SECTOR));
        self.numbers[usize::from(slot)] = self.sent;
        self.sent += 1;
    }

    /// Takes what is complete, and goes on until something fails.
    fn load(&mut self, most: u64) -> Outcome {
        let number = self.pool.disk.number;
        for _ in 0..self.pool.disk.ring.used_waiting() {
            let (slot, status) = self.pool.take()?;
            let sent = self.numbers[usize::from(slot)];
            if status == S_OK {
                if sent > self.first_error {
                    fail!("disk {number}: block {sent} succeeded, and {} before it had failed", self.first_error);
                }
                self.ok += 1;
            } else {
                self.errors += 1;
                self.first_error = self.first_error.min(sent);
            }
            if self.errors == 0 && self.sent < most {
                self.send(slot);
            }
        }
        self.kick();
        if self.ok + self.errors == self.sent {
            self.loaded = false;
            say!("plug: disk={number} load ended ok={} errors={}", self.ok, self.errors);
        }
        Ok(())
    }
}

/// A serial number.
fn text(name: &[u8; 20]) -> &str {
    let name = name.split(|byte| *byte == 0).next().and_then(|name| core::str::from_utf8(name).ok());
    name.unwrap_or("(not text)")
}
