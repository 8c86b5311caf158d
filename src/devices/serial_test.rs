//! Both sides of the serial port: registers as a driver uses them, and pipes as a terminal.

use std::io::{PipeReader, Read};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Registers and bits as the 8250 driver calls them.
const DATA: u64 = 0;
const IER: u64 = 1;
const MCR: u64 = 4;
const LSR: u64 = 5;
const DATA_READY: u8 = 1;

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Port {
    serial: Serial<Line>,
    line: EventFd,
    events: Receiver<SerialEvent>,
}

fn port(output: Option<File>) -> Port {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let (tell, events) = channel();
    let serial = Serial::new(Line(line.try_clone().unwrap()), output, move |event| tell.send(event).unwrap());
    Port { serial, line, events }
}

/// A port and the pipe it writes to.
fn piped() -> (Port, PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    (port(Some(File::from(OwnedFd::from(writer)))), reader)
}

#[test]
fn a_reset_puts_every_register_back_and_loses_what_the_guest_has_not_read_and_nothing_else() {
    let mut port = port(None);
    let registers = |port: &mut Port| -> Vec<u8> {
        let plain: Vec<u8> = [1, 2, 3, 4, 5, 6, 7].map(|register| port.get(register)).to_vec();
        port.put(3, 0x83);
        let divisor = [port.get(0), port.get(1)];
        port.put(3, 3);
        [plain, divisor.to_vec()].concat()
    };
    let before = registers(&mut port);
    for latched in [false, true] {
        assert_eq!(port.serial.receive(&[7; 100]), 64);
        for (register, byte) in [(3, 0x9b), (0, 1), (1, 2), (3, 0x1b), (IER, 7), (MCR, 0x13), (7, 0x5a)] {
            port.put(register, byte);
        }
        if latched {
            port.put(3, 0x9b);
        }
        assert_eq!(port.events(), []);
        port.serial.reset();
        assert_eq!(port.events(), [SerialEvent::Room], "the rest of the hundred may come");
        assert_eq!(registers(&mut port), before);
        assert_eq!(port.get(LSR) & DATA_READY, 0);
        port.line.read().unwrap();
        assert_eq!(port.serial.receive(b"x"), 1);
        assert!(port.line.read().is_err(), "no interrupt that the next kernel has not asked for");
        assert_eq!(port.get(DATA), b'x');
    }
}

impl Port {
    fn get(&mut self, register: u64) -> u8 {
        let mut byte = [0];
        self.serial.read(register, &mut byte);
        byte[0]
    }

    fn put(&mut self, register: u64, byte: u8) {
        self.serial.write(register, &[byte]);
    }

    fn events(&self) -> Vec<SerialEvent> {
        self.events.try_iter().collect()
    }

    /// What a driver reads until there is no more.
    fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.get(LSR) & DATA_READY != 0 {
            bytes.push(self.get(DATA));
        }
        bytes
    }
}

#[test]
fn what_the_guest_writes_comes_out_at_once() {
    let (mut port, mut reader) = piped();
    b"hello".iter().for_each(|byte| port.put(DATA, *byte));
    let mut got = [0; 5];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    assert!(port.events().is_empty());
}

#[test]
fn a_reader_that_does_not_read_costs_the_guest_no_time_and_us_a_bounded_backlog() {
    let (mut port, mut reader) = piped();
    let written: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
    written.iter().for_each(|byte| port.put(DATA, *byte));
    assert_eq!(port.events(), [SerialEvent::Backlog], "said once");
    let kept = written.len() - port.serial.dropped() as usize;
    assert!((BACKLOG_MAX..written.len()).contains(&kept), "{kept}");

    // Now it reads; the loop flushes as the pipe takes more, and the order is kept.
    let mut got = Vec::new();
    let mut chunk = vec![0; 32 << 10];
    while got.len() < kept {
        port.serial.flush();
        let n = reader.read(&mut chunk).unwrap();
        got.extend_from_slice(&chunk[..n]);
    }
    assert!(port.serial.flush(), "nothing is left");
    assert_eq!(got, written[..kept]);
    port.put(DATA, b'!');
    assert_eq!(reader.read(&mut chunk).unwrap(), 1);
    assert!(port.events().is_empty(), "no backlog any more");
}

#[test]
fn what_comes_after_a_backlog_waits_behind_it() {
    let (mut port, mut reader) = piped();
    while port.events().is_empty() {
        port.put(DATA, b'a');
    }
    let mut chunk = vec![0; 1 << 20];
    let first = reader.read(&mut chunk).unwrap();
    port.put(DATA, b'z');
    assert!(chunk[..first].iter().all(|byte| *byte == b'a'));
    assert!(port.serial.flush());
    let rest = reader.read(&mut chunk).unwrap();
    assert_eq!(chunk[..rest], *b"az");
}

#[test]
fn a_reader_that_has_gone_is_forgotten() {
    let (mut port, reader) = piped();
    drop(reader);
    (0..100_000).for_each(|_| port.put(DATA, b'x'));
    assert!(port.events().is_empty() && port.serial.flush());
    assert_eq!(port.serial.dropped(), 0, "lost to nobody");
}

#[test]
fn a_paste_of_any_length_arrives_whole() {
    let mut port = port(None);
    let paste: Vec<u8> = (0..100_000u32).map(|n| (n % 253) as u8).collect();
    let (mut sent, mut got) = (0, Vec::new());
    while sent < paste.len() {
        sent += port.serial.receive(&paste[sent..]);
        assert_eq!(port.serial.receive(&paste[sent..]), 0, "full");
        port.get(LSR);
        assert!(port.events().is_empty(), "no room yet");
        got.extend(port.drain());
        let expected: &[_] = if sent < paste.len() { &[SerialEvent::Room] } else { &[] };
        assert_eq!(port.events(), expected, "said once, and only if bytes were refused");
    }
    assert_eq!(got, paste);
}

#[test]
fn a_byte_that_comes_in_interrupts_once_the_driver_wants_it() {
    let mut port = port(None);
    assert_eq!(port.serial.receive(b"a"), 1);
    assert!(port.line.read().is_err(), "interrupts are off");
    port.put(IER, 1);
    assert_eq!(port.line.read().unwrap(), 1, "the byte still waits");
    assert_eq!(port.drain(), b"a");
    port.serial.receive(b"b");
    assert_eq!(port.line.read().unwrap(), 1);
}

#[test]
fn in_loopback_nothing_comes_in_and_what_waits_is_called_for_after() {
    let mut port = port(None);
    port.put(MCR, 0x10);
    port.put(DATA, b'l');
    assert_eq!(port.serial.receive(b"abc"), 0);
    assert_eq!(port.drain(), b"l");
    assert!(port.events().is_empty(), "still in loopback");
    port.put(MCR, 0);
    assert_eq!(port.events(), [SerialEvent::Room]);
    assert_eq!(port.serial.receive(b"abc"), 3);
}

#[test]
fn accesses_wider_than_a_register_touch_the_registers_they_cover() {
    let (mut port, mut reader) = piped();
    // Data and interrupt enable by one 16-bit write.
    port.serial.write(DATA, b"w\x01");
    let mut both = [0; 2];
    port.serial.read(DATA, &mut both);
    assert_eq!(both[1], 1);
    let mut got = [0; 1];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"w");
}
