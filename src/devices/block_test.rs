//! The drive as a driver meets it: real chains, a real loop, a real file.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use proptest::prelude::*;

use super::*;
use crate::config::spec::{Access, Aio, Cache, DriveSpec};
use crate::event::Done;
use crate::event::Wait;
use crate::qos::{Bucket, Limits, Quantity};
use crate::virtio::testing::*;

/// Where a request's parts lie; the data lies at `DATA`.
const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;
const SECTORS: u64 = 128;
/// What the status byte is before a request, and none that the device writes.
const UNTOUCHED: u8 = 0xee;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// A kind of request, and the errno that it failed with.
type Failure = (Kind, Option<i32>);

/// A driver with one drive whose file is in memory, where reads and writes are finished on the spot.
struct Rig {
    guest: Guest,
    vring: Vring,
    orders: Sender<Order>,
    counters: Arc<BlockCounters>,
    failures: Arc<Mutex<Vec<Failure>>>,
    file: PathBuf,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Byte `i` of the file.
fn content(i: u64) -> u8 {
    (i / SECTOR + i) as u8
}

impl Rig {
    fn new() -> Rig {
        Rig::with(Access::ReadWrite)
    }

    fn with(access: Access) -> Rig {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("loopvisor-block-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let file = PathBuf::from("/dev/shm").join(name);
        std::fs::write(&file, (0..SECTORS * SECTOR).map(content).collect::<Vec<_>>()).unwrap();
        let spec = DriveSpec { access, cache: Cache::Buffered, aio: Aio::Threads, ..DriveSpec::new("vda", &file) };
        let ram = ram();
        let disk = Disk::open(&spec, ram.clone()).unwrap();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let told = failures.clone();
        let report =
            Box::new(move |f: IoFailure| told.lock().unwrap().push((f.kind, f.error.raw_os_error()))) as FailureReport;
        let throttle = Throttle::Own(Bucket::new(&Limits::default()));
        let block = Block::new("vda", "serial-0123456789", disk, throttle, ram.clone(), report);
        let (counters, orders) = (block.counters(), block.orders());
        let mut guest = Guest::new(block, ram);
        let vring = guest.start(0, 256);
        Rig { guest, vring, orders, counters, failures, file }
    }

    fn put_header(&self, kind: u32, sector: u64) {
        let header = [kind.to_le_bytes(), [0; 4]].concat();
        self.guest.put(HEADER, &[header, sector.to_le_bytes().to_vec()].concat());
    }

    /// Runs one chain to its end: the used length, and the byte at `STATUS`.
    fn run(&mut self, descs: &[Desc]) -> (u32, u8) {
        self.guest.put(STATUS, &[UNTOUCHED]);
        let head = self.vring.add(descs);
        self.guest.kick(0);
        (self.finish(head), self.guest.get(STATUS, 1)[0])
    }

    /// Turns the loop until the chain is back: its used length.
    fn finish(&mut self, head: u16) -> u32 {
        for _ in 0..10_000_000 {
            self.guest.event_loop.turn(Wait::Poll).unwrap();
            if let Some(&(used, len)) = self.vring.take_used().first() {
                assert_eq!(used, head);
                return len;
            }
            std::thread::yield_now();
        }
        panic!("the chain does not come back");
    }

    /// A request of the usual form: header, data, status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u32, u8) {
        self.put_header(kind, sector);
        let chain = [&[Desc::readable(HEADER, 16)][..], data, &[Desc::writable(STATUS, 1)]].concat();
        self.run(&chain)
    }

    /// A discard or write-zeroes of one range.
    fn unmap(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> (u32, u8) {
        let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.guest.put(DATA, &range);
        self.request(kind, 0, &[Desc::readable(DATA, 16)])
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        std::fs::read(&self.file).unwrap()[offset as usize..][..len].to_vec()
    }

    /// Operations, bytes, failed, invalid.
    fn counts(&self, kind: Kind) -> [u64; 4] {
        let counts = &self.counters.kinds[kind as usize];
        [&counts.operations, &counts.bytes, &counts.failed, &counts.invalid].map(|count| count.load(Relaxed))
    }
}

fn expected(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(content).collect()
}

#[test]
fn the_configuration_tells_the_capacity_in_sectors_and_the_limits() {
    let rig = Rig::new();
    let word = |at: u64| rig.guest.read(reg::CONFIG + at);
    assert_eq!([word(0), word(4)], [SECTORS as u32, 0]);
    assert_eq!([word(12), word(20)], [254, 512], "segments and block size");
    assert_eq!([word(24), word(28)], [0, 0], "topology");
    assert_eq!([word(36), word(40), word(44)], [UNMAP_SECTORS, 1, 1], "discard");
    assert_eq!([word(48), word(52), word(56)], [UNMAP_SECTORS, 1, 1], "write zeroes");
    let (writable, read_only) = (rig.guest.offered(), Rig::with(Access::ReadOnly).guest.offered());
    let changes = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!((writable & changes, writable >> VIRTIO_BLK_F_RO & 1), (changes, 0));
    assert_eq!((read_only & changes, read_only >> VIRTIO_BLK_F_RO & 1), (0, 1));
}

#[test]
fn topology_counts_in_logical_blocks() {
    let rig = Rig::new();
    let topology = Topology { logical_block: 4096, physical_block: 16384, minimum_io: 65536, optimal_io: 1 << 20 };
    write_config(&rig.guest.page, SECTORS, &topology);
    let word = |at: u64| rig.guest.read(reg::CONFIG + at);
    assert_eq!([word(20), word(24), word(28)], [4096, 2 | 16 << 16, 256]);
    assert_eq!(word(44), 32, "discards aligned to a physical block");
    assert_ne!(rig.guest.offered() & 1 << VIRTIO_BLK_F_TOPOLOGY, 0);
}

#[test]
fn a_read_fills_the_buffers_in_order_and_says_how_much() {
    let mut rig = Rig::new();
    let data = [Desc::writable(DATA, 100), Desc::writable(HIGH, 900), Desc::writable(DATA + 100, 536)];
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 5, &data), (1537, OK));
    let read = [rig.guest.get(DATA, 100), rig.guest.get(HIGH, 900), rig.guest.get(DATA + 100, 536)].concat();
    assert!(read == expected(5 * 512, 1536));
    assert_eq!(rig.counts(Kind::Read), [1, 1536, 0, 0]);
}

#[test]
fn a_write_goes_to_the_disk_and_only_where_it_says() {
    let mut rig = Rig::new();
    rig.guest.put(DATA, &[0x5a; 1024]);
    let data = [Desc::readable(DATA, 1000), Desc::readable(DATA + 1000, 24)];
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 7, &data), (1, OK));
    assert_eq!(rig.on_disk(7 * 512, 1024), [0x5a; 1024]);
    assert!(rig.on_disk(0, 7 * 512) == expected(0, 7 * 512));
    assert!(rig.on_disk(9 * 512, 512) == expected(9 * 512, 512));
    assert_eq!(rig.counts(Kind::Write), [1, 1024, 0, 0]);
}

#[test]
fn a_flush_is_answered() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (1, OK));
    assert_eq!(rig.counts(Kind::Flush), [1, 0, 0, 0]);
}

#[test]
fn a_header_may_be_cut_into_any_pieces() {
    let mut rig = Rig::new();
    for cut in 1..16 {
        rig.put_header(VIRTIO_BLK_T_IN, 3);
        let chain = [
            Desc::readable(HEADER, cut),
            Desc::readable(HEADER + u64::from(cut), 16 - cut),
            Desc::writable(DATA, 512),
            Desc::writable(STATUS, 1),
        ];
        assert_eq!(rig.run(&chain), (513, OK), "cut at {cut}");
    }
    let mut bytes: Vec<Desc> = (0..16).map(|i| Desc::readable(HEADER + i, 1)).collect();
    rig.put_header(VIRTIO_BLK_T_OUT, 3);
    rig.guest.put(DATA, &[1; 512]);
    // The last piece of the header and the data in one buffer.
    rig.guest.put(HEADER + 16, &[2; 512]);
    bytes.truncate(8);
    bytes.extend([Desc::readable(HEADER + 8, 8 + 512), Desc::writable(STATUS, 1)]);
    assert_eq!(rig.run(&bytes), (1, OK));
    assert_eq!(rig.on_disk(3 * 512, 512), [2; 512]);
}

#[test]
fn the_status_is_the_last_byte_wherever_it_lies() {
    let mut rig = Rig::new();
    rig.put_header(VIRTIO_BLK_T_IN, 4);
    let read = [Desc::readable(HEADER, 16), Desc::writable(STATUS - 512, 513)];
    assert_eq!(rig.run(&read), (513, OK));
    assert!(rig.guest.get(STATUS - 512, 512) == expected(4 * 512, 512));
    // Behind a write there may be room that nobody asked for.
    rig.put_header(VIRTIO_BLK_T_OUT, 4);
    let write = [Desc::readable(HEADER, 16), Desc::readable(DATA, 512), Desc::writable(STATUS - 9, 10)];
    assert_eq!(rig.run(&write), (1, OK));
}

#[test]
fn a_request_without_data_is_done_when_it_is_taken() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &[]), (1, OK));
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 1, &[]), (1, OK));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, SECTORS, &[]), (1, OK));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, SECTORS + 1, &[]), (1, IOERR));
    let empty = [Desc::writable(u64::MAX, 0), Desc::writable(DATA, 512), Desc::writable(0, 0)];
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &empty), (513, OK));
}

#[test]
fn a_chain_without_header_or_status_comes_back_empty() {
    let mut rig = Rig::new();
    rig.put_header(VIRTIO_BLK_T_IN, 0);
    let cases: [&[Desc]; 6] = [
        &[Desc::readable(HEADER, 16)],
        &[Desc::writable(STATUS, 1)],
        &[Desc::readable(HEADER, 15), Desc::writable(STATUS, 1)],
        &[Desc::readable(LOW_BYTES - 8, 16), Desc::writable(STATUS, 1)],
        &[Desc::readable(HEADER, 16), Desc::writable(STATUS, 0)],
        &[Desc::readable(HEADER, 16), Desc::writable(u64::MAX, 2)],
    ];
    for chain in cases {
        assert_eq!(rig.run(chain), (0, UNTOUCHED), "{chain:?}");
    }
    // A status in the hole of memory is written nowhere.
    assert_eq!(rig.run(&[Desc::readable(HEADER, 16), Desc::writable(LOW_BYTES, 1)]), (0, UNTOUCHED));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[Desc::writable(DATA, 512)]), (513, OK));
}

#[test]
fn buffers_outside_memory_are_an_error_of_the_request_and_of_nothing_else() {
    let mut rig = Rig::new();
    let places = [
        (LOW_BYTES, 512),
        (LOW_BYTES - 511, 512),
        (HIGH - 1, 512),
        (HIGH + HIGH_BYTES - 256, 512),
        (u64::MAX, 512),
        (u64::MAX - 511, 512),
        (u64::MAX - 510, 512),
        (1 << 63, 512),
        (DATA, 1 << 31),
    ];
    for (addr, len) in places {
        let read = rig.request(VIRTIO_BLK_T_IN, 0, &[Desc::writable(DATA, 512), Desc::writable(addr, len)]);
        assert_eq!(read, (1, IOERR), "read to {addr:#x}");
        let write = rig.request(VIRTIO_BLK_T_OUT, 0, &[Desc::readable(addr, len)]);
        assert_eq!(write, (1, IOERR), "write from {addr:#x}");
        let id = rig.request(VIRTIO_BLK_T_GET_ID, 0, &[Desc::writable(addr, 20)]);
        assert_eq!(
            id.1,
            if addr == DATA || addr == LOW_BYTES - 511 || addr == HIGH + HIGH_BYTES - 256 { OK } else { IOERR }
        );
    }
    assert!(rig.on_disk(0, 512) == expected(0, 512));
    assert_eq!(rig.counts(Kind::Write)[3], places.len() as u64);
    assert!(rig.failures.lock().unwrap().is_empty(), "the host did nothing wrong");
    assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
}

#[test]
fn what_does_not_lie_on_the_disk_in_whole_sectors_is_refused() {
    let mut rig = Rig::new();
    let cases = [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
    ];
    for (sector, len) in cases {
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, sector, &[Desc::writable(DATA, len)]), (1, IOERR), "{sector} {len}");
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, sector, &[Desc::readable(DATA, len)]), (1, IOERR), "{sector} {len}");
    }
    assert_eq!(rig.counts(Kind::Read), [0, 0, 0, cases.len() as u64]);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, SECTORS - 1, &[Desc::writable(DATA, 512)]), (513, OK));
}

#[test]
fn a_read_only_drive_is_read_and_not_changed() {
    let mut rig = Rig::with(Access::ReadOnly);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[Desc::writable(DATA, 512)]), (513, OK));
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[Desc::readable(DATA, 512)]), (1, IOERR));
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (1, OK));
    assert_eq!(rig.unmap(VIRTIO_BLK_T_DISCARD, 0, 1, 0), (1, IOERR));
    assert_eq!(rig.unmap(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), (1, IOERR));
    assert!(rig.on_disk(0, 512) == expected(0, 512));
    assert!(rig.failures.lock().unwrap().is_empty());
}

#[test]
fn zeroes_are_written_and_discards_are_done() {
    let mut rig = Rig::new();
    assert_eq!(rig.unmap(VIRTIO_BLK_T_WRITE_ZEROES, 2, 3, 0), (1, OK));
    assert_eq!(rig.unmap(VIRTIO_BLK_T_WRITE_ZEROES, 9, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP), (1, OK));
    assert_eq!(rig.on_disk(2 * 512, 3 * 512), [0; 3 * 512]);
    assert_eq!(rig.on_disk(9 * 512, 512), [0; 512]);
    assert!(rig.on_disk(5 * 512, 512) == expected(5 * 512, 512));
    assert_eq!(rig.unmap(VIRTIO_BLK_T_DISCARD, 0, SECTORS as u32, 0), (1, OK));
    assert_eq!(std::fs::metadata(&rig.file).unwrap().len(), SECTORS * 512);
    assert_eq!(rig.counts(Kind::Unmap), [3, (3 + 1 + SECTORS) * 512, 0, 0]);
}

#[test]
fn ranges_that_are_not_on_the_disk_and_flags_that_nobody_knows_are_refused() {
    let mut rig = Rig::new();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (sector, sectors) in [(SECTORS, 1), (0, SECTORS as u32 + 1), (u64::MAX, 1), (0, u32::MAX), (1 << 55, 1)] {
            assert_eq!(rig.unmap(kind, sector, sectors, 0), (1, IOERR), "{sectors} at {sector}");
        }
        for flags in [2, 3, 1 << 31, u32::MAX] {
            assert_eq!(rig.unmap(kind, 0, 1, flags), (1, UNSUPP));
        }
        // One range is all that a request may have, and it may not have less.
        for len in [0, 8, 15, 17, 32] {
            assert_eq!(rig.request(kind, 0, &[Desc::readable(DATA, len)]), (1, IOERR), "{len} bytes");
        }
    }
    assert_eq!(rig.unmap(VIRTIO_BLK_T_DISCARD, 0, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP), (1, UNSUPP));
    assert!(rig.on_disk(0, 512) == expected(0, 512));
}

#[test]
fn the_serial_number_is_cut_to_the_buffer_and_never_longer_than_20_bytes() {
    let mut rig = Rig::new();
    let serial = b"serial-0123456789\0\0\0";
    for len in 0..=32 {
        rig.guest.put(DATA, &[0xaa; 40]);
        // In two pieces, so that a border lies inside the serial number.
        let (first, second) = (len.min(7), len - len.min(7));
        let data = [Desc::writable(DATA, first), Desc::writable(DATA + u64::from(first), second)];
        let written = len.min(20) as usize;
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &data), (written as u32 + 1, OK), "{len} bytes");
        let read = rig.guest.get(DATA, 40);
        assert_eq!((&read[..written], &read[written..]), (&serial[..written], &vec![0xaa; 40 - written][..]));
    }
}

#[test]
fn a_kind_of_request_that_is_not_offered_is_answered_as_unsupported() {
    let mut rig = Rig::new();
    // SCSI pass-through (2, 3) is the one that has cost others a heap overflow (CVE-2026-48914).
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 0x100, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[Desc::writable(DATA, 512)]), (1, UNSUPP), "kind {kind}");
    }
}

#[test]
fn a_host_error_is_the_guests_status_and_is_told_at_a_limited_rate() {
    let mut rig = Rig::new();
    // The file becomes shorter under us.
    std::fs::File::options().write(true).open(&rig.file).unwrap().set_len(512).unwrap();
    let data = [Desc::writable(DATA, 512)];
    for _ in 0..100 {
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &data), (1, IOERR));
    }
    assert_eq!(rig.counts(Kind::Read), [0, 0, 100, 0]);
    assert_eq!(*rig.failures.lock().unwrap(), vec![(Kind::Read, Some(libc::EIO)); 10]);
    rig.guest.clock.fetch_add(5_000_000_000, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &data), (1, IOERR));
    assert_eq!(rig.failures.lock().unwrap().len(), 11);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &data), (513, OK));
}

#[test]
fn a_reset_with_requests_on_their_way_to_the_file_returns_when_they_are_done() {
    let mut rig = Rig::new();
    for round in 0..20 {
        // Discards are never done on the spot.
        rig.put_header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
        rig.guest.put(DATA, &[&0_u64.to_le_bytes()[..], &64_u32.to_le_bytes(), &[0; 4]].concat());
        for i in 0..64 {
            let status = Desc::writable(STATUS + i, 1);
            rig.vring.add(&[Desc::readable(HEADER, 16), Desc::readable(DATA, 16), status]);
        }
        rig.guest.kick(0);
        for _ in 0..round % 4 {
            rig.guest.event_loop.turn(Wait::Poll).unwrap();
        }
        rig.guest.reset();
        let memory = rig.guest.get(0, LOW_BYTES as usize);
        rig.guest.turn();
        assert!(rig.guest.get(0, LOW_BYTES as usize) == memory, "written to after the reset");
        rig.vring = rig.guest.start(0, 256);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 100, &[Desc::writable(DATA, 512)]), (513, OK));
        assert_eq!(rig.counters.in_flight.load(Relaxed), 0);
    }
}

/// A descriptor of a driver that wants to do harm, and knows where things are.
fn hostile_desc() -> impl Strategy<Value = Desc> {
    let places =
        [HEADER, STATUS, DATA, DATA + 512, RINGS, RINGS + 0x4000, RINGS + 0x8000, LOW_BYTES - 8, HIGH, u64::MAX, 0];
    let lens = [0, 1, 15, 16, 17, 20, 32, 512, 513, 4096, 1 << 20, u32::MAX];
    let flags = [0, 1, 1, 1, 2, 3, 3, 4, 5, 7];
    (
        prop::sample::select(places.to_vec()),
        prop::sample::select(lens.to_vec()),
        prop::sample::select(flags.to_vec()),
        prop_oneof![4 => 0..16_u16, 1 => any::<u16>()],
    )
        .prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever lies in the tables and rings, nothing breaks, everything ends, and after a reset the drive works.
    #[test]
    fn no_driver_breaks_the_drive(
        tables in prop::collection::vec(prop::collection::vec(hostile_desc(), 16), 1..4),
        heads in prop::collection::vec(prop_oneof![8 => 0..16_u16, 1 => any::<u16>()], 0..24),
        kind in prop::sample::select(vec![0, 1, 4, 8, 11, 13, 99_u32]),
        sector in prop_oneof![3 => 0..130_u64, 1 => any::<u64>()],
        event_idx in any::<bool>(),
        jump in prop_oneof![9 => Just(0), 1 => any::<u16>()],
    ) {
        let mut rig = Rig::new();
        rig.guest.reset();
        rig.vring = rig.guest.start(if event_idx { EVENT_IDX | INDIRECT_DESC } else { 0 }, 16);
        rig.put_header(kind, sector);
        for table in &tables {
            for (i, desc) in (0..).zip(table) {
                rig.vring.put(i, *desc);
            }
            for head in &heads {
                rig.vring.offer(*head);
                rig.guest.kick(0);
                rig.guest.event_loop.turn(Wait::Poll).unwrap();
            }
            if jump != 0 {
                rig.vring.publish(jump);
            }
            rig.guest.run(0);
        }
        rig.guest.reset();
        prop_assert_eq!(rig.guest.status(), 0);
        prop_assert_eq!(std::fs::metadata(&rig.file).unwrap().len(), SECTORS * 512);
        rig.vring = rig.guest.start(0, 256);
        prop_assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, &[Desc::writable(DATA, 512)]), (513, OK));
        prop_assert_eq!(rig.counters.in_flight.load(Relaxed), 0);
    }
}

impl Rig {
    /// Has the drive limited as an operator does; true when the answer is there.
    fn limit(&mut self, limits: &Limits) -> bool {
        let ended = Arc::new(AtomicU32::new(0));
        let count = ended.clone();
        let done = Done::posted(move |end| {
            assert!(end.is_ok());
            count.fetch_add(1, Relaxed);
        });
        assert!(self.orders.send(Order::Limit(SetLimits { limits: *limits, done })).is_ok());
        self.guest.turn();
        ended.load(Relaxed) == 1
    }

    fn pass(&self, ms: u64) {
        self.guest.clock.fetch_add(ms * 1_000_000, Relaxed);
    }

    /// How long a read of a sector has to wait, in quarters of a second.
    fn next_read_waits(&mut self) -> u64 {
        self.waits(VIRTIO_BLK_T_IN, Desc::writable(DATA, 512))
    }

    /// The same of another request for one sector.
    fn waits(&mut self, kind: u32, data: Desc) -> u64 {
        self.put_header(kind, 0);
        let head = self.vring.add(&[Desc::readable(HEADER, 16), data, Desc::writable(STATUS, 1)]);
        self.guest.run(0);
        for quarters in 0..100 {
            if let Some(&(used, _)) = self.vring.take_used().first() {
                assert_eq!(used, head);
                return quarters;
            }
            self.pass(250);
            self.guest.turn();
        }
        panic!("it waits for ever");
    }
}

#[test]
fn each_kind_of_request_counts_for_the_limits_as_the_page_on_them_says() {
    let of = |quantity: Quantity, rate, iops_size| {
        let mut limits = Limits { iops_size, ..Limits::default() };
        limits.each[quantity as usize].rate = rate;
        limits
    };
    let iops = of(Quantity::Iops, 1, 1024);
    let bytes = of(Quantity::Bps, 1024, 0);
    let writes = of(Quantity::IopsWrite, 1, 0);
    type Case = (&'static str, fn(&mut Rig) -> (u32, u8), [(u64, u64); 2]);
    // The wait of the next read at one request a second with an iops-size of 1 KiB, and at 1 KiB a second: at least and
    // at most, in quarters of a second.
    let cases: [Case; 10] = [
        ("read", |rig| rig.request(VIRTIO_BLK_T_IN, 0, &[Desc::writable(DATA, 512)]), [(4, 5), (2, 3)]),
        ("write", |rig| rig.request(VIRTIO_BLK_T_OUT, 0, &[Desc::readable(DATA, 2048)]), [(8, 9), (8, 9)]),
        ("flush", |rig| rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), [(0, 0), (0, 0)]),
        ("get-id", |rig| rig.request(VIRTIO_BLK_T_GET_ID, 0, &[Desc::writable(DATA, 20)]), [(0, 0), (0, 0)]),
        ("discard", |rig| rig.unmap(VIRTIO_BLK_T_DISCARD, 0, 8, 0), [(16, 17), (0, 0)]),
        ("write-zeroes", |rig| rig.unmap(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), [(16, 17), (16, 17)]),
        ("unknown", |rig| rig.request(77, 0, &[]), [(4, 5), (0, 0)]),
        ("no header", |rig| rig.run(&[Desc::writable(STATUS, 1)]), [(4, 5), (0, 0)]),
        ("beyond the end", |rig| rig.request(VIRTIO_BLK_T_IN, SECTORS, &[Desc::writable(DATA, 512)]), [(4, 5), (0, 0)]),
        ("no memory", |rig| rig.request(VIRTIO_BLK_T_IN, 0, &[Desc::writable(u64::MAX, 512)]), [(4, 5), (2, 3)]),
    ];
    for (limits, column) in [(iops, 0), (bytes, 1)] {
        let mut rig = Rig::new();
        assert!(rig.limit(&limits));
        for (name, request, waits) in &cases {
            rig.pass(3_600_000);
            request(&mut rig);
            let (least, most) = waits[column];
            let wait = rig.next_read_waits();
            assert!((least..=most).contains(&wait), "{name}: {wait} quarters of a second, limit {column}");
        }
    }
    // What only writes count for does not hold up a read.
    let mut rig = Rig::new();
    assert!(rig.limit(&writes));
    for (name, request, _) in &cases {
        rig.pass(3_600_000);
        request(&mut rig);
        assert_eq!(rig.next_read_waits(), 0, "{name}");
    }
    // ... and a write that makes no sense is a write.
    rig.pass(3_600_000);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, SECTORS, &[Desc::readable(DATA, 512)]), (1, IOERR));
    assert!((4..=5).contains(&rig.waits(VIRTIO_BLK_T_OUT, Desc::readable(DATA, 512))));
}

#[test]
fn a_request_that_makes_no_sense_waits_like_any_other_and_is_answered_once() {
    let mut rig = Rig::new();
    assert!(rig.limit(&Limits::iops(1)));
    for n in 0..5 {
        rig.put_header(VIRTIO_BLK_T_IN, SECTORS);
        rig.vring.add(&[Desc::readable(HEADER, 16), Desc::writable(DATA, 512), Desc::writable(STATUS, 1)]);
        rig.vring.add(&[Desc::writable(STATUS, 1)]);
        rig.guest.run(0);
        assert_eq!((rig.vring.take_used().len(), rig.counts(Kind::Read)[3]), (1, n + 1), "one a second");
        rig.pass(1_002);
        rig.guest.turn();
        assert_eq!(rig.vring.take_used().len(), 1);
        rig.pass(1_002);
    }
}
