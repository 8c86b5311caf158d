//! `power`: waits for the power button (an edge on line 16 of the I/O APIC), `count` times, and says so each time.
//! `crash`: says to pvpanic that a crash kernel takes over, which is not true, and goes on.

use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::text::Outcome;
use crate::words::Words;

const BUTTON_LINE: u32 = 16;
/// The port of pvpanic, and what is written there.
pub const PVPANIC: u16 = 0x505;
pub const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

pub fn run(words: Words) -> Outcome {
    interrupt::start();
    interrupt::route(BUTTON_LINE, Trigger::Edge, None);
    say!("power: begin");
    for press in 1..=words.number("count", 1) as u32 {
        while interrupt::count(BUTTON_LINE) < press {
            cpu::wait_for_interrupt();
        }
        say!("power: pressed {press}");
    }
    Ok(())
}

pub fn crash(words: Words) -> Outcome {
    let events = cpu::in8(PVPANIC);
    for _ in 0..words.number("count", 1) {
        cpu::out8(PVPANIC, CRASH_LOADED);
    }
    say!("crash: events={events}");
    Ok(())
}
