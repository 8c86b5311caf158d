//! An empty slot as a driver meets it.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::virtio::testing::*;

const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 0x800;

fn start() -> (Guest, Vring) {
    let ram = ram();
    let mut guest = Guest::new(Vacant::new(3, ram.clone()), ram);
    let vring = guest.start(0, 256);
    (guest, vring)
}

/// A request's used length and status.
fn request(guest: &mut Guest, vring: &mut Vring, kind: u32, sector: u64, data: &[Desc]) -> (u32, u8) {
    guest.put(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
    guest.put(HEADER + 8, &sector.to_le_bytes());
    guest.put(STATUS, &[0xee]);
    vring.add(&[&[Desc::readable(HEADER, 16)][..], data, &[Desc::writable(STATUS, 1)]].concat());
    guest.run(0);
    (vring.take_used()[0].1, guest.get(STATUS, 1)[0])
}

#[test]
fn every_request_is_answered_at_once_with_an_error_and_nothing_is_written_but_the_status() {
    let (mut guest, mut vring) = start();
    guest.put(DATA, &[0x55; 512]);
    let [read, write] = [Desc::writable(DATA, 512), Desc::readable(DATA, 512)];
    for (kind, data) in [
        (VIRTIO_BLK_T_IN, &[read][..]),
        (VIRTIO_BLK_T_OUT, &[write]),
        (VIRTIO_BLK_T_FLUSH, &[]),
        (VIRTIO_BLK_T_DISCARD, &[write]),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[write]),
    ] {
        for sector in [0, 1, u64::MAX] {
            assert_eq!(request(&mut guest, &mut vring, kind, sector, data), (1, VIRTIO_BLK_S_IOERR as u8), "{kind}");
        }
    }
    assert_eq!(request(&mut guest, &mut vring, 0x77, 0, &[read]), (1, VIRTIO_BLK_S_UNSUPP as u8));
    assert_eq!(guest.get(DATA, 512), [0x55; 512]);
}

#[test]
fn its_serial_number_is_empty_however_the_buffers_for_it_are_cut() {
    let (mut guest, mut vring) = start();
    let ok = VIRTIO_BLK_S_OK as u8;
    for cut in [&[20][..], &[7, 13], &[1, 1, 40], &[5]] {
        guest.put(DATA, &[0x55; 64]);
        let mut at = DATA;
        let data: Vec<Desc> = cut
            .iter()
            .map(|&len| {
                at += u64::from(len);
                Desc::writable(at - u64::from(len), len)
            })
            .collect();
        let bytes = cut.iter().sum::<u32>().min(20);
        assert_eq!(request(&mut guest, &mut vring, VIRTIO_BLK_T_GET_ID, 0, &data), (bytes + 1, ok));
        let (zeros, rest) = (guest.get(DATA, bytes as usize), guest.get(DATA + u64::from(bytes), 8));
        assert!(zeros.iter().all(|&byte| byte == 0) && rest == [0x55; 8], "{cut:?}");
    }
    let outside = [Desc::writable(LOW_BYTES, 20)];
    let ioerr = VIRTIO_BLK_S_IOERR as u8;
    assert_eq!(request(&mut guest, &mut vring, VIRTIO_BLK_T_GET_ID, 0, &outside), (1, ioerr));
}

#[test]
fn a_request_without_a_header_or_a_status_comes_back_empty_and_the_slot_goes_on() {
    let (mut guest, mut vring) = start();
    for descs in [&[Desc::readable(HEADER, 16)][..], &[Desc::readable(HEADER, 8), Desc::writable(STATUS, 1)]] {
        vring.add(descs);
        guest.run(0);
        assert_eq!(vring.take_used()[0].1, 0);
    }
    assert_eq!(guest.status() & NEEDS_RESET, 0);
}

#[test]
fn it_has_no_sectors_and_offers_what_any_disk_needs_that_comes_later() {
    let (guest, _vring) = start();
    let word = |at: u64| guest.read(reg::CONFIG + at);
    assert_eq!([word(0), word(4), word(20)], [0, 0, 512]);
    assert_eq!(guest.offered() & features(true) & !features(false), 0, "it is not read-only");
    assert_eq!(guest.offered() & features(false), features(false));
}
