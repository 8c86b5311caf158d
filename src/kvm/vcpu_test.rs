//! Guests of a few instructions, run on the host's own KVM.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::{Range, Slot};
use crate::kvm::irq::Irq;
use crate::kvm::kick::Kick;
use crate::kvm::x86_64::regs::Mode;
use crate::memory;

/// Where the guest's code is, a port, and an address that is mapped and not RAM.
const CODE: u64 = 0x10_0000;
const PORT: u16 = 0x3f8;
const MMIO: u64 = 0x3000_0000;

/// `mov dx, PORT`
const MOV_DX: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];
/// `mov ebx, MMIO`
const MOV_EBX: [u8; 5] = [0xbb, 0x00, 0x00, 0x00, 0x30];
/// No interrupt table is loaded, so an undefined instruction is a triple fault.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// What the guest did, in order.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Read(u64, usize),
    Wrote(u64, Vec<u8>),
    Event(VcpuEvent),
}

/// Tells of each access and answers reads with the bytes it was given.
struct Probe {
    tell: Sender<Seen>,
    base: u64,
    answers: VecDeque<u8>,
}

impl Slot for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill_with(|| self.answers.pop_front().unwrap_or(0));
        let _ = self.tell.send(Seen::Read(self.base + offset, data.len()));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.tell.send(Seen::Wrote(self.base + offset, data.to_vec()));
    }
}

/// A machine with 16 MiB, or the reason why there is none.
fn machine() -> Option<Arc<Vm>> {
    match Vm::new(memory::allocate(16 << 20, false, true).unwrap()) {
        Ok(vm) => Some(Arc::new(vm)),
        Err(error) => {
            // Not by a macro of print's: the harness would keep it to itself.
            let _ = writeln!(std::io::stderr(), "skipped, no guest runs here: {error}");
            None
        }
    }
}

struct Guest {
    /// First, so that the vCPUs end before what they tell is gone.
    vcpus: Vec<VcpuHandle>,
    seen: Receiver<Seen>,
}

impl Guest {
    /// Starts `count` vCPUs, of which the first runs `code`.
    fn start(vm: &Arc<Vm>, code: &[u8], answers: &[u8], count: u8, parked: bool) -> Guest {
        let (tell, seen) = channel();
        let probe = |base, len, answers: &[u8]| {
            let slot = Probe { tell: tell.clone(), base, answers: answers.iter().copied().collect() };
            Bus::new(vec![Range { base, len, slot: Arc::new(Mutex::new(slot)) }]).unwrap()
        };
        let buses = Buses { pio: probe(PORT.into(), 8, answers), mmio: probe(MMIO, 4096, answers) };
        vm.ram().write_slice(code, GuestAddress(CODE)).unwrap();
        let entry =
            Entry { mode: Mode::Long { page_tables: 0x9000 }, rip: CODE, rsp: 0x8000, rbx: 0, rsi: 0, gdt: 0x500 };
        let mut vcpus: Vec<Vcpu> = (0..count).map(|index| Vcpu::new(vm, index, count).unwrap()).collect();
        vcpus[0].boot_by(Box::new(move || Ok(entry))).unwrap();
        let start = |vcpu: Vcpu| {
            let tell = tell.clone();
            let on_event = move |event| drop(tell.send(Seen::Event(event)));
            vcpu.start(buses.clone(), parked, on_event).unwrap()
        };
        Guest { vcpus: vcpus.into_iter().map(start).collect(), seen }
    }

    /// What comes next, called for again each second, as Control does. The time limit only turns a hang into a failure,
    /// which says where everyone stands.
    fn next(&self) -> Seen {
        for _ in 0..60 {
            match self.seen.recv_timeout(Duration::from_secs(1)) {
                Ok(seen) => return seen,
                Err(_) => {
                    let _ = writeln!(std::io::stderr(), "called again: {}", self.standing());
                    self.vcpus.iter().for_each(VcpuHandle::call_again);
                }
            }
        }
        panic!("the guest does nothing: {}", self.standing())
    }

    fn standing(&self) -> String {
        let file = |tid, name| std::fs::read_to_string(format!("/proc/self/task/{tid}/{name}")).unwrap_or_default();
        let threads =
            self.vcpus.iter().map(|vcpu| ["status", "stat", "syscall", "stack"].map(|name| file(vcpu.tid(), name)));
        format!("{:?}, {:?}", self.vcpus, threads.collect::<Vec<_>>())
    }

    fn expect(&self, expected: &[Seen]) {
        for one in expected {
            assert_eq!(self.next(), *one);
        }
    }
}

#[test]
fn port_and_memory_accesses_reach_the_buses_and_a_triple_fault_is_told() {
    let Some(vm) = machine() else { return };
    // in al, dx; inc al; out dx, al; mov eax, [rbx]; mov [rbx+4], ax
    let code = [&MOV_DX[..], &MOV_EBX, &[0xec, 0xfe, 0xc0, 0xee, 0x8b, 0x03, 0x66, 0x89, 0x43, 0x04], &UD2].concat();
    let guest = Guest::start(&vm, &code, &[0x41, 0x42, 0x43, 0x44], 1, false);
    guest.expect(&[
        Seen::Read(PORT.into(), 1),
        Seen::Wrote(PORT.into(), vec![0x42]),
        Seen::Read(MMIO, 4),
        Seen::Wrote(MMIO + 4, vec![0x41, 0x42]),
        Seen::Event(VcpuEvent::Shutdown),
    ]);
    // It runs no more and can still be parked.
    guest.vcpus[0].park();
    guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
    guest.vcpus[0].resume();
    guest.vcpus[0].park();
    guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
}

#[test]
fn a_string_instruction_makes_accesses_of_its_own_size() {
    let Some(vm) = machine() else { return };
    // mov edi, 0x5000; mov esi, edi; mov ecx, 6; rep insb; mov ecx, 3; rep outsw
    let code = [
        &MOV_DX[..],
        &[0xbf, 0, 0x50, 0, 0, 0x89, 0xfe, 0xb9, 6, 0, 0, 0, 0xf3, 0x6c],
        &[0xb9, 3, 0, 0, 0, 0xf3, 0x66, 0x6f],
        &UD2,
    ];
    let guest = Guest::start(&vm, &code.concat(), &[1, 2, 3, 4, 5, 6], 1, false);
    let port = u64::from(PORT);
    guest.expect(&[const { Seen::Read(PORT as u64, 1) }; 6]);
    guest.expect(&[
        Seen::Wrote(port, vec![1, 2]),
        Seen::Wrote(port, vec![3, 4]),
        Seen::Wrote(port, vec![5, 6]),
        Seen::Event(VcpuEvent::Shutdown),
    ]);
}

#[test]
fn a_vcpu_parks_resumes_and_stops_in_the_middle_of_a_loop_without_exits() {
    let Some(vm) = machine() else { return };
    // out dx, al; jmp $
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee, 0xeb, 0xfe]].concat(), &[], 1, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0])]);
    for _ in 0..100 {
        guest.vcpus[0].park();
        guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
        guest.vcpus[0].resume();
    }
    // Dropping it ends it.
}

#[test]
fn a_vcpu_whose_call_was_lost_answers_the_next_once() {
    let Some(vm) = machine() else { return };
    // out dx, al; jmp $
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee, 0xeb, 0xfe]].concat(), &[], 1, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0])]);
    for number in 1..=20 {
        // As `park`, but the signal comes to nothing.
        guest.vcpus[0].gate.ask(Request::Park(number));
        guest.vcpus[0].call_again();
        guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
        guest.vcpus[0].call_again();
        guest.vcpus[0].resume();
    }
    assert!(guest.seen.try_recv().is_err());
}

#[test]
fn parking_loses_and_doubles_no_access() {
    let Some(vm) = machine() else { return };
    // inc eax; out dx, eax; jmp back
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xff, 0xc0, 0xef, 0xeb, 0xfb]].concat(), &[], 1, false);
    let mut parked = 0;
    let mut count = 0u32;
    guest.vcpus[0].park();
    while parked < 200 {
        match guest.next() {
            Seen::Wrote(_, value) => {
                count += 1;
                assert_eq!(value, count.to_le_bytes());
            }
            other => {
                assert_eq!(other, Seen::Event(VcpuEvent::Parked));
                parked += 1;
                guest.vcpus[0].resume();
                guest.vcpus[0].park();
            }
        }
    }
}

#[test]
fn a_vcpu_that_sleeps_or_was_never_woken_parks_too() {
    let Some(vm) = machine() else { return };
    // out dx, al; hlt, with interrupts off; the second vCPU waits for the first to start it
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee, 0xf4]].concat(), &[], 2, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0])]);
    for vcpu in &guest.vcpus {
        for _ in 0..20 {
            vcpu.park();
            guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
            vcpu.resume();
        }
    }
}

#[test]
fn a_vcpu_started_parked_runs_nothing_until_resumed() {
    let Some(vm) = machine() else { return };
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee], &UD2].concat(), &[], 1, true);
    guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
    guest.vcpus[0].resume();
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0]), Seen::Event(VcpuEvent::Shutdown)]);
}

#[test]
fn the_registers_come_when_asked_for_whether_the_vcpu_runs_is_parked_or_has_ended() {
    let Some(vm) = machine() else { return };
    let registers = |guest: &Guest, rip: &str| {
        guest.vcpus[0].dump();
        match guest.next() {
            Seen::Event(VcpuEvent::Registers(text)) => {
                assert!(text.starts_with(&format!("vCPU 0: rip={rip} ")), "{text}")
            }
            other => panic!("{other:?}"),
        }
    };
    // out dx, al; jmp $
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee, 0xeb, 0xfe]].concat(), &[], 1, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0])]);
    for _ in 0..100 {
        registers(&guest, "0x100005");
        guest.vcpus[0].park();
        guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
        registers(&guest, "0x100005");
        guest.vcpus[0].resume();
    }
    drop(guest);

    let guest = Guest::start(&machine().unwrap(), &UD2, &[], 1, false);
    guest.expect(&[Seen::Event(VcpuEvent::Shutdown)]);
    guest.vcpus[0].dump();
    let Seen::Event(VcpuEvent::Registers(text)) = guest.next() else { panic!("no registers") };
    // The local APIC as it is made: its timer masked, nothing pending.
    assert!(text.contains(" mp_state=0 lvtt=0x10000 tmict=0x0 tmcct=0x0 deadline=0x0 tsc=0x"), "{text}");
    assert!(text.ends_with(" tpr=0x0 svr=0xff irr=[] isr=[]"), "{text}");
}

#[test]
fn a_vcpu_that_ended_by_a_triple_fault_lives_again_after_a_reset_and_begins_at_its_beginning() {
    let Some(vm) = machine() else { return };
    // out dx, al; inc byte [CODE+4096]; mov al, [CODE+4096]; out dx, al, and the fault
    let cell = (CODE as u32 + 4096).to_le_bytes();
    let code = [&MOV_DX[..], &[0xee, 0xfe, 0x04, 0x25], &cell, &[0x8a, 0x04, 0x25], &cell, &[0xee], &UD2].concat();
    let guest = Guest::start(&vm, &code, &[], 2, false);
    for life in 1..=20 {
        guest.expect(&[
            Seen::Wrote(PORT.into(), vec![0]),
            Seen::Wrote(PORT.into(), vec![life]),
            Seen::Event(VcpuEvent::Shutdown),
        ]);
        for vcpu in &guest.vcpus {
            vcpu.park();
            guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
        }
        for vcpu in &guest.vcpus {
            vcpu.reset();
            guest.expect(&[Seen::Event(VcpuEvent::Reset)]);
        }
        guest.vcpus[0].boot();
        guest.expect(&[Seen::Event(VcpuEvent::Reset)]);
        guest.vcpus.iter().for_each(VcpuHandle::resume);
    }
}

/// The counter as the guest reads it lies between what KVM says before and after. On AMD processors a triple fault takes the
/// two apart.
#[test]
fn a_guest_reads_the_tsc_that_kvm_counts_with_also_after_a_triple_fault() {
    let Some(vm) = machine() else { return };
    // rdtsc; out dx, eax; mov eax, edx; out; and the fault. The port is in edx only after the counter was.
    let code = [&[0x0f, 0x31, 0x89, 0xd3][..], &MOV_DX, &[0xef, 0x89, 0xd8, 0xef], &UD2].concat();
    let guest = Guest::start(&vm, &code, &[], 1, true);
    guest.expect(&[Seen::Event(VcpuEvent::Parked)]);
    let kvms = || {
        guest.vcpus[0].dump();
        let Seen::Event(VcpuEvent::Registers(text)) = guest.next() else { panic!("no registers") };
        let tsc = text.split(" tsc=0x").nth(1).and_then(|rest| rest.split(' ').next());
        u64::from_str_radix(tsc.expect("the counter"), 16).unwrap()
    };
    let half = || match guest.next() {
        Seen::Wrote(_, bytes) => u64::from(u32::from_le_bytes(bytes.try_into().unwrap())),
        other => panic!("{other:?}"),
    };
    for life in 0..3 {
        let before = kvms();
        guest.vcpus[0].resume();
        let guests = half() | half() << 32;
        guest.expect(&[Seen::Event(VcpuEvent::Shutdown)]);
        let after = kvms();
        assert!((before..=after).contains(&guests), "life {life}: {before:#x} {guests:#x} {after:#x}");
        for ask in [VcpuHandle::park, VcpuHandle::reset, VcpuHandle::boot] {
            ask(&guest.vcpus[0]);
            assert!(matches!(guest.next(), Seen::Event(VcpuEvent::Parked | VcpuEvent::Reset)));
        }
    }
}

#[test]
fn what_cannot_be_loaded_at_a_reset_is_told_and_the_vcpu_runs_no_more() {
    let Some(vm) = machine() else { return };
    let mut vcpu = Vcpu::new(&vm, 0, 1).unwrap();
    let entry = Entry { mode: Mode::Protected, rip: CODE, rsp: 0x8000, rbx: 0, rsi: 0, gdt: 0x500 };
    let mut files = vec![entry];
    let loader = move || files.pop().ok_or_else(|| crate::error::Error::host("the file is cut short"));
    vcpu.boot_by(Box::new(loader)).unwrap();
    let (tell, seen) = channel();
    let buses = Buses { pio: Bus::new(vec![]).unwrap(), mmio: Bus::new(vec![]).unwrap() };
    let vcpu = vcpu.start(buses, true, move |event| drop(tell.send(event))).unwrap();
    let next = || seen.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(next(), VcpuEvent::Parked);
    vcpu.boot();
    assert_eq!(next(), VcpuEvent::Failed("reset: the file is cut short".into()));
    vcpu.resume();
    vcpu.park();
    assert_eq!(next(), VcpuEvent::Parked);
}

#[test]
fn a_vcpus_thread_has_its_name_on_the_host() {
    let Some(vm) = machine() else { return };
    let guest = Guest::start(&vm, &[&MOV_DX[..], &[0xee, 0xeb, 0xfe]].concat(), &[], 1, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0])]);
    let name = std::fs::read_to_string(format!("/proc/self/task/{}/comm", guest.vcpus[0].tid())).unwrap();
    assert_eq!(name, "CPU 0/KVM\n");
}

#[test]
fn what_kvm_cannot_run_is_told_with_the_registers() {
    let Some(vm) = machine() else { return };
    // jmp rbx, to where there is no memory
    let guest = Guest::start(&vm, &[&MOV_EBX[..], &[0xff, 0xe3]].concat(), &[], 1, false);
    loop {
        match guest.next() {
            Seen::Event(VcpuEvent::Failed(why)) => {
                assert!(why.contains("rip=0x30000000"), "{why}");
                return;
            }
            // Some hosts try to fetch the instruction from the device there.
            other => assert!(matches!(other, Seen::Read(..)), "{other:?}"),
        }
    }
}

#[test]
fn a_kick_takes_its_own_value_at_its_own_address_while_it_lives_and_only_then() {
    let Some(vm) = machine() else { return };
    let kick = Kick::new(&vm, MMIO + 0x50, 1).unwrap();
    assert!(Kick::new(&vm, MMIO + 0x50, 1).is_err(), "one of each");
    // again: mov dword [rbx+0x50], 1; mov dword [rbx+0x50], 2; in al, dx; jmp again
    let code = [&MOV_DX[..], &MOV_EBX, &[0xc7, 0x43, 0x50, 1, 0, 0, 0, 0xc7, 0x43, 0x50, 2, 0, 0, 0, 0xec, 0xeb, 0xef]];
    let guest = Guest::start(&vm, &code.concat(), &[], 1, false);
    let (two, pause) = (Seen::Wrote(MMIO + 0x50, vec![2, 0, 0, 0]), Seen::Read(PORT.into(), 1));
    guest.expect(&[two, pause]);
    assert!(kick.take() >= 1);
    drop(kick);
    let on_the_bus = Seen::Wrote(MMIO + 0x50, vec![1, 0, 0, 0]);
    assert!((0..1000).any(|_| guest.next() == on_the_bus));
    drop(Kick::new(&vm, MMIO + 0x50, 1).unwrap());
}

#[test]
fn an_interrupt_reaches_the_controllers_while_it_lives_and_only_then() {
    let Some(vm) = machine() else { return };
    let pending = || {
        let mut chip =
            kvm_bindings::kvm_irqchip { chip_id: kvm_bindings::KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
        vm.fd().get_irqchip(&mut chip).unwrap();
        // SAFETY: the kernel has filled in what was asked for, and any bits are a valid number.
        unsafe { chip.chip.pic.irr }
    };
    // The kernel passes an interrupt on by a thread of its own, soon.
    let soon = |lines: u8| while pending() != lines {};
    let irq = Irq::new(&vm, 5).unwrap();
    assert_eq!(pending(), 0);
    irq.trigger();
    soon(1 << 5);
    drop(irq);
    let other = Irq::new(&vm, 6).unwrap();
    other.trigger();
    soon(1 << 5 | 1 << 6);
    // The line is free for another.
    drop(Irq::new(&vm, 5).unwrap());
}

/// What the code in the ROM writes, and where.
const ASKS_FOR_RESET: (u64, [u8; 1]) = (0x64, [0xfe]);

/// Runs a vCPU that starts where `place` puts it: its first write to a port.
fn first_write(vm: &Arc<Vm>, place: impl FnOnce(&VcpuFd)) -> Seen {
    let vcpu = Vcpu::new(vm, 0, 1).unwrap();
    place(&vcpu.fd);
    let (tell, seen) = channel();
    let slot = Probe { tell: tell.clone(), base: 0x60, answers: VecDeque::new() };
    let pio = Bus::new(vec![Range { base: 0x60, len: 5, slot: Arc::new(Mutex::new(slot)) }]).unwrap();
    let buses = Buses { pio, mmio: Bus::new(vec![]).unwrap() };
    let handle = vcpu.start(buses, false, move |event| drop(tell.send(Seen::Event(event)))).unwrap();
    let first = seen.recv_timeout(Duration::from_secs(60)).unwrap();
    drop(handle);
    first
}

#[test]
fn the_code_at_both_reset_vectors_asks_for_a_reset() {
    let (port, value) = ASKS_FOR_RESET;
    let asks = Seen::Wrote(port, value.to_vec());
    // As power-on and INIT leave it: 0xffff_fff0.
    let Some(vm) = machine() else { return };
    assert_eq!(first_write(&vm, |_| ()), asks);
    // A jump to F000:FFF0 in real mode.
    let vm = machine().unwrap();
    let jump = |fd: &VcpuFd| {
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.selector, sregs.cs.base) = (0xf000, 0xf_0000);
        fd.set_sregs(&sregs).unwrap();
    };
    assert_eq!(first_write(&vm, jump), asks);
}

#[test]
fn a_guest_that_writes_to_the_rom_does_not_change_it() {
    let Some(vm) = machine() else { return };
    // mov byte [0xffff0], 0x90; mov al, [0xffff0]; out dx, al
    let address = 0xf_fff0_u32.to_le_bytes();
    let code = [&MOV_DX[..], &[0xc6, 0x04, 0x25], &address, &[0x90, 0x8a, 0x04, 0x25], &address, &[0xee], &UD2];
    let guest = Guest::start(&vm, &code.concat(), &[], 1, false);
    guest.expect(&[Seen::Wrote(PORT.into(), vec![0xfa]), Seen::Event(VcpuEvent::Shutdown)]);
}
