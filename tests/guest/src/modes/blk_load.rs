//! `blk-load`: random requests with a fixed number in flight, completions polled; measures the monitor, so it is lean.

use crate::clock;
use crate::cpu;
use crate::histogram::Histogram;
use crate::memory;
use crate::modes::random::Random;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, F_RO, S_OK, SECTOR, T_IN, T_OUT};
use crate::virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::virtio::pool::Pool;
use crate::words::Words;
use core::fmt;

/// Most disks under load at once: as many as a machine has slots.
const MOST_DISKS: usize = 11;
/// Most windows of time counted by themselves.
const WINDOWS: usize = 3600;
/// Times of completions in one line.
const TIMES_A_LINE: usize = 16;
/// Without any completion for this long, of time the processor ran, the load has failed.
const SILENCE_NS: u64 = 30_000_000_000;

/// Which requests are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
    Mixed,
}

/// What the words ask for.
struct Plan {
    name: &'static str,
    operation: Operation,
    depth: u64,
    size: u64,
    region: u64,
    kick_each: bool,
    interrupts: bool,
    indirect: bool,
    features: u64,
    queue: u32,
    ns: Option<u64>,
    count: Option<u64>,
    windows: bool,
    window_ticks: u64,
    times: u64,
    drain: bool,
    look_ticks: u64,
}

impl Plan {
    fn read(words: Words) -> Outcome<Plan> {
        let name = words.get("op").unwrap_or("read");
        let operation = match name {
            "read" => Operation::Read,
            "write" => Operation::Write,
            "mixed" => Operation::Mixed,
            _ => fail!("op={name} is not read, write or mixed"),
        };
        let size = words.number("bs", 4096);
        if size == 0 || !size.is_multiple_of(SECTOR) {
            fail!("bs={size} is not a multiple of {SECTOR}");
        }
        let indirect = words.is("indirect", "on");
        let mut features = blk::KNOWN;
        if words.is("notify", "flags") {
            features &= !F_EVENT_IDX;
        }
        if !indirect {
            features &= !F_INDIRECT_DESC;
        }
        let count = words.get("count").map(|_| words.number("count", 0));
        let ns = match (words.get("ms"), count) {
            (None, Some(_)) => None,
            _ => Some(words.number("ms", 3000) * 1_000_000),
        };
        Ok(Plan {
            name,
            operation,
            depth: words.number("depth", 32),
            size,
            region: words.number("region", u64::MAX),
            kick_each: words.is("kick", "each"),
            interrupts: !words.is("irq", "off"),
            indirect,
            features,
            queue: words.number("queue", 1024) as u32,
            ns,
            count,
            windows: words.is("windows", "1"),
            window_ticks: clock::to_ticks(words.number("window_ms", 1000).max(1) * 1_000_000),
            times: words.number("times", 0),
            drain: !words.is("drain", "off"),
            look_ticks: clock::to_ticks(words.number("look_us", 0) * 1000),
        })
    }
}

/// One disk under load, and what it has done. Times are in ticks.
struct Lane {
    pool: Pool,
    random: Random,
    blocks: u64,
    sent_at: &'static mut [u64],
    histogram: Histogram,
    windows: &'static mut [u32],
    /// When the first completions were seen.
    times: &'static mut [u64],
    in_flight: u64,
    sent: u64,
    done: u64,
    errors: u64,
    kicks: u64,
    last: u64,
    longest_gap: u64,
}

impl Lane {
    fn new(disk: Disk, plan: &Plan) -> Outcome<Lane> {
        let number = disk.number;
        if plan.operation != Operation::Read && disk.has(F_RO) {
            fail!("disk {number} is read-only");
        }
        if plan.indirect && !disk.has(F_INDIRECT_DESC) {
            fail!("disk {number} does not offer indirect descriptors");
        }
        let blocks = (disk.capacity_sectors * SECTOR).min(plan.region) / plan.size;
        if blocks == 0 {
            fail!("disk {number} has no room for a block of {} bytes", plan.size);
        }
        let mut pool = Pool::new(disk, plan.depth, plan.size, plan.indirect)?;
        pool.disk.ring.ask_interrupt(plan.interrupts);
        Ok(Lane {
            pool,
            random: Random::new(number + 1),
            blocks,
            sent_at: memory::table(plan.depth as usize, 0),
            histogram: Histogram::new(),
            windows: memory::table(if plan.windows { WINDOWS } else { 0 }, 0),
            times: memory::table(plan.times as usize, 0),
            in_flight: 0,
            sent: 0,
            done: 0,
            errors: 0,
            kicks: 0,
            last: 0,
            longest_gap: 0,
        })
    }

    /// Offers one more request on an idle slot.
    #[inline]
    fn send(&mut self, slot: u16, now: u64, plan: &Plan) {
        let kind = match plan.operation {
            Operation::Read => T_IN,
            Operation::Write => T_OUT,
            Operation::Mixed => [T_IN, T_OUT][self.random.below(2) as usize],
        };
        let sector = self.random.below(self.blocks) * (plan.size / SECTOR);
        self.pool.offer(slot, kind, sector);
        self.sent_at[usize::from(slot)] = now;
        self.sent += 1;
        self.in_flight += 1;
        if plan.kick_each {
            self.kick();
        }
    }

    #[inline]
    fn kick(&mut self) {
        if self.pool.disk.ring.publish() {
            self.pool.disk.device.notify(0);
            self.kicks += 1;
        }
    }

    /// Takes what is complete, sends as many again if the load goes on, and tells the device once.
    #[inline]
    fn turn(&mut self, waiting: u16, begin: u64, goes_on: bool, plan: &Plan) -> Outcome {
        let now = cpu::ticks();
        self.longest_gap = self.longest_gap.max(now - self.last);
        self.last = now;
        for _ in 0..waiting {
            if let Some(time) = self.times.get_mut(self.done as usize) {
                *time = now;
            }
            let (slot, status) = self.pool.take()?;
            self.errors += u64::from(status != S_OK);
            self.histogram.add(clock::ns(now - self.sent_at[usize::from(slot)]));
            self.in_flight -= 1;
            self.done += 1;
            if goes_on && plan.count.is_none_or(|count| self.sent < count) {
                self.send(slot, now, plan);
            }
        }
        if !self.windows.is_empty() {
            let number = ((now - begin) / plan.window_ticks) as usize;
            if let Some(window) = self.windows.get_mut(number) {
                *window += u32::from(waiting);
            }
        }
        if plan.interrupts {
            self.pool.disk.ring.ask_interrupt(true);
        }
        self.kick();
        Ok(())
    }

    fn print(&self, begin: u64, plan: &Plan) {
        let disk = self.pool.disk.number;
        let ns = clock::ns(self.last - begin).max(1);
        let iops = (u128::from(self.done) * 1_000_000_000 / u128::from(ns)) as u64;
        let h = &self.histogram;
        say!(
            "load: disk={disk} op={} depth={} requests={} ns={ns} iops={iops} p50_ns={} p99_ns={} max_ns={} kicks={} \
             errors={} longest_gap_ns={} in_flight={}",
            plan.name,
            plan.depth,
            self.done,
            h.percentile(500),
            h.percentile(990),
            h.max(),
            self.kicks,
            self.errors,
            clock::ns(self.longest_gap),
            self.in_flight
        );
        let windows = (self.last - begin) / plan.window_ticks + 1;
        // A window of another length goes by its number.
        let unit = if plan.window_ticks == clock::to_ticks(1_000_000_000) { "second" } else { "window" };
        for (number, requests) in self.windows.iter().take(windows as usize).enumerate() {
            say!("window: disk={disk} {unit}={number} requests={requests}");
        }
        let seen = (self.done as usize).min(self.times.len());
        for (line, times) in self.times[..seen].chunks(TIMES_A_LINE).enumerate() {
            say!("times: disk={disk} from={} us={}", line * TIMES_A_LINE, Times(times, begin));
        }
    }
}

/// Times since the beginning in microseconds, with commas.
struct Times<'a>(&'a [u64], u64);

impl fmt::Display for Times<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, time) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}", clock::ns(time - self.1) / 1000)?;
        }
        Ok(())
    }
}

pub fn run(words: Words) -> Outcome {
    let plan = Plan::read(words)?;
    let mut lanes: [Option<Lane>; MOST_DISKS] = [const { None }; MOST_DISKS];
    let mut count = 0;
    for ((number, device), lane) in blk::chosen(words).zip(&mut lanes) {
        *lane = Some(Lane::new(Disk::start(number, device, plan.features, plan.queue)?, &plan)?);
        count += 1;
    }
    if count == 0 {
        fail!("no such disk");
    }
    say!("load: begin disks={count}");
    let begin = load(&mut lanes, &plan)?;
    lanes.iter().flatten().for_each(|lane| lane.print(begin, &plan));
    match lanes.iter().flatten().map(|lane| lane.errors).sum() {
        0 => Ok(()),
        errors => fail!("{errors} requests ended with an error"),
    }
}

/// Keeps all lanes busy until the time is over or the count is reached, and unless told otherwise until the last request
/// is back; returns when it began, in ticks.
fn load(lanes: &mut [Option<Lane>], plan: &Plan) -> Outcome<u64> {
    let begin = cpu::ticks();
    let end = plan.ns.map_or(u64::MAX, |ns| begin + clock::to_ticks(ns));
    let silence = clock::to_ticks(SILENCE_NS);
    let mut look = begin;
    for lane in lanes.iter_mut().flatten() {
        lane.last = begin;
        for slot in 0..lane.pool.depth() {
            if plan.count.is_none_or(|count| lane.sent < count) {
                lane.send(slot, cpu::ticks(), plan);
            }
        }
        lane.kick();
    }
    loop {
        if plan.look_ticks != 0 {
            // Looks that were missed are not made up for.
            look = cpu::ticks().max(look + plan.look_ticks);
            while cpu::ticks() < look {
                core::hint::spin_loop();
            }
        }
        let goes_on = cpu::ticks() < end;
        let mut in_flight = 0;
        for lane in lanes.iter_mut().flatten() {
            let waiting = lane.pool.disk.ring.used_waiting();
            if waiting != 0 {
                lane.turn(waiting, begin, goes_on, plan)?;
            } else if lane.in_flight != 0 && cpu::ticks() - lane.last > silence {
                fail!("disk {}: {} requests in flight and no completion", lane.pool.disk.number, lane.in_flight);
            }
            in_flight += lane.in_flight;
        }
        if in_flight == 0 || !goes_on && !plan.drain {
            for lane in lanes.iter_mut().flatten().filter(|lane| lane.in_flight != 0) {
                lane.longest_gap = lane.longest_gap.max(cpu::ticks() - lane.last);
            }
            return Ok(begin);
        }
        core::hint::spin_loop();
    }
}
