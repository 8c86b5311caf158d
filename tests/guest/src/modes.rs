//! One mode a test, chosen by the word `mode=`.

mod balloon;
mod blk_check;
mod blk_hostile;
mod blk_load;
mod blk_plug;
mod blk_reset;
mod blk_typed;
mod blk_verify;
mod console;
mod echo;
mod hello;
mod idle;
mod irq;
mod net;
pub mod power;
mod random;
mod reboot;
mod rng;
mod smp;
mod spin;
mod touch;
mod vsock;

use crate::start::Machine;
use crate::text::Outcome;

/// Runs the mode of that name.
pub fn run(mode: &str, machine: &Machine) -> Outcome {
    match mode {
        "hello" => hello::run(machine),
        "balloon" => balloon::run(machine.words),
        "blk-check" => blk_check::run(machine.words),
        "blk-load" => blk_load::run(machine.words),
        "blk-plug" => blk_plug::run(machine.words),
        "blk-typed" => blk_typed::run(machine.words),
        "blk-verify" => blk_verify::run(machine.words),
        "blk-reset" => blk_reset::run(machine.words),
        "blk-hostile" => blk_hostile::run(machine),
        "rng" => rng::run(machine.words),
        "console" => console::run(machine.words),
        "net-deaf" => net::deaf(machine.words),
        "net-send" => net::send(machine.words),
        "net-sink" => net::sink(machine.words),
        "net-echo" => net::echo(machine.words),
        "irq" => irq::run(machine.words),
        "echo" => echo::run(),
        "idle" => idle::run(machine.words),
        "spin" => spin::run(machine.words),
        "power" => power::run(machine.words),
        "crash" => power::crash(machine.words),
        "reboot" => reboot::run(machine.words),
        "smp" => smp::run(machine.words),
        "vsock" => vsock::run(machine.words),
        "touch" => touch::run(machine.words),
        _ => fail!("no mode {mode}"),
    }
}
