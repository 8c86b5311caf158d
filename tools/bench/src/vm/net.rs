//! The network: packets and bits a second through a tap, each way and there and back, and what a packet costs the monitor.
//!
//! The guest sends as fast as it may, or counts what comes; the host sends through a packet socket, which leaves checksums and
//! the cutting into segments to others as a TCP of its own would. All of it is in a network namespace of this process's, which
//! takes root. One main thread, and one that sends.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use super::Result;
use super::monitor::{Machine, Monitor};
use super::process;
use super::programs::Programs;
use super::running::{Running, number};
use super::table::{Table, median};
use super::target::Figure;

const ROUNDS: usize = 3;
const TAP: &str = "bench0";
/// How long a load lasts, in ms.
const LOAD_MS: u32 = 1000;
const PINGS: u32 = 20_000;

/// Who takes part.
const CONTESTANTS: [(Monitor, bool, &str); 3] = [
    (Monitor::Loopvisor, true, "loopvisor, iothread"),
    (Monitor::Loopvisor, false, "loopvisor, main"),
    (Monitor::Qemu, false, "QEMU"),
];

/// What goes which way: bytes of a frame, and of a segment if others are to cut it.
#[derive(Clone, Copy)]
enum Case {
    Send(u64, u64),
    Receive(u64, u64),
    Echo(u64),
}

const CASES: [(Case, &str); 8] = [
    (Case::Send(64, 0), "the guest sends 64 bytes"),
    (Case::Send(1514, 0), "the guest sends 1514 bytes"),
    (Case::Send(65_226, 1448), "the guest sends 64 KiB in segments of 1448"),
    (Case::Receive(64, 0), "the guest receives 64 bytes"),
    (Case::Receive(1514, 0), "the guest receives 1514 bytes"),
    (Case::Receive(65_226, 1448), "the guest receives 64 KiB in segments of 1448"),
    (Case::Echo(56), "there and back, 98 bytes, one at a time"),
    (Case::Echo(1400), "there and back, 1442 bytes, one at a time"),
];

#[derive(Clone, Copy)]
struct Sample {
    rate: f64,
    gbit: f64,
    cpu_us: f64,
    kicks: f64,
}

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    enter()?;
    let mut samples = CASES.map(|_| CONTESTANTS.map(|_| Vec::new()));
    for _ in 0..ROUNDS {
        for ((case, _), samples) in CASES.iter().zip(&mut samples) {
            for (&(monitor, iothread, _), samples) in CONTESTANTS.iter().zip(samples) {
                samples.push(measure(programs, monitor, iothread, *case)?);
            }
        }
    }
    let mut table = Table::new(&["", "", "packets/s", "Gbit/s", "CPU us a packet", "kicks a packet"]);
    for ((_, name), samples) in CASES.iter().zip(&samples) {
        for ((_, _, who), samples) in CONTESTANTS.iter().zip(samples) {
            let of = |read: fn(&Sample) -> f64| median(&samples.iter().map(read).collect::<Vec<_>>());
            table.row([
                name.to_string(),
                who.to_string(),
                format!("{:.0}", of(|sample| sample.rate)),
                format!("{:.2}", of(|sample| sample.gbit)),
                format!("{:.2}", of(|sample| sample.cpu_us)),
                // The guest that answers pings says nothing of them.
                Some(of(|sample| sample.kicks))
                    .filter(|kicks| !kicks.is_nan())
                    .map_or("-".into(), |k| format!("{k:.3}")),
            ]);
        }
    }
    table.print(&format!(
        "A NIC on a tap: medians of {ROUNDS} rounds of {LOAD_MS} ms, or of {PINGS} pings. A packet is a frame as it is handed \
         over. CPU is all threads but the vCPU."
    ));
    Ok(Vec::new())
}

fn measure(programs: &Programs, monitor: Monitor, iothread: bool, case: Case) -> Result<Sample> {
    let mode = match case {
        Case::Send(size, gso) => format!("net-send size={size} gso={gso} ms={LOAD_MS}"),
        Case::Receive(..) => format!("net-sink ms={LOAD_MS}"),
        Case::Echo(_) => "net-echo ip=10.0.0.2".to_owned(),
    };
    let words = format!("mode={mode} end=hang");
    let machine = Machine { words, tap: Some((TAP.to_owned(), iothread)), ..Machine::default() };
    let mut running = Running::start(monitor.command(programs, &machine))?;
    running.line("net: begin")?;
    // A tap that nobody has does not take its queue's packets.
    wait_for_carrier()?;
    let before = process::used(running.pid())?;
    let (packets, bytes, ns, kicks) = match case {
        Case::Send(..) => counted(&running.line("net: sent=")?, "sent")?,
        Case::Receive(size, gso) => {
            let line = with_sender(size, gso, || running.line("net: sunk="))?;
            counted(&line, "sunk")?
        }
        Case::Echo(size) => {
            let ns = ping(size)?;
            let packets = f64::from(2 * PINGS);
            (packets, packets * (size + 42) as f64, ns, f64::NAN)
        }
    };
    let after = process::used(running.pid())?;
    running.kill()?;
    Ok(Sample {
        rate: packets * 1e9 / ns,
        gbit: 8.0 * bytes / ns,
        cpu_us: (after.cpu_ns - before.cpu_ns) as f64 / 1e3 / packets,
        kicks: kicks / packets,
    })
}

/// Packets, bytes, nanoseconds and kicks of the guest's line.
fn counted(line: &str, packets: &str) -> Result<(f64, f64, f64, f64)> {
    Ok((number(line, packets)?, number(line, "bytes")?, number(line, "ns")?, number(line, "kicks")?))
}

/// Puts this process into a network namespace of its own, with a tap.
fn enter() -> Result<()> {
    // SAFETY: changes what this process sees and nothing in memory. It has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("a network namespace: {}: run it as root", io::Error::last_os_error()).into());
    }
    shell(&format!(
        "ip link set lo up && ip tuntap add dev {TAP} mode tap && ip addr add 10.0.0.1/24 dev {TAP} && \
         {{ echo 1 >/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6 || true; }} && ip link set {TAP} up"
    ))
    .map(drop)
}

fn shell(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", line]).output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn wait_for_carrier() -> Result<()> {
    while shell(&format!("ip link show {TAP}"))?.contains("NO-CARRIER") {
        thread::yield_now();
    }
    Ok(())
}

/// Pings one after the other as fast as they come back; how long all of them took, in nanoseconds.
fn ping(size: u64) -> Result<f64> {
    let told = shell(&format!("ping -f -q -c {PINGS} -s {size} 10.0.0.2"))?;
    let ms = told.split("time ").nth(1).and_then(|rest| rest.split("ms").next()?.trim().parse::<f64>().ok());
    Ok(ms.filter(|_| told.contains(" 0% packet loss")).ok_or_else(|| format!("ping: {told}"))? * 1e6)
}

/// Runs `work` while frames of `size` bytes go into the tap as fast as it takes them.
fn with_sender<T>(size: u64, gso: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let socket = packet_socket()?;
    let frame = frame(size as usize, gso as u16);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                // SAFETY: the buffer has that many bytes. What the tap does not take is lost, as on a wire.
                unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            }
        });
        let result = work();
        over.store(true, Relaxed);
        result
    })
}

/// A socket that sends whole frames to the tap, each behind a header of virtio's.
fn packet_socket() -> Result<OwnedFd> {
    let index: i32 = fs::read_to_string("/proc/net/dev_mcast")
        .ok()
        .and_then(|text| text.lines().find(|line| line.contains(TAP))?.split_whitespace().next()?.parse().ok())
        .ok_or("the tap has no number")?;
    let failed = |what: &str| format!("{what}: {}", io::Error::last_os_error());
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(failed("a packet socket").into());
    }
    // SAFETY: just opened, and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_QDISC_BYPASS] {
        // SAFETY: the option is an int.
        let set = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const on).cast(), 4) };
        if set != 0 {
            return Err(failed("a packet socket's option").into());
        }
    }
    // SAFETY: zeros are one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (address.sll_family, address.sll_ifindex) = (libc::AF_PACKET as u16, index);
    // SAFETY: the address and its length.
    if unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) } != 0 {
        return Err(failed("bind a packet socket").into());
    }
    Ok(socket)
}

/// TCP over IPv4 to the guest, whose checksum and segments of `gso` bytes are left to others.
fn frame(size: usize, gso: u16) -> Vec<u8> {
    let mut header = [0u8; 10];
    if gso > 0 {
        header[..2].copy_from_slice(&[1, 1]);
        for (at, value) in [(2, 54), (4, gso), (6, 34), (8, 16)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    let mut frame = vec![0u8; size];
    frame[..12].copy_from_slice(&[0x52, 0x54, 0, 0x12, 0x34, 0x56, 2, 0, 0, 0, 0, 1]);
    frame[12] = 8;
    if size >= 54 {
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&((size - 14) as u16).to_be_bytes());
        (frame[22], frame[23], frame[46]) = (64, 6, 5 << 4);
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    }
    [&header[..], &frame].concat()
}
