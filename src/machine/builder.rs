//! From what the user asked for to a machine that is ready to run: memory, KVM, devices, kernel, vCPUs.
//!
//! What can be refused cheaply is tried first; the iothreads set up their devices while the kernel is being loaded.
//! Nothing runs in the guest until [`Machine::start`]. Main thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use log::warn;

use super::board::Board;
use super::boot::Boot;
use super::hardware::{Hardware, Image};
use super::inventory::{self, DiskSlot, Inventory, NicSlot, Notice};
use super::parts::drive::DriveMaker;
use super::{layout, parts};
use crate::bus::{Bus, Range};
use crate::config::spec::{DriveSpec, SerialSpec, VmSpec};
use crate::devices::i8042::I8042;
use crate::devices::net::Net;
use crate::devices::power::Power;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::reset::ResetRegister;
use crate::devices::serial::{Serial, SerialEvent};
use crate::disk::Disk;
use crate::error::{Context, Result};
use crate::event::thread::LoopThread;
use crate::event::{EventLoop, Remote, Sender};
use crate::kvm::irq::Irq;
use crate::kvm::vcpu::{Buses, Vcpu, VcpuHandle};
use crate::kvm::vm::Vm;
use crate::memory;
use crate::sys::progress::Progress;
use crate::sys::{stdio, tune};

/// A machine whose vCPUs have not been started.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    buses: Buses,
    notices: Sender<Notice>,
    inventory: Inventory,
    balloon: Option<inventory::Balloon>,
    serial: Arc<Mutex<Serial>>,
    lines: Vec<Irq>,
    iothreads: Vec<LoopThread>,
}

/// The threads of a running machine, to be ended by the main thread once its loop has returned: first the vCPUs, of
/// which one may be waiting for a device, then the iothreads, which answer it.
pub struct Threads {
    _vcpus: Arc<[VcpuHandle]>,
    _iothreads: Vec<LoopThread>,
    _lines: Vec<Irq>,
}

impl Machine {
    /// Builds the machine of `spec`. Devices without an iothread go to `main`. The machine's threads speak through
    /// `notices`, its serial port through `serial_events`.
    ///
    /// # Errors
    /// Whatever the host refuses, with the part's name.
    pub fn build(
        spec: &VmSpec,
        main: &mut EventLoop,
        notices: Sender<Notice>,
        serial_events: Sender<SerialEvent>,
        progress: &Progress,
    ) -> Result<Machine> {
        progress.at(format!("taking {} MiB of memory for the guest", spec.memory_bytes >> 20));
        let ram = match &spec.mem_path {
            None => memory::allocate(spec.memory_bytes, spec.mem_share, spec.dump_guest_core)?,
            Some(path) => memory::allocate_on(path, spec.memory_bytes, spec.mem_share, spec.dump_guest_core)?,
        };
        memory::reserve(&ram)?;
        let sockets =
            spec.consoles.iter().map(|console| parts::console::listen(console, spec)).collect::<Result<Vec<_>>>()?;
        let open = |drive: &DriveSpec| {
            progress.at(format!("opening {:?} for drive {:?}", drive.file, drive.id));
            Disk::open(drive, ram.clone())
        };
        let disks = spec.drives.iter().map(open).collect::<Result<Vec<_>>>()?;
        let devices = spec.nics.iter().map(|nic| parts::nic::net(nic, &ram)).collect::<Result<Vec<_>>>()?;
        progress.at("making the virtual machine (/dev/kvm)");
        let mut vm = Vm::new(ram.clone())?;
        if !spec.pmu {
            vm.hide_pmu();
        }
        let vm = Arc::new(vm);
        let iothreads = spec
            .iothreads
            .iter()
            .map(|iothread| LoopThread::start(&iothread.id, tune::short_slice))
            .collect::<Result<Vec<_>>>()?;
        let home = |id: Option<&str>| iothreads.iter().find(|thread| Some(thread.id()) == id).map(LoopThread::remote);
        let mut board = Board::new(vm.clone());
        let maker = DriveMaker::new(ram.clone(), notices.clone());
        let disks = plug_disks(spec, disks, &maker, &mut board, &home, main)?;
        let nics = plug_nics(spec, devices, &mut board, &home, main)?;
        let mut balloon = None;
        if let Some(asked) = spec.balloons.first() {
            let (device, part) = parts::balloon::balloon(asked, spec, &ram, &notices)?;
            balloon = Some(part);
            // In the main loop: giving pages back is no work for an iothread's disks (rule D1.3).
            board.plug(Box::new(device), None, main)?;
        }
        if let Some(asked) = spec.rngs.first() {
            board.plug(Box::new(parts::rng::rng(asked, &ram)?), None, main)?;
        }
        let mut consoles = Vec::with_capacity(sockets.len());
        for (asked, listener) in spec.consoles.iter().zip(sockets) {
            let (device, part) = parts::console::console(asked, listener, &ram);
            consoles.push(part);
            board.plug(Box::new(device), None, main)?;
        }
        let mut vsocks = Vec::new();
        for asked in &spec.vsocks {
            let (device, part) = parts::vsock::vsock(asked, &ram)?;
            vsocks.push(part);
            board.plug(device, None, main)?;
        }
        let serial = serial(spec.serial, &vm, serial_events)?;
        let pio = Bus::new(legacy(&serial, &notices))?;
        let initrd = spec.initrd.as_ref().map(|initrd| format!(" and {initrd:?}")).unwrap_or_default();
        progress.at(format!("reading {:?}{initrd}", spec.kernel));
        let vcpus = prepare_vcpus(spec, &vm, &board)?;
        let mut soldered = board.finish()?;
        let power_button = Irq::new(&vm, layout::POWER_BUTTON_IRQ)?;
        let buses = Buses { pio, mmio: Bus::new(soldered.mmio)? };
        let inventory = Inventory {
            name: spec.name.clone(),
            vcpus: Arc::new([]),
            workers: soldered.workers,
            hardware: Hardware::new(buses.clone(), vm, power_button.eventfd()),
            disks,
            consoles,
            nics,
            vsocks,
            iothreads: iothreads.iter().map(|thread| (thread.id().to_string(), thread.remote().clone())).collect(),
            main: main.remote(),
            maker,
        };
        soldered.lines.push(power_button);
        Ok(Machine { vcpus, buses, notices, inventory, balloon, serial, lines: soldered.lines, iothreads })
    }

    /// The serial port, for whoever feeds it.
    pub fn serial(&self) -> &Arc<Mutex<Serial>> {
        &self.serial
    }

    /// The balloon, for who is to move it; `None` if there is none, or if it has been taken.
    pub fn take_balloon(&mut self) -> Option<inventory::Balloon> {
        self.balloon.take()
    }

    /// Starts the vCPUs: running, or `frozen` before their first instruction.
    ///
    /// # Errors
    /// EAGAIN from the kernel's limit on threads.
    pub fn start(mut self, frozen: bool) -> Result<(Inventory, Threads)> {
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for vcpu in self.vcpus {
            let notices = self.notices.clone();
            let on_event = move |event| {
                // A control plane that is gone is waiting for this thread to end.
                let _ = notices.send(Notice::Vcpu(event));
            };
            vcpus.push(vcpu.start(self.buses.clone(), frozen, on_event)?);
        }
        self.inventory.vcpus = vcpus.into();
        // From here on a client may ask for their ids.
        self.iothreads.iter_mut().for_each(LoopThread::await_begun);
        let threads = Threads { _vcpus: self.inventory.vcpus.clone(), _iothreads: self.iothreads, _lines: self.lines };
        Ok((self.inventory, threads))
    }
}

/// The loop of an iothread, by its id; none is the main loop.
type Home<'a> = dyn Fn(Option<&str>) -> Option<&'a Remote> + 'a;

/// The disks of the command line into the first slots, and what stands in for the others into the rest.
fn plug_disks(
    spec: &VmSpec,
    disks: Vec<Disk>,
    maker: &DriveMaker,
    board: &mut Board,
    home: &Home<'_>,
    main: &mut EventLoop,
) -> Result<Vec<DiskSlot>> {
    let mut groups = HashMap::new();
    let mut disks = spec.drives.iter().zip(disks);
    let plug = |slot| {
        let (device, drive, iothread) = match disks.next() {
            Some((drive, disk)) => {
                if let Some(warning) = drive.cut_serial() {
                    warn!("{warning}");
                }
                let limits = spec.limits_of(drive);
                let throttle = parts::drive::throttle(drive, &limits, &mut groups);
                let (device, part) = maker.make(drive, disk, throttle, limits);
                (device, Some(part), drive.iothread.as_deref())
            }
            None => (maker.vacant(slot), None, None),
        };
        let worker = board.plug(device, home(iothread), main)?;
        Ok(DiskSlot { worker, drive, busy: false })
    };
    (0..spec.slots().disks).map(plug).collect()
}

/// The NICs of the command line into the first slots, and NICs without a cable into the rest.
fn plug_nics(
    spec: &VmSpec,
    nics: Vec<(Net, NicSlot)>,
    board: &mut Board,
    home: &Home<'_>,
    main: &mut EventLoop,
) -> Result<Vec<NicSlot>> {
    let mut nics = spec.nics.iter().zip(nics);
    let plug = |number| {
        let (net, slot, iothread) = match nics.next() {
            Some((asked, (net, slot))) => (net, slot, asked.iothread.as_deref()),
            None => {
                let (net, slot) = parts::nic::vacant(number, board.ram());
                (net, slot, None)
            }
        };
        board.plug(Box::new(net), home(iothread), main)?;
        Ok(slot)
    };
    (0..spec.slots().nics).map(plug).collect()
}

/// The serial port at its interrupt, connected as asked.
fn serial(spec: SerialSpec, vm: &Arc<Vm>, events: Sender<SerialEvent>) -> Result<Arc<Mutex<Serial>>> {
    let irq = Irq::new(vm, layout::SERIAL_IRQ)?;
    let output = match spec {
        SerialSpec::None => None,
        SerialSpec::Stdio => Some(stdio::output().context(|| "-serial stdio: duplicate standard output")?),
    };
    let on_event = move |event| {
        // The console may be gone: nobody types, nobody reads.
        let _ = events.send(event);
    };
    Ok(Arc::new(Mutex::new(Serial::new(irq, output, on_event))))
}

/// The devices that a PC has always had, at their ports.
fn legacy(serial: &Arc<Mutex<Serial>>, notices: &Sender<Notice>) -> Vec<Range> {
    let tell = |notice: fn() -> Notice| {
        let notices = notices.clone();
        move || {
            // As in `parts::drive::block`.
            let _ = notices.send(notice());
        }
    };
    let i8042 = Arc::new(Mutex::new(I8042::new(tell(|| Notice::Reset))));
    let port_a = Arc::new(Mutex::new(ResetRegister::port_a(tell(|| Notice::Reset))));
    let reset_control = Arc::new(Mutex::new(ResetRegister::reset_control(tell(|| Notice::Reset))));
    let power = Arc::new(Mutex::new(Power::new(tell(|| Notice::PowerOff))));
    let panics = notices.clone();
    let pvpanic = Pvpanic::new(move |what| {
        let _ = panics.send(Notice::Panic(what));
    });
    vec![
        Range { base: layout::SERIAL.into(), len: layout::SERIAL_PORTS, slot: serial.clone() },
        Range { base: layout::I8042.into(), len: layout::I8042_PORTS, slot: i8042 },
        Range { base: layout::PORT_A.into(), len: 1, slot: port_a },
        Range { base: layout::RESET_CONTROL.into(), len: 1, slot: reset_control },
        Range { base: layout::PVPANIC.into(), len: 1, slot: Arc::new(Mutex::new(pvpanic)) },
        Range { base: layout::SLEEP_CONTROL.into(), len: layout::SLEEP_PORTS, slot: power },
    ]
}

/// Makes the vCPUs, and loads the kernel and the tables that describe the machine to it.
fn prepare_vcpus(spec: &VmSpec, vm: &Arc<Vm>, board: &Board) -> Result<Vec<Vcpu>> {
    let slots = board.slots();
    let words: Vec<String> = slots.iter().map(layout::VirtioSlot::kernel_word).collect();
    let boot = Boot::open(&spec.kernel, spec.kernel_format, spec.initrd.as_deref(), spec.append.clone())?
        .with_words(words.join(" "), spec.kernel_words);
    let mut vcpus = (0..spec.cpus).map(|index| Vcpu::new(vm, index, spec.cpus)).collect::<Result<Vec<_>>>()?;
    if let Some(first) = vcpus.first_mut() {
        let mut image = Image::new(vm.clone(), boot, spec.cpus, slots);
        first.boot_by(Box::new(move || image.load()))?;
    }
    Ok(vcpus)
}
