//! How a driver learns that a disk was plugged or unplugged: by a size of one sector between none and the real one, because
//! Linux sends udev an event for that. The driver reads as Linux' `virtblk_update_capacity` does.

use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};

use super::*;
use crate::config::spec::{Aio, Cache, DriveSpec};
use crate::devices::block::{Block, Order, Throttle};
use crate::disk::Disk;
use crate::event::{Done, Sender};
use crate::qos::{Bucket, Limits};
use crate::virtio::Command;
use crate::virtio::testing::*;

const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;
const SECTORS: u64 = 128;
const SECOND_NS: u64 = 1_000_000_000;

/// A file in memory that goes away with its test.
struct File(PathBuf);

impl File {
    fn new(sectors: u64) -> File {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("loopvisor-announce-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = PathBuf::from("/dev/shm").join(name);
        std::fs::write(&path, vec![0x77; sectors as usize * 512]).unwrap();
        File(path)
    }

    fn block(&self, serial: &str, ram: &Arc<GuestRam>) -> Block {
        let spec = DriveSpec { cache: Cache::Buffered, aio: Aio::Threads, ..DriveSpec::new(serial, &self.0) };
        let disk = Disk::open(&spec, ram.clone()).unwrap();
        let throttle = Throttle::Own(Bucket::new(&Limits::default()));
        Block::new(serial, serial, disk, throttle, ram.clone(), Box::new(|failure| panic!("{failure:?}")))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A driver of one slot.
struct Rig {
    guest: Guest,
    vring: Vring,
    /// How many exchanges are done.
    exchanged: Arc<AtomicU64>,
}

impl Rig {
    /// The driver of an empty slot.
    fn new() -> Rig {
        let ram = ram();
        let mut guest = Guest::new(Vacant::new(1, ram.clone()), ram);
        let vring = guest.start(0, 256);
        let mut rig = Rig { guest, vring, exchanged: Arc::default() };
        assert_eq!(rig.capacity(), 0);
        rig
    }

    /// The same, with that disk plugged and its size read.
    fn with_disk(file: &File) -> Rig {
        let mut rig = Rig::new();
        rig.plug(file, "data");
        assert_eq!(rig.sizes(), [1, SECTORS]);
        rig
    }

    fn exchange(&mut self, device: Box<dyn Device>) {
        let (count, before) = (self.exchanged.clone(), self.exchanged.load(SeqCst));
        let done = Done::posted(move |end| {
            assert!(matches!(end, Ok(Ok(_))));
            count.fetch_add(1, SeqCst);
        });
        assert!(self.guest.worker.send(Command::Exchange(device, done)).is_ok());
        self.guest.turn();
        assert_eq!(self.exchanged.load(SeqCst), before + 1, "the command does not wait for the driver");
    }

    fn plug(&mut self, file: &File, serial: &str) -> Sender<Order> {
        let block = file.block(serial, &self.guest.ram);
        let orders = block.orders();
        self.exchange(Box::new(block));
        orders
    }

    fn unplug(&mut self) {
        let vacant = Vacant::new(1, self.guest.ram.clone());
        self.exchange(Box::new(vacant));
    }

    fn word(&self, at: u64) -> u64 {
        self.guest.read(reg::CONFIG + at).into()
    }

    /// Reads the capacity until the generation has not changed meanwhile (virtio 1.2, section 2.5.2).
    fn capacity(&mut self) -> u64 {
        let mut generation = self.guest.read(reg::CONFIG_GENERATION);
        loop {
            let sectors = self.word(0) | self.word(4) << 32;
            let now = self.guest.read(reg::CONFIG_GENERATION);
            if now == generation {
                self.guest.turn();
                return sectors;
            }
            generation = now;
        }
    }

    /// What Linux reads: a size for each configuration interrupt, until no more comes.
    fn sizes(&mut self) -> Vec<u64> {
        let mut sizes = Vec::new();
        while self.guest.interrupts() > 0 {
            self.guest.write(reg::INTERRUPT_ACK, 3);
            sizes.push(self.capacity());
            assert!(sizes.len() < 10, "{sizes:?}");
        }
        sizes
    }

    fn pass(&mut self, ns: u64) {
        self.guest.clock.fetch_add(ns, SeqCst);
        self.guest.turn();
    }

    /// A request with `len` bytes of data: its status and the data.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u32, Vec<u8>) {
        self.guest.put(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
        self.guest.put(HEADER + 8, &sector.to_le_bytes());
        self.guest.put(DATA, &vec![0xee; len as usize]);
        self.vring.add(&[Desc::readable(HEADER, 16), Desc::writable(DATA, len), Desc::writable(STATUS, 1)]);
        self.guest.run(0);
        let mut used = self.vring.take_used();
        while used.is_empty() {
            self.guest.turn();
            used = self.vring.take_used();
        }
        // Not a change of the configuration.
        self.guest.interrupts();
        (self.guest.get(STATUS, 1)[0].into(), self.guest.get(DATA, len as usize))
    }

    fn serial(&mut self) -> String {
        let (status, bytes) = self.request(VIRTIO_BLK_T_GET_ID, 0, 20);
        assert_eq!(status, VIRTIO_BLK_S_OK);
        String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_string()
    }
}

#[test]
fn a_plug_announces_one_sector_and_then_the_size() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    rig.plug(&file, "data");
    assert_eq!(rig.serial(), "data", "it can be used at once");
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, SECTORS - 1, 512), (VIRTIO_BLK_S_OK, vec![0x77; 512]));
    rig.unplug();
    rig.sizes();
    rig.plug(&file, "data");
    assert_eq!(rig.sizes(), [1, SECTORS]);
    rig.pass(100 * SECOND_NS);
    assert_eq!(rig.sizes(), [0; 0], "nothing more comes");
}

#[test]
fn an_unplug_announces_one_sector_without_serial_and_then_none() {
    let file = File::new(SECTORS);
    let mut rig = Rig::with_disk(&file);
    rig.unplug();
    assert_eq!(rig.guest.interrupts(), 1);
    assert_eq!(rig.capacity(), 1);
    assert_eq!(rig.serial(), "");
    rig.unplug();
    assert_eq!(rig.sizes(), [1, 0]);
    rig.pass(100 * SECOND_NS);
    assert_eq!(rig.sizes(), [0; 0]);
}

#[test]
fn sector_of_an_unplugged_disk_reads_as_zeros() {
    let file = File::new(SECTORS);
    let mut rig = Rig::with_disk(&file);
    rig.unplug();
    let failed = (VIRTIO_BLK_S_IOERR, vec![0xee; 512]);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512), failed, "it was sent to the disk that is gone");
    assert_eq!(rig.capacity(), 1);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512), (VIRTIO_BLK_S_OK, vec![0; 512]));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, 512), failed);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 1024).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, 512).0, VIRTIO_BLK_S_IOERR);
    // A read that was sent before the driver knew of no sectors, and that the slot has not seen yet.
    let mut used = Vec::new();
    rig.guest.put(HEADER, &[0; 16]);
    rig.vring.add(&[Desc::readable(HEADER, 16), Desc::writable(DATA, 512), Desc::writable(STATUS, 1)]);
    rig.guest.put(STATUS, &[0xee]);
    assert_eq!(rig.capacity(), 0);
    used.extend(rig.vring.take_used());
    assert_eq!((used.len(), rig.guest.get(STATUS, 1)[0].into()), (1, VIRTIO_BLK_S_OK));
    rig.guest.interrupts();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_IOERR);
}

#[test]
fn the_second_step_waits_for_both_halves_under_one_generation() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    // The driver has begun to read when the disk comes: it will begin again.
    rig.guest.read(reg::CONFIG_GENERATION);
    assert_eq!(rig.word(0), 0);
    rig.plug(&file, "data");
    for _ in 0..2 {
        assert_eq!(rig.word(4), 0);
        rig.guest.turn();
    }
    assert_eq!(rig.guest.interrupts(), 1);
    rig.guest.read(reg::CONFIG_GENERATION);
    rig.guest.turn();
    assert_eq!((rig.word(0), rig.word(4)), (1, 0));
    rig.guest.turn();
    assert_eq!((rig.word(0), rig.guest.interrupts()), (1, 0), "the driver has not compared the generations");
    rig.guest.read(reg::CONFIG_GENERATION);
    rig.guest.turn();
    assert_eq!((rig.word(0), rig.guest.interrupts()), (SECTORS, 1));
}

#[test]
fn second_step_comes_in_time_without_a_read() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    rig.plug(&file, "data");
    rig.pass(SECOND_NS);
    assert_eq!((rig.word(0), rig.guest.interrupts()), (1, 1));
    rig.pass(20 * SECOND_NS);
    assert_eq!((rig.word(0), rig.guest.interrupts()), (SECTORS, 1));
    rig.unplug();
    rig.pass(20 * SECOND_NS);
    assert_eq!((rig.word(0), rig.guest.interrupts()), (0, 2));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_IOERR);
}

#[test]
fn time_for_the_first_step_does_not_run_while_stopped() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    let paused = rig.guest.command(Command::Pause);
    rig.plug(&file, "data");
    rig.pass(1000 * SECOND_NS);
    assert_eq!((paused.load(SeqCst), rig.word(0)), (1, 1));
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.guest.turn();
    rig.pass(SECOND_NS);
    assert_eq!(rig.sizes(), [1, SECTORS]);
    // A stop after the unplug.
    rig.unplug();
    rig.pass(SECOND_NS);
    rig.guest.command(Command::Pause);
    rig.guest.turn();
    rig.pass(1000 * SECOND_NS);
    assert_eq!(rig.word(0), 1);
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.pass(SECOND_NS);
    assert_eq!(rig.sizes(), [1, 0]);
}

#[test]
fn plug_after_an_unplug_is_announced_by_its_own_steps() {
    let (files, mut rig) = ([File::new(SECTORS), File::new(SECTORS)], Rig::new());
    rig.plug(&files[0], "one");
    assert_eq!(rig.sizes(), [1, SECTORS]);
    rig.unplug();
    let generation = rig.guest.read(reg::CONFIG_GENERATION);
    rig.plug(&files[1], "two");
    // The report of a vCPU that read the unplug's first step during the plug.
    assert!(rig.guest.worker.send(Command::ConfigRead(generation)).is_ok());
    rig.guest.turn();
    assert_eq!(rig.word(0), 1);
    assert_eq!(rig.sizes(), [1, SECTORS]);
    assert_eq!(rig.serial(), "two");
}

#[test]
fn resize_before_the_first_step_is_read_keeps_both_steps() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    let orders = rig.plug(&file, "data");
    assert_eq!(rig.guest.interrupts(), 1);
    let told = Arc::new(AtomicU64::new(0));
    let count = told.clone();
    let done = Done::posted(move |end: std::result::Result<(), _>| count.store(1 + u64::from(end.is_err()), SeqCst));
    assert!(orders.send(Order::Grow(done)).is_ok());
    rig.guest.turn();
    assert_eq!((told.load(SeqCst), rig.word(0), rig.guest.interrupts()), (1, 1, 0));
    assert_eq!(rig.capacity(), 1);
    assert_eq!(rig.sizes(), [SECTORS]);
}

#[test]
fn a_next_driver_finds_the_size_at_once() {
    let (file, mut rig) = (File::new(SECTORS), Rig::new());
    rig.plug(&file, "data");
    rig.guest.reset();
    assert_eq!(rig.word(0), SECTORS);
    rig.vring = rig.guest.start(0, 256);
    rig.guest.interrupts();
    rig.pass(100 * SECOND_NS);
    assert_eq!((rig.capacity(), rig.sizes()), (SECTORS, vec![]));
}

#[test]
fn a_disk_of_one_sector_comes_in_one_step() {
    let (file, mut rig) = (File::new(1), Rig::new());
    rig.plug(&file, "data");
    assert_eq!(rig.sizes(), [1]);
    rig.unplug();
    assert_eq!(rig.sizes(), [1, 0]);
}
