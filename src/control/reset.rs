//! A reset of the machine, step by step: the devices' workers, the registers and interrupt controllers, the vCPUs, and what
//! the boot vCPU starts from.
//!
//! It begins when all vCPUs are parked, and each step when the last answer of the step before is in: nobody waits here. The
//! vCPUs are all reset before anything is loaded, because KVM writes into guest memory for one that is not (stolen time).
//! When a reset may begin, and what comes after it, is `run`'s. Main thread.

use serde_json::{Value, json};

use super::run::Message;
use crate::error::Result;
use crate::event::{Done, Sender};
use crate::machine::Inventory;
use crate::qmp::event::ShutdownCause;
use crate::virtio;

/// How far a reset is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It has not begun.
    Asked,
    /// So many workers have not let go of the old life.
    Workers(usize),
    /// So many vCPUs are not as before their first instruction.
    Vcpus(usize),
    /// The boot vCPU has not loaded what it starts from.
    Loading,
}

/// One reset, from its being asked for to its answer.
pub struct Reset {
    /// Who asked.
    pub cause: ShutdownCause,
    answer: Option<Done<Result<Value>>>,
    step: Step,
}

impl Reset {
    /// One for `cause`, with the answer to whom it is owed.
    pub fn new(cause: ShutdownCause, answer: Option<Done<Result<Value>>>) -> Reset {
        Reset { cause, answer, step: Step::Asked }
    }

    /// All vCPUs are parked: asks the workers to let go, each of which will say [`Message::Drained`].
    ///
    /// # Errors
    /// As [`Reset::worker_done`].
    pub fn begin(&mut self, inventory: &Inventory, sender: &Sender<Message>) -> Result<()> {
        // One more than there are, so that a machine without a worker goes on too.
        self.step = Step::Workers(inventory.workers.len() + 1);
        for worker in &inventory.workers {
            let sender = sender.clone();
            let done = Done::posted(move |_| {
                let _ = sender.send(Message::Drained);
            });
            // A worker that is gone drops the slip, which is posted all the same.
            let _ = worker.send(virtio::Command::Reset(done));
        }
        self.worker_done(inventory)
    }

    /// A worker has let go. After the last, the registers are reset and the vCPUs asked to reset themselves.
    ///
    /// # Errors
    /// KVM refuses to reset the interrupt controllers.
    pub fn worker_done(&mut self, inventory: &Inventory) -> Result<()> {
        match self.step {
            Step::Workers(1) => {
                inventory.hardware.reset()?;
                self.step = Step::Vcpus(inventory.vcpus.len());
                for vcpu in inventory.vcpus.iter() {
                    vcpu.reset();
                }
            }
            Step::Workers(left) => self.step = Step::Workers(left - 1),
            Step::Asked | Step::Vcpus(_) | Step::Loading => {}
        }
        Ok(())
    }

    /// A vCPU has done what it was asked: whether the machine is ready to run.
    pub fn vcpu_done(&mut self, inventory: &Inventory) -> bool {
        match self.step {
            Step::Vcpus(1) => {
                self.step = Step::Loading;
                if let Some(first) = inventory.vcpus.first() {
                    first.boot();
                }
            }
            Step::Vcpus(left) => self.step = Step::Vcpus(left.saturating_sub(1)),
            Step::Loading => return true,
            Step::Asked | Step::Workers(_) => {}
        }
        false
    }

    /// It is over, or will never be: whoever asked is told.
    pub fn answer(&mut self, result: Result<()>) {
        if let Some(done) = self.answer.take() {
            done.end(result.map(|()| json!({})));
        }
    }
}
