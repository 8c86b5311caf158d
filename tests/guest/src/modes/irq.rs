//! `irq`: requests with interrupts, one at a time, through the I/O APIC; says how many interrupts arrived.

use crate::clock::{self, Patience};
use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::memory::{self, Dma};
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk, Layout, REQUEST_NS, S_OK, T_IN};
use crate::virtio::ring::{Desc, WRITE};
use crate::words::Words;

pub fn run(words: Words) -> Outcome {
    let trigger = if words.is("trigger", "level") { Trigger::Level } else { Trigger::Edge };
    interrupt::start();
    for (number, device) in blk::chosen(words) {
        let mut disk = Disk::start(number, device, blk::KNOWN, 256)?;
        interrupt::route(device.irq, trigger, Some(device.registers));
        requests(&mut disk, words.number("count", 10))?;
    }
    Ok(())
}

/// Sends each request and waits for its interrupt: in ring 3 with interrupts let in, and every other one halted.
fn requests(disk: &mut Disk, count: u64) -> Outcome {
    let (number, irq) = (disk.number, disk.device.irq);
    let data = memory::take(512);
    let first = interrupt::count(irq);
    let begin = clock::now();
    for request in 0..count {
        let before = interrupt::count(irq);
        disk.ring.ask_interrupt(true);
        if request % 2 == 0 {
            cpu::let_interrupts_in(true);
            let status = disk.run(T_IN, 0, &[data], Layout::Direct)?.0;
            if status != S_OK {
                fail!("disk {number}: status {status}");
            }
            let mut patience = Patience::new(REQUEST_NS);
            while interrupt::count(irq) == before {
                if patience.is_over() {
                    fail!("disk {number}: request {request} is used, but no interrupt on line {irq} comes");
                }
            }
            cpu::let_interrupts_in(false);
        } else {
            halted_request(disk, data, before)?;
        }
    }
    let (interrupts, ns) = (interrupt::count(irq) - first, clock::now() - begin);
    say!("irq: disk={number} irq={irq} requests={count} interrupts={interrupts} ns={ns}");
    Ok(())
}

/// One request after which the processor halts until the interrupt; a timer bounds the wait.
fn halted_request(disk: &mut Disk, data: Dma, before: u32) -> Outcome {
    let (number, irq) = (disk.number, disk.device.irq);
    disk.header(T_IN, 0);
    let read = Desc { address: data.at(0), len: 512, flags: WRITE, next: 0 };
    let chain = [disk.header_desc(), read, disk.status_desc()];
    disk.offer(&chain, Layout::Direct);
    disk.kick();
    let late = interrupt::count(interrupt::TIMER_LINE);
    interrupt::start_timer(2_000_000_000);
    while interrupt::count(irq) == before {
        if interrupt::count(interrupt::TIMER_LINE) != late {
            fail!("disk {number}: no interrupt on line {irq} wakes the halted processor");
        }
        cpu::wait_for_interrupt();
    }
    interrupt::start_timer(0);
    match disk.wait(REQUEST_NS) {
        Some(_) if disk.status_byte() == S_OK => Ok(()),
        _ => fail!("disk {number}: an interrupt came without a completed request"),
    }
}
