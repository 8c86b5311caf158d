//! `net-echo`: a host that answers ARP and ICMP echo requests, until a `q` or for `ms=`. `net-send`: frames as fast as they
//! go. `net-sink`: counts what comes.

use crate::clock;
use crate::cpu;
use crate::memory::{self, Dma};
use crate::serial;
use crate::text::Outcome;
use crate::virtio::mmio::F_EVENT_IDX;
use crate::virtio::net::{F_GUEST_CSUM, F_GUEST_TSO4, F_MRG_RXBUF, HEADER, KNOWN, MOST, Nic};
use crate::words::Words;

const ETHERNET: u64 = 14;
const TYPE_ARP: u16 = 0x0806;
const TYPE_IPV4: u16 = 0x0800;
const PROTOCOL_ICMP: u8 = 1;

/// A big-endian word of 16 bits.
fn be16(data: &Dma, at: u64) -> u16 {
    data.read16(at).swap_bytes()
}

/// The NIC that the words ask for, and whether its link is up, as is told.
fn start(words: Words) -> Outcome<(Nic, bool)> {
    let mut wanted = KNOWN;
    if words.is("mrg", "off") {
        // Without it a buffer takes a whole packet, and none may be larger than the MTU.
        wanted &= !(F_MRG_RXBUF | F_GUEST_TSO4);
    }
    if words.is("tso", "off") {
        wanted &= !(F_GUEST_TSO4 | F_GUEST_CSUM);
    }
    if words.is("notify", "flags") {
        wanted &= !F_EVENT_IDX;
    }
    let number = words.number("nic", 0) as usize;
    let nic = Nic::start(words, number, wanted, words.number("buffer", 2048), words.number("buffers", 256))?;
    let ([a, b, c, d, e, f], link) = (nic.mac, nic.link());
    say!(
        "net: begin mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} mtu={} link={} features={:#x}",
        nic.mtu(),
        u8::from(link),
        nic.features
    );
    Ok((nic, link))
}

/// An address such as 10.0.0.2, as it stands in memory.
fn address(words: Words, key: &str) -> Outcome<u32> {
    let text = words.get(key).unwrap_or("10.0.0.2");
    let mut bytes = [0u8; 4];
    let mut parts = text.split('.');
    for byte in &mut bytes {
        match parts.next().and_then(|part| part.parse().ok()) {
            Some(value) => *byte = value,
            None => fail!("{key}={text} is no address"),
        }
    }
    Ok(u32::from_le_bytes(bytes))
}

/// How long a mode lasts.
struct Until(Option<u64>);

impl Until {
    fn read(words: Words) -> Until {
        Until(words.get("ms").map(|_| cpu::ticks() + clock::to_ticks(words.number("ms", 0) * 1_000_000)))
    }

    fn is_over(&self) -> bool {
        self.0.is_some_and(|end| cpu::ticks() >= end)
    }
}

pub fn echo(words: Words) -> Outcome {
    let ip = address(words, "ip")?;
    let (mut nic, mut link) = start(words)?;
    let in_two = words.is("tx", "two");
    let scratch = memory::take(MOST);
    let until = Until::read(words);
    let (mut received, mut answered, mut others, mut most, mut turns) = (0u64, 0u64, 0u64, 0u16, 0u32);
    loop {
        turns = turns.wrapping_add(1);
        // Serial input and the link are an exit each.
        if turns % (1 << 17) == 0 {
            if serial::input() == Some(b'q') || until.is_over() {
                break;
            }
            if nic.link() != link {
                link = !link;
                say!("net: link={}", u8::from(link));
            }
        }
        nic.collect()?;
        // As many as there are places for answers, then they go together.
        let mut batch = 0;
        while batch < 32 && nic.under_way() < 64 {
            let Some(frame) = nic.receive(&scratch)? else { break };
            batch += 1;
            received += 1;
            most = most.max(frame.buffers);
            if answer(&frame.data, frame.len, ip, nic.mac) {
                let Some((slot, place)) = nic.slot() else { fail!("no slot") };
                place.copy(HEADER, &frame.data, 0, frame.len);
                if in_two {
                    nic.offer_in_two(slot, frame.len)
                } else {
                    nic.offer(slot, frame.len)
                }
                answered += 1;
            } else {
                others += 1;
            }
        }
        if batch > 0 {
            nic.refill();
            nic.push();
        } else {
            core::hint::spin_loop();
        }
    }
    say!("net: received={received} answered={answered} others={others} most_buffers={most} kicks={}", nic.kicks);
    Ok(())
}

/// The frame that `send` sends: TCP over IPv4 to nobody, whose checksum and segments of `gso` bytes are left to others.
fn write_frame(place: &Dma, len: u64, mac: [u8; 6], gso: u64) {
    if gso > 0 {
        // NEEDS_CSUM, TCPV4; the headers' length; where the checksum begins and where it goes.
        place.write16(0, 1 | 1 << 8);
        place.write16(2, 54);
        place.write16(4, gso as u16);
        place.write16(6, 34);
        place.write16(8, 16);
    }
    let frame = place.piece(HEADER, len);
    for (at, byte) in (0..).zip([0x52, 0x54, 0, 0xff, 0xff, 0xff].into_iter().chain(mac)) {
        frame.write8(at, byte);
    }
    frame.write16(12, TYPE_IPV4.swap_bytes());
    if len >= ETHERNET + 40 {
        frame.write16(14, 0x45);
        frame.write16(16, ((len - ETHERNET) as u16).swap_bytes());
        frame.write8(22, 64);
        frame.write8(23, 6);
        frame.write8(46, 5 << 4);
    }
}

/// Sends frames of `size=` bytes, `depth=` under way at once, for `ms=`; `gso=N` leaves the cutting to the host.
pub fn send(words: Words) -> Outcome {
    let (mut nic, _) = start(words)?;
    let (size, depth, gso) = (words.number("size", 64), words.number("depth", 64) as usize, words.number("gso", 0));
    let begin = cpu::ticks();
    let end = begin + clock::to_ticks(words.number("ms", 1000) * 1_000_000);
    let mut sent = 0u64;
    while cpu::ticks() < end || nic.under_way() > 0 {
        nic.collect()?;
        while cpu::ticks() < end && nic.under_way() < depth {
            let Some((slot, place)) = nic.slot() else { break };
            write_frame(&place, size, nic.mac, gso);
            nic.offer(slot, size);
            sent += 1;
        }
        nic.push();
        core::hint::spin_loop();
    }
    let ns = clock::ns(cpu::ticks() - begin).max(1);
    say!("net: sent={sent} bytes={} ns={ns} kicks={}", sent * size, nic.kicks);
    Ok(())
}

/// Counts what comes for `ms=`, from the first frame on.
pub fn sink(words: Words) -> Outcome {
    let (mut nic, _) = start(words)?;
    let length = clock::to_ticks(words.number("ms", 1000) * 1_000_000);
    let (mut begin, mut frames, mut bytes) = (0, 0u64, 0u64);
    while begin == 0 || cpu::ticks() - begin < length {
        let mut batch = 0;
        while batch < 32 {
            let Some(len) = nic.drop_one()? else { break };
            batch += 1;
            bytes += len;
        }
        if batch > 0 {
            if begin == 0 {
                begin = cpu::ticks();
            }
            frames += batch;
            nic.refill();
        } else {
            core::hint::spin_loop();
        }
    }
    let ns = clock::ns(cpu::ticks() - begin).max(1);
    say!("net: sunk={frames} bytes={bytes} ns={ns} kicks={}", nic.kicks);
    Ok(())
}

/// Gives `buffers=` buffers and takes none back, until a `b`, which gives as many again, or a `q`.
pub fn deaf(words: Words) -> Outcome {
    let (mut nic, _) = start(words)?;
    loop {
        match serial::input() {
            Some(b'q') => return Ok(()),
            Some(b'b') => {
                let mut count = 0;
                while nic.drop_one()?.is_some() {
                    count += 1;
                }
                nic.refill();
                say!("net: more {count}");
            }
            _ => clock::spin_ns(5_000_000),
        }
    }
}

/// Turns a request to us into its answer, in place. False for anything else.
fn answer(frame: &Dma, len: u64, ip: u32, mac: [u8; 6]) -> bool {
    if len < ETHERNET + 20 {
        return false;
    }
    let turn = || {
        frame.copy(0, frame, 6, 6);
        (6..).zip(mac).for_each(|(at, byte)| frame.write8(at, byte));
    };
    match be16(frame, 12) {
        TYPE_ARP if len >= ETHERNET + 28 && be16(frame, 20) == 1 && frame.read32(38) == ip => {
            turn();
            frame.write16(20, 2u16.swap_bytes());
            // The asker's address and number to where the target's are, ours to the sender's.
            frame.copy(32, frame, 22, 10);
            (22..).zip(mac).for_each(|(at, byte)| frame.write8(at, byte));
            frame.write32(28, ip);
            true
        }
        TYPE_IPV4 if frame.read8(14) == 0x45 && frame.read8(23) == PROTOCOL_ICMP && frame.read32(30) == ip => {
            if frame.read8(34) != 8 {
                return false;
            }
            turn();
            frame.write32(30, frame.read32(26));
            frame.write32(26, ip);
            // Type 8 becomes 0, and the sum of the message grows by as much as that falls (RFC 1624).
            frame.write8(34, 0);
            let sum = u32::from(be16(frame, 36)) + 0x0800;
            frame.write16(36, ((sum & 0xffff) as u16 + (sum >> 16) as u16).swap_bytes());
            true
        }
        _ => false,
    }
}
