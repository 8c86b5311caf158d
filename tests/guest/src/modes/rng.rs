//! `rng`: random bytes through virtio-rng: that they are there, differ, and come no faster than `rate=` allows.
//!
//! `depth=` buffers of `bytes=` are always with the device, `count=` of them in all. A buffer that comes back must hold as
//! many new bytes as the device says, none more, and not those of any before it. `over` is by how many bytes the sum was
//! ever ahead of the rate since the first buffer was sent.

use crate::clock::{self, Patience};
use crate::memory;
use crate::text::Outcome;
use crate::virtio::mmio::{Device, F_VERSION_1};
use crate::virtio::ring::{Desc, Ring, WRITE};
use crate::words::Words;

const DEVICE_ID: u32 = 4;
/// What a buffer holds before the device has written it.
const UNTOUCHED: u8 = 0;
/// Without a completion for this long, of time the processor ran, the device has failed.
const SILENCE_NS: u64 = 30_000_000_000;

pub fn run(words: Words) -> Outcome {
    let Some(device) = Device::all(words).find(|device| device.id == DEVICE_ID) else { fail!("no rng") };
    device.negotiate(device.offered() & F_VERSION_1)?;
    let mut ring = Ring::new(device.queue_max(0).min(64) as u16, false);
    let depth = words.number("depth", 1).min(ring.size().into()) as u16;
    let bytes = words.number("bytes", 64);
    let count = words.number("count", 100);
    let rate = words.number("rate", 0);
    let buffers = memory::take(u64::from(depth) * bytes.next_multiple_of(8));
    let buffer = |head: u16| buffers.piece(u64::from(head) * bytes.next_multiple_of(8), bytes);
    let seen = memory::table(count as usize, 0u64);
    device.set_queue(0, &ring);
    device.go();
    ring.ask_interrupt(false);
    let mut sent = 0;
    for head in 0..depth.min(count as u16) {
        Desc { address: buffer(head).at(0), len: bytes as u32, flags: WRITE, next: 0 }.write(&ring.table(), head);
        ring.offer(head);
        sent += 1;
    }
    let began = clock::now();
    if ring.publish() {
        device.notify(0);
    }
    let (mut done, mut total, mut over) = (0, 0u64, 0i64);
    let (mut shortest, mut longest) = (u64::MAX, 0);
    let mut patience = Patience::new(SILENCE_NS);
    while done < count {
        if ring.used_waiting() == 0 {
            if patience.is_over() {
                fail!("no completion after {done}");
            }
            core::hint::spin_loop();
            continue;
        }
        patience = Patience::new(SILENCE_NS);
        let used = ring.take_used();
        let (head, len) = (used.head as u16, u64::from(used.len));
        total += len;
        (shortest, longest) = (shortest.min(len), longest.max(len));
        if rate > 0 {
            let allowed = u128::from(clock::now() - began) * u128::from(rate) / 1_000_000_000;
            over = over.max(total as i64 - allowed as i64);
        }
        if len > bytes {
            fail!("{len} bytes in a buffer of {bytes}");
        }
        // Two alike of eight bytes and more are a fault; of fewer they are chance.
        if len >= 8 {
            let digest = buffer(head).piece(0, len / 8 * 8).digest();
            if seen[..done as usize].contains(&digest) {
                fail!("the same {len} bytes twice");
            }
            seen[done as usize] = digest;
        }
        if len < bytes && buffer(head).read8(len) != UNTOUCHED {
            fail!("a byte was written behind the {len} of an answer");
        }
        done += 1;
        if sent < count {
            sent += 1;
            buffer(head).fill(UNTOUCHED);
            ring.offer(head);
            if ring.publish() {
                device.notify(0);
            }
        }
    }
    let ns = clock::now() - began;
    say!("rng: done={done} bytes={total} shortest={shortest} longest={longest} over={over} ns={ns}");
    Ok(())
}
