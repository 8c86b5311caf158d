//! `hello`: what the guest sees of its machine.

use crate::clock::{self, Source};
use crate::memory;
use crate::start::Machine;
use crate::text::Outcome;
use crate::virtio::blk::{self, Disk};
use crate::virtio::mmio::Device;

pub fn run(machine: &Machine) -> Outcome {
    say!("loopvisor test guest");
    let clock = match clock::source() {
        Source::KvmClock => "kvm",
        Source::Uncalibrated => "uncalibrated",
    };
    let ram_kib = machine.ram >> 10;
    let free_kib = memory::free() >> 10;
    say!("hello: protocol={} clock={clock} ram_kib={ram_kib} free_kib={free_kib}", machine.protocol);
    say!("hello: devices={}", Device::all(machine.words).count());
    let mut disks = 0;
    for device in Device::all(machine.words) {
        let (address, irq, id) = (device.registers.base(), device.irq, device.id);
        let offered = device.offered();
        say!("device: address={address:#x} irq={irq} id={id} features={offered:#x}");
        if id == blk::DEVICE_ID {
            disk(disks, device)?;
            disks += 1;
        }
    }
    Ok(())
}

fn disk(number: u64, device: Device) -> Outcome {
    let disk = Disk::start(number, device, blk::KNOWN, 256)?;
    let read_only = u8::from(disk.has(blk::F_RO));
    let (sectors, features, queue) = (disk.capacity_sectors, disk.features, disk.ring.size());
    say!("disk: disk={number} sectors={sectors} features={features:#x} readonly={read_only} queue={queue}");
    device.reset()
}
