//! `Worker`: the loop half of a virtio device, written once for all of them.
//!
//! It owns the device, its rings and its kicks, and lives in exactly one loop: the main loop's, or an iothread's (rules
//! D1.1, D1.6). A kick is told, the ring is served a bounded batch, what the device queued goes out in one submission,
//! and the driver gets at most one interrupt. A queue that its device tells to wait is served again by a timer and not
//! by kicks. Decoding of registers is the front's.

use std::sync::Arc;

use log::error;

use super::command::{Activation, Command, Exchanged};
use super::device::{Completions, Device};
use super::fault::{Fault, FaultLog};
use super::interrupt::Interrupt;
use super::lent::Lending;
use super::page::{CONFIG_BYTES, Page};
use super::ring::{Ring, Served};
use crate::error::{Error, Result};
use crate::event::{Cx, Done, Event, Flow, Handler, Interest, Key, Receiver, Signal};
use crate::qos::Wait;

/// Tags below this are queue numbers; the device's own watches start here.
pub const DEVICE_TAG: u32 = 0x100;
const COMMANDS: u32 = 0x80;
const TIMER: u32 = 0x81;
const CALL: u32 = 0x82;
const BROKEN: u32 = 0x83;
const UNREAD: u32 = 0x84;
/// How long a driver has to read an interim configuration. Linux does it at once, but may be slow to run.
const INTERIM_NS: u64 = 10_000_000_000;
/// Chains served of one queue before the other handlers of the loop have their turn (G10).
const BUDGET: usize = 64;

/// How one queue comes to be served: by its kicks, or by the timer.
struct Queue {
    number: usize,
    kick: Key,
    /// Chains of it wait until the timer goes.
    waits: bool,
    /// ... and nothing that the driver adds could go: its kicks say nothing.
    idle: bool,
    /// It was kicked all the same, and is masked.
    deaf: bool,
    /// When a chain of it last went while others waited, as a number that grows.
    went: u64,
}

/// One device in its loop.
pub struct Worker {
    device: Box<dyn Device>,
    page: Arc<Page>,
    interrupt: Interrupt,
    commands: Receiver<Command>,
    rings: Vec<Option<Ring>>,
    queues: Vec<Queue>,
    /// The rings that the device lends, while a driver is there.
    lending: Option<Lending>,
    /// How often a queue that waits was served.
    served: u64,
    timer: Option<Key>,
    /// What the timer is armed for; none if it is not.
    armed_ns: Option<u64>,
    /// A driver has the device, and has not broken the rules since.
    live: bool,
    /// What it has agreed on.
    features: u64,
    /// Control has stopped the machine.
    paused: bool,
    /// What the device was last told of the two.
    running: bool,
    /// Waiting for the last request in flight: a reset's slip and pauses' slips.
    reset: Option<Done<()>>,
    pauses: Vec<Done<()>>,
    /// Also waiting for that: the device that takes its place, and the slip in which it leaves.
    exchange: Option<(Box<dyn Device>, Done<Exchanged>)>,
    /// What the driver is still to read of the device that took another's place.
    unread: Option<Unread>,
    /// The end of its time for that.
    interim_end: Option<Key>,
    log: FaultLog,
}

/// Which configuration a driver is to read: the interim one, or the whole one that follows it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unread {
    Interim,
    Whole,
}

impl Worker {
    /// A worker for `device`, which writes its configuration to `page`.
    pub fn new(device: Box<dyn Device>, page: Arc<Page>, interrupt: Interrupt, commands: Receiver<Command>) -> Self {
        configure(&*device, &page, false);
        Worker {
            device,
            page,
            interrupt,
            commands,
            rings: Vec::new(),
            queues: Vec::new(),
            lending: None,
            served: 0,
            timer: None,
            armed_ns: None,
            live: false,
            features: 0,
            paused: false,
            running: false,
            reset: None,
            pauses: Vec::new(),
            exchange: None,
            unread: None,
            interim_end: None,
            log: FaultLog::default(),
        }
    }

    /// Tells the device if it may work from now on, or may not any more; the rings that it lends are out while it may.
    fn tell_running(&mut self, cx: &mut Cx<'_>) {
        let running = self.live && !self.paused && self.exchange.is_none();
        if std::mem::replace(&mut self.running, running) == running {
            return;
        }
        let mut moved = Ok(());
        if !running && let Some(lending) = &mut self.lending {
            moved = lending.take_back(&mut *self.device, &mut self.rings);
        }
        self.device.set_running(running, cx);
        if running && let Some(lending) = &mut self.lending {
            moved = lending.hand_over(&mut *self.device, &self.rings);
        }
        if let Err(e) = moved {
            // The host's doing, and yet at the guest's rate, who can ask for it again.
            self.log.warn(cx.now_ns(), self.device.id(), &e);
            if self.live {
                self.give_up(cx);
            }
        }
    }

    fn command(&mut self, command: Command, cx: &mut Cx<'_>) {
        match command {
            Command::Activate(activation) => self.activate(activation, cx),
            Command::Reset(done) => {
                self.live = false;
                self.tell_running(cx);
                self.forget_kicks(cx);
                self.end_interim();
                self.reset = Some(done);
            }
            Command::Pause(done) => {
                self.paused = true;
                self.tell_running(cx);
                self.hear_kicks(Interest::NONE, cx);
                self.pauses.push(done);
            }
            Command::Resume => {
                self.paused = false;
                self.tell_running(cx);
                if self.unread == Some(Unread::Interim) {
                    self.arm_interim_end(cx);
                }
                if self.exchange.is_some() {
                    // It has every ring looked at when it is done.
                    return;
                }
                // A ring that is not empty has been kicked once, and a kick that has ever rung is told when it is
                // heard again: so no chain is left behind, whatever the pause interrupted (G20).
                self.hear_kicks(Interest::READ, cx);
                // What was due during the pause was not served; the time has earned what its device lets it earn.
                self.ask_again(cx);
            }
            Command::Exchange(device, done) => match self.exchange {
                None => {
                    // Not served from here on: what the driver sends now is not for the device that leaves.
                    self.exchange = Some((device, done));
                    self.tell_running(cx);
                    self.hear_kicks(Interest::NONE, cx);
                }
                Some(_) => {
                    let refusal =
                        Error::host(format!("device \"{}\": another takes its place already", self.device.id()));
                    done.end(Err((device, refusal)));
                }
            },
            // What was read before another device came says nothing of that one.
            Command::ConfigRead(generation) if generation == self.page.generation() => self.config_read(cx),
            Command::ConfigRead(_) => {}
            Command::Dump(done) => done.end(self.dump()),
        }
    }

    fn activate(&mut self, activation: Activation, cx: &mut Cx<'_>) {
        self.rings = activation.rings;
        self.features = activation.features;
        self.device.begin(activation.features, &self.page, cx.now_ns());
        if let Err(e) = self.take_kicks(activation.kicks, cx) {
            error!("{}: {e}", self.device.id());
            self.give_up(cx);
            return;
        }
        if self.paused || self.exchange.is_some() {
            // Masked like those of before, so that the resume tells what rings meanwhile.
            self.hear_kicks(Interest::NONE, cx);
        }
        self.live = true;
        self.tell_running(cx);
        // Linux kicks some queues before DRIVER_OK, when there was nobody to hear it: each is looked at once.
        self.ask_again(cx);
    }

    /// Has the loop hear the kicks, but those of rings that are lent.
    fn take_kicks(&mut self, kicks: Vec<(u32, Signal)>, cx: &mut Cx<'_>) -> Result<()> {
        let mut lent = Vec::new();
        for (queue, kick) in kicks {
            let number = queue as usize;
            if number < self.device.lends() {
                lent.push((number, kick));
            } else {
                let kick = cx.own(kick, queue)?;
                self.queues.push(Queue { number, kick, waits: true, idle: false, deaf: false, went: 0 });
            }
        }
        if !lent.is_empty() {
            self.lending = Some(Lending::new(lent, CALL, BROKEN, cx)?);
        }
        Ok(())
    }

    fn hear_kicks(&mut self, interest: Interest, cx: &mut Cx<'_>) {
        for queue in &mut self.queues {
            queue.deaf = false;
            if let Err(e) = cx.set_interest(queue.kick, interest) {
                error!("{}: {e}", self.device.id());
            }
        }
    }

    fn forget_kicks(&mut self, cx: &mut Cx<'_>) {
        for queue in self.queues.drain(..) {
            cx.unwatch(queue.kick);
        }
        if let Some(lending) = self.lending.take() {
            lending.end(cx);
        }
    }

    /// A driver's kick. One that was asked not to kick a queue that waits, and does it all the same, is masked until the
    /// queue is empty: it costs two system calls and not one for each kick.
    fn kicked(&mut self, number: usize, cx: &mut Cx<'_>) -> Flow {
        match self.queues.iter_mut().find(|queue| queue.number == number && queue.idle) {
            None => self.serve(number, cx),
            Some(queue) => {
                queue.deaf = true;
                if let Err(e) = cx.set_interest(queue.kick, Interest::NONE) {
                    error!("{}: {e}", self.device.id());
                }
                Flow::Idle
            }
        }
    }

    /// Serves the queues that wait, each once, whether or not they are due: first the one of which nothing has gone for
    /// the longest, so that none gets what is another's. Idle if there is none.
    fn serve_waiting(&mut self, cx: &mut Cx<'_>) -> Flow {
        if self.paused || self.exchange.is_some() || !self.queues.iter().any(|queue| queue.waits) {
            return Flow::Idle;
        }
        self.queues.sort_unstable_by_key(|queue| queue.went);
        let mut flow = Flow::Done;
        for place in 0..self.queues.len() {
            // A fault ends the list.
            let Some(&Queue { number, waits, .. }) = self.queues.get(place) else { break };
            if waits && self.serve(number, cx) == Flow::More {
                flow = Flow::More;
            }
        }
        flow
    }

    /// Has the queues that wait served as soon as the loop comes to it.
    fn ask_again(&mut self, cx: &mut Cx<'_>) {
        if self.queues.iter().any(|queue| queue.waits) {
            self.arm(cx.now_ns(), cx);
        }
    }

    /// Says how a queue comes to be served next: whether chains of it wait for the timer, and whether a kick may bring one
    /// that can go.
    fn await_next(&mut self, number: usize, timer: bool, kicks: bool, cx: &mut Cx<'_>) {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.number == number) else { return };
        (queue.waits, queue.idle) = (timer, !kicks);
        if kicks
            && std::mem::take(&mut queue.deaf)
            && let Err(e) = cx.set_interest(queue.kick, Interest::READ)
        {
            error!("{}: {e}", self.device.id());
        }
    }

    /// A chain of a queue that waits has gone.
    fn took_turn(&mut self, number: usize) {
        self.served += 1;
        if let Some(queue) = self.queues.iter_mut().find(|queue| queue.number == number) {
            queue.went = self.served;
        }
    }

    /// Arms the timer, unless it is armed for an earlier time, or the device will say itself when to go on.
    fn arm(&mut self, until_ns: u64, cx: &mut Cx<'_>) {
        if let Some(timer) = self.timer
            && until_ns != Wait::UNTIL_TOLD.until_ns
            && self.armed_ns.is_none_or(|armed_ns| until_ns < armed_ns)
        {
            self.armed_ns = Some(until_ns);
            if let Err(e) = cx.arm(timer, until_ns) {
                error!("{}: {e}", self.device.id());
            }
        }
    }

    /// Serves one batch of a queue.
    fn serve(&mut self, queue: usize, cx: &mut Cx<'_>) -> Flow {
        if !self.live || self.paused || self.exchange.is_some() {
            return Flow::Idle;
        }
        let Some(Some(ring)) = self.rings.get_mut(queue) else { return Flow::Idle };
        let device = &mut self.device;
        let now_ns = cx.now_ns();
        let served = ring.serve(BUDGET, now_ns, |chain| device.process(queue, chain, now_ns));
        if let Some(held) = ring.take_held() {
            device.held(held);
        }
        let settled = self.settle(cx);
        match served.and_then(|served| settled.map(|()| served)) {
            Ok(Served::All) => {
                self.await_next(queue, false, true, cx);
                Flow::Done
            }
            Ok(Served::More) => Flow::More,
            Ok(Served::Held { until_ns, kicks, went }) => {
                self.await_next(queue, true, kicks, cx);
                if went {
                    self.took_turn(queue);
                }
                self.arm(until_ns, cx);
                Flow::Done
            }
            Err(fault) => {
                self.fault(fault, cx);
                Flow::Done
            }
        }
    }

    /// Takes in what the device has finished, and interrupts the driver at most once for that and for what was finished
    /// on the spot.
    fn settle(&mut self, cx: &mut Cx<'_>) -> std::result::Result<(), Fault> {
        let interim = self.unread == Some(Unread::Interim);
        let mut completions = Completions::new(&mut self.rings, &self.page, interim);
        self.device.reap(cx, &mut completions);
        if completions.outcome()? && self.live {
            self.interrupt.config();
        }
        let mut wanted = false;
        for ring in self.rings.iter_mut().flatten() {
            wanted |= ring.needs_interrupt()?;
        }
        if wanted {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Puts `device` in the place of the present one, which has nothing in flight. Its own watches are set up first, so
    /// what is refused leaves everything as it was.
    fn exchange(&mut self, mut device: Box<dyn Device>, done: Done<Exchanged>, cx: &mut Cx<'_>) {
        if self.device.is_vacant()
            && let Err(fault) = self.clear_rings(cx)
        {
            self.fault(fault, cx);
        }
        let before = cx.watches(DEVICE_TAG);
        match device.attach(cx) {
            Ok(()) => {
                before.into_iter().for_each(|watch| cx.unwatch(watch));
                let gone = std::mem::replace(&mut self.device, device);
                self.running = false;
                let interim = configure(&*self.device, &self.page, self.live);
                if self.live {
                    self.device.begin(self.features, &self.page, cx.now_ns());
                    self.announce(interim.then_some(Unread::Interim), cx);
                }
                done.end(Ok(gone));
            }
            Err(e) => {
                let half_done = cx.watches(DEVICE_TAG).into_iter().filter(|watch| !before.contains(watch));
                half_done.for_each(|watch| cx.unwatch(watch));
                done.end(Err((device, e)));
            }
        }
        self.tell_running(cx);
        // Whoever is there now is asked about what came meanwhile, and about what the other had told to wait.
        self.queues.iter_mut().for_each(|queue| queue.waits = true);
        if !self.paused {
            self.hear_kicks(Interest::READ, cx);
            self.ask_again(cx);
        }
    }

    /// Tells the driver of the configuration that was just written, and watches it read that if something depends on it.
    fn announce(&mut self, unread: Option<Unread>, cx: &mut Cx<'_>) {
        self.unread = unread;
        match unread {
            Some(_) => self.page.watch_reader(),
            None => self.page.unwatch_reader(),
        }
        if unread == Some(Unread::Interim) && !self.paused {
            self.arm_interim_end(cx);
        }
        self.interrupt.config();
    }

    fn arm_interim_end(&mut self, cx: &mut Cx<'_>) {
        if let Some(timer) = self.interim_end
            && let Err(e) = cx.arm(timer, cx.now_ns().saturating_add(INTERIM_NS))
        {
            error!("{}: {e}", self.device.id());
        }
    }

    /// The driver has read what was announced.
    fn config_read(&mut self, cx: &mut Cx<'_>) {
        match self.unread {
            Some(Unread::Interim) => {
                self.device.config_read(false);
                self.announce_whole(cx);
            }
            Some(Unread::Whole) => {
                self.unread = None;
                // Requests that the driver sent before it knew are answered as before.
                if self.device.is_vacant()
                    && let Err(fault) = self.clear_rings(cx)
                {
                    self.fault(fault, cx);
                }
                self.device.config_read(true);
            }
            None => {}
        }
    }

    fn announce_whole(&mut self, cx: &mut Cx<'_>) {
        configure(&*self.device, &self.page, false);
        self.announce(Some(Unread::Whole), cx);
    }

    /// The next driver, or the reset of this one, finds the whole configuration.
    fn end_interim(&mut self) {
        if self.unread.take() == Some(Unread::Interim) {
            configure(&*self.device, &self.page, false);
        }
        self.page.unwatch_reader();
    }

    /// Has the device, which answers at once, answer all that is in the rings now, whether or not the machine is paused.
    fn clear_rings(&mut self, cx: &mut Cx<'_>) -> std::result::Result<(), Fault> {
        if !self.live {
            return Ok(());
        }
        let (device, now_ns) = (&mut self.device, cx.now_ns());
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            if let Some(ring) = ring {
                // No more chains than this can have been there when the command came.
                let all = ring.size();
                ring.serve(all, now_ns, |chain| device.process(queue, chain, now_ns))?;
            }
        }
        self.settle(cx)
    }

    /// One line: whose state, how far each ring is, what is in flight.
    fn dump(&self) -> String {
        if self.device.is_vacant() {
            return format!("{}: {}", self.device.id(), if self.live { "vacant" } else { "vacant, no driver" });
        }
        let state = match (self.live, self.paused, self.queues.iter().any(|queue| queue.waits)) {
            (false, ..) => "no driver",
            (true, true, _) => "paused",
            (true, false, true) => "held back",
            (true, false, false) => "live",
        };
        let mut line = format!("{}: {state}, {} in flight in the device", self.device.id(), self.device.in_flight());
        for (queue, ring) in self.rings.iter().enumerate() {
            if let Some(ring) = ring {
                let lent = self.lending.as_ref().is_some_and(|lending| lending.has(queue));
                line += &format!("; queue {queue}: {}", ring.dump(lent));
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
        self.tell_running(cx);
        self.forget_kicks(cx);
        self.end_interim();
        self.page.set_needs_reset();
        self.interrupt.config();
    }

    /// Ends the slips that wait for the last request in flight, once it is back.
    fn end_drained(&mut self, cx: &mut Cx<'_>) {
        if self.device.in_flight() > 0 {
            return;
        }
        if let Some(done) = self.reset.take() {
            self.rings.clear();
            self.device.reset();
            done.end(());
        }
        for done in self.pauses.drain(..) {
            done.end(());
        }
        if let Some((device, done)) = self.exchange.take() {
            self.exchange(device, done, cx);
        }
    }
}

/// Writes the configuration of `device` to the page in one change, so that a driver never reads half of it; the interim one if
/// that is wanted and there is one, which it returns.
fn configure(device: &dyn Device, page: &Page, interim: bool) -> bool {
    let written = Page::default();
    device.write_config(&written);
    let interim = interim && device.write_interim_config(&written);
    let mut bytes = [0; CONFIG_BYTES];
    written.config(0, &mut bytes);
    page.set_config(0, &bytes);
    interim
}

impl Handler for Worker {
    fn name(&self) -> &str {
        self.device.id()
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.commands, COMMANDS);
        self.timer = Some(cx.timer(TIMER)?);
        self.interim_end = Some(cx.timer(UNREAD)?);
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
            TIMER => {
                self.armed_ns = None;
                self.serve_waiting(cx)
            }
            UNREAD => {
                // A driver that is stopped cannot read; its time begins again when it goes on.
                if self.unread == Some(Unread::Interim) && !self.paused {
                    self.announce_whole(cx);
                }
                Flow::Done
            }
            CALL => {
                self.interrupt.used();
                Flow::Done
            }
            BROKEN => {
                self.fault(Fault::Lent, cx);
                Flow::Done
            }
            DEVICE_TAG.. => {
                let ask_again = self.device.ready(event, cx);
                match if ask_again { self.serve_waiting(cx) } else { Flow::Idle } {
                    // Not by being called again, for the watch has nothing new to say.
                    Flow::More => self.ask_again(cx),
                    Flow::Done => {}
                    // Nothing was served, so nothing was taken in.
                    Flow::Idle => {
                        if let Err(fault) = self.settle(cx) {
                            self.fault(fault, cx);
                        }
                    }
                }
                Flow::Done
            }
            queue => self.kicked(queue as usize, cx),
        };
        if self.reset.is_some() || !self.pauses.is_empty() || self.exchange.is_some() {
            self.end_drained(cx);
        }
        Ok(flow)
    }
}
