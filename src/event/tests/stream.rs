//! Streams: level-triggered, masked by interest, let go of at a hang-up (G6, G7); and signals that are masked (G20).

use std::io::{Read, Write, pipe};
use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn t06_a_hang_up_is_told_once_and_the_loop_does_not_spin_on_it() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (reader, writer) = pipe().unwrap();
    let theirs = log.clone();
    let handler = probe(
        move |cx| {
            cx.watch(&reader, Interest::READ, 1)?;
            let timer = cx.timer(2)?;
            cx.arm(timer, cx.clock_ns() + 5_000_000)
        },
        move |event, _| {
            log.push((event.tag, event.is_hang_up()));
            Ok(Flow::Done)
        },
    );
    event_loop.add(handler).unwrap();
    drop(writer);
    let mut turns = 0;
    let mut told = Vec::new();
    while !told.contains(&(2, false)) {
        event_loop.turn(Wait::Block).unwrap();
        turns += 1;
        told.extend(theirs.take());
    }
    told.sort_unstable();
    assert_eq!(told, [(1, true), (2, false)]);
    assert!(turns < 5, "{turns} turns until the timer");
}

#[test]
fn t06_what_was_written_before_a_hang_up_can_still_be_read() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    mine.set_nonblocking(true).unwrap();
    theirs.write_all(&[7; 300]).unwrap();
    drop(theirs);
    let (mut reader, inner) = (mine.try_clone().unwrap(), log.clone());
    let handler = probe(
        move |cx| cx.watch(&mine, Interest::READ, 0).map(drop),
        move |event, _| {
            assert!(event.is_hang_up() && event.is_readable() && event.is_writable());
            let got = reader.read(&mut [0; 100]).unwrap();
            inner.push(got);
            Ok(if got == 0 { Flow::Done } else { Flow::More })
        },
    );
    event_loop.add(handler).unwrap();
    let calls: usize = (0..20).map(|_| event_loop.turn(Wait::Poll).unwrap()).sum();
    assert_eq!((calls, log.take()), (4, vec![100, 100, 100, 0]), "a budgeted handler comes back for the rest");
}

#[test]
fn t07_a_masked_stream_wakes_nobody_and_is_served_once_it_is_unmasked() {
    let mut event_loop = EventLoop::new().unwrap();
    let log = Log::new();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let (reader, inner) = (mine.try_clone().unwrap(), log.clone());
    let mut keys = None;
    let handler = probe(
        move |cx| {
            keys.get_or_insert((cx.watch(&mine, Interest::NONE, 1)?, cx.timer(2)?));
            Ok(())
        },
        move |event, _| {
            if event.tag == 1 {
                (&reader).read_exact(&mut [0; 1]).unwrap();
            }
            inner.push(event.tag);
            Ok(Flow::Done)
        },
    );
    let me = event_loop.add(handler).unwrap();
    theirs.write_all(b"x").unwrap();
    let keys: Vec<Key> = event_loop.watches.iter().map(|(key, _)| key).collect();
    let mut cx = Cx { event_loop: &mut event_loop, me };
    cx.arm(keys[1], cx.clock_ns() + 1_000_000).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    assert_eq!(log.take(), [2], "the timer ended the sleep, not the stream");
    assert_eq!(event_loop.counters().wakes_stream, 0);
    Cx { event_loop: &mut event_loop, me }.set_interest(keys[0], Interest::READ).unwrap();
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    assert_eq!(log.take(), [1]);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
}

#[test]
fn g07_progress_now_and_then_keeps_a_stream_from_being_masked() {
    let (_, mut event_loop) = stepped();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let mut calls = 0;
    let handler = probe(
        move |cx| cx.watch(&mine, Interest::READ, 0).map(drop),
        move |_, _| {
            calls += 1;
            Ok(if calls % 64 == 0 { Flow::Done } else { Flow::Idle })
        },
    );
    event_loop.add(handler).unwrap();
    theirs.write_all(b"x").unwrap();
    let calls: usize = (0..300).map(|_| event_loop.turn(Wait::Poll).unwrap()).sum();
    assert_eq!((calls, event_loop.counters().stuck), (300, 0));
}

#[test]
fn g07_a_masked_stream_comes_back_when_its_handler_unmasks_it() {
    let (_, mut event_loop) = stepped();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let handler = probe(move |cx| cx.watch(&mine, Interest::BOTH, 0).map(drop), |_, _| Ok(Flow::Idle));
    let me = event_loop.add(handler).unwrap();
    theirs.write_all(b"x").unwrap();
    for _ in 0..100 {
        event_loop.turn(Wait::Poll).unwrap();
    }
    assert_eq!(event_loop.counters().stuck, 1);
    let key = event_loop.watches.iter().next().unwrap().0;
    Cx { event_loop: &mut event_loop, me }.set_interest(key, Interest::READ).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
}

#[test]
fn g20_a_signal_that_rang_while_masked_is_told_once_when_it_is_unmasked() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let (bell, me) = add_bell(&mut event_loop, 3, &log);
    let key = event_loop.watches.iter().next().unwrap().0;
    Cx { event_loop: &mut event_loop, me }.set_interest(key, Interest::NONE).unwrap();
    for _ in 0..5 {
        bell.write(1).unwrap();
        assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    }
    Cx { event_loop: &mut event_loop, me }.set_interest(key, Interest::READ).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(log.take(), [3]);
}

#[test]
fn g20_masking_takes_back_what_was_fetched_and_not_told() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let bells = [eventfd(), eventfd()];
    let (mine, inner) = (bells.each_ref().map(|bell| bell.try_clone().unwrap()), log.clone());
    let keys = Arc::new(Mutex::new(Vec::new()));
    let theirs = keys.clone();
    let handler = probe(
        move |cx| {
            for (tag, bell) in mine.iter().enumerate() {
                theirs.lock().unwrap().push(cx.own(Box::new(bell.try_clone().unwrap()), tag as u32)?);
            }
            Ok(())
        },
        move |event, cx| {
            inner.push(event.tag);
            cx.set_interest(keys.lock().unwrap()[1 - event.tag as usize], Interest::NONE)?;
            Ok(Flow::Done)
        },
    );
    event_loop.add(handler).unwrap();
    for bell in &bells {
        bell.write(1).unwrap();
    }
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [0]);
}
