//! A disk does what a plain array would, whichever way its requests go.

use proptest::prelude::*;

use super::testing::*;
use super::*;
use crate::config::spec::Cache;

const SIZE: usize = 1 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7 + i / 512) as u8).collect()
}

/// Every way to the file: in memory or on a disk, through the page cache or not, by either engine.
fn ways() -> Vec<(bool, Cache, Aio)> {
    let mut ways = Vec::new();
    for aio in [Aio::Auto, Aio::Threads] {
        ways.extend([(true, Cache::Buffered, aio), (false, Cache::Buffered, aio), (false, Cache::Direct, aio)]);
    }
    ways
}

fn guest(file: &TestFile, cache: Cache, aio: Aio) -> Guest {
    Guest::new(&DriveSpec { cache, aio, ..spec(&file.0) })
}

#[test]
fn every_alignment_of_offset_length_and_memory_reads_and_writes_the_right_bytes() {
    for (in_memory, cache, aio) in ways() {
        // The last 512 bytes are no whole block, and 100 more are no sector.
        let content = pattern(SIZE + 512 + 100);
        let file = TestFile::new(in_memory, &content);
        let mut guest = guest(&file, cache, aio);
        assert_eq!(guest.disk.sectors(), (SIZE as u64 + 512) / 512);
        let mut expected = content;
        // The last two are aligned to nothing, whatever the disk below.
        let tail = [(SIZE, 512), (SIZE - 4096, 4608), (1000, 3000), (4096, 1001)];
        for (offset, len) in [(0, 4096), (512, 512), (4096, 8192), (3584, 1024)].into_iter().chain(tail) {
            for shift in [0, 1, 512, RAM_BYTES as u64 / 2 - 256] {
                let at = offset as u64;
                let segments = [segment(shift, 256), segment(shift + 256, len - 256)];
                guest.put(shift, &vec![0xee; len]);
                guest.run(Op::Read { offset: at, segments: &segments }).unwrap();
                assert_eq!(guest.take(shift, len), expected[offset..offset + len], "read {cache:?} {aio:?} {offset}");
                let fresh: Vec<u8> = expected[offset..offset + len].iter().map(|b| b.wrapping_add(1)).collect();
                guest.put(shift, &fresh);
                guest.run(Op::Write { offset: at, segments: &segments }).unwrap();
                expected[offset..offset + len].copy_from_slice(&fresh);
            }
        }
        guest.run(Op::Flush).unwrap();
        assert!(file.content() == expected, "{in_memory} {cache:?} {aio:?}");
    }
}

#[test]
fn a_long_request_with_odd_memory_goes_through_bounce_buffers_in_pieces() {
    for aio in [Aio::Auto, Aio::Threads] {
        let content = pattern(2 * SIZE);
        let file = TestFile::new(false, &content);
        let mut guest = guest(&file, Cache::Direct, aio);
        let segments = [segment(1, SIZE - 8192), segment(RAM_BYTES as u64 - 9000, 8192)];
        guest.run(Op::Read { offset: 4096, segments: &segments }).unwrap();
        assert!(guest.take(1, SIZE - 8192) == content[4096..SIZE - 4096]);
        assert!(guest.take(RAM_BYTES as u64 - 9000, 8192) == content[SIZE - 4096..SIZE + 4096]);
        guest.run(Op::Write { offset: SIZE as u64, segments: &segments }).unwrap();
        assert!(file.content()[SIZE..] == content[4096..SIZE + 4096]);
    }
}

#[test]
fn many_requests_at_once_wait_for_bounce_buffers_and_for_those_that_must_be_alone() {
    for aio in [Aio::Auto, Aio::Threads] {
        let content = pattern(SIZE);
        let file = TestFile::new(false, &content);
        let mut guest = guest(&file, Cache::Direct, aio);
        for i in 0..60_u64 {
            // Odd memory, odd offset, neither: by turns.
            let (memory, disk) = match i % 3 {
                0 => (i * 8192 + 1, i * 8192),
                1 => (i * 8192, i * 8192 + 100),
                _ => (i * 8192, i * 8192),
            };
            let op = Op::Read { offset: disk, segments: &[segment(memory, 4096)] };
            assert!(matches!(guest.disk.submit(op, i as u32), Submitted::Queued));
        }
        let mut done = guest.drain();
        done.sort_by_key(|(token, _)| *token);
        assert!(done.iter().enumerate().all(|(i, (token, result))| *token == i as u32 && result.is_ok()));
        for i in 0..60_usize {
            let (memory, disk) = (i * 8192 + usize::from(i % 3 == 0), i * 8192 + 100 * usize::from(i % 3 == 1));
            assert!(guest.take(memory as u64, 4096) == content[disk..disk + 4096], "request {i}");
        }
    }
}

#[test]
fn a_write_that_shares_a_page_with_another_waits_for_it_when_one_of_them_takes_the_page_cache() {
    for aio in [Aio::Auto, Aio::Threads] {
        let file = TestFile::new(false, &pattern(SIZE));
        let mut guest = guest(&file, Cache::Direct, aio);
        guest.put(0, &[1; 4096]);
        guest.put(4096, &[2; 4096]);
        for page in 0..100_u64 {
            let whole = Op::Write { offset: page * 4096, segments: &[segment(0, 4096)] };
            let part = Op::Write { offset: page * 4096 + 100, segments: &[segment(4096, 200)] };
            for op in if page % 2 == 0 { [whole, part] } else { [part, whole] } {
                assert!(matches!(guest.disk.submit(op, 0), Submitted::Queued));
            }
        }
        assert!(guest.drain().iter().all(|(_, result)| result.is_ok()));
        for (page, bytes) in file.content().chunks(4096).take(100).enumerate() {
            let is_part = |at: usize| page % 2 == 0 && (100..300).contains(&at);
            let right = bytes.iter().enumerate().all(|(at, byte)| *byte == 1 + u8::from(is_part(at)));
            assert!(right, "{aio:?}, page {page}");
        }
    }
}

#[test]
fn a_read_only_disk_refuses_changes_and_flushes_for_nothing() {
    let file = TestFile::new(true, &pattern(SIZE));
    let mut guest = Guest::new(&DriveSpec { access: Access::ReadOnly, ..spec(&file.0) });
    assert!(guest.disk.is_read_only());
    let write = Op::Write { offset: 0, segments: &[segment(0, 512)] };
    for op in [write, Op::Discard { offset: 0, len: 512 }, Op::WriteZeroes { offset: 0, len: 512, unmap: true }] {
        assert_eq!(errno(&guest.run(op)), libc::EROFS);
    }
    guest.run(Op::Flush).unwrap();
    assert!(file.content() == pattern(SIZE));
}

#[test]
fn nothing_outside_the_disk_or_guest_memory_is_touched() {
    let file = TestFile::new(true, &pattern(SIZE + 100));
    let mut guest = Guest::new(&spec(&file.0));
    let all = u64::MAX;
    for (offset, len) in [(SIZE as u64, 512), (SIZE as u64 - 256, 512), (all, 512), (all - 511, 512), (1, SIZE)] {
        assert_eq!(errno(&guest.run(Op::Read { offset, segments: &[segment(0, len)] })), libc::EINVAL);
        assert_eq!(errno(&guest.run(Op::Write { offset, segments: &[segment(0, len)] })), libc::EINVAL);
        let len = len as u64;
        assert_eq!(errno(&guest.run(Op::Discard { offset, len })), libc::EINVAL);
        assert_eq!(errno(&guest.run(Op::WriteZeroes { offset, len, unmap: false })), libc::EINVAL);
    }
    assert_eq!(errno(&guest.run(Op::Discard { offset: 512, len: all })), libc::EINVAL);
    for (addr, len) in [(0, 512), (RAM - 1, 512), (RAM + RAM_BYTES as u64 - 1, 2), (all, 2)] {
        let segments = [segment(0, 512), Segment { addr: GuestAddress(addr), len }];
        assert_eq!(errno(&guest.run(Op::Read { offset: 0, segments: &segments })), libc::EFAULT);
    }
    assert_eq!(guest.disk.in_flight(), 0);
    assert!(file.content() == pattern(SIZE + 100), "the file neither changed nor grew");
}

#[test]
fn an_empty_request_is_done_at_once() {
    let file = TestFile::new(false, &pattern(SIZE));
    let mut guest = guest(&file, Cache::Direct, Aio::Auto);
    for op in [
        Op::Read { offset: 0, segments: &[] },
        Op::Write { offset: SIZE as u64, segments: &[segment(0, 0)] },
        Op::Discard { offset: 3, len: 0 },
        Op::WriteZeroes { offset: 0, len: 0, unmap: false },
    ] {
        assert!(matches!(guest.disk.submit(op, 0), Submitted::Done(Ok(()))));
    }
}

#[test]
fn what_the_page_cache_holds_is_read_in_place_and_long_requests_are_not() {
    for in_memory in [true, false] {
        let file = TestFile::new(in_memory, &pattern(SIZE));
        let mut guest = Guest::new(&spec(&file.0));
        let short = Op::Read { offset: 4096, segments: &[segment(0, 4096)] };
        assert!(matches!(guest.disk.submit(short, 0), Submitted::Done(Ok(()))));
        assert!(guest.take(0, 4096) == pattern(SIZE)[4096..8192]);
        let long = Op::Read { offset: 0, segments: &[segment(0, SIZE)] };
        assert!(matches!(guest.disk.submit(long, 0), Submitted::Queued));
        guest.drain();
        assert!(guest.take(0, SIZE) == pattern(SIZE));
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Read(usize, usize, usize),
    Write(usize, usize, usize, u8),
    Discard(usize, usize),
    Zero(usize, usize, bool),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sector = 0..64_usize;
    let count = 1..20_usize;
    let memory = prop_oneof![Just(0_usize), Just(512), 0..9000_usize];
    let step = prop_oneof![
        (sector.clone(), count.clone(), memory.clone()).prop_map(|(s, c, m)| Step::Read(s, c, m)),
        (sector.clone(), count.clone(), memory, any::<u8>()).prop_map(|(s, c, m, b)| Step::Write(s, c, m, b)),
        (sector.clone(), count.clone()).prop_map(|(s, c)| Step::Discard(s, c)),
        (sector, count, any::<bool>()).prop_map(|(s, c, unmap)| Step::Zero(s, c, unmap)),
        Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..30)
}

/// Runs the steps against a disk and an array.
fn compare(guest: &mut Guest, file: &TestFile, steps: &[Step]) -> std::result::Result<(), TestCaseError> {
    let mut model = file.content();
    let range = |s: usize, c: usize| s.min(63) * 512..(s + c).min(64) * 512;
    for step in steps {
        match *step {
            Step::Read(s, c, memory) => {
                let range = range(s, c);
                let op = Op::Read { offset: range.start as u64, segments: &[segment(memory as u64, range.len())] };
                guest.run(op)?;
                prop_assert!(guest.take(memory as u64, range.len()) == model[range], "{step:?}");
            }
            Step::Write(s, c, memory, byte) => {
                let range = range(s, c);
                let bytes: Vec<u8> = (0..range.len()).map(|i| byte.wrapping_add(i as u8)).collect();
                guest.put(memory as u64, &bytes);
                let segments = [segment(memory as u64, 100), segment(memory as u64 + 100, range.len() - 100)];
                guest.run(Op::Write { offset: range.start as u64, segments: &segments })?;
                model[range].copy_from_slice(&bytes);
            }
            Step::Discard(s, c) => {
                let range = range(s, c);
                guest.run(Op::Discard { offset: range.start as u64, len: range.len() as u64 })?;
                // What is read afterwards is anybody's guess (virtio 5.2.6.2), so the model looks.
                model[range.clone()].copy_from_slice(&file.content()[range]);
            }
            Step::Zero(s, c, unmap) => {
                let range = range(s, c);
                guest.run(Op::WriteZeroes { offset: range.start as u64, len: range.len() as u64, unmap })?;
                model[range].fill(0);
            }
            Step::Flush => guest.run(Op::Flush)?,
        }
    }
    prop_assert!(file.content() == model);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_requests_leaves_what_it_would_leave_in_an_array(steps in steps()) {
        for (in_memory, cache, aio) in ways() {
            let file = TestFile::new(in_memory, &pattern(64 * 512));
            let mut guest = guest(&file, cache, aio);
            compare(&mut guest, &file, &steps)?;
        }
    }
}
