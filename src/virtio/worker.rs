//! `Worker`: the loop half of a virtio device, written once for all of them.
//!
//! It owns the device, its rings and its kicks, and lives in exactly one loop: the main loop's, or an iothread's (rules
//! D1.1, D1.6). A kick is told, the ring is served a bounded batch, what the device queued goes out in one submission,
//! and the driver gets at most one interrupt. Decoding of registers is the front's.

use std::sync::Arc;

use log::error;

use super::command::{Activation, Command};
use super::device::{Completions, Device};
use super::fault::{Fault, FaultLog};
use super::interrupt::Interrupt;
use super::page::Page;
use super::ring::{Ring, Served};
use crate::error::Result;
use crate::event::{Cx, Done, Event, Flow, Handler, Interest, Key, Receiver};

/// Tags below this are queue numbers; the device's own watches start here.
pub const DEVICE_TAG: u32 = 0x100;
const COMMANDS: u32 = 0x80;
/// Chains served of one queue before the other handlers of the loop have their turn (G10).
const BUDGET: usize = 64;

/// One device in its loop.
pub struct Worker<D: Device> {
    device: D,
    page: Arc<Page>,
    interrupt: Interrupt,
    commands: Receiver<Command>,
    rings: Vec<Option<Ring>>,
    kicks: Vec<Key>,
    /// A driver has the device, and has not broken the rules since.
    live: bool,
    /// Control has stopped the machine.
    paused: bool,
    /// Waiting for the last request in flight: a reset's slip and pauses' slips.
    reset: Option<Done<()>>,
    pauses: Vec<Done<()>>,
    log: FaultLog,
}

impl<D: Device> Worker<D> {
    /// A worker for `device`, which writes its configuration to `page`.
    pub fn new(device: D, page: Arc<Page>, interrupt: Interrupt, commands: Receiver<Command>) -> Self {
        device.write_config(&page);
        Worker {
            device,
            page,
            interrupt,
            commands,
            rings: Vec::new(),
            kicks: Vec::new(),
            live: false,
            paused: false,
            reset: None,
            pauses: Vec::new(),
            log: FaultLog::default(),
        }
    }

    fn command(&mut self, command: Command, cx: &mut Cx<'_>) {
        match command {
            Command::Activate(activation) => self.activate(activation, cx),
            Command::Reset(done) => {
                self.live = false;
                self.forget_kicks(cx);
                self.reset = Some(done);
            }
            Command::Pause(done) => {
                self.paused = true;
                self.hear_kicks(Interest::NONE, cx);
                self.pauses.push(done);
            }
            Command::Resume => {
                self.paused = false;
                // A ring that is not empty has been kicked once, and a kick that has ever rung is told when it is
                // heard again: so no chain is left behind, whatever the pause interrupted (G20).
                self.hear_kicks(Interest::READ, cx);
            }
            Command::Dump(done) => done.end(self.dump()),
        }
    }

    fn activate(&mut self, activation: Activation, cx: &mut Cx<'_>) {
        self.rings = activation.rings;
        for (queue, kick) in activation.kicks {
            match cx.own(kick, queue) {
                Ok(key) => self.kicks.push(key),
                Err(e) => {
                    error!("{}: {e}", self.device.id());
                    self.give_up(cx);
                    return;
                }
            }
        }
        if self.paused {
            // Masked like those of before, so that the resume tells what rings meanwhile.
            self.hear_kicks(Interest::NONE, cx);
        }
        self.live = true;
    }

    fn hear_kicks(&mut self, interest: Interest, cx: &mut Cx<'_>) {
        for &kick in &self.kicks {
            if let Err(e) = cx.set_interest(kick, interest) {
                error!("{}: {e}", self.device.id());
            }
        }
    }

    fn forget_kicks(&mut self, cx: &mut Cx<'_>) {
        for key in self.kicks.drain(..) {
            cx.unwatch(key);
        }
    }

    /// Serves one batch of a queue.
    fn serve(&mut self, queue: usize, cx: &mut Cx<'_>) -> Flow {
        if !self.live || self.paused {
            return Flow::Idle;
        }
        let Some(Some(ring)) = self.rings.get_mut(queue) else { return Flow::Idle };
        let device = &mut self.device;
        let now_ns = cx.now_ns();
        let served = ring.serve(BUDGET, |chain| device.process(queue, chain, now_ns));
        let settled = self.settle(cx);
        match served.and_then(|served| settled.map(|()| served)) {
            Ok(Served::All) => Flow::Done,
            Ok(Served::More) => Flow::More,
            Err(fault) => {
                self.fault(fault, cx);
                Flow::Done
            }
        }
    }

    /// Takes in what the device has finished, and interrupts the driver at most once for that and for what was finished
    /// on the spot.
    fn settle(&mut self, cx: &Cx<'_>) -> std::result::Result<(), Fault> {
        let mut completions = Completions::new(&mut self.rings);
        self.device.reap(cx.clock_ns(), &mut completions);
        completions.outcome()?;
        let mut wanted = false;
        for ring in self.rings.iter_mut().flatten() {
            wanted |= ring.needs_interrupt()?;
        }
        if wanted {
            self.interrupt.used();
        }
        Ok(())
    }

    /// One line: whose state, how far each ring is, what is in flight.
    fn dump(&self) -> String {
        let state = match (self.live, self.paused) {
            (false, _) => "no driver",
            (true, false) => "live",
            (true, true) => "paused",
        };
        let mut line = format!("{}: {state}, {} in flight in the device", self.device.id(), self.device.in_flight());
        for (queue, ring) in self.rings.iter().enumerate() {
            if let Some(ring) = ring {
                line += &format!("; queue {queue}: {}", ring.dump());
            }
        }
        line
    }

    fn fault(&mut self, fault: Fault, cx: &mut Cx<'_>) {
        self.log.warn(cx.now_ns(), self.device.id(), &fault);
        self.give_up(cx);
    }

    /// Stops serving until the driver resets the device (virtio 1.2, section 2.1.1).
    fn give_up(&mut self, cx: &mut Cx<'_>) {
        self.live = false;
        self.forget_kicks(cx);
        self.page.set_needs_reset();
        self.interrupt.config();
    }

    /// Ends the slips that wait for the last request in flight, once it is back.
    fn end_drained(&mut self) {
        if self.device.in_flight() > 0 {
            return;
        }
        if let Some(done) = self.reset.take() {
            self.rings.clear();
            done.end(());
        }
        for done in self.pauses.drain(..) {
            done.end(());
        }
    }
}

impl<D: Device> Handler for Worker<D> {
    fn name(&self) -> &str {
        self.device.id()
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.commands, COMMANDS);
        self.device.attach(cx)
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Flow> {
        let flow = match event.tag {
            COMMANDS => {
                while let Some(command) = self.commands.receive() {
                    self.command(command, cx);
                }
                Flow::Done
            }
            DEVICE_TAG.. => {
                if let Err(fault) = self.settle(cx) {
                    self.fault(fault, cx);
                }
                Flow::Done
            }
            queue => self.serve(queue as usize, cx),
        };
        if self.reset.is_some() || !self.pauses.is_empty() {
            self.end_drained();
        }
        Ok(flow)
    }
}
