//! `spin ms=T`: keeps its processors busy in ring 3 and off the bus, until the time is over or a `q` arrives.

use crate::clock;
use crate::modes::smp;
use crate::serial;
use crate::text::Outcome;
use crate::words::Words;

/// Between two looks at the serial port, which cost an exit each.
const LOOK_NS: u64 = 10_000_000;

pub fn run(words: Words) -> Outcome {
    let cpus = words.number("cpus", 1);
    let until = words.get("ms").map(|_| clock::now() + words.number("ms", 0) * 1_000_000);
    smp::start(cpus, smp::Then::Spin)?;
    say!("spin: begin cpus={cpus}");
    let begin = clock::now();
    while until.is_none_or(|until| clock::now() < until) && serial::input() != Some(b'q') {
        clock::spin_ns(LOOK_NS);
    }
    say!("spin: ns={}", clock::now() - begin);
    Ok(())
}
