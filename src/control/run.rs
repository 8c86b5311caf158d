//! `Control`: the run state of the machine, and the one place where requests, vCPU events and device events meet.
//!
//! A handler of the main loop. It never waits: `stop` asks the vCPUs to park, asks the workers to drain when the last
//! one has, and answers when the last slip is back; a reset goes on in steps (`reset`); what asks to change the run state
//! meanwhile stands in line. It holds no device and no socket.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use log::{error, info, warn};
use serde_json::{Value, json};

use super::memory::Memory;
use super::plug::{Deleted, News, Plug};
use super::reset::Reset;
use super::session::ToSession;
use super::state::{Change, State, Then};
use super::{answers, chardev, dump, net, throttle};
use crate::config::spec::VmSpec;
use crate::devices::balloon::BalloonNews;
use crate::devices::block::{IoFailure, Kind};
use crate::devices::pvpanic::GuestPanic;
use crate::error::{self, Error, Result};
use crate::event::{Cx, Done, Event as LoopEvent, Flow, Handler, Key, Receiver, Sender, channel};
use crate::kvm::vcpu::{VcpuEvent, VcpuHandle};
use crate::machine::{Inventory, Notice};
use crate::qmp::balloon::BalloonInfo;
use crate::qmp::command::Command;
use crate::qmp::event::{
    BlockErrorAction, BlockIoError, Event, GuestMemoryFull, GuestPanicAction, IoOperationType, Panicked, ResetData,
    Shutdown, ShutdownCause, Timestamp,
};
use crate::qmp::plug::DeviceDeleted;
use crate::virtio::{self, FaultLog};

/// The tag of the channel by which Control leaves the loop.
const LEAVE: u32 = 2;
/// The tag of the timer by which vCPUs that have not parked are called again.
const CALL: u32 = 3;

/// How long a vCPU has to park before it is called again.
const PATIENCE_NS: u64 = 100_000_000;

/// What Control is told by the rest of the control plane; the machine's own voice is [`Notice`].
pub enum Message {
    /// A client has connected and wants to hear of events.
    Joined(Sender<ToSession>),
    /// A client asks for something.
    Command(Command, Done<Result<Value>>),
    /// ... and hands over a descriptor for it.
    CommandWith(Command, OwnedFd, Done<Result<Value>>),
    /// The machine is to end, and why.
    End(ShutdownCause),
    /// A worker has drained or been reset, or is gone.
    Drained,
    /// Somebody wants to know where everything stands (SIGUSR1).
    Dump,
    /// A part of the dump.
    Dumped(String),
    /// What hot-plug had to wait for.
    Plug(Box<News>),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By the guest's or an operator's wish: exit code 0.
    Wanted,
    /// By a failure, which is to be told on standard error: exit code 1.
    Failed(String),
}

/// The machine's run state, and who is to hear of it.
pub struct Control {
    inventory: Inventory,
    /// The balloon, if there is one.
    memory: Option<Memory>,
    plug: Plug,
    notices: Receiver<Notice>,
    messages: Receiver<Message>,
    /// For what is posted back to itself.
    sender: Sender<Message>,
    state: State,
    /// The timer by which vCPUs that are being parked are called again, and whether it is armed.
    call: Option<Key>,
    calling: bool,
    /// The `stop` that the present change of state will answer.
    stopping: Option<Done<Result<Value>>>,
    /// Changes of state asked for, in order; they wait while one is going on.
    waiting: VecDeque<Change>,
    /// The reset that is going on, or that the vCPUs are being parked for.
    reset: Option<Reset>,
    /// `-no-reboot` or `-machine reboot=off`: a reset ends the machine.
    no_reboot: bool,
    /// Of what the guest can cause as often as it likes.
    log: FaultLog,
    sessions: Vec<Sender<ToSession>>,
    /// Posted to itself when every client has been told of the end.
    leave: (Sender<()>, Receiver<()>),
    end: Arc<OnceLock<End>>,
}

impl Control {
    /// Control over `inventory` and, if there is a balloon, its `memory`. The vCPUs are running, or parking themselves if
    /// `spec` says so. `end` is where it leaves how the machine ended.
    pub fn new(
        inventory: Inventory,
        memory: Option<Memory>,
        spec: &VmSpec,
        notices: Receiver<Notice>,
        (sender, messages): (Sender<Message>, Receiver<Message>),
        end: Arc<OnceLock<End>>,
    ) -> Self {
        let left = inventory.vcpus.len();
        let state = if spec.freeze { State::Parking { left, then: Then::Launch } } else { State::Running };
        Control {
            inventory,
            memory,
            plug: Plug::new(sender.clone()),
            notices,
            messages,
            sender,
            state,
            call: None,
            calling: false,
            stopping: None,
            waiting: VecDeque::new(),
            reset: None,
            no_reboot: spec.no_reboot,
            log: FaultLog::default(),
            sessions: Vec::new(),
            leave: channel(),
            end,
        }
    }

    fn message(&mut self, message: Message, cx: &mut Cx<'_>) {
        match message {
            Message::Joined(session) => {
                // Who has gone is forgotten here too: a machine may see no event for months, and a client each second.
                self.sessions.retain(|session| !session.is_closed());
                self.sessions.push(session);
            }
            Message::Command(command, done) => self.command(command, done, cx),
            Message::CommandWith(Command::NetdevAdd(asked), fd, done) => {
                self.plug.add_netdev(&asked, Some(fd), &self.inventory, done);
            }
            // No other command takes one: it is closed.
            Message::CommandWith(command, _, done) => self.command(command, done, cx),
            Message::End(cause) => self.finish(cause, End::Wanted),
            Message::Drained => self.worker_done(),
            Message::Dump => dump::log(self.state, &self.inventory, &self.sender),
            Message::Dumped(line) => info!("{line}"),
            Message::Plug(news) => {
                if let Some(Deleted { device, done, answer }) = self.plug.hear(*news, &mut self.inventory) {
                    // First the event, then the answer.
                    self.tell(&Event::DeviceDeleted(DeviceDeleted { device: Some(device.clone()), path: device }));
                    done.end(answer);
                }
            }
        }
    }

    fn notice(&mut self, notice: Notice, cx: &mut Cx<'_>) -> Result<()> {
        match notice {
            Notice::Vcpu(VcpuEvent::Parked) => self.parked(),
            Notice::Vcpu(VcpuEvent::Reset) => self.vcpu_reset(),
            Notice::Vcpu(VcpuEvent::Shutdown) => self.guest_resets("a triple fault", cx.now_ns()),
            Notice::Reset => self.guest_resets("a reset register", cx.now_ns()),
            Notice::Vcpu(VcpuEvent::Failed(why)) => self.finish(ShutdownCause::HostError, End::Failed(why)),
            Notice::Vcpu(VcpuEvent::Starved(why)) => self.guest_starves(why, cx.now_ns()),
            Notice::Vcpu(VcpuEvent::Registers(registers)) => info!("{registers}"),
            Notice::Panic(what) => self.guest_panics(what),
            Notice::PowerOff => self.finish(ShutdownCause::GuestShutdown, End::Wanted),
            Notice::IoFailure(drive, failure) => self.io_failure(drive, &failure),
            Notice::Balloon(news) => {
                let Some(memory) = &mut self.memory else { return Ok(()) };
                match news {
                    BalloonNews::Changed => {
                        let info = memory.changed(cx)?;
                        self.balloon_changed(info);
                    }
                    BalloonNews::Statistics(values) => memory.statistics(values, cx.now_ns()),
                }
            }
        }
        Ok(())
    }

    fn command(&mut self, command: Command, done: Done<Result<Value>>, cx: &mut Cx<'_>) {
        match command {
            Command::SystemPowerdown => {
                self.tell(&Event::Powerdown);
                done.end(Ok(json!({})));
                self.inventory.hardware.press_power_button();
            }
            Command::Stop => self.change(Change::Stop(done)),
            Command::Cont => self.change(Change::Cont(done)),
            Command::SystemReset if self.no_reboot => {
                done.end(Ok(json!({})));
                self.finish(ShutdownCause::HostQmpSystemReset, End::Wanted);
            }
            Command::SystemReset => {
                self.change(Change::Reset(Reset::new(ShutdownCause::HostQmpSystemReset, Some(done))))
            }
            Command::Quit => {
                done.end(Ok(json!({})));
                self.finish(ShutdownCause::HostQmpQuit, End::Wanted);
            }
            Command::NetdevSetThrottle(asked) => net::set_throttle(&asked, &mut self.inventory.nics, done),
            Command::SetLink(asked) => net::set_link(&asked, &mut self.inventory.nics, done),
            Command::QueryChardev => done.end(chardev::query(&self.inventory.consoles)),
            Command::ChardevAdd(asked) => chardev::add(&asked, &mut self.inventory.consoles, done),
            Command::ChardevRemove(asked) => chardev::remove(&asked.id, &mut self.inventory.consoles, done),
            Command::ChardevResize(asked) => done.end(chardev::resize(&asked, &self.inventory.consoles)),
            Command::BlockSetIoThrottle(asked) => throttle::set(&asked, &mut self.inventory.disks, done),
            Command::BlockdevAdd(asked) => self.plug.add_node(&asked, &self.inventory, done),
            Command::BlockdevDel(asked) => self.plug.delete_node(&asked.node_name, &self.inventory, done),
            Command::NetdevAdd(asked) => self.plug.add_netdev(&asked, None, &self.inventory, done),
            Command::NetdevDel(asked) => self.plug.delete_netdev(&asked.id, &self.inventory, done),
            Command::DeviceAdd(asked) => self.plug.add_device(&asked, &mut self.inventory, done),
            Command::DeviceDel(asked) => self.plug.delete_device(&asked.id, &mut self.inventory, done),
            Command::BlockResize(asked) => self.plug.resize(&asked, &self.inventory, done),
            Command::Balloon(_)
            | Command::QueryBalloon
            | Command::QueryBalloonDetail
            | Command::QueryBalloonStats
            | Command::BalloonStatsInterval(_) => done.end(self.balloon(&command, cx)),
            query => done.end(answers::answer(&query, self.state.told(), &self.inventory, cx.now_ns())),
        }
    }

    /// A command about the balloon. None waits for the guest.
    fn balloon(&mut self, command: &Command, cx: &mut Cx<'_>) -> Result<Value> {
        let memory = self
            .memory
            .as_mut()
            .ok_or_else(|| Error::new(error::Kind::NotActive, "No balloon device has been activated"))?;
        match command {
            Command::Balloon(asked) => memory.set_target(asked.value.0, cx.now_ns()).map(|()| json!({})),
            Command::QueryBalloon => memory.info().and_then(answers::value),
            Command::QueryBalloonDetail => memory.detail(cx.now_ns()).and_then(answers::value),
            Command::QueryBalloonStats => memory.stats().and_then(answers::value),
            Command::BalloonStatsInterval(asked) => memory.set_interval(asked.seconds, cx).map(|()| json!({})),
            _ => Ok(json!({})),
        }
    }

    fn balloon_changed(&mut self, info: Option<BalloonInfo>) {
        if let Some(info) = info {
            self.tell(&Event::BalloonChanged(info.clone()));
            self.tell(&Event::BalloonChange(info));
        }
    }

    fn change(&mut self, change: Change) {
        self.waiting.push_back(change);
        self.next_change();
    }

    /// The guest has asked for a reset. It asks in vain while one is on its way: who pulls the line has not been parked yet.
    fn guest_resets(&mut self, how: &str, now_ns: u64) {
        if self.end.get().is_some() {
            // Linux asks again until its vCPU is parked.
        } else if self.no_reboot {
            info!("the guest resets the machine by {how}, which ends it (-no-reboot or reboot=off)");
            self.finish(ShutdownCause::GuestReset, End::Wanted);
        } else if self.reset.is_none() && !self.waiting.iter().any(|change| matches!(change, Change::Reset(_))) {
            if self.log.allows(now_ns) {
                info!("the guest resets the machine by {how}");
            }
            self.change(Change::Reset(Reset::new(ShutdownCause::GuestReset, None)));
        }
    }

    /// The host has no room for a page of guest memory. The machine stops, and the page is tried again at `cont`.
    fn guest_starves(&mut self, why: String, now_ns: u64) {
        if self.state != State::Running || self.waiting.iter().any(|change| matches!(change, Change::Stop(_))) {
            // Each vCPU may report it until it is parked.
            return;
        }
        if self.log.allows(now_ns) {
            error!("the machine stops: {why}, then use cont");
        }
        self.tell(&Event::GuestMemoryFull(GuestMemoryFull { reason: why }));
        self.change(Change::Stop(Done::posted(|_| {})));
    }

    /// The guest's kernel has come to its end, which is the machine's too, unless a crash kernel takes over.
    fn guest_panics(&mut self, what: GuestPanic) {
        match what {
            GuestPanic::Panicked => {
                error!("the guest's kernel has panicked");
                self.tell(&Event::GuestPanicked(Panicked { action: GuestPanicAction::Poweroff }));
                self.finish(ShutdownCause::GuestPanic, End::Wanted);
            }
            GuestPanic::CrashLoaded => {
                error!("the guest's kernel has panicked, and starts its crash kernel");
                self.tell(&Event::GuestCrashloaded(Panicked { action: GuestPanicAction::Run }));
            }
        }
    }

    /// Carries out the changes of state that stand in line, up to one that takes time.
    fn next_change(&mut self) {
        while !matches!(self.state, State::Parking { .. } | State::Draining { .. } | State::Resetting { .. }) {
            let Some(change) = self.waiting.pop_front() else { return };
            match (change, self.state) {
                (Change::Stop(done), State::Running) => {
                    self.stopping = Some(done);
                    self.park(Then::Stop);
                }
                (Change::Cont(done), State::Paused | State::Prelaunch) => {
                    for worker in &self.inventory.workers {
                        // A worker that is gone has failed and said so.
                        let _ = worker.send(virtio::Command::Resume);
                    }
                    self.state = State::Running;
                    // First the event, then the answer, and both before the guest can cause another.
                    self.tell(&Event::Resume);
                    done.end(Ok(json!({})));
                    self.resume();
                }
                (Change::Reset(reset), State::Running) => {
                    self.reset = Some(reset);
                    self.park(Then::Reset);
                }
                (Change::Reset(reset), State::Paused | State::Prelaunch) => {
                    self.reset = Some(reset);
                    self.begin_reset(false);
                }
                // Already so, or at its end: nothing to do and nothing to tell.
                (Change::Stop(done) | Change::Cont(done), _) => done.end(Ok(json!({}))),
                (Change::Reset(mut reset), _) => reset.answer(self.failure()),
            }
        }
    }

    fn park(&mut self, then: Then) {
        self.state = State::Parking { left: self.inventory.vcpus.len(), then };
        for vcpu in self.inventory.vcpus.iter() {
            vcpu.park();
        }
    }

    /// A vCPU that has not parked in time is called once more, and once more.
    fn call_again(&mut self, cx: &Cx<'_>) {
        self.calling = false;
        if let State::Parking { left, .. } = self.state {
            if self.log.allows(cx.now_ns()) {
                warn!("{left} vCPUs have not stopped in 0.1 s and are called again");
            }
            self.inventory.vcpus.iter().for_each(VcpuHandle::call_again);
        }
    }

    /// Keeps the timer of those calls.
    fn keep_calling(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        let Some(call) = self.call else { return Ok(()) };
        let parking = matches!(self.state, State::Parking { .. });
        match (parking, self.calling) {
            (true, false) => cx.arm(call, cx.now_ns() + PATIENCE_NS)?,
            (false, true) => cx.cancel(call)?,
            _ => {}
        }
        self.calling = parking;
        Ok(())
    }

    fn resume(&self) {
        for vcpu in self.inventory.vcpus.iter() {
            vcpu.resume();
        }
    }

    fn parked(&mut self) {
        let State::Parking { left, then } = self.state else { return };
        match (left.saturating_sub(1), then) {
            (0, Then::Launch) => self.state = State::Prelaunch,
            (0, Then::Stop) => {
                for worker in &self.inventory.workers {
                    let sender = self.sender.clone();
                    let done = Done::posted(move |_| {
                        let _ = sender.send(Message::Drained);
                    });
                    // A worker that is gone drops the slip, which is posted all the same.
                    let _ = worker.send(virtio::Command::Pause(done));
                }
                self.state = State::Draining { left: self.inventory.workers.len() };
            }
            (0, Then::Reset) => self.begin_reset(true),
            (left, then) => self.state = State::Parking { left, then },
        }
        self.settle();
    }

    /// All vCPUs are parked, and a reset begins after which they run again, or do not.
    fn begin_reset(&mut self, runs: bool) {
        self.state = State::Resetting { runs };
        let begun = self.reset.as_mut().map_or(Ok(()), |reset| reset.begin(&self.inventory, &self.sender));
        self.check_reset(begun);
    }

    fn worker_done(&mut self) {
        match self.state {
            State::Draining { left } => {
                self.state = State::Draining { left: left.saturating_sub(1) };
                self.settle();
            }
            State::Resetting { .. } => {
                let done = self.reset.as_mut().map_or(Ok(()), |reset| reset.worker_done(&self.inventory));
                self.check_reset(done);
            }
            _ => {}
        }
    }

    fn check_reset(&mut self, done: Result<()>) {
        if let Err(error) = done {
            self.finish(ShutdownCause::HostError, End::Failed(format!("reset: {error}")));
        }
    }

    fn vcpu_reset(&mut self) {
        let State::Resetting { runs } = self.state else { return };
        let Some(mut reset) = self.reset.take_if(|reset| reset.vcpu_done(&self.inventory)) else { return };
        self.state = if runs { State::Running } else { State::Prelaunch };
        self.tell(&Event::Reset(ResetData { guest: reset.cause.is_guests(), reason: reset.cause }));
        reset.answer(Ok(()));
        if runs {
            self.resume();
        }
        self.next_change();
    }

    /// Ends a change of state that has nothing left to wait for, and goes on to the next.
    fn settle(&mut self) {
        if self.state == (State::Draining { left: 0 }) {
            self.state = State::Paused;
            self.tell(&Event::Stop);
            if let Some(done) = self.stopping.take() {
                done.end(Ok(json!({})));
            }
        }
        self.next_change();
    }

    /// Tells everybody that the machine ends, and leaves the loop once they have been told.
    fn finish(&mut self, cause: ShutdownCause, end: End) {
        // The first cause is the cause.
        if self.end.set(end).is_err() {
            return;
        }
        info!("the machine ends: {cause}");
        self.state = State::ended_by(cause);
        for vcpu in self.inventory.vcpus.iter() {
            vcpu.stop();
        }
        self.tell(&Event::Shutdown(Shutdown { guest: cause.is_guests(), reason: cause }));
        if let Some(done) = self.stopping.take() {
            done.end(self.failure().map(|()| json!({})));
        }
        if let Some(mut reset) = self.reset.take() {
            reset.answer(self.failure());
        }
        self.next_change();
        // Told a turn later, behind what the sessions are told: so they write it first.
        let _ = self.leave.0.send(());
    }

    /// The error for commands that are pending when the machine fails.
    fn failure(&self) -> Result<()> {
        match self.end.get() {
            Some(End::Failed(why)) => Err(Error::host(format!("the virtual machine has failed: {why}"))),
            _ => Ok(()),
        }
    }

    fn io_failure(&mut self, drive: String, failure: &IoFailure) {
        error!("drive \"{drive}\": {:?}: {}", failure.kind, failure.error);
        let plugged = self.inventory.disks.iter().filter_map(|disk| disk.drive.as_ref());
        let device = plugged.into_iter().find(|plugged| plugged.spec.id == drive).map(|plugged| plugged.device.clone());
        let device = device.unwrap_or_else(|| drive.clone());
        let operation = if failure.kind == Kind::Read { IoOperationType::Read } else { IoOperationType::Write };
        self.tell(&Event::BlockIoError(BlockIoError {
            qom_path: answers::qom_path(&device),
            node_name: Some(drive),
            device,
            operation,
            action: BlockErrorAction::Report,
            nospace: Some(failure.error.raw_os_error() == Some(libc::ENOSPC)),
            reason: failure.error.to_string(),
        }));
    }

    /// Sends an event to every client; those that have gone are forgotten.
    fn tell(&mut self, event: &Event) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = Timestamp { seconds: since_epoch.as_secs(), microseconds: since_epoch.subsec_micros() };
        self.sessions.retain(|session| session.send(ToSession::Event(event.clone(), at)).is_ok());
    }
}

impl Handler for Control {
    fn name(&self) -> &str {
        "control"
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.notices, 0);
        cx.listen(&self.messages, 1);
        cx.listen(&self.leave.1, LEAVE);
        self.call = Some(cx.timer(CALL)?);
        self.memory.as_mut().map_or(Ok(()), |memory| memory.attach(cx))
    }

    fn ready(&mut self, event: LoopEvent, cx: &mut Cx<'_>) -> Result<Flow> {
        if event.tag == LEAVE {
            cx.stop();
            return Ok(Flow::Done);
        }
        if event.tag == CALL {
            self.call_again(cx);
        }
        while let Some(notice) = self.notices.receive() {
            self.notice(notice, cx)?;
        }
        while let Some(message) = self.messages.receive() {
            self.message(message, cx);
        }
        if let Some(memory) = &mut self.memory {
            let info = memory.ready(event, cx)?;
            self.balloon_changed(info);
        }
        self.keep_calling(cx)?;
        Ok(Flow::Done)
    }
}
