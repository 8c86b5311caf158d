//! `vsock`: streams between guest and host. It listens on `port=` and sends back what comes, however many connect; with
//! `connect=PORT` it opens `count=` connections to the host, sends `bytes=` through each, and finds the same come back.
//!
//! Typed on the serial port: `q` ends it, `c` connects (once more), `r` resets the device, `p` has it read nothing and `g` go on.
//! `hostile=on` begins with what no driver may do.

use crate::clock::Patience;
use crate::cpu;
use crate::interrupt::{self, Trigger};
use crate::memory::{self, Dma};
use crate::modes::random::Random;
use crate::serial;
use crate::text::Outcome;
use crate::virtio::vsock::{
    CREDIT_REQUEST, CREDIT_UPDATE, DATA, HEADER, Header, NO_RECEIVE, NO_SEND, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
    STREAM, Vsock,
};
use crate::words::Words;

const MAX: usize = 128;
/// Bytes of the host's that we keep for a connection.
const ROOM: u32 = 16 << 10;
const SILENCE_NS: u64 = 30_000_000_000;
/// How long streams may take to end when all is over, in time the processor ran.
const LEAVE_NS: u64 = 3_000_000_000;
const NAP_NS: u64 = 20_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// We have asked.
    Asked,
    Open,
    /// We have said that we will neither send nor receive.
    Leaving,
}

#[derive(Clone, Copy)]
struct Stream {
    state: State,
    host: u32,
    guest: u32,
    /// One of ours, which is to send so many bytes and see them again.
    client: bool,
    left: u64,
    awaited: u64,
    /// What was received and is not yet sent back: a ring of ROOM bytes, from `passed` to `received`.
    received: u32,
    passed: u32,
    told: u32,
    sent: u32,
    host_alloc: u32,
    host_passed: u32,
    host_shut: u32,
    said_end: bool,
}

const NOBODY: Stream = Stream {
    state: State::Free,
    host: 0,
    guest: 0,
    client: false,
    left: 0,
    awaited: 0,
    received: 0,
    passed: 0,
    told: 0,
    sent: 0,
    host_alloc: 0,
    host_passed: 0,
    host_shut: 0,
    said_end: false,
};

/// The byte at `place` of a stream that begins at `seed`.
fn pattern(seed: u32, place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9) >> 11) as u8 ^ (seed as u8).wrapping_mul(37)
}

struct Driver {
    vsock: Vsock,
    streams: [Stream; MAX],
    rooms: Dma,
    port: u32,
    next_port: u32,
    opened: u64,
    refused: u64,
    finished: u64,
    bytes: u64,
    reads: bool,
}

pub fn run(words: Words) -> Outcome {
    let vsock = Vsock::start(words)?;
    interrupt::start();
    interrupt::route(vsock.device.irq, Trigger::Edge, Some(vsock.device.registers));
    let rooms = memory::take(MAX as u64 * u64::from(ROOM));
    let port = words.number("port", 52) as u32;
    let mut driver = Driver {
        vsock,
        streams: [NOBODY; MAX],
        rooms,
        port,
        next_port: 2000,
        opened: 0,
        refused: 0,
        finished: 0,
        bytes: 0,
        reads: true,
    };
    if words.is("hostile", "on") {
        driver.misbehave()?;
    }
    say!("vsock: begin cid={} port={port}", driver.vsock.cid);
    let bytes = words.number("bytes", 1 << 20);
    let count = words.number("count", 1);
    let target = words.get("connect").map(|_| words.number("connect", 0) as u32);
    if let Some(target) = target {
        driver.connect_all(target, count, bytes)?;
    }
    loop {
        let busy = driver.step()?;
        match serial::input() {
            Some(b'q') => break,
            Some(b'c') => driver.connect_all(target.unwrap_or(53), count, bytes)?,
            Some(b'r') => {
                driver.vsock.restart()?;
                driver.streams = [NOBODY; MAX];
                say!("vsock: reset");
            }
            Some(b'p') => {
                driver.reads = false;
                say!("vsock: reads nothing");
            }
            Some(b'g') => driver.reads = true,
            _ if !busy => driver.nap(),
            _ => {}
        }
    }
    // The last answers may be on their way.
    let mut patience = Patience::new(LEAVE_NS);
    while driver.streams.iter().any(|stream| stream.state != State::Free) && !patience.is_over() {
        driver.step()?;
    }
    let open = driver.streams.iter().filter(|stream| stream.state != State::Free).count();
    say!("vsock: end opened={} refused={} bytes={} open={open}", driver.opened, driver.refused, driver.bytes);
    Ok(())
}

impl Driver {
    fn nap(&mut self) {
        self.vsock.rx.ask_interrupt(true);
        if self.vsock.rx.used_waiting() == 0 {
            interrupt::start_timer(NAP_NS);
            cpu::wait_for_interrupt();
        }
        self.vsock.rx.ask_interrupt(false);
    }

    /// Opens so many connections to the host at once, as many as there is room for, and waits for their end.
    fn connect_all(&mut self, target: u32, count: u64, bytes: u64) -> Outcome {
        let (refused, finished) = (self.refused, self.finished);
        let mut asked = 0;
        let mut patience = Patience::new(SILENCE_NS);
        while self.refused - refused + self.finished - finished < count {
            if asked < count
                && let Some(number) = self.streams.iter().position(|stream| stream.state == State::Free)
            {
                self.next_port += 1;
                let stream = Stream {
                    state: State::Asked,
                    host: target,
                    guest: self.next_port,
                    client: true,
                    left: bytes,
                    awaited: bytes,
                    ..NOBODY
                };
                self.streams[number] = stream;
                asked += 1;
                self.say(number, REQUEST, 0)?;
            }
            if self.step()? {
                patience = Patience::new(SILENCE_NS);
            } else if patience.is_over() {
                fail!("vsock: nothing more comes, {} of {count} are done", self.finished - finished);
            }
        }
        say!("vsock: connected={} refused={}", self.finished - finished, self.refused - refused);
        Ok(())
    }

    /// Whatever there is to do: whether there was anything.
    fn step(&mut self) -> Outcome<bool> {
        let mut busy = false;
        while self.reads
            && let Some((head, header)) = self.vsock.receive()?
        {
            busy = true;
            self.hear(head, &header)?;
            self.vsock.done(head);
        }
        for number in 0..MAX {
            if self.streams[number].state == State::Open {
                busy |= self.talk(number)?;
            }
        }
        Ok(busy)
    }

    fn header(&mut self, number: usize, op: u16) -> Header {
        let stream = &mut self.streams[number];
        stream.told = stream.passed;
        Header {
            src_cid: self.vsock.cid,
            dst_cid: 2,
            src_port: stream.guest,
            dst_port: stream.host,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: stream.passed,
        }
    }

    /// Sends a packet without data.
    fn say(&mut self, number: usize, op: u16, flags: u32) -> Outcome {
        let header = Header { flags, ..self.header(number, op) };
        self.post(&header)
    }

    fn post(&mut self, header: &Header) -> Outcome {
        let head = self.vsock.idle()?;
        self.vsock.send(head, header, HEADER, HEADER);
        Ok(())
    }

    /// One packet of the host's.
    fn hear(&mut self, head: u16, header: &Header) -> Outcome {
        if header.kind != STREAM {
            fail!("vsock: a packet of type {}", header.kind);
        }
        let is_it = |stream: &Stream| {
            stream.state != State::Free && (stream.host, stream.guest) == (header.src_port, header.dst_port)
        };
        let Some(number) = self.streams.iter().position(is_it) else { return self.hear_stranger(header) };
        let stream = &mut self.streams[number];
        (stream.host_alloc, stream.host_passed) = (header.buf_alloc, header.fwd_cnt);
        match (header.op, stream.state) {
            (RESPONSE, State::Asked) => {
                stream.state = State::Open;
                self.opened += 1;
            }
            (RST, State::Asked) => {
                *stream = NOBODY;
                self.refused += 1;
            }
            (RST, state) => {
                if stream.client {
                    if state != State::Leaving || stream.awaited > 0 {
                        fail!("vsock: a stream was reset with {} bytes to come", stream.awaited);
                    }
                    self.finished += 1;
                }
                *stream = NOBODY;
            }
            (RW, State::Open | State::Leaving) => self.take(number, head, header)?,
            (SHUTDOWN, State::Open) => stream.host_shut |= header.flags,
            (CREDIT_REQUEST, _) => self.say(number, CREDIT_UPDATE, 0)?,
            (CREDIT_UPDATE | SHUTDOWN, _) => {}
            (op, _) => fail!("vsock: op {op} out of place"),
        }
        Ok(())
    }

    fn hear_stranger(&mut self, header: &Header) -> Outcome {
        let free = self.streams.iter().position(|stream| stream.state == State::Free);
        if header.op == REQUEST
            && header.dst_port == self.port
            && let Some(number) = free
        {
            self.streams[number] = Stream {
                state: State::Open,
                host: header.src_port,
                guest: header.dst_port,
                host_alloc: header.buf_alloc,
                host_passed: header.fwd_cnt,
                ..NOBODY
            };
            self.opened += 1;
            return self.say(number, RESPONSE, 0);
        }
        if header.op == RST {
            return Ok(());
        }
        let rst = Header {
            src_cid: self.vsock.cid,
            dst_cid: 2,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            op: RST,
            flags: 0,
            ..*header
        };
        self.post(&rst)
    }

    /// Data of the host's.
    fn take(&mut self, number: usize, head: u16, header: &Header) -> Outcome {
        let data = self.vsock.buffer(0, head).piece(HEADER, DATA);
        let stream = &mut self.streams[number];
        let held = stream.received.wrapping_sub(stream.passed);
        if header.len == 0 || header.len > ROOM - held {
            fail!("vsock: {} bytes, and there was room for {}", header.len, ROOM - held);
        }
        self.bytes += u64::from(header.len);
        for place in 0..u64::from(header.len) {
            let byte = data.read8(place);
            if stream.client {
                let at = u64::from(stream.received) + place;
                if byte != pattern(stream.guest, at) {
                    fail!("vsock: byte {at} of port {} is {byte:#x}", stream.guest);
                }
            } else {
                let at = (u64::from(stream.received) + place) % u64::from(ROOM);
                self.rooms.write8(number as u64 * u64::from(ROOM) + at, byte);
            }
        }
        stream.received = stream.received.wrapping_add(header.len);
        if stream.client {
            stream.awaited -= u64::from(header.len);
            stream.passed = stream.received;
            if stream.received.wrapping_sub(stream.told) > ROOM / 2 {
                self.say(number, CREDIT_UPDATE, 0)?;
            }
        }
        Ok(())
    }

    /// Sends what a stream has to send: whether it had anything.
    fn talk(&mut self, number: usize) -> Outcome<bool> {
        let mut busy = false;
        loop {
            let stream = self.streams[number];
            let room = stream.host_alloc.saturating_sub(stream.sent.wrapping_sub(stream.host_passed));
            let held = if stream.client { stream.left } else { stream.received.wrapping_sub(stream.passed).into() };
            let deaf = stream.host_shut & NO_RECEIVE != 0;
            let now = held.min(room.into()).min(DATA);
            if held == 0 || deaf {
                let over = if stream.client { stream.awaited == 0 || deaf } else { stream.host_shut & NO_SEND != 0 };
                if over && !stream.said_end {
                    self.streams[number].said_end = true;
                    self.streams[number].state = State::Leaving;
                    self.say(number, SHUTDOWN, NO_RECEIVE | NO_SEND)?;
                    busy = true;
                }
                return Ok(busy);
            }
            if now == 0 || !self.vsock.can_send() {
                return Ok(busy);
            }
            busy = true;
            let head = self.vsock.idle()?;
            let data = self.vsock.buffer(1, head).piece(HEADER, DATA);
            for place in 0..now {
                let byte = if stream.client {
                    pattern(stream.guest, u64::from(stream.sent) + place)
                } else {
                    let at = (u64::from(stream.passed) + place) % u64::from(ROOM);
                    self.rooms.read8(number as u64 * u64::from(ROOM) + at)
                };
                data.write8(place, byte);
            }
            let after = &mut self.streams[number];
            after.sent = after.sent.wrapping_add(now as u32);
            if stream.client {
                after.left -= now;
            } else {
                after.passed = after.passed.wrapping_add(now as u32);
            }
            let header = Header { len: now as u32, ..self.header(number, RW) };
            // In pieces of any size, the header cut too.
            let cut = [HEADER, 10, HEADER + now / 2][stream.sent as usize / 64 % 3];
            self.vsock.send(head, &header, cut, HEADER + now);
        }
    }

    /// What no driver may do; then a reset, after which all must be well.
    fn misbehave(&mut self) -> Outcome {
        let mut random = Random::new(7);
        let good = Header {
            src_cid: self.vsock.cid,
            dst_cid: 2,
            src_port: 1,
            dst_port: 2,
            len: 0,
            kind: STREAM,
            op: RW,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        };
        for round in 0..3000u64 {
            let mut number = || random.below(1 << 32) as u32;
            let header = match round % 10 {
                0 => Header { src_cid: number().into(), ..good },
                1 => Header { dst_cid: u64::from(number()) << 20, ..good },
                2 => Header { len: number(), ..good },
                3 => Header { op: number() as u16, ..good },
                4 => Header { kind: number() as u16, ..good },
                5 => Header { op: REQUEST, dst_port: number(), src_port: number(), ..good },
                6 => Header { op: SHUTDOWN, flags: number(), ..good },
                7 => Header { op: RESPONSE, ..good },
                8 => Header { op: CREDIT_UPDATE, buf_alloc: number(), fwd_cnt: number(), ..good },
                _ => Header {
                    src_cid: number().into(),
                    dst_cid: number().into(),
                    src_port: number(),
                    dst_port: number(),
                    len: number(),
                    kind: number() as u16,
                    op: number() as u16,
                    flags: number(),
                    buf_alloc: number(),
                    fwd_cnt: number(),
                },
            };
            let all = [HEADER, 43, 1, HEADER + 100][(round / 10 % 4) as usize];
            if self.vsock.can_send() {
                let head = self.vsock.idle()?;
                self.vsock.send(head, &header, 20, all);
            }
            // Its answers are taken now and then only.
            if round % 500 == 499 {
                let mut patience = Patience::new(SILENCE_NS);
                while !self.vsock.can_send() && !patience.is_over() {
                    while let Some((head, _)) = self.vsock.receive()? {
                        self.vsock.done(head);
                    }
                }
            }
            if round % 1000 == 999 {
                self.vsock.restart()?;
            }
        }
        self.vsock.restart()?;
        say!("vsock: misbehaved");
        Ok(())
    }
}
