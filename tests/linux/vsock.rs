//! The host's end of AF_VSOCK, whose sockets the standard library reads and writes once they are there.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::monitor::LIMIT;

const DEVICE: &str = "/dev/vhost-vsock";
const SET_GUEST_CID: libc::Ioctl = 0x4008_af60_u32 as libc::Ioctl;

/// Whether this host's kernel moves the packets of guests; says so if it does not.
pub fn is_here() -> bool {
    let here = fs::File::options().read(true).write(true).open(Path::new(DEVICE));
    if let Err(e) = &here {
        println!("skipped: {DEVICE}: {e}");
    }
    here.is_ok()
}

/// A context id that no other machine of this host has, and the next that none has either.
pub fn own_cid() -> u32 {
    100_000 + 2 * std::process::id()
}

fn new_socket() -> OwnedFd {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "a socket: {}", std::io::Error::last_os_error());
    // SAFETY: it is new and ours.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: zeros are an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Listens at a port of the host's.
pub fn listen(port: u32) -> OwnedFd {
    let socket = new_socket();
    let here = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the kernel reads one address.
    let done = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const here).cast(), ADDRESS_BYTES) == 0
            && libc::listen(socket.as_raw_fd(), 16) == 0
    };
    assert!(done, "listen at {port}: {}", std::io::Error::last_os_error());
    socket
}

/// Waits for a guest's connection.
pub fn accept(listener: &OwnedFd) -> UnixStream {
    // SAFETY: no address is asked for.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    assert!(fd >= 0, "accept: {}", std::io::Error::last_os_error());
    // SAFETY: it is new and ours.
    UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connects to a port of a guest that listens.
pub fn connect(cid: u32, port: u32) -> UnixStream {
    let socket = new_socket();
    let there = address(cid, port);
    // SAFETY: the kernel reads one address.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const there).cast(), ADDRESS_BYTES) };
    assert_eq!(done, 0, "connect to {cid}, {port}: {}", std::io::Error::last_os_error());
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Sends bytes, ends the sending side, and expects the same bytes and the end.
pub fn echo(stream: &UnixStream, bytes: &[u8]) {
    echo_counted(stream, bytes, &AtomicUsize::new(0));
}

/// The same, and `count` says how many have come back.
pub fn echo_counted(mut stream: &UnixStream, bytes: &[u8], count: &AtomicUsize) {
    let reader = stream.try_clone().unwrap();
    let back = std::thread::scope(|scope| {
        let reads = scope.spawn(move || {
            let (mut back, mut piece) = (Vec::<u8>::new(), [0; 65536]);
            loop {
                match (&reader).read(&mut piece).unwrap() {
                    0 => return back,
                    read => back.extend(&piece[..read]),
                }
                count.store(back.len(), SeqCst);
            }
        });
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        reads.join().unwrap()
    });
    assert!(back == bytes, "{} bytes came back of {}, or others", back.len(), bytes.len());
}

/// Opens the kernel's device and gives it a context id, as who starts a monitor does it; the descriptor is left to children.
pub fn prepare(cid: u32) -> fs::File {
    let file = fs::File::options().read(true).write(true).open(DEVICE).unwrap();
    let number = u64::from(cid);
    // SAFETY: the kernel reads one number; the second call takes numbers.
    let done = unsafe {
        libc::ioctl(file.as_raw_fd(), SET_GUEST_CID, &raw const number) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) == 0
    };
    assert!(done, "{DEVICE}: {}", std::io::Error::last_os_error());
    file
}

/// What a monitor says that does not start with this device.
pub fn refusal(device: &str) -> String {
    let linux = std::env::var("LOOPVISOR_LINUX").expect("LOOPVISOR_LINUX, see docs/testing.md");
    let kernel = format!("{linux}/vmlinuz");
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopvisor"));
    let output = command.args(["-kernel", &kernel, "-device", device]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}
