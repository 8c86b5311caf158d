//! Prints the frequency of this processor's time stamp counter in kHz, measured against the monotonic clock for 100 ms.
//! tools/linux-image compiles it; tools/nested-host passes the result to the emulated machine, which has the same counter.

use std::arch::x86_64::_rdtsc;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The time and the counter, read as close together as a busy machine allows.
fn read() -> (Instant, u64) {
    let once = |_| {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has the instruction.
        let counter = unsafe { _rdtsc() };
        (before.elapsed(), before, counter)
    };
    let (_, time, counter) = (0..100).map(once).min().expect("a hundred readings");
    (time, counter)
}

fn main() {
    let (time, counter) = read();
    sleep(Duration::from_millis(100));
    let (later, counted) = read();
    println!("{}", u128::from(counted - counter) * 1_000_000 / (later - time).as_nanos());
}
