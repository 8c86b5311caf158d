//! The Linux guest's AF_VSOCK client and server, for which busybox has no tool. tools/linux-image compiles it.
//!
//!     vsock listen PORT COUNT    sends back what comes through each of COUNT connections, one after the other
//!     vsock connect PORT BYTES   sends BYTES to the host's PORT, ends its half, and compares what comes back
//!
//! Each says in one line how it went. Only the calls that the standard library lacks are declared here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

/// struct sockaddr_vm of linux/vm_sockets.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn bind(fd: i32, address: *const Address, len: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, len: *mut u32) -> i32;
    fn connect(fd: i32, address: *const Address, len: u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_socket() -> io::Result<File> {
    // SAFETY: takes numbers; the descriptor is new and ours.
    unsafe { Ok(File::from(OwnedFd::from_raw_fd(checked(socket(AF_VSOCK, SOCK_STREAM, 0))?))) }
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, reserved: 0, port, cid, zero: [0; 4] }
}

fn serve(port: u32, count: u32) -> io::Result<u64> {
    let listener = new_socket()?;
    let here = address(ANY, port);
    // SAFETY: the kernel reads one address.
    unsafe {
        checked(bind(listener.as_raw_fd(), &raw const here, size_of::<Address>() as u32))?;
        checked(listen(listener.as_raw_fd(), 16))?;
    }
    println!("vsock: listening at {port}");
    let mut bytes = 0;
    for _ in 0..count {
        // SAFETY: no address is asked for; the descriptor is new and ours.
        let fd = unsafe { checked(accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()))? };
        // SAFETY: as above.
        let stream = unsafe { File::from(OwnedFd::from_raw_fd(fd)) };
        bytes += io::copy(&mut &stream, &mut &stream)?;
    }
    Ok(bytes)
}

fn send(port: u32, count: usize) -> io::Result<u64> {
    let stream = new_socket()?;
    let there = address(HOST, port);
    // SAFETY: the kernel reads one address.
    unsafe { checked(connect(stream.as_raw_fd(), &raw const there, size_of::<Address>() as u32))? };
    let sent: Vec<u8> = (0..count).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| (&stream).read_to_end(&mut back));
        (&stream).write_all(&sent)?;
        // SAFETY: takes numbers.
        unsafe { checked(shutdown(stream.as_raw_fd(), SHUT_WR))? };
        reads.join().unwrap_or(Ok(0))
    })?;
    if back == sent {
        Ok(back.len() as u64)
    } else {
        Err(io::Error::other(format!("{} other bytes came back", back.len())))
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| words.get(place).and_then(|word| word.parse().ok()).unwrap_or(0);
    let (what, port) = (words.first().map_or("", String::as_str), number(1));
    let done = match what {
        "listen" => serve(port, number(2)),
        "connect" => send(port, number(2) as usize),
        _ => Err(io::Error::other("vsock listen PORT COUNT, or vsock connect PORT BYTES")),
    };
    match done {
        Ok(bytes) => println!("vsock: {what} {port} ok, {bytes} bytes"),
        Err(e) => println!("vsock: {what} {port} failed: {e}"),
    }
}
