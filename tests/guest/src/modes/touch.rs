//! `touch mb=N`: writes one word to each page of N MiB, then idles, so that the host can weigh the machine.

use crate::memory;
use crate::modes::idle;
use crate::text::Outcome;
use crate::words::Words;

pub fn run(words: Words) -> Outcome {
    let mb = words.number("mb", 1);
    let piece = memory::take_as_is(mb << 20);
    for page in 0..mb << 8 {
        piece.write64(page << 12, page);
    }
    say!("touch: mb={mb} pages={}", mb << 8);
    idle::run(words)
}
