//! The terminal: what is typed goes to the guest's serial port, what the port could not write at once goes out here.
//!
//! A handler of the main loop. Keys are passed on as the port has room for them and read little faster, so that pasting
//! a file loses nothing, and a guest that reads nothing does not keep the escape from being seen. On a terminal `Ctrl-a x`
//! ends the monitor and `Ctrl-a Ctrl-a` types one Ctrl-a. In the background the machine runs on,
//! and reads no key. The port itself is `devices::serial`'s.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::run::Message;
use crate::devices::serial::{Serial, SerialEvent};
use crate::error::{Context, Result};
use crate::event::{Cx, Event, Flow, Handler, Interest, Key, Receiver, Sender};
use crate::qmp::event::ShutdownCause;
use crate::sys::{stdio, terminal};

const INPUT: u32 = 0;
const OUTPUT: u32 = 1;
const PORT: u32 = 2;
const AWAY: u32 = 3;
/// Bytes read at once.
const READ_BYTES: usize = 256;
/// Bytes typed ahead of the guest.
const TYPED_BYTES: usize = 4096;
const CTRL_A: u8 = 1;

/// Standard input and output, connected to the serial port.
pub struct Console {
    input: File,
    output: File,
    serial: Arc<Mutex<Serial>>,
    events: Receiver<SerialEvent>,
    control: Sender<Message>,
    escape: Escape,
    /// What was typed and has not reached the guest.
    typed: Vec<u8>,
    input_watch: Option<Key>,
    /// The watch on a terminal while another job is in the foreground: an edge for each key.
    away: Option<Key>,
    output_watch: Option<Key>,
    /// Input that epoll does not take, a file: always readable.
    always_readable: bool,
}

/// Whether keys are commands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Escape {
    /// No terminal: bytes are bytes.
    Off,
    /// The next key is the guest's.
    Plain,
    /// The last key was Ctrl-a.
    Armed,
}

impl Console {
    /// A console for `serial`, which speaks through `events`. `terminal` says whether somebody types.
    ///
    /// # Errors
    /// EMFILE.
    pub fn new(
        serial: Arc<Mutex<Serial>>,
        events: Receiver<SerialEvent>,
        control: Sender<Message>,
        terminal: bool,
    ) -> Result<Self> {
        Ok(Console {
            input: stdio::input().context(|| "-serial stdio: duplicate standard input")?,
            output: stdio::output().context(|| "-serial stdio: duplicate standard output")?,
            serial,
            events,
            control,
            escape: if terminal { Escape::Plain } else { Escape::Off },
            typed: Vec::with_capacity(READ_BYTES),
            input_watch: None,
            away: None,
            output_watch: None,
            always_readable: false,
        })
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room(&self) -> bool {
        self.typed.len() + READ_BYTES <= TYPED_BYTES
    }

    /// Reads once, if there is room. False at the end of the input.
    fn read(&mut self) -> bool {
        if !self.has_room() {
            return true;
        }
        let mut bytes = [0; READ_BYTES];
        match self.input.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.type_in(&bytes[..count]);
                true
            }
            Err(e) => matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock),
        }
    }

    fn type_in(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match (self.escape, byte) {
                (Escape::Plain, CTRL_A) => self.escape = Escape::Armed,
                (Escape::Armed, b'x') => {
                    // Control lives as long as the loop.
                    let _ = self.control.send(Message::End(ShutdownCause::HostUi));
                }
                (Escape::Armed, _) => {
                    self.escape = Escape::Plain;
                    self.typed.push(byte);
                }
                _ => self.typed.push(byte),
            }
        }
    }

    /// Gives the guest what it has room for.
    fn pass_on(&mut self) {
        if !self.typed.is_empty() {
            let taken = self.serial().receive(&self.typed);
            self.typed.drain(..taken);
        }
    }

    fn listen_to_input(&self, cx: &mut Cx<'_>) -> Result<()> {
        let interest = if self.has_room() { Interest::READ } else { Interest::NONE };
        self.input_watch.map_or(Ok(()), |watch| cx.set_interest(watch, interest))
    }

    /// Whether the input may be read: reading a terminal from the background would stop the process.
    fn is_ours(&self) -> bool {
        // A terminal that is gone is read to its end.
        self.escape == Escape::Off || terminal::claim().unwrap_or(true)
    }

    /// Watches the input. In the background only edges are watched: each key may be the first after `fg`.
    fn watch_input(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        if let Some(watch) = self.away.take().or(self.input_watch.take()) {
            cx.unwatch(watch);
        }
        if self.is_ours() {
            self.input_watch = Some(cx.watch(&self.input, Interest::READ, INPUT)?);
        } else {
            let keys = self.input.try_clone().context(|| "-serial stdio: duplicate standard input")?;
            self.away = Some(cx.own(Box::new(keys), AWAY)?);
        }
        Ok(())
    }

    fn flush(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        let done = self.serial().flush();
        match (done, self.output_watch) {
            (true, Some(watch)) => {
                cx.unwatch(watch);
                self.output_watch = None;
            }
            (false, None) => self.output_watch = Some(cx.watch(&self.output, Interest::WRITE, OUTPUT)?),
            _ => {}
        }
        Ok(())
    }
}

impl Handler for Console {
    fn name(&self) -> &str {
        "console"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.events, PORT);
        // EPERM: a file, or /dev/null. What it holds goes to the guest as it takes it.
        if self.watch_input(cx).is_err() {
            self.always_readable = true;
            self.always_readable = self.read();
            self.pass_on();
        }
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        match event.tag {
            // A new watch would report at once a line that the other job has not read yet, again and again.
            AWAY if !self.is_ours() => {}
            AWAY => self.watch_input(cx)?,
            INPUT if !self.is_ours() => self.watch_input(cx)?,
            INPUT => {
                if !self.read()
                    && let Some(watch) = self.input_watch.take()
                {
                    cx.unwatch(watch);
                }
                self.pass_on();
                self.listen_to_input(cx)?;
                // A pipe whose writer is gone is told once, and may hold more.
                return Ok(if event.is_hang_up() && self.input_watch.is_some() { Flow::More } else { Flow::Done });
            }
            OUTPUT => self.flush(cx)?,
            _ => {
                while let Some(event) = self.events.receive() {
                    match event {
                        SerialEvent::Backlog => self.flush(cx)?,
                        SerialEvent::Room => self.pass_on(),
                    }
                }
                if self.always_readable {
                    self.always_readable = self.read();
                    self.pass_on();
                }
                self.listen_to_input(cx)?;
            }
        }
        Ok(Flow::Done)
    }
}
