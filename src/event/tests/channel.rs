//! Channels and reply slips: nothing is lost, nothing rings for nothing, nobody waits for a loop that is gone (G17).

use super::*;

/// A handler that listens to a channel of numbers and says them.
fn listener(event_loop: &mut EventLoop, receiver: Receiver<u32>, log: &Log<u32>) -> Key {
    let log = log.clone();
    let receiver = Arc::new(receiver);
    let mine = receiver.clone();
    let handler = probe(
        move |cx| {
            cx.listen(&mine, 0);
            Ok(())
        },
        move |_, _| {
            while let Some(number) = receiver.receive() {
                log.push(number);
            }
            Ok(Flow::Done)
        },
    );
    event_loop.add(handler).unwrap()
}

/// How often the loop's bell was rung; it is never read, so its count is all rings so far, and starts anew here.
fn rings(event_loop: &EventLoop) -> u64 {
    event_loop.inbox.bell().read().unwrap_or(0)
}

#[test]
fn what_was_sent_before_anybody_listened_is_told_by_the_first_turn() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    sender.send(1).unwrap();
    sender.send(2).unwrap();
    listener(&mut event_loop, receiver, &log);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [1, 2]);
}

#[test]
fn g17_posts_to_a_loop_that_is_awake_ring_no_bell_and_a_burst_is_one_call() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    listener(&mut event_loop, receiver, &log);
    for number in 0..100 {
        sender.send(number).unwrap();
    }
    assert_eq!(rings(&event_loop), 0);
    assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1, "and it does not fall asleep over them");
    assert_eq!(log.take(), (0..100).collect::<Vec<u32>>());
}

#[test]
fn g17_a_burst_of_messages_names_its_channel_to_the_loop_once() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    listener(&mut event_loop, receiver, &log);
    (0..100).for_each(|number| sender.send(number).unwrap());
    let mut commands = Vec::new();
    event_loop.inbox.take(&mut commands);
    assert_eq!(commands.len(), 1);
}

#[test]
fn g17_posts_to_a_sleeping_loop_ring_its_bell_once() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    let (_other, unused) = channel::<u32>();
    listener(&mut event_loop, receiver, &log);
    let key = listener(&mut event_loop, unused, &log);
    assert!(event_loop.inbox.sleep(), "nothing has come in");
    sender.send(1).unwrap();
    assert_eq!(rings(&event_loop), 1);
    sender.send(2).unwrap();
    event_loop.remote().remove(key, Done::posted(|_| {}));
    event_loop.remote().stop();
    assert_eq!(rings(&event_loop), 0, "it is rung already");
    event_loop.inbox.awake();
    event_loop.inbox.clear_stop();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [1, 2]);
}

#[test]
fn g10_a_flood_of_posts_does_not_keep_the_loop_from_its_descriptors() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    listener(&mut event_loop, receiver, &log);
    let (bell, _) = add_bell(&mut event_loop, 1000, &log);
    for number in 0..10 {
        sender.send(number).unwrap();
        bell.write(1).unwrap();
        assert_eq!(event_loop.turn(Wait::Block).unwrap(), 2);
    }
}

#[test]
fn a_message_for_a_receiver_that_is_gone_comes_back() {
    let (_, mut event_loop) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel());
    let key = listener(&mut event_loop, receiver, &log);
    event_loop.remove(key);
    assert_eq!(sender.send(5), Err(5));
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
}

#[test]
fn a_receiver_moves_to_another_loop_with_what_is_waiting_in_it() {
    let (_, mut first) = stepped();
    let (_, mut second) = stepped();
    let (log, (sender, receiver)) = (Log::new(), channel::<u32>());
    let receiver = Arc::new(receiver);
    let mine = receiver.clone();
    let key = first
        .add(probe(
            move |cx| {
                cx.listen(&mine, 0);
                Ok(())
            },
            |_, _| Ok(Flow::Done),
        ))
        .unwrap();
    sender.send(1).unwrap();
    first.remove(key);
    listener(&mut second, Arc::into_inner(receiver).unwrap(), &log);
    sender.send(2).unwrap();
    assert_eq!(first.turn(Wait::Poll).unwrap(), 0);
    assert_eq!(second.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [1, 2]);
}

#[test]
fn a_slip_that_is_dropped_answers_lost_and_an_ended_one_its_value() {
    let (done, waiter) = Done::<u32>::waited();
    drop(done);
    assert_eq!(waiter.wait(), Err(Lost));
    let (done, waiter) = Done::waited();
    done.end(5);
    assert_eq!(waiter.wait(), Ok(5));
    let log = Log::new();
    for end in [true, false] {
        let inner = log.clone();
        let done = Done::posted(move |value| inner.push(value));
        if end {
            done.end(6);
        }
    }
    assert_eq!(log.take(), [Ok(6), Err(Lost)]);
}

#[test]
fn commands_to_a_loop_that_is_gone_answer_lost() {
    let (_, event_loop) = stepped();
    let remote = event_loop.remote();
    let (done, before) = Done::waited();
    remote.adopt(bystander(), done);
    drop(event_loop);
    assert!(matches!(before.wait(), Err(Lost)), "what it had not done yet");
    let (done, after) = Done::waited();
    remote.adopt(bystander(), done);
    assert!(matches!(after.wait(), Err(Lost)), "and what comes later");
}
