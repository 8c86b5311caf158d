//! The serial port: a 16550 between the guest and a file of the host's, usually the terminal.
//!
//! The registers are vm-superio's. What is ours is that neither side can hold up or flood the other: the guest's
//! bytes go to the file at once while it takes them, and into a bounded backlog while it does not, so a vCPU never
//! waits for a reader; the host's bytes go to the guest as far as its FIFO has room, and it is said when there is
//! room again, so a paste of any length arrives whole. The registers and most output run on a vCPU's thread, `receive`
//! and `flush` on the main loop's; the slot's mutex is between them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::bus::Slot;
use crate::kvm::irq::Irq;
use crate::sys::poll;

/// How much output is kept for a file that does not take it, in bytes. What exceeds it is dropped and counted.
pub const BACKLOG_MAX: usize = 64 << 10;

/// The modem control register and its loopback bit: while set, nothing comes in from outside.
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;
/// The data register, and the line status with its bit that says that a byte is there.
const DATA: u8 = 0;
const LINE_STATUS: u8 = 5;
const DATA_READY: u8 = 1;

/// What a reset writes, in order: no interrupts, no loopback (OUT2 is set on this chip), nothing in the scratch register;
/// then the divisor of 9600 baud behind the divisor latch, and eight bits a byte.
const AT_RESET: [(u8, u8); 7] = [(1, 0), (MODEM_CONTROL, 8), (7, 0), (3, 0x83), (DATA, 12), (1, 0), (3, 3)];

/// What the main loop must do something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialEvent {
    /// The file does not take the guest's output: call [`Serial::flush`] once it is writable. Said once until then.
    Backlog,
    /// The guest has read what an earlier [`Serial::receive`] left: there is room again. Said once a refusal.
    Room,
}

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Irq::trigger(self);
        Ok(())
    }
}

/// A serial port that interrupts by `I`.
pub struct Serial<I: Trigger = Irq> {
    chip: vm_superio::Serial<I, NoEvents, Output>,
    /// How many bytes the guest's FIFO holds.
    fifo: usize,
    /// Bytes for the guest were refused and it has not been said yet that there is room.
    refused: bool,
    on_event: Box<dyn Fn(SerialEvent) + Send>,
}

impl<I: Trigger> Serial<I> {
    /// A port that raises `irq` and writes to `output`, or nowhere. `on_event` is called with the port locked, on the
    /// thread of the vCPU whose access brought the event about, and must not wait.
    pub fn new(irq: I, output: Option<File>, on_event: impl Fn(SerialEvent) + Send + 'static) -> Self {
        let output = Output { file: output, backlog: VecDeque::new(), dropped: 0 };
        let chip = vm_superio::Serial::new(irq, output);
        Self { fifo: chip.fifo_capacity(), chip, refused: false, on_event: Box::new(on_event) }
    }

    /// Gives the guest as many of these bytes as it has room for: how many. The rest is to be offered again after
    /// [`SerialEvent::Room`], and nothing be read from the host until then.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        // A full FIFO and one in loopback both take nothing; our interrupt cannot fail.
        let taken = self.chip.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.refused = taken < bytes.len();
        taken
    }

    /// Writes the backlog to the file, as far as it takes it without waiting: whether all of it is gone.
    pub fn flush(&mut self) -> bool {
        self.chip.writer_mut().drain();
        self.chip.writer().backlog.is_empty()
    }

    /// How many bytes of the guest's output were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.chip.writer().dropped
    }

    /// Says that there is room, if somebody waits for it and the guest has emptied its FIFO.
    fn offer_room(&mut self) {
        if self.refused && self.chip.fifo_capacity() == self.fifo && self.chip.read(MODEM_CONTROL) & LOOPBACK == 0 {
            self.refused = false;
            (self.on_event)(SerialEvent::Room);
        }
    }
}

impl<I: Trigger + Send> Slot for Serial<I> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(offset..) {
            *byte = self.chip.read(register as u8);
        }
        self.offer_room();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let idle = self.chip.writer().backlog.is_empty();
        for (byte, register) in data.iter().zip(offset..) {
            // The output and the interrupt take everything, and a byte too many for the loopback is lost on the
            // real chip as well.
            let _ = self.chip.write(register as u8, *byte);
        }
        if idle && !self.chip.writer().backlog.is_empty() {
            (self.on_event)(SerialEvent::Backlog);
        }
        self.offer_room();
    }

    /// What the guest has not read is lost, as on the real chip; what the host has not taken is not, and what has been
    /// typed and did not fit is there for the next kernel.
    fn reset(&mut self) {
        // The divisor latch would hide the interrupts' register.
        let _ = self.chip.write(3, 3);
        for (register, value) in AT_RESET {
            let _ = self.chip.write(register, value);
        }
        while self.chip.read(LINE_STATUS) & DATA_READY != 0 {
            self.chip.read(DATA);
        }
        // Reading it forgets what an interrupt was about.
        self.chip.read(2);
        self.offer_room();
    }
}

/// Where the guest's bytes go.
struct Output {
    /// `None`: nowhere, or there was an error and nobody reads it any more.
    file: Option<File>,
    /// What the file did not take yet, at most [`BACKLOG_MAX`] bytes.
    backlog: VecDeque<u8>,
    dropped: u64,
}

impl Output {
    /// Writes what the file takes now of the backlog.
    fn drain(&mut self) {
        while let (Some(file), (chunk @ [_, ..], _)) = (&mut self.file, self.backlog.as_slices()) {
            match write_now(file, chunk) {
                Ok(0) => return,
                Ok(written) => drop(self.backlog.drain(..written)),
                Err(_) => self.close(),
            }
        }
    }

    /// The file is gone: a pipe without a reader, a terminal hung up. The guest goes on without being heard.
    fn close(&mut self) {
        self.file = None;
        self.backlog = VecDeque::new();
    }
}

impl Write for Output {
    /// Takes everything and never waits.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        if let (Some(file), true) = (&mut self.file, self.backlog.is_empty()) {
            match write_now(file, rest) {
                Ok(written) => rest = &rest[written..],
                Err(_) => self.close(),
            }
        }
        if self.file.is_some() {
            let room = rest.len().min(BACKLOG_MAX - self.backlog.len());
            self.backlog.extend(&rest[..room]);
            self.dropped += (rest.len() - room) as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes as much as the file takes without waiting, which may be nothing.
///
/// The file is not switched to non-blocking: a terminal is shared with the shell that started us. It is asked first,
/// and given no more than what a pipe or terminal that says yes takes whole.
fn write_now(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    /// A terminal that is writable has room for at least this.
    const AT_ONCE: usize = 256;
    if bytes.is_empty() || !poll::is_writable(file.as_fd()) {
        return Ok(0);
    }
    match file.write(&bytes[..bytes.len().min(AT_ONCE)]) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}

#[cfg(test)]
#[path = "serial_test.rs"]
mod tests;
