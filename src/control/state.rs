//! What the machine is doing as Control knows it, what it can be asked for, and what an operator is told of it.
//!
//! Plain data; what leads from one state to another is in `run`. Main thread.

use serde_json::Value;

use super::reset::Reset;
use crate::error::Result;
use crate::event::Done;
use crate::qmp::event::ShutdownCause;
use crate::qmp::reply::RunState;

/// The run state. Its changes are in `run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// `-S`, or a reset while paused: the vCPUs have not run yet.
    Prelaunch,
    Running,
    /// So many vCPUs have not reported yet that they are parked.
    Parking {
        left: usize,
        then: Then,
    },
    /// All vCPUs are parked; so many workers may still have requests in flight.
    Draining {
        left: usize,
    },
    Paused,
    /// All vCPUs are parked; the [`Reset`] says how far it is.
    Resetting {
        runs: bool,
    },
    Ended(RunState),
}

/// What the vCPUs are being parked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Launch,
    Stop,
    Reset,
}

/// A change of state that was asked for.
pub enum Change {
    Stop(Done<Result<Value>>),
    Cont(Done<Result<Value>>),
    Reset(Reset),
}

impl State {
    /// Under QEMU's name.
    pub fn told(self) -> RunState {
        match self {
            State::Prelaunch | State::Parking { then: Then::Launch, .. } | State::Resetting { runs: false } => {
                RunState::Prelaunch
            }
            // Until the last request is back the machine has not stopped.
            State::Running | State::Parking { .. } | State::Draining { .. } | State::Resetting { runs: true } => {
                RunState::Running
            }
            State::Paused => RunState::Paused,
            State::Ended(state) => state,
        }
    }

    /// The last one, for this cause.
    pub fn ended_by(cause: ShutdownCause) -> State {
        State::Ended(match cause {
            ShutdownCause::HostError => RunState::InternalError,
            ShutdownCause::GuestPanic => RunState::GuestPanicked,
            _ => RunState::Shutdown,
        })
    }
}
