//! Where everything stands, written to the log when somebody asks for it (SIGUSR1): for a guest that hangs.
//!
//! Main thread. What other threads have to say comes later, as a message.

use log::info;

use super::run::Message;
use super::state::State;
use crate::event::{Done, Lost, Sender};
use crate::machine::Inventory;
use crate::virtio;

/// Logs what is known here, and asks the vCPUs and the workers for theirs: they say it in time, or never.
pub fn log(state: State, inventory: &Inventory, sender: &Sender<Message>) {
    info!("run state {state:?}");
    let iothreads = inventory.iothreads.iter().map(|(id, remote)| (id.as_str(), remote));
    for (id, remote) in std::iter::once(("main", &inventory.main)).chain(iothreads) {
        info!("loop {id}, thread {}: {:?}", remote.thread_id(), remote.counters());
    }
    for vcpu in inventory.vcpus.iter() {
        vcpu.dump();
    }
    for worker in &inventory.workers {
        let sender = sender.clone();
        let done = Done::posted(move |line: Result<String, Lost>| {
            let line = line.unwrap_or_else(|Lost| "the worker of a device is gone".to_string());
            let _ = sender.send(Message::Dumped(line));
        });
        let _ = worker.send(virtio::Command::Dump(done));
    }
}
