//! `Control`: the run state of the machine, and the one place where requests, vCPU events and device events meet.
//!
//! A handler of the main loop. It never waits: `stop` asks the vCPUs to park, asks the workers to drain when the last
//! one has, and answers when the last slip is back; what asks to change the run state meanwhile stands in line. It
//! holds no device and no socket.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use log::{error, info};
use serde_json::{Value, json};

use super::memory::Memory;
use super::session::ToSession;
use super::{answers, throttle};
use crate::devices::balloon::BalloonNews;
use crate::devices::block::{IoFailure, Kind};
use crate::error::{self, Error, Result};
use crate::event::{Cx, Done, Event as LoopEvent, Flow, Handler, Lost, Receiver, Sender, channel};
use crate::kvm::vcpu::VcpuEvent;
use crate::machine::{Inventory, Notice};
use crate::qmp::balloon::BalloonInfo;
use crate::qmp::command::Command;
use crate::qmp::event::{BlockErrorAction, BlockIoError, Event, IoOperationType, Shutdown, ShutdownCause, Timestamp};
use crate::qmp::reply::RunState;
use crate::virtio;

/// The tag of the channel by which Control leaves the loop.
const LEAVE: u32 = 2;

/// What Control is told by the rest of the control plane; the machine's own voice is [`Notice`].
pub enum Message {
    /// A client has connected and wants to hear of events.
    Joined(Sender<ToSession>),
    /// A client asks for something.
    Command(Command, Done<Result<Value>>),
    /// The machine is to end, and why.
    End(ShutdownCause),
    /// A worker has drained, or is gone.
    Drained,
    /// Somebody wants to know where everything stands (SIGUSR1).
    Dump,
    /// A part of the dump.
    Dumped(String),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By the guest's or an operator's wish: exit code 0.
    Wanted,
    /// By a failure, which is to be told on standard error: exit code 1.
    Failed(String),
}

/// The run state. Its changes are in [`Control::next_change`], [`Control::parked`] and [`Control::drained`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// `-S`: the vCPUs have not run yet.
    Prelaunch,
    Running,
    /// So many vCPUs have not reported yet that they are parked.
    Parking {
        left: usize,
        launched: bool,
    },
    /// All vCPUs are parked; so many workers may still have requests in flight.
    Draining {
        left: usize,
    },
    Paused,
    Ended(RunState),
}

/// A request and its reply slip.
type Asked = (Command, Done<Result<Value>>);

/// The machine's run state, and who is to hear of it.
pub struct Control {
    inventory: Inventory,
    /// The balloon, if there is one.
    memory: Option<Memory>,
    notices: Receiver<Notice>,
    messages: Receiver<Message>,
    /// For what is posted back to itself.
    sender: Sender<Message>,
    state: State,
    /// The `stop` that the present change of state will answer.
    stopping: Option<Done<Result<Value>>>,
    /// Changes of state asked for, in order; they wait while one is going on.
    waiting: VecDeque<Asked>,
    sessions: Vec<Sender<ToSession>>,
    /// Posted to itself when every client has been told of the end.
    leave: (Sender<()>, Receiver<()>),
    end: Arc<OnceLock<End>>,
}

impl Control {
    /// Control over `inventory` and, if there is a balloon, its `memory`. The vCPUs are running, or parking themselves if
    /// `frozen`. `end` is where it leaves how the machine ended.
    pub fn new(
        inventory: Inventory,
        memory: Option<Memory>,
        frozen: bool,
        notices: Receiver<Notice>,
        (sender, messages): (Sender<Message>, Receiver<Message>),
        end: Arc<OnceLock<End>>,
    ) -> Self {
        let left = inventory.vcpus.len();
        let state = if frozen { State::Parking { left, launched: false } } else { State::Running };
        Control {
            inventory,
            memory,
            notices,
            messages,
            sender,
            state,
            stopping: None,
            waiting: VecDeque::new(),
            sessions: Vec::new(),
            leave: channel(),
            end,
        }
    }

    fn run_state(&self) -> RunState {
        match self.state {
            State::Prelaunch | State::Parking { launched: false, .. } => RunState::Prelaunch,
            // Until the last request is back the machine has not stopped.
            State::Running | State::Parking { .. } | State::Draining { .. } => RunState::Running,
            State::Paused => RunState::Paused,
            State::Ended(state) => state,
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
            Message::End(cause) => self.finish(cause, End::Wanted),
            Message::Drained => self.drained(),
            Message::Dump => self.dump(),
            Message::Dumped(line) => info!("{line}"),
        }
    }

    fn notice(&mut self, notice: Notice, cx: &mut Cx<'_>) -> Result<()> {
        match notice {
            Notice::Vcpu(VcpuEvent::Parked) => self.parked(),
            Notice::Vcpu(VcpuEvent::Shutdown) | Notice::Reset => self.finish(ShutdownCause::GuestReset, End::Wanted),
            Notice::Vcpu(VcpuEvent::Failed(why)) => self.finish(ShutdownCause::HostError, End::Failed(why)),
            Notice::Vcpu(VcpuEvent::Registers(registers)) => info!("{registers}"),
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
            Command::Stop | Command::Cont => {
                self.waiting.push_back((command, done));
                self.next_change();
            }
            Command::Quit => {
                done.end(Ok(json!({})));
                self.finish(ShutdownCause::HostQmpQuit, End::Wanted);
            }
            Command::BlockSetIoThrottle(asked) => throttle::set(&asked, &mut self.inventory.drives, done),
            Command::Balloon(_)
            | Command::QueryBalloon
            | Command::QueryBalloonDetail
            | Command::QueryBalloonStats
            | Command::BalloonStatsInterval(_) => done.end(self.balloon(&command, cx)),
            query => done.end(answers::answer(&query, self.run_state(), &self.inventory, cx.now_ns())),
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

    /// Carries out the changes of state that stand in line, up to one that takes time.
    fn next_change(&mut self) {
        while !matches!(self.state, State::Parking { .. } | State::Draining { .. }) {
            let Some((command, done)) = self.waiting.pop_front() else { return };
            match (command, self.state) {
                (Command::Stop, State::Running) => {
                    self.stopping = Some(done);
                    self.state = State::Parking { left: self.inventory.vcpus.len(), launched: true };
                    for vcpu in self.inventory.vcpus.iter() {
                        vcpu.park();
                    }
                }
                (Command::Cont, State::Paused | State::Prelaunch) => {
                    for worker in &self.inventory.workers {
                        // A worker that is gone has failed and said so.
                        let _ = worker.send(virtio::Command::Resume);
                    }
                    self.state = State::Running;
                    // First the event, then the answer, and both before the guest can cause another.
                    self.tell(&Event::Resume);
                    done.end(Ok(json!({})));
                    for vcpu in self.inventory.vcpus.iter() {
                        vcpu.resume();
                    }
                }
                // Already so, or at its end: nothing to do and nothing to tell.
                _ => done.end(Ok(json!({}))),
            }
        }
    }

    fn parked(&mut self) {
        let State::Parking { left, launched } = self.state else { return };
        self.state = match (left.saturating_sub(1), launched) {
            (0, false) => State::Prelaunch,
            (0, true) => {
                for worker in &self.inventory.workers {
                    let sender = self.sender.clone();
                    let done = Done::posted(move |_| {
                        let _ = sender.send(Message::Drained);
                    });
                    // A worker that is gone drops the slip, which is posted all the same.
                    let _ = worker.send(virtio::Command::Pause(done));
                }
                State::Draining { left: self.inventory.workers.len() }
            }
            (left, launched) => State::Parking { left, launched },
        };
        self.settle();
    }

    fn drained(&mut self) {
        if let State::Draining { left } = self.state {
            self.state = State::Draining { left: left.saturating_sub(1) };
        }
        self.settle();
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
        let state = if matches!(end, End::Failed(_)) { RunState::InternalError } else { RunState::Shutdown };
        // The first cause is the cause.
        if self.end.set(end).is_err() {
            return;
        }
        self.state = State::Ended(state);
        for vcpu in self.inventory.vcpus.iter() {
            vcpu.stop();
        }
        let guest = matches!(cause, ShutdownCause::GuestShutdown | ShutdownCause::GuestReset);
        self.tell(&Event::Shutdown(Shutdown { guest, reason: cause }));
        if let Some(done) = self.stopping.take() {
            done.end(Ok(json!({})));
        }
        self.next_change();
        // Told a turn later, behind what the sessions are told: so they write it first.
        let _ = self.leave.0.send(());
    }

    fn io_failure(&mut self, drive: String, failure: &IoFailure) {
        error!("drive \"{drive}\": {:?}: {}", failure.kind, failure.error);
        let operation = if failure.kind == Kind::Read { IoOperationType::Read } else { IoOperationType::Write };
        self.tell(&Event::BlockIoError(BlockIoError {
            qom_path: answers::qom_path(&drive),
            node_name: Some(drive.clone()),
            device: drive,
            operation,
            action: BlockErrorAction::Report,
            nospace: Some(failure.error.raw_os_error() == Some(libc::ENOSPC)),
            reason: failure.error.to_string(),
        }));
    }

    /// Writes to the log where everything stands: for a guest that hangs.
    fn dump(&self) {
        info!("run state {:?}", self.state);
        let iothreads = self.inventory.iothreads.iter().map(|(id, remote)| (id.as_str(), remote));
        for (id, remote) in std::iter::once(("main", &self.inventory.main)).chain(iothreads) {
            info!("loop {id}, thread {}: {:?}", remote.thread_id(), remote.counters());
        }
        for vcpu in self.inventory.vcpus.iter() {
            vcpu.dump();
        }
        for worker in &self.inventory.workers {
            let sender = self.sender.clone();
            let done = Done::posted(move |line: std::result::Result<String, Lost>| {
                let line = line.unwrap_or_else(|Lost| "the worker of a device is gone".to_string());
                let _ = sender.send(Message::Dumped(line));
            });
            let _ = worker.send(virtio::Command::Dump(done));
        }
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
        self.memory.as_mut().map_or(Ok(()), |memory| memory.attach(cx))
    }

    fn ready(&mut self, event: LoopEvent, cx: &mut Cx<'_>) -> Result<Flow> {
        if event.tag == LEAVE {
            cx.stop();
            return Ok(Flow::Done);
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
        Ok(Flow::Done)
    }
}
