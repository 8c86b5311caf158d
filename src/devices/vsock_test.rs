//! The device as a driver and as the host's programs meet it: real chains, a real loop, real Unix sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::SeqCst};

use proptest::prelude::*;

use super::credit::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, HOST_CID, Header, op};
use super::table::MAX_GREETERS;
use super::*;
use crate::sys::socket;
use crate::virtio::Command;
use crate::virtio::testing::*;

const CID: u32 = 9;
/// Room for data in each of the driver's buffers.
const ROOM: u32 = 1000;
const RX_BUFFERS: u16 = 32;
/// What the driver says it has room for in all.
const ALLOC: u32 = 50_000;

/// A driver, and a folder for the host's sockets.
struct Rig {
    guest: Guest,
    rings: Vec<Vring>,
    folder: PathBuf,
    counters: Arc<VsockCounters>,
    /// Buffers that come back go to the device again; otherwise they are kept in `idle`.
    feeds: bool,
    idle: Vec<u16>,
    /// Packets that came and were not taken.
    packets: VecDeque<(Header, Vec<u8>)>,
    next_tx: u64,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Rig {
    fn idle() -> Rig {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("loopvisor-vsock-{}-{}", std::process::id(), COUNT.fetch_add(1, SeqCst));
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let listener = PrivateListener::bind(&folder.join("v")).unwrap();
        let ram = ram();
        let device = Vsock::new("v", CID, listener, ram.clone());
        let counters = device.counters();
        let guest = Guest::new(device, ram);
        Rig {
            guest,
            rings: Vec::new(),
            folder,
            counters,
            feeds: true,
            idle: Vec::new(),
            packets: VecDeque::new(),
            next_tx: 0,
        }
    }

    fn new() -> Rig {
        let mut rig = Rig::idle();
        rig.start();
        rig
    }

    fn start(&mut self) {
        self.guest.negotiate(F_STREAM | VERSION_1);
        self.rings = (0..3).map(|queue| self.guest.set_up(queue, 64, false)).collect();
        self.guest.driver_ok();
        self.guest.turn();
        self.idle = (0..RX_BUFFERS).collect();
        if self.feeds {
            self.feed();
        }
    }

    /// Gives the device the buffers that it does not have.
    fn feed(&mut self) {
        for number in std::mem::take(&mut self.idle) {
            self.offer(number);
        }
        self.guest.run(RX);
    }

    /// The header lies with the data, by itself, or cut.
    fn offer(&mut self, number: u16) {
        let at = self.rx_at(number);
        let (header, all) = (HEADER_BYTES as u32, HEADER_BYTES as u32 + ROOM);
        let ring = &mut self.rings[RX];
        let head = match number % 3 {
            0 => ring.add(&[Desc::writable(at, all)]),
            1 => ring.add(&[Desc::writable(at, header), Desc::writable(at + u64::from(header), ROOM)]),
            _ => ring.add(&[Desc::writable(at, 7), Desc::writable(at + 7, all - 7)]),
        };
        self.guest.put(HIGH + 4 * u64::from(head), &u32::from(number).to_le_bytes());
    }

    fn rx_at(&self, number: u16) -> u64 {
        HIGH + 0x1000 + 2048 * u64::from(number)
    }

    /// Turns the loop, and takes in what came.
    fn turn(&mut self) {
        loop {
            self.guest.turn();
            let used = self.rings[RX].take_used();
            if used.is_empty() {
                break;
            }
            let number = |(head, len): (u16, u32)| (self.guest.get(HIGH + 4 * u64::from(head), 4)[0], len);
            let used: Vec<(u8, u32)> = used.into_iter().map(number).collect();
            for (number, len) in used {
                let bytes = self.guest.get(self.rx_at(number.into()), len as usize);
                if len > 0 {
                    let (header, data) = bytes.split_first_chunk().unwrap();
                    let header = Header::read(header);
                    assert_eq!(header.len as usize, data.len());
                    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
                    self.packets.push_back((header, data.to_vec()));
                }
                if self.feeds {
                    self.offer(number.into());
                } else {
                    self.idle.push(number.into());
                }
            }
            if self.feeds {
                self.guest.kick(RX);
            }
        }
        self.rings[TX].take_used();
    }

    /// The next packet for the guest.
    #[track_caller]
    fn packet(&mut self) -> (Header, Vec<u8>) {
        self.turn();
        self.packets.pop_front().expect("a packet for the guest")
    }

    #[track_caller]
    fn expect(&mut self, ports: Ports, op: u16) -> Header {
        let (header, _) = self.packet();
        assert_eq!((header.src_port, header.dst_port, header.op), (ports.host, ports.guest, op), "{header:?}");
        header
    }

    #[track_caller]
    fn expect_silence(&mut self) {
        self.turn();
        assert_eq!(self.packets.pop_front(), None);
    }

    /// Sends a packet, its header and data cut where it pleases.
    fn send_bytes(&mut self, bytes: &[u8], cut: usize) {
        let at = DATA + self.next_tx % 8 * 0x1_0000;
        self.next_tx += 1;
        self.guest.put(at, bytes);
        let (first, rest) = (cut.min(bytes.len()), bytes.len().saturating_sub(cut));
        let mut descs = vec![Desc::readable(at, first as u32)];
        if rest > 0 {
            descs.push(Desc::readable(at + first as u64, rest as u32));
        }
        self.rings[TX].add(&descs);
        self.guest.run(TX);
        self.turn();
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let bytes = [&header.bytes(), data].concat();
        self.send_bytes(&bytes, [HEADER_BYTES, 3, bytes.len(), 60][self.next_tx as usize % 4]);
    }

    fn say(&mut self, ports: Ports, op: u16) {
        self.send(said(ports, op), &[]);
    }

    fn data(&mut self, ports: Ports, data: &[u8]) {
        self.send(Header { len: data.len() as u32, ..said(ports, op::RW) }, data);
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.join(format!("v_{port}"))).unwrap()
    }

    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.join("v")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// A stream that the guest has opened, and the host's end.
    #[track_caller]
    fn opened(&mut self, guest: u32) -> (Ports, UnixStream) {
        let ports = Ports { host: 1000 + guest, guest };
        let listener = self.listen(ports.host);
        self.say(ports, op::REQUEST);
        self.expect(ports, op::RESPONSE);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        (ports, stream)
    }

    /// One that a client of the host's has opened.
    #[track_caller]
    fn dialled(&mut self, guest: u32) -> (Ports, UnixStream) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {guest}\n").as_bytes()).unwrap();
        let (header, _) = self.packet();
        let ports = Ports { host: header.src_port, guest };
        assert_eq!((header.op, header.dst_port, header.buf_alloc), (op::REQUEST, guest, BUFFER_BYTES));
        self.say(ports, op::RESPONSE);
        assert_eq!(said_to(&mut client), format!("OK {}\n", ports.host));
        (ports, client)
    }

    /// Sends until neither the socket nor its buffer takes any more: all that was sent.
    fn fill(&mut self, ports: Ports) -> Vec<u8> {
        let (mut sent, mut known) = (Vec::new(), 0);
        loop {
            let room = known + BUFFER_BYTES as usize - sent.len();
            if room == 0 {
                return sent;
            }
            let now = noise(sent.len() as u64, room.min(30_000));
            self.data(ports, &now);
            sent.extend(now);
            while let Some((header, _)) = self.packets.pop_front() {
                assert_eq!(header.op, op::CREDIT_UPDATE);
                known = header.fwd_cnt as usize;
            }
        }
    }

    fn open(&self) -> u64 {
        self.counters.open.load(Relaxed)
    }

    fn pass(&mut self, seconds: u64) {
        self.guest.clock.fetch_add(seconds * SECOND_NS, SeqCst);
        self.turn();
    }
}

/// A packet of the guest's.
fn said(ports: Ports, op: u16) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        kind: STREAM,
        op,
        buf_alloc: ALLOC,
        ..Header::default()
    }
}

/// What can be read from a socket now.
fn said_to(stream: &mut UnixStream) -> String {
    String::from_utf8_lossy(&bytes_of(stream).0).into_owned()
}

/// The same as bytes, and whether that was the end.
fn bytes_of(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut bytes = [0; 65_536];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&bytes[..count]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(_) => return (all, true),
        }
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    bytes_of(stream).1
}

fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn the_driver_finds_its_context_id_and_streams_and_nothing_else() {
    let rig = Rig::new();
    let config: Vec<u32> = [0, 4].map(|at| rig.guest.read(reg::CONFIG + at)).to_vec();
    assert_eq!(config, [CID, 0]);
    assert_eq!(rig.guest.offered() & !(VERSION_1 | EVENT_IDX | INDIRECT_DESC), F_STREAM);
}

#[test]
fn a_client_names_a_port_and_is_told_its_own_when_the_guest_takes_it() {
    let mut rig = Rig::new();
    let (ports, mut client) = rig.dialled(52);
    assert_eq!(ports.host, 1 << 30);
    let (other, _client) = rig.dialled(52);
    assert_ne!(ports.host, other.host, "two clients are two ports");
    client.write_all(b"hello").unwrap();
    let (header, data) = rig.packet();
    assert_eq!((header.op, header.len, data.as_slice()), (op::RW, 5, b"hello".as_slice()));
    rig.data(ports, b"good day");
    assert_eq!(said_to(&mut client), "good day");
    // The longest line there is.
    rig.dialled(u32::MAX);
}

#[test]
fn a_line_may_come_in_pieces_and_what_is_behind_it_is_the_guests() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    for piece in ["CON", "NECT ", "7"] {
        client.write_all(piece.as_bytes()).unwrap();
        rig.expect_silence();
    }
    client.write_all(b"7\nand more").unwrap();
    let (header, _) = rig.packet();
    assert_eq!((header.op, header.dst_port), (op::REQUEST, 77));
    let ports = Ports { host: header.src_port, guest: 77 };
    rig.expect_silence();
    rig.say(ports, op::RESPONSE);
    assert_eq!(rig.packet().1, b"and more");
}

#[test]
fn a_client_that_says_its_line_and_bytes_and_leaves_at_once_has_them_delivered() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 5\nlast words").unwrap();
    drop(client);
    let (header, _) = rig.packet();
    let ports = Ports { host: header.src_port, guest: 5 };
    rig.say(ports, op::RESPONSE);
    assert_eq!(rig.packet().1, b"last words");
    assert_eq!(rig.expect(ports, op::SHUTDOWN).flags, NO_RECEIVE | NO_SEND);
    rig.say(ports, op::RST);
    assert_eq!(rig.open(), 0);
}

#[test]
fn a_line_is_read_as_firecracker_reads_it() {
    let mut rig = Rig::new();
    let longest = format!("connect{}5\n", " ".repeat(MAX_LINE_BYTES - 8));
    for line in ["connect 5\n", "Connect 5\r\n", "  CONNECT\t 5  \n", "CONNECT 0005\n", "CONNECT 5 more\n", &longest] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        let (header, _) = rig.packet();
        assert_eq!((header.op, header.dst_port), (op::REQUEST, 5), "{line:?}");
        rig.say(Ports { host: header.src_port, guest: 5 }, op::RST);
        assert!(is_closed(&mut client));
    }
}

#[test]
fn lines_that_say_something_else_end_the_conversation() {
    let mut rig = Rig::new();
    let long = format!("CONNECT {}", "1".repeat(100));
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT5\n",
        "CONNECT -5\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "\0\n",
        &long,
    ] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        rig.expect_silence();
        assert!(is_closed(&mut client), "{line:?}");
    }
    assert_eq!(rig.open(), 0);
}

#[test]
fn a_client_that_the_guest_refuses_or_does_not_answer_or_has_no_driver_for_is_let_go() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let (header, _) = rig.packet();
    rig.say(header_ports(&header), op::RST);
    assert!(is_closed(&mut client));
    // No answer within ten seconds: the guest is told that it is over.
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let (header, _) = rig.packet();
    rig.pass(9);
    assert!(!is_closed(&mut client));
    rig.pass(2);
    rig.expect(header_ports(&header), op::RST);
    assert!(is_closed(&mut client));
    // A driver that has no buffers has not heard of it, and need not hear of its end.
    rig.feeds = false;
    rig.guest.reset();
    rig.start();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.turn();
    rig.pass(11);
    assert!(is_closed(&mut client));
    rig.feeds = true;
    rig.feed();
    rig.expect_silence();
    rig.guest.reset();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.guest.turn();
    assert!(is_closed(&mut client), "no driver");
    assert_eq!(rig.open(), 0);
}

/// The ports of a packet to the guest.
fn header_ports(header: &Header) -> Ports {
    Ports { host: header.src_port, guest: header.dst_port }
}

#[test]
fn the_guest_reaches_who_listens_and_is_refused_where_nobody_does() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    rig.data(ports, b"hello");
    assert_eq!(said_to(&mut stream), "hello");
    stream.write_all(b"good day").unwrap();
    assert_eq!(rig.packet().1, b"good day");
    let nobody = Ports { host: 1, guest: 3 };
    rig.say(nobody, op::REQUEST);
    rig.expect(nobody, op::RST);
    // One that was left behind by who listened once, and one that is no socket.
    drop(rig.listen(2));
    std::fs::write(rig.folder.join("v_4"), "file").unwrap();
    for host in [2, 4] {
        let ports = Ports { host, guest: 3 };
        rig.say(ports, op::REQUEST);
        rig.expect(ports, op::RST);
    }
    assert_eq!((rig.open(), rig.counters.refused.load(Relaxed)), (1, 3));
}

#[test]
fn a_listener_that_has_no_room_is_tried_again_for_two_seconds() {
    let mut rig = Rig::new();
    let listener = PrivateListener::bind(&rig.folder.join("v_1")).unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = socket::connect(&rig.folder.join("v_1")) {
        waiting.push(stream);
    }
    let ports = |guest| Ports { host: 1, guest };
    for guest in 0..3 {
        rig.say(ports(guest), op::REQUEST);
    }
    rig.expect_silence();
    assert_eq!(rig.open(), 3);
    // The guest gives one of them up itself.
    rig.say(ports(2), op::RST);
    listener.accept().unwrap();
    rig.guest.clock.fetch_add(2 * REDIAL_NS, SeqCst);
    let (header, _) = rig.packet();
    assert_eq!(header.op, op::RESPONSE);
    rig.expect_silence();
    rig.pass(3);
    let (header, _) = rig.packet();
    assert_eq!(header.op, op::RST);
    assert_eq!(rig.open(), 1);
}

#[test]
fn bytes_of_the_hosts_go_no_further_than_the_guest_has_room_for_and_go_on_when_it_has() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    let bytes = noise(1, 120_000);
    let written = stream.write(&bytes).unwrap();
    rig.turn();
    let mut came = Vec::new();
    let mut asked = 0;
    let mut take = |rig: &mut Rig, came: &mut Vec<u8>| {
        while let Some((header, data)) = rig.packets.pop_front() {
            match header.op {
                op::RW => came.extend(data),
                op::CREDIT_REQUEST => asked += 1,
                op => panic!("op {op}"),
            }
        }
        asked
    };
    take(&mut rig, &mut came);
    assert_eq!(came.len() as u32, ALLOC);
    for _ in 0..10 {
        assert_eq!(rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap(), 0, "it does not spin");
    }
    rig.send(Header { fwd_cnt: 10, ..said(ports, op::CREDIT_UPDATE) }, &[]);
    take(&mut rig, &mut came);
    assert_eq!(came.len() as u32, ALLOC + 10);
    rig.send(Header { fwd_cnt: ALLOC, ..said(ports, op::CREDIT_UPDATE) }, &[]);
    take(&mut rig, &mut came);
    rig.send(Header { fwd_cnt: 2 * ALLOC, ..said(ports, op::CREDIT_UPDATE) }, &[]);
    let asked = take(&mut rig, &mut came);
    assert!(came == bytes[..written], "{} of {written}", came.len());
    assert!((1..=4).contains(&asked), "{asked} times it was asked for room");
}

#[test]
fn bytes_of_the_guests_wait_for_a_slow_reader_within_its_credit_and_it_is_told_when_there_is_room() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    let sent = rig.fill(ports);
    let mut came = Vec::new();
    assert!(sent.len() > BUFFER_BYTES as usize, "the socket took some");
    rig.expect_silence();
    // Who reads finds all of it, and the guest finds room.
    for _ in 0..100 {
        came.extend(bytes_of(&mut stream).0);
        rig.turn();
    }
    let told = rig.packets.iter().map(|(header, _)| (header.op, header.fwd_cnt as usize)).max();
    assert!(told.is_some_and(|told| told.0 == op::CREDIT_UPDATE && told.1 > sent.len() / 2), "{told:?}");
    assert!(came == sent, "{} of {}", came.len(), sent.len());
    rig.packets.clear();
    rig.say(ports, op::CREDIT_REQUEST);
    let header = rig.expect(ports, op::CREDIT_UPDATE);
    assert_eq!((header.fwd_cnt as usize, header.buf_alloc), (sent.len(), BUFFER_BYTES));
}

#[test]
fn each_side_may_end_its_half_and_the_other_half_goes_on() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    stream.write_all(b"all I have").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.packet().1, b"all I have");
    assert_eq!(rig.expect(ports, op::SHUTDOWN).flags, NO_SEND);
    rig.data(ports, b"thank you");
    assert_eq!(said_to(&mut stream), "thank you");
    rig.send(Header { flags: NO_SEND, ..said(ports, op::SHUTDOWN) }, &[]);
    assert!(is_closed(&mut stream), "the end of what the guest sends");
    assert_eq!(rig.expect(ports, op::SHUTDOWN).flags, NO_RECEIVE | NO_SEND, "nothing can go either way");
    rig.send(Header { flags: NO_RECEIVE, ..said(ports, op::SHUTDOWN) }, &[]);
    rig.expect(ports, op::RST);
    assert_eq!(rig.open(), 0);

    let (ports, mut stream) = rig.opened(4);
    rig.send(Header { flags: NO_SEND, ..said(ports, op::SHUTDOWN) }, &[]);
    assert!(is_closed(&mut stream));
    stream.write_all(b"one more").unwrap();
    assert_eq!(rig.packet().1, b"one more");
    // What comes behind the end it said itself is none.
    rig.data(ports, b"but");
    rig.expect(ports, op::RST);

    let (ports, mut stream) = rig.opened(5);
    rig.send(Header { flags: NO_RECEIVE, ..said(ports, op::SHUTDOWN) }, &[]);
    assert_eq!(stream.write_all(b"no more").unwrap_err().kind(), ErrorKind::BrokenPipe);
    rig.data(ports, b"still here");
    assert_eq!(said_to(&mut stream), "still here");
}

#[test]
fn a_host_that_closes_is_told_to_the_guest_behind_its_last_bytes_and_a_guest_that_ignores_it_is_cut_off() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    stream.write_all(&noise(3, 2500)).unwrap();
    drop(stream);
    let mut came = Vec::new();
    loop {
        let (header, data) = rig.packet();
        came.extend(data);
        if header.op == op::SHUTDOWN && header.flags == NO_RECEIVE | NO_SEND {
            break;
        }
        assert!(header.op == op::RW || header.flags == NO_RECEIVE, "{header:?}");
    }
    assert!(came == noise(3, 2500));
    // What it sends now goes nowhere, and costs it nothing.
    for _ in 0..10 {
        rig.data(ports, &noise(4, 20_000));
    }
    assert!(rig.packets.iter().all(|(header, _)| header.op == op::CREDIT_UPDATE));
    rig.packets.clear();
    rig.pass(9);
    rig.expect_silence();
    rig.pass(2);
    rig.expect(ports, op::RST);
    assert_eq!(rig.open(), 0);
}

#[test]
fn what_a_guest_sent_before_it_left_reaches_a_slow_reader_and_its_ports_are_free_at_once() {
    let mut rig = Rig::new();
    let listener = rig.listen(1);
    let ports = Ports { host: 1, guest: 3 };
    rig.say(ports, op::REQUEST);
    rig.expect(ports, op::RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let sent = rig.fill(ports);
    rig.send(Header { flags: NO_RECEIVE | NO_SEND, ..said(ports, op::SHUTDOWN) }, &[]);
    rig.expect(ports, op::RST);
    assert_eq!(rig.open(), 1, "it is still being read");
    rig.say(ports, op::REQUEST);
    rig.expect(ports, op::RESPONSE);
    // Even a reset of the guest does not take back what it has sent.
    rig.guest.reset();
    let mut came = Vec::new();
    let mut ended = false;
    for _ in 0..1000 {
        let (bytes, end) = bytes_of(&mut stream);
        came.extend(bytes);
        ended |= end;
        rig.guest.turn();
    }
    assert!(came == sent && ended, "{} of {}", came.len(), sent.len());
    assert_eq!(rig.open(), 0);
}

#[test]
fn a_reader_that_never_reads_what_a_guest_left_is_given_half_a_minute() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    rig.fill(ports);
    rig.send(Header { flags: NO_RECEIVE | NO_SEND, ..said(ports, op::SHUTDOWN) }, &[]);
    rig.expect(ports, op::RST);
    rig.pass(29);
    assert_eq!(rig.open(), 1);
    rig.pass(2);
    assert_eq!(rig.open(), 0);
    assert!(is_closed(&mut stream));
}

#[test]
fn every_packet_that_no_driver_may_send_is_answered_or_dropped_and_harms_nobody_else() {
    let rw = |len| Header { len, ..said(Ports { host: 1, guest: 2 }, op::RW) };
    let request = said(Ports { host: 1, guest: 2 }, op::REQUEST);
    // What is sent; whether an RST is the answer.
    let strangers: Vec<(&str, Header, bool)> = vec![
        ("another source", Header { src_cid: 10, ..request }, false),
        ("the host as the source", Header { src_cid: 2, ..request }, false),
        ("a source beyond 32 bits", Header { src_cid: 1 << 32 | u64::from(CID), ..request }, false),
        ("another destination", Header { dst_cid: 3, ..request }, false),
        ("anybody as the destination", Header { dst_cid: u64::MAX, ..request }, false),
        ("a packet socket", Header { kind: 2, ..request }, true),
        ("no type", Header { kind: 0, ..request }, true),
        ("no type, and a reset", Header { kind: 0, op: op::RST, ..request }, false),
        ("no op", Header { op: 0, ..request }, true),
        ("an unknown op", Header { op: 8, ..request }, true),
        ("the greatest op", Header { op: u16::MAX, ..request }, true),
        ("a response to nothing", Header { op: op::RESPONSE, ..request }, true),
        ("data for nobody", rw(0), true),
        ("much data for nobody", rw(u32::MAX), true),
        ("a shutdown of nothing", Header { op: op::SHUTDOWN, flags: 3, ..request }, true),
        ("credit for nobody", Header { op: op::CREDIT_UPDATE, ..request }, true),
        ("a question of nobody", Header { op: op::CREDIT_REQUEST, ..request }, true),
        ("a reset of nothing", Header { op: op::RST, ..request }, false),
        ("a port of nobody's", Header { dst_port: u32::MAX, ..request }, true),
    ];
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(7);
    for (what, header, answered) in strangers {
        rig.send(header, &[]);
        let answer = rig.packets.pop_front().map(|(answer, _)| answer);
        assert_eq!(answer.map(|answer| answer.op), answered.then_some(op::RST), "{what}");
        if let Some(answer) = answer {
            let expected = (header.dst_port, header.src_port, header.kind);
            assert_eq!((answer.src_port, answer.dst_port, answer.kind), expected, "{what}");
        }
        rig.expect_silence();
    }
    for len in [0, 1, 43] {
        rig.send_bytes(&request.bytes()[..len.max(1)], 1);
        rig.expect_silence();
    }
    // A chain with nothing to read, and one that lies nowhere.
    for desc in [Desc::writable(DATA, 100), Desc::readable(LOW_BYTES - 10, 100), Desc::readable(u64::MAX - 10, 100)] {
        rig.rings[TX].add(&[desc]);
        rig.guest.run(TX);
        rig.expect_silence();
    }
    rig.data(ports, b"undisturbed");
    assert_eq!(said_to(&mut stream), "undisturbed");
    assert_eq!((rig.open(), rig.guest.status() & NEEDS_RESET), (1, 0));
}

#[test]
fn every_packet_that_is_wrong_for_its_connection_ends_that_one_alone() {
    type Wrong = (&'static str, fn(Ports) -> (Header, usize));
    let wrong: Vec<Wrong> = vec![
        ("no op", |ports| (said(ports, 0), 0)),
        ("an unknown op", |ports| (said(ports, 77), 0)),
        ("a second request", |ports| (said(ports, op::REQUEST), 0)),
        ("a response to no request", |ports| (said(ports, op::RESPONSE), 0)),
        ("more data than the packet has", |ports| (Header { len: 101, ..said(ports, op::RW) }, 100)),
        ("data without any", |ports| (Header { len: u32::MAX, ..said(ports, op::RW) }, 0)),
        ("more data than there is credit for", |ports| {
            (Header { len: BUFFER_BYTES + 1, ..said(ports, op::RW) }, BUFFER_BYTES as usize + 1)
        }),
    ];
    let mut rig = Rig::new();
    let (other, mut others) = rig.opened(1);
    for (number, (what, make)) in (10..).zip(wrong) {
        let (ports, mut stream) = rig.opened(number);
        let (header, data) = make(ports);
        let bytes = [&header.bytes()[..], &vec![0; data]].concat();
        rig.send_bytes(&bytes, 44);
        let (answer, _) = rig.packet();
        assert_eq!((answer.op, answer.dst_port), (op::RST, number), "{what}");
        assert!(is_closed(&mut stream), "{what}");
        rig.expect_silence();
    }
    // Data that are announced and lie outside memory.
    let (ports, mut stream) = rig.opened(99);
    rig.guest.put(DATA, &Header { len: 100, ..said(ports, op::RW) }.bytes());
    rig.rings[TX].add(&[Desc::readable(DATA, 44), Desc::readable(DATA, 10), Desc::readable(LOW_BYTES - 10, 90)]);
    rig.guest.run(TX);
    rig.expect(ports, op::RST);
    assert!(is_closed(&mut stream));
    // What is no harm: no flags, unknown flags, credit that cannot be.
    for header in [
        Header { flags: 0, ..said(other, op::SHUTDOWN) },
        Header { flags: !3, ..said(other, op::SHUTDOWN) },
        Header { fwd_cnt: 1 << 31, buf_alloc: 0, ..said(other, op::CREDIT_UPDATE) },
        Header { len: 0, ..said(other, op::RW) },
        said(other, op::CREDIT_UPDATE),
    ] {
        rig.send(header, &[]);
        rig.expect_silence();
    }
    others.write_all(b"fine").unwrap();
    assert_eq!(rig.packet().1, b"fine");
    assert_eq!(rig.open(), 1);
}

#[test]
fn buffers_of_the_drivers_that_are_too_short_or_lie_nowhere_come_back_empty() {
    let mut rig = Rig::idle();
    rig.feeds = false;
    rig.start();
    let nobody = Ports { host: 1, guest: 2 };
    for desc in [
        Desc::writable(DATA, 43),
        Desc::readable(DATA, 100),
        Desc::writable(LOW_BYTES - 10, 100),
        Desc::writable(u64::MAX - 9, 100),
    ] {
        rig.say(nobody, op::CREDIT_REQUEST);
        rig.rings[RX].add(&[desc]);
        rig.guest.run(RX);
        assert_eq!(rig.rings[RX].take_used().iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0]);
    }
    assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
    // A buffer for the header alone takes packets without data, and none with.
    rig.feeds = true;
    rig.feed();
    rig.turn();
    rig.packets.clear();
    let (ports, _stream) = rig.opened(3);
    rig.data(ports, b"x");
    assert_eq!(rig.open(), 1);
}

#[test]
fn a_guest_that_does_not_take_its_answers_is_not_heard_until_it_does() {
    let mut rig = Rig::idle();
    rig.feeds = false;
    rig.start();
    for guest in 0..2 * MAX_RSTS as u32 {
        if rig.rings[TX].free() < 2 {
            break;
        }
        rig.say(Ports { host: 1, guest }, op::RW);
    }
    assert!(rig.rings[TX].free() < 2, "the ring stands full");
    let calls: usize = (0..20).map(|_| rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap()).sum();
    assert_eq!(calls, 0, "nobody spins");
    rig.feeds = true;
    rig.feed();
    rig.turn();
    let answers = rig.packets.len();
    assert_eq!(rig.rings[TX].free(), 64, "all were heard in the end");
    assert!(answers >= MAX_RSTS, "{answers}");
    assert!(rig.packets.iter().all(|(header, _)| header.op == op::RST));
}

#[test]
fn a_driver_without_buffers_leaves_the_sockets_unread_and_the_loop_asleep() {
    let mut rig = Rig::idle();
    rig.feeds = false;
    rig.start();
    let listener = rig.listen(1);
    let mut streams = Vec::new();
    for guest in 0..10 {
        rig.say(Ports { host: 1, guest }, op::REQUEST);
        streams.push(listener.accept().unwrap().0);
    }
    for (number, stream) in (0u8..).zip(&mut streams) {
        stream.write_all(&[number; 10]).unwrap();
    }
    rig.guest.turn();
    for stream in &mut streams {
        stream.write_all(b"more").unwrap();
    }
    rig.guest.turn();
    assert_eq!(rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap(), 0);
    rig.feeds = true;
    rig.feed();
    rig.turn();
    let data: Vec<_> = rig.packets.iter().filter(|(header, _)| header.op == op::RW).collect();
    assert_eq!(data.len(), 10);
    assert!(data.iter().all(|(_, bytes)| bytes.len() == 14 && bytes.ends_with(b"more")));
}

#[test]
fn connections_take_turns() {
    let mut rig = Rig::idle();
    rig.feeds = false;
    rig.start();
    rig.feed();
    let listener = rig.listen(1);
    let mut streams = Vec::new();
    for guest in 0..4 {
        rig.say(Ports { host: 1, guest }, op::REQUEST);
        streams.push(listener.accept().unwrap().0);
    }
    rig.turn();
    rig.packets.clear();
    for stream in &mut streams {
        stream.write_all(&[7; 20_000]).unwrap();
    }
    // Of the buffers that are left each gets as many, give or take one.
    rig.turn();
    let mut counts = [0; 4];
    rig.packets.iter().for_each(|(header, _)| counts[header.dst_port as usize] += 1);
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(*least >= 6 && most - least <= 1, "{counts:?}");
}

#[test]
fn a_pause_leaves_memory_alone_and_loses_nothing() {
    let mut rig = Rig::new();
    let (ports, mut stream) = rig.opened(3);
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(SeqCst), 1);
    stream.write_all(b"meanwhile").unwrap();
    let mut client = rig.client();
    client.write_all(b"CONNECT 6\n").unwrap();
    rig.guest.turn();
    assert!(rig.rings[RX].take_used().is_empty());
    assert_eq!(rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap(), 0, "it does not spin");
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.turn();
    let ops: Vec<u16> = rig.packets.iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [op::RW, op::REQUEST]);
    assert_eq!(rig.packets[0].1, b"meanwhile");
    rig.packets.clear();
    rig.data(ports, b"and on");
    assert_eq!(said_to(&mut stream), "and on");
}

#[test]
fn a_reset_ends_every_connection_and_the_next_driver_begins_anew() {
    let mut rig = Rig::new();
    for _ in 0..3 {
        let mut ends: Vec<UnixStream> = (10..20).map(|guest| rig.dialled(guest).1).collect();
        let (_, mut stream) = rig.opened(3);
        std::fs::remove_file(rig.folder.join("v_1003")).unwrap();
        let mut asked = rig.client();
        asked.write_all(b"CONNECT 6\n").unwrap();
        let greeter = rig.client();
        rig.turn();
        stream.write_all(b"never to be read").unwrap();
        rig.packets.clear();
        rig.guest.reset();
        for end in ends.iter_mut().chain([&mut stream, &mut asked]) {
            assert!(is_closed(end));
        }
        assert_eq!(rig.open(), 1, "who has said nothing may still");
        drop(greeter);
        rig.start();
        rig.expect_silence();
    }
}

#[test]
fn as_many_connections_as_there_may_be_and_no_more() {
    let mut rig = Rig::new();
    let listener = PrivateListener::bind(&rig.folder.join("v_1")).unwrap();
    tune_descriptors();
    let mut streams = Vec::new();
    for guest in 0..MAX_CONNECTIONS as u32 {
        let ports = Ports { host: 1, guest };
        rig.say(ports, op::REQUEST);
        let (header, _) = rig.packet();
        if header.op == op::RST {
            // This host lets us have no more descriptors.
            break;
        }
        streams.push(listener.accept().unwrap());
    }
    let full = streams.len() == MAX_CONNECTIONS;
    rig.say(Ports { host: 1, guest: 5000 }, op::REQUEST);
    rig.expect(Ports { host: 1, guest: 5000 }, op::RST);
    if full {
        let refused = rig.counters.refused.load(Relaxed);
        let mut client = rig.client();
        rig.expect_silence();
        assert!(is_closed(&mut client));
        assert_eq!(rig.counters.refused.load(Relaxed), refused + 1);
    }
    // One leaves, and one may come.
    rig.say(Ports { host: 1, guest: 7 }, op::RST);
    rig.say(Ports { host: 1, guest: 5000 }, op::REQUEST);
    rig.expect(Ports { host: 1, guest: 5000 }, op::RESPONSE);
}

/// The tests of this program share its descriptors.
fn tune_descriptors() {
    crate::sys::tune::allow_descriptors(8 * MAX_CONNECTIONS as u64);
}

#[test]
fn clients_that_say_nothing_make_room_for_new_ones_and_are_let_go_after_a_minute() {
    let mut rig = Rig::new();
    let mut clients: Vec<UnixStream> = Vec::new();
    for _ in 0..MAX_GREETERS + 10 {
        clients.push(rig.client());
        rig.turn();
    }
    assert_eq!(rig.open(), MAX_GREETERS as u64);
    let closed = clients.iter_mut().filter_map(|client| is_closed(client).then_some(())).count();
    assert_eq!(closed, 10);
    assert!(is_closed(&mut clients[9]) && !is_closed(&mut clients[10]), "the oldest");
    rig.pass(59);
    assert_eq!(rig.open(), MAX_GREETERS as u64);
    rig.pass(2);
    assert_eq!(rig.open(), 0);
    assert!(clients.iter_mut().all(is_closed));
    rig.dialled(5);
}

#[test]
fn the_patience_with_one_connection_is_not_that_with_another() {
    let mut rig = Rig::new();
    let mut early = rig.client();
    rig.turn();
    rig.pass(30);
    let mut late = rig.client();
    rig.turn();
    rig.pass(31);
    assert!(is_closed(&mut early) && !is_closed(&mut late), "a minute for each");
    rig.pass(28);
    assert!(!is_closed(&mut late));
    rig.pass(2);
    assert!(is_closed(&mut late));
}

/// What the two ends and the driver do next.
#[derive(Clone, Debug)]
enum Step {
    GuestSends(u16),
    HostSends(u16),
    HostReads,
    GuestReads,
    Pause,
    Feed(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1u16..=30_000).prop_map(Step::GuestSends),
        3 => (1u16..=60_000).prop_map(Step::HostSends),
        2 => Just(Step::HostReads),
        2 => Just(Step::GuestReads),
        1 => Just(Step::Pause),
        1 => any::<bool>().prop_map(Step::Feed),
    ]
}

/// One of several streams in the property test: the two directions as the reference keeps them.
struct Model {
    ports: Ports,
    stream: UnixStream,
    guest_sent: Vec<u8>,
    host_came: Vec<u8>,
    host_sent: Vec<u8>,
    guest_came: Vec<u8>,
    /// What the guest knows of the host's room, and what it has taken out of its own.
    known: u32,
    passed: usize,
}

impl Model {
    fn header(&self, op: u16) -> Header {
        Header { fwd_cnt: self.passed as u32, ..said(self.ports, op) }
    }
}

/// Takes in what came for the guest, and holds it against what may come.
fn settle(rig: &mut Rig, models: &mut [Model]) {
    rig.turn();
    while let Some((header, data)) = rig.packets.pop_front() {
        let model = models.iter_mut().find(|model| model.ports == header_ports(&header)).unwrap();
        model.known = header.fwd_cnt;
        assert!(model.known as usize <= model.guest_sent.len(), "it says it passed on what it never had");
        match header.op {
            op::RW => {
                model.guest_came.extend(data);
                assert!(model.guest_came.len() - model.passed <= ALLOC as usize, "more than there is room for");
                assert!(model.host_sent.starts_with(&model.guest_came), "other bytes than were sent");
            }
            op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
            op => panic!("op {op}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn no_bytes_are_lost_changed_or_sent_beyond_the_room_there_is(
        steps in proptest::collection::vec((0usize..3, step()), 1..120),
    ) {
        let mut rig = Rig::new();
        let mut models = Vec::new();
        for guest in 0..3 {
            let (ports, stream) = if guest == 1 { rig.dialled(guest) } else { rig.opened(guest) };
            let none = Vec::new;
            models.push(Model {
                ports, stream, guest_sent: none(), host_came: none(), host_sent: none(), guest_came: none(), known: 0, passed: 0,
            });
        }
        let mut paused = false;
        for (one, step) in steps {
            let model = &mut models[one];
            match step {
                Step::GuestSends(bytes) => {
                    let room = BUFFER_BYTES - (model.guest_sent.len() as u32 - model.known);
                    let bytes = room.min(bytes.into()) as usize;
                    if bytes > 0 && !paused && rig.rings[TX].free() >= 2 {
                        let data = noise(model.guest_sent.len() as u64 + one as u64, bytes);
                        let header = Header { len: bytes as u32, ..model.header(op::RW) };
                        model.guest_sent.extend(&data);
                        rig.send(header, &data);
                    }
                }
                Step::HostSends(bytes) => {
                    let data = noise(model.host_sent.len() as u64 + 77, bytes.into());
                    if let Ok(count) = model.stream.write(&data) {
                        model.host_sent.extend(&data[..count]);
                    }
                }
                Step::HostReads => {
                    model.host_came.extend(bytes_of(&mut model.stream).0);
                    prop_assert!(model.guest_sent.starts_with(&model.host_came));
                }
                Step::GuestReads => {
                    model.passed = model.guest_came.len();
                    if !paused && rig.rings[TX].free() >= 2 {
                        let header = model.header(op::CREDIT_UPDATE);
                        rig.send(header, &[]);
                    }
                }
                Step::Feed(feeds) => {
                    rig.feeds = feeds;
                    if feeds {
                        rig.feed();
                    }
                }
                Step::Pause => {
                    paused = !paused;
                    if paused {
                        rig.guest.command(Command::Pause);
                    } else {
                        prop_assert!(rig.guest.worker.send(Command::Resume).is_ok());
                    }
                }
            }
            settle(&mut rig, &mut models);
        }
        if paused {
            prop_assert!(rig.guest.worker.send(Command::Resume).is_ok());
        }
        rig.feeds = true;
        rig.feed();
        for _ in 0..100 {
            settle(&mut rig, &mut models);
            for model in &mut models {
                model.host_came.extend(bytes_of(&mut model.stream).0);
                model.passed = model.guest_came.len();
                let header = model.header(op::CREDIT_UPDATE);
                rig.send(header, &[]);
            }
        }
        for model in &models {
            prop_assert!(model.host_came == model.guest_sent, "{} of {}", model.host_came.len(), model.guest_sent.len());
            prop_assert!(model.guest_came == model.host_sent, "{} of {}", model.guest_came.len(), model.host_sent.len());
        }
    }
}
