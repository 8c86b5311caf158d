//! A vCPU and its thread.
//!
//! The thread `CPU n/KVM` runs guest code, and between two stretches of it answers the guest's register accesses
//! through the buses. It stops at one place, its gate, where the main loop lets it run, parks it or ends it
//! without ever waiting for it: what the vCPU has to say comes by a callback. What an access means is the slots'
//! business; what becomes of the machine after an event is `control`'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, register_signal_handler};

use super::run_page::RunPage;
use super::vm::Vm;
use super::x86_64::regs::Entry;
use super::x86_64::state::Initial;
use super::x86_64::{cpuid, msr, regs};
use crate::bus::Bus;
use crate::error::{Context, Result};
use crate::event::Done;
use crate::memory;
use crate::sys::gettid;

/// What a vCPU has to say to the main loop.
#[derive(Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// It has left the guest, its last access is complete, and it runs no more until resumed. One for each `park`.
    Parked,
    /// It is as before its first instruction, or has loaded what it starts from. One for each `reset` and each `boot`.
    Reset,
    /// A triple fault: the guest reset the processor, on purpose or not. The vCPU runs no more until it is reset.
    Shutdown,
    /// KVM cannot go on with this vCPU: why, and its registers; or it could not be reset. The vCPU runs no more.
    Failed(String),
    /// The host has no room for a page of guest memory, and why. The vCPU tries again, and sends this again, until it is parked.
    Starved(String),
    /// Its index and registers, as [`VcpuHandle::dump`] asked.
    Registers(String),
}

/// The two address spaces of devices.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// Puts into guest memory what the machine starts from: at the start, and again at each reset.
pub type Loader = Box<dyn FnMut() -> Result<Entry> + Send>;

/// A vCPU that has no thread yet.
pub struct Vcpu {
    fd: VcpuFd,
    gate: Arc<Gate>,
    index: u8,
    initial: Initial,
    /// The boot vCPU's.
    loader: Option<Loader>,
    /// Keeps the machine, and so guest memory, for as long as the vCPU may touch it. Last, so dropped last.
    vm: Arc<Vm>,
}

impl Vcpu {
    /// Makes vCPU `index` of `count`: its processor features and the registers that firmware would set.
    ///
    /// Until [`Vcpu::boot_by`] it is as after reset; all but the first wait for the guest to wake them.
    ///
    /// # Errors
    ///
    /// KVM refuses: no room for another vCPU on this host, or a feature it cannot show.
    pub fn new(vm: &Arc<Vm>, index: u8, count: u8) -> Result<Vcpu> {
        register_signal_handler(CALL, on_call).context(|| "KVM: handle the signal that calls a vCPU out")?;
        let fd = vm.fd().create_vcpu(index.into()).context(|| {
            let most = vm.fd().check_extension_int(Cap::MaxVcpus);
            format!("KVM: create vCPU {index} of {count} (this host allows {most} vCPUs)")
        })?;
        let features = cpuid::of_vcpu(vm.supported_cpuid(), index, count, vm.has_tsc_deadline())?;
        fd.set_cpuid2(&features).context(|| format!("KVM: set the features of vCPU {index}"))?;
        msr::set(&fd)?;
        let initial = Initial::of(&fd)?;
        vm.initial_msrs(&fd)?;
        let page = RunPage::map(&fd, vm.fd().run_size())?;
        let gate = Arc::new(Gate {
            request: AtomicU64::new(Request::Run.pack()),
            dump: AtomicBool::new(false),
            page,
            tid: AtomicI32::new(0),
        });
        Ok(Vcpu { fd, gate, index, initial, loader: None, vm: vm.clone() })
    }

    /// Makes this the boot vCPU, which starts where `loader` says, now and after each reset; writes the tables that it
    /// needs into guest memory.
    ///
    /// # Errors
    ///
    /// What the loader says, a table that does not lie in guest memory, or KVM refuses a register.
    pub fn boot_by(&mut self, loader: Loader) -> Result<()> {
        self.loader = Some(loader);
        self.boot()
    }

    fn boot(&mut self) -> Result<()> {
        let Some(loader) = &mut self.loader else { return Ok(()) };
        loader()?.prepare(self.vm.ram(), &self.fd)
    }

    fn reset(&self) -> Result<()> {
        self.initial.restore(&self.fd, self.vm.initial_msrs(&self.fd)?)
    }

    /// Starts the thread: running the guest at once, or parked (it then says [`VcpuEvent::Parked`] once).
    ///
    /// `on_event` is called on the vCPU's thread and must not wait. Returns when the thread has begun, so that nobody
    /// can ask for its id or name too early; the guest does not wait for that.
    ///
    /// # Errors
    ///
    /// The host refuses a thread.
    pub fn start(
        self,
        buses: Buses,
        parked: bool,
        on_event: impl FnMut(VcpuEvent) + Send + 'static,
    ) -> Result<VcpuHandle> {
        let name = format!("CPU {}/KVM", self.index);
        let gate = self.gate.clone();
        gate.ask(if parked { Request::Park(0) } else { Request::Run });
        let mut runner = Runner { vcpu: self, buses, alive: true, refusals: 0, on_event: Box::new(on_event) };
        let (begun, waiter) = Done::waited();
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            runner.vcpu.gate.tid.store(gettid(), Ordering::Relaxed);
            begun.end(());
            runner.run();
        });
        let thread = Some(thread.context(|| format!("thread {name}"))?);
        // It has begun even if it was lost since.
        let _ = waiter.wait();
        Ok(VcpuHandle { gate, asked: AtomicU32::new(0), thread })
    }
}

/// The signal that calls a vCPU out of the guest. Not one of the real-time signals, which queue: the host may have no
/// room for another in the queue, and then refuses it.
const CALL: libc::c_int = libc::SIGUSR2;

/// How often the host may refuse KVM a thread before the vCPU fails: with pauses of [`LONGEST_PAUSE`] that takes a second.
const MAX_REFUSALS: u32 = 100;
/// The longest pause between two calls to a vCPU that is to end.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// Does nothing: a signal's arrival is enough to end KVM_RUN. Without SA_RESTART, so that it ends a blocking system
/// call of the vCPU's thread as well.
extern "C" fn on_call(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What the main loop wants of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Run,
    Stop,
    /// With the number of this request, so that two that follow each other quickly are told apart.
    Park(u32),
    /// Of a parked vCPU only, and so is the next.
    Reset(u32),
    Boot(u32),
}

impl Request {
    fn pack(self) -> u64 {
        match self {
            Request::Run => 0,
            Request::Stop => 1,
            Request::Park(number) => u64::from(number) << 3 | 2,
            Request::Reset(number) => u64::from(number) << 3 | 3,
            Request::Boot(number) => u64::from(number) << 3 | 4,
        }
    }

    fn unpack(word: u64) -> Request {
        let number = (word >> 3) as u32;
        match word & 7 {
            0 => Request::Run,
            1 => Request::Stop,
            2 => Request::Park(number),
            3 => Request::Reset(number),
            _ => Request::Boot(number),
        }
    }
}

/// Where the main loop's request and the vCPU meet. No lock: a request is one atomic word, and a parked vCPU sleeps
/// in `thread::park`, whose token cannot be lost.
#[derive(Debug)]
struct Gate {
    request: AtomicU64,
    /// The registers are wanted.
    dump: AtomicBool,
    page: RunPage,
    tid: AtomicI32,
}

impl Gate {
    /// Publishes a request. The request first: whoever sees the page's flag must find it. Only the vCPU clears the flag,
    /// so no request can take back what another one set it for.
    fn ask(&self, request: Request) {
        self.request.store(request.pack(), Ordering::SeqCst);
        if request != Request::Run {
            self.page.set_immediate_exit(true);
        }
    }

    fn request(&self) -> Request {
        Request::unpack(self.request.load(Ordering::SeqCst))
    }

    /// Readies the next KVM_RUN: it enters the guest only if nothing else is wanted. A request published after the
    /// look sets the flag after we cleared it, so it is never lost.
    fn pass(&self) {
        self.page.set_immediate_exit(false);
        if self.request() != Request::Run || self.dump.load(Ordering::SeqCst) {
            self.page.set_immediate_exit(true);
        }
    }
}

/// The main loop's hold on a vCPU. Dropping it ends the vCPU and joins its thread; to end several, `stop` all first.
#[derive(Debug)]
pub struct VcpuHandle {
    gate: Arc<Gate>,
    /// How many times it was asked for something that it answers.
    asked: AtomicU32,
    /// `None` only while being dropped.
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Asks the vCPU to leave the guest and stay out; [`VcpuEvent::Parked`] follows. Returns at once.
    ///
    /// The next request is to come after that event: a `resume` before it may leave it unsaid.
    pub fn park(&self) {
        self.ask(Request::Park(self.number()));
    }

    /// Makes a parked vCPU what it was before its first instruction, also one that has ended; [`VcpuEvent::Reset`]
    /// follows, or [`VcpuEvent::Failed`]. It stays parked. Returns at once.
    pub fn reset(&self) {
        self.ask(Request::Reset(self.number()));
    }

    /// Has a parked boot vCPU load what the machine starts from, which may take as long as the files are long; the same
    /// answers follow. Returns at once.
    pub fn boot(&self) {
        self.ask(Request::Boot(self.number()));
    }

    /// Only the numbers' difference matters: two parkings in a row have two.
    fn number(&self) -> u32 {
        self.asked.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Lets a parked vCPU go on. Returns at once.
    pub fn resume(&self) {
        self.ask(Request::Run);
    }

    /// Asks the vCPU for its registers; [`VcpuEvent::Registers`] follows, unless it has ended. Returns at once.
    pub fn dump(&self) {
        self.gate.dump.store(true, Ordering::SeqCst);
        self.gate.page.set_immediate_exit(true);
        self.call();
    }

    /// Asks the vCPU to end. Returns at once; nothing follows.
    pub fn stop(&self) {
        self.ask(Request::Stop);
    }

    /// The thread's id on the host.
    pub fn tid(&self) -> i32 {
        self.gate.tid.load(Ordering::Relaxed)
    }

    fn ask(&self, request: Request) {
        self.gate.ask(request);
        match request {
            // It is at its gate.
            Request::Run | Request::Reset(_) | Request::Boot(_) => self.wake(),
            Request::Park(_) | Request::Stop => self.call(),
        }
    }

    /// Calls the vCPU for what it was asked for and has not answered yet. One call is enough by all that POSIX and KVM
    /// promise; on a software-only KVM a vCPU was twice seen to run on after it, in some ten thousand runs of a test.
    /// Harms nobody: who has answered sleeps on.
    pub fn call_again(&self) {
        self.call();
    }

    /// Wakes the thread at its gate.
    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Calls the thread to its gate, out of the guest if it is in there.
    fn call(&self) {
        self.wake();
        if let Some(thread) = &self.thread {
            // A thread that has ended needs no calling out.
            let _ = thread.kill(CALL);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.stop();
        let mut pause = Duration::from_micros(20);
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
            self.call_again();
        }
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// How a stretch of guest code ended.
enum Outcome {
    /// The exit has been answered: go on.
    Answered,
    /// A signal or the gate's flag: the last access is complete.
    Interrupted,
    /// The vCPU cannot go on.
    Over(VcpuEvent),
    /// The host has no room for a page of guest memory: the same instruction may go on later.
    Starved(String),
}

/// A vCPU on its thread.
struct Runner {
    vcpu: Vcpu,
    buses: Buses,
    /// It can run the guest: it has not ended, or has been reset since.
    alive: bool,
    /// How often the host has refused KVM a thread.
    refusals: u32,
    on_event: Box<dyn FnMut(VcpuEvent) + Send>,
}

impl Runner {
    /// The thread: runs the guest until told to stop.
    fn run(&mut self) {
        loop {
            if self.alive {
                match self.enter() {
                    Outcome::Answered => continue,
                    Outcome::Interrupted => {}
                    Outcome::Over(event) => {
                        (self.on_event)(event);
                        self.alive = false;
                    }
                    Outcome::Starved(why) => {
                        (self.on_event)(VcpuEvent::Starved(why));
                        // Until it is parked it tries again.
                        thread::sleep(LONGEST_PAUSE);
                    }
                }
            }
            if !self.wait() {
                return;
            }
        }
    }

    /// Waits at the gate until the vCPU is wanted again; false once it is to end.
    fn wait(&mut self) -> bool {
        let mut last = None;
        loop {
            if self.vcpu.gate.dump.swap(false, Ordering::SeqCst) {
                let fd = &self.vcpu.fd;
                let state = fd.get_mp_state().map_or(u32::MAX, |state| state.mp_state);
                let (registers, lapic) = (regs::dump(fd), regs::dump_lapic(fd));
                (self.on_event)(VcpuEvent::Registers(format!(
                    "vCPU {}: {registers} mp_state={state} {lapic}",
                    self.vcpu.index
                )));
            }
            match self.vcpu.gate.request() {
                Request::Stop => return false,
                Request::Run if self.alive => {
                    if last.is_some() {
                        // Tells the guest's watchdog that it was stopped, not stuck; refused where the guest has not
                        // switched KVM's clock on, and then there is nothing to tell.
                        let _ = self.vcpu.fd.kvmclock_ctrl();
                    }
                    return true;
                }
                Request::Run => thread::park(),
                request if last == Some(request) => thread::park(),
                request => {
                    last = Some(request);
                    let event = self.carry_out(request);
                    (self.on_event)(event);
                }
            }
        }
    }

    /// Does what was asked at the gate: the answer.
    fn carry_out(&mut self, request: Request) -> VcpuEvent {
        let done = match request {
            Request::Reset(_) => self.vcpu.reset(),
            Request::Boot(_) => self.vcpu.boot(),
            Request::Run | Request::Stop | Request::Park(_) => return VcpuEvent::Parked,
        };
        self.alive = done.is_ok();
        done.map_or_else(|error| VcpuEvent::Failed(format!("reset: {error}")), |()| VcpuEvent::Reset)
    }

    /// Runs the guest up to one exit, and answers it.
    fn enter(&mut self) -> Outcome {
        self.vcpu.gate.pass();
        let why = match self.vcpu.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.buses.mmio.read(address, data);
                return Outcome::Answered;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.buses.mmio.write(address, data);
                return Outcome::Answered;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let size = self.vcpu.gate.page.io_size();
                data.chunks_mut(size).for_each(|access| self.buses.pio.read(port.into(), access));
                return Outcome::Answered;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let size = self.vcpu.gate.page.io_size();
                data.chunks(size).for_each(|access| self.buses.pio.write(port.into(), access));
                return Outcome::Answered;
            }
            Ok(VcpuExit::Intr) => return Outcome::Interrupted,
            Ok(VcpuExit::Shutdown) => return Outcome::Over(VcpuEvent::Shutdown),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET, _)) => {
                return Outcome::Over(VcpuEvent::Shutdown);
            }
            Ok(VcpuExit::FailEntry(reason, _)) => format!("the processor refuses its state (reason {reason:#x})"),
            Ok(VcpuExit::InternalError) => format!("KVM internal error {}", self.vcpu.gate.page.suberror()),
            Ok(exit) => format!("KVM exit that we do not know: {exit:?}"),
            Err(errno) => match errno.errno() {
                libc::EINTR => return Outcome::Interrupted,
                libc::EAGAIN => return self.try_again(),
                libc::EFAULT => match memory::full_file_system(self.vcpu.vm.ram()) {
                    Some(why) => return Outcome::Starved(why),
                    None => format!(
                        "KVM_RUN: {errno}: a page of guest memory is missing: its file was cut, or huge pages ran out"
                    ),
                },
                _ => format!("KVM_RUN: {errno}"),
            },
        };
        Outcome::Over(VcpuEvent::Failed(format!("{why}; {}", regs::dump(&self.vcpu.fd))))
    }

    /// KVM_RUN has returned EAGAIN. For a vCPU that waits for its first INIT this is the answer to each signal. For any other the
    /// host has refused KVM a thread, and may allow it later.
    fn try_again(&mut self) -> Outcome {
        if self.vcpu.fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_UNINITIALIZED) {
            return Outcome::Interrupted;
        }
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS {
            return Outcome::Over(VcpuEvent::Failed(
                "KVM_RUN: the host refuses KVM a thread; raise the limit on processes and threads (ulimit -u, systemd's \
                 TasksMax=, pids.max of the control group)"
                    .to_owned(),
            ));
        }
        thread::sleep(LONGEST_PAUSE);
        Outcome::Interrupted
    }
}

#[cfg(test)]
#[path = "vcpu_test.rs"]
#[allow(unsafe_code)]
mod tests;
