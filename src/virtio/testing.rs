//! A guest without a processor: real memory, the real registers through the real bus, a real loop turned by hand.
//!
//! A test acts as the driver: it negotiates, builds rings and chains (well formed or not), kicks, turns the loop and
//! looks. What KVM would do is two plain eventfds: the kick and the interrupt line. `Vring` is the driver's side of one
//! queue, `Holding` a device that keeps what it is given until it is told, `Keeper` one that keeps a
//! place, `Lender` one that lends its rings, `Metered` one that is limited. Test threads
//! only.

mod holding;
mod keeper;
mod lending;
mod metered;
mod vring;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use holding::{Held, Holding};
pub use keeper::Keeper;
pub use lending::{Borrower, Lender};
pub use metered::{Hand, Metered};
pub use vring::{Desc, INDIRECT, NEXT, Vring, WRITE};

use super::{Command, Device, Front, Interrupt, KickMaker, Page, Worker};
use crate::bus::{Bus, Range};
use crate::event::{Done, EventLoop, Sender, Signal, Wait, channel};
use crate::memory::GuestRam;

/// The registers of virtio-mmio that the tests name (virtio 1.2, section 4.2.2).
pub mod reg {
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// The device status bits.
pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const FAILED: u32 = 128;

/// What every driver must agree to, and what most do.
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Where the registers are.
pub const MMIO: u64 = 0xd000_0000;
/// Memory: two pieces with a hole between them.
pub const LOW_BYTES: u64 = 2 << 20;
pub const HIGH: u64 = 1 << 32;
pub const HIGH_BYTES: u64 = 1 << 20;
/// Where the tests put rings and data; queue `n`'s rings are `n` times this further.
pub const RINGS: u64 = 0x1_0000;
pub const DATA: u64 = 0x10_0000;

/// A guest's memory.
pub fn ram() -> Arc<GuestRam> {
    let pieces = [(GuestAddress(0), LOW_BYTES as usize), (GuestAddress(HIGH), HIGH_BYTES as usize)];
    Arc::new(GuestRam::from_ranges(&pieces).unwrap())
}

/// The driver's copies of the kicks, by queue, and whether the loop's still live.
pub type Kicks = Arc<Mutex<BTreeMap<usize, (EventFd, Weak<()>)>>>;

/// What the loop owns in the place of an ioeventfd.
struct Kick {
    fd: EventFd,
    life: Arc<()>,
}

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// One device, seen from inside the guest, and the loop that it lives in.
pub struct Guest {
    pub ram: Arc<GuestRam>,
    pub bus: Bus,
    pub event_loop: EventLoop,
    pub page: Arc<Page>,
    pub worker: Sender<Command>,
    /// CLOCK_MONOTONIC of the loop, in nanoseconds.
    pub clock: Arc<AtomicU64>,
    line: EventFd,
    kicks: Kicks,
}

impl Guest {
    pub fn new(device: impl Device, ram: Arc<GuestRam>) -> Guest {
        let kicks = Kicks::default();
        let made = kicks.clone();
        let make_kick = move |queue: u32| {
            let kick = Kick { fd: EventFd::new(EFD_NONBLOCK).unwrap(), life: Arc::new(()) };
            let copy = (kick.fd.try_clone().unwrap(), Arc::downgrade(&kick.life));
            made.lock().unwrap().insert(queue as usize, copy);
            Ok(Box::new(kick) as Signal)
        };
        Guest::with_kicks(device, ram, Box::new(make_kick), kicks)
    }

    /// A guest whose kicks are made by `make_kick`.
    pub fn with_kicks(device: impl Device, ram: Arc<GuestRam>, make_kick: KickMaker, kicks: Kicks) -> Guest {
        let page = Arc::new(Page::default());
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = || Interrupt::new(page.clone(), line.try_clone().unwrap());
        let (sender, receiver) = channel();
        let front = Front::new(&device, page.clone(), interrupt(), sender.clone(), ram.clone(), make_kick);
        let worker = Worker::new(Box::new(device), page.clone(), interrupt(), receiver);
        let bus = Bus::new(vec![Range { base: MMIO, len: 0x200, slot: Arc::new(Mutex::new(front)) }]).unwrap();
        let clock = Arc::new(AtomicU64::new(1));
        let mut event_loop = EventLoop::stepped(clock.clone()).unwrap();
        event_loop.add(Box::new(worker)).unwrap();
        Guest { ram, bus, event_loop, page, worker: sender, clock, line, kicks }
    }

    pub fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.bus.read(MMIO + register, &mut word);
        u32::from_le_bytes(word)
    }

    pub fn write(&self, register: u64, value: u32) {
        self.bus.write(MMIO + register, &value.to_le_bytes());
    }

    pub fn read_bytes(&self, register: u64, bytes: &mut [u8]) {
        self.bus.read(MMIO + register, bytes);
    }

    pub fn write_bytes(&self, register: u64, bytes: &[u8]) {
        self.bus.write(MMIO + register, bytes);
    }

    pub fn status(&self) -> u32 {
        self.read(reg::STATUS)
    }

    pub fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    pub fn offered(&self) -> u64 {
        let half = |sel| {
            self.write(reg::DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(reg::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for (sel, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(reg::DRIVER_FEATURES_SEL, sel);
            self.write(reg::DRIVER_FEATURES, half);
        }
    }

    /// The ladder up to FEATURES_OK, the way that Linux climbs it.
    pub fn negotiate(&self, features: u64) {
        self.write(reg::STATUS, self.status() | ACKNOWLEDGE);
        self.write(reg::STATUS, self.status() | DRIVER);
        self.accept(features);
        self.write(reg::STATUS, self.status() | FEATURES_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Configures a queue at its usual place.
    pub fn set_up(&self, queue: u32, size: u16, event_idx: bool) -> Vring {
        let base = RINGS + 0x1_0000 * u64::from(queue);
        let vring = Vring::new(self.ram.clone(), base, size, event_idx);
        self.configure(queue, &vring);
        vring
    }

    pub fn configure(&self, queue: u32, vring: &Vring) {
        self.write(reg::QUEUE_SEL, queue);
        self.write(reg::QUEUE_NUM, vring.size.into());
        self.write_address(reg::QUEUE_DESC, vring.descriptors);
        self.write_address(reg::QUEUE_DRIVER, vring.available);
        self.write_address(reg::QUEUE_DEVICE, vring.used);
        self.write(reg::QUEUE_READY, 1);
    }

    /// The last rung.
    pub fn driver_ok(&self) {
        self.write(reg::STATUS, self.status() | DRIVER_OK);
    }

    /// A live device with one queue.
    pub fn start(&mut self, features: u64, size: u16) -> Vring {
        self.negotiate(features | VERSION_1);
        let vring = self.set_up(0, size, features & EVENT_IDX != 0);
        self.driver_ok();
        self.turn();
        vring
    }

    pub fn kick(&self, queue: usize) {
        self.kicks.lock().unwrap()[&queue].0.write(1).unwrap();
    }

    /// Whether KVM would still know the kick that was made last for `queue` (invariant I5).
    pub fn has_kick(&self, queue: usize) -> bool {
        self.kicks.lock().unwrap()[&queue].1.upgrade().is_some()
    }

    /// Turns the loop until nothing is ready.
    pub fn turn(&mut self) {
        while self.event_loop.turn(Wait::Poll).unwrap() > 0 {}
    }

    /// Kicks, and turns the loop until nothing is ready.
    pub fn run(&mut self, queue: usize) {
        self.kick(queue);
        self.turn();
    }

    /// How often the interrupt was raised since the last call.
    pub fn interrupts(&self) -> u64 {
        self.line.read().unwrap_or(0)
    }

    /// Writes 0 to the status on a vCPU's thread while this one turns the loop, and returns when the vCPU goes on.
    pub fn reset(&mut self) {
        self.reset_while(|| ());
    }

    /// The same, with something done at each turn.
    pub fn reset_while(&mut self, mut each_turn: impl FnMut()) {
        let bus = self.bus.clone();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(move || bus.write(MMIO + reg::STATUS, &[0; 4]));
            while !vcpu.is_finished() {
                self.turn();
                each_turn();
            }
            vcpu.join().unwrap();
        });
    }

    /// Sends the command that `make` puts the slip in. The flag that comes back says how often the slip was ended.
    pub fn command(&self, make: impl FnOnce(Done<()>) -> Command) -> Arc<AtomicU64> {
        let ended = Arc::new(AtomicU64::new(0));
        let count = ended.clone();
        let done = Done::posted(move |end| {
            assert!(end.is_ok());
            count.fetch_add(1, SeqCst);
        });
        assert!(self.worker.send(make(done)).is_ok());
        ended
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// A kick maker that the host refuses descriptors.
pub fn no_kicks() -> KickMaker {
    Box::new(|_| Err(crate::error::Error::host("no descriptor left")))
}
