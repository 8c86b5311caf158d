//! `idle`: the processor halts and does nothing at all, until serial input wakes it, or for `ms=T`.

use crate::clock;
use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::serial;
use crate::text::Outcome;
use crate::words::Words;

/// The interrupt line of the first serial port.
const SERIAL_LINE: u32 = 4;

pub fn run(words: Words) -> Outcome {
    if words.is("wake", "never") {
        say!("idle: begin");
        cpu::halt();
    }
    interrupt::start();
    interrupt::route(SERIAL_LINE, Trigger::Edge, None);
    serial::enable_interrupt();
    let begin = clock::now();
    let until = words.get("ms").map(|_| begin + words.number("ms", 0) * 1_000_000);
    say!("idle: begin");
    let mut wakes = 0u64;
    while serial::input().is_none() {
        if let Some(until) = until {
            match until.checked_sub(clock::now()) {
                Some(left) if left > 0 => interrupt::start_timer(left),
                _ => break,
            }
        }
        cpu::wait_for_interrupt();
        wakes += 1;
    }
    say!("idle: end wakes={wakes} ns={}", clock::now() - begin);
    Ok(())
}
