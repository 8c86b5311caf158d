//! Trouble: a handler that fails, and every refusal of the kernel that can be had for real (G5, G22).

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::AtomicI32;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;
use crate::error::Error;

#[test]
fn t18_a_handler_that_fails_is_removed_and_named_and_the_others_go_on() {
    let (_, mut event_loop) = stepped();
    let log = Log::new();
    let failures = Log::new();
    let told = failures.clone();
    event_loop.on_failure(move |name, error| told.push(format!("{name}: {error}")));
    let bell = eventfd();
    bell.write(1).unwrap();
    let mine = bell.try_clone().unwrap();
    event_loop
        .add(Box::new(Probe {
            name: "drive \"vda\"".into(),
            attach: Box::new(move |cx| cx.own(Box::new(mine.try_clone().unwrap()), 0).map(drop)),
            ready: Box::new(|_, _| Err(Error::host("its file is gone"))),
        }))
        .unwrap();
    let (other, _) = add_bell(&mut event_loop, 5, &log);
    other.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 2);
    assert_eq!(failures.take(), ["drive \"vda\": its file is gone"]);
    assert_eq!(event_loop.watches.iter().count(), 1, "its watches went with it");
    bell.write(1).unwrap();
    other.write(1).unwrap();
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 1);
    assert_eq!(log.take(), [5, 5]);
    assert_eq!(event_loop.counters().failed, 1);
}

#[test]
fn g22_a_handler_whose_attach_fails_leaves_nothing_behind() {
    let (_, mut event_loop) = stepped();
    let bell = eventfd();
    bell.write(1).unwrap();
    let mine = bell.try_clone().unwrap();
    let handler = probe(
        move |cx| {
            cx.own(Box::new(mine.try_clone().unwrap()), 0)?;
            cx.timer(1)?;
            Err(Error::host("no"))
        },
        |_, _| unreachable!("it was never there"),
    );
    assert_eq!(event_loop.add(handler).unwrap_err().to_string(), "no");
    assert_eq!(event_loop.watches.iter().count(), 0);
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
}

/// A descriptor whose number can be changed behind the loop's back.
struct Slippery(Arc<AtomicI32>);

impl AsRawFd for Slippery {
    fn as_raw_fd(&self) -> RawFd {
        self.0.load(Relaxed)
    }
}

#[test]
fn t19_what_epoll_refuses_is_an_error_that_says_why() {
    let (_, mut event_loop) = stepped();
    let me = event_loop.add(bystander()).unwrap();
    let mut cx = Cx { event_loop: &mut event_loop, me };
    let refusal = |error: Error| error.to_string();
    let before = cx.event_loop.watches.iter().count();

    let regular = std::fs::File::open("/proc/self/exe").unwrap();
    assert!(refusal(cx.own(Box::new(regular), 0).unwrap_err()).ends_with("(os error 1)"), "EPERM: a regular file");

    let shared = Arc::new(eventfd());
    let key = cx.own(Box::new(shared.clone()), 0).unwrap();
    assert!(refusal(cx.own(Box::new(shared), 1).unwrap_err()).ends_with("(os error 17)"), "EEXIST: watched already");
    cx.unwatch(key);

    let (watched, other) = (eventfd(), eventfd());
    let number = Arc::new(AtomicI32::new(watched.as_raw_fd()));
    let key = cx.own(Box::new(Slippery(number.clone())), 0).unwrap();
    number.store(other.as_raw_fd(), Relaxed);
    let error = refusal(cx.set_interest(key, Interest::NONE).unwrap_err());
    assert!(error.ends_with("(os error 2)"), "ENOENT: another descriptor by now: {error}");
    number.store(-1, Relaxed);
    assert!(refusal(cx.set_interest(key, Interest::READ).unwrap_err()).ends_with("(os error 9)"), "EBADF: closed");
    // The loop cannot take out what is not there: it says so in the log and goes on.
    cx.unwatch(key);

    // A limit of epoll's own, as ENOSPC is: it does not nest deeper than five.
    let mut nest = vec![Epoll::new().unwrap()];
    let error = loop {
        let event = EpollEvent::new(EventSet::IN, 0);
        let (inner, outer) = (nest.last().unwrap().as_raw_fd(), Epoll::new().unwrap());
        if outer.ctl(ControlOperation::Add, inner, event).is_err() {
            break refusal(cx.own(Box::new(nest.pop().unwrap()), 0).unwrap_err());
        }
        nest.push(outer);
    };
    assert!(error.starts_with("event loop: watch descriptor"), "{error}");
    assert!(error.ends_with("(os error 22)") || error.ends_with("(os error 40)"), "EINVAL or ELOOP: {error}");

    assert_eq!(event_loop.watches.iter().count(), before, "no refusal left a watch behind");
    assert_eq!(event_loop.turn(Wait::Poll).unwrap(), 0);
}

const CHILD: &str = "LOOPVISOR_TEST_WITHOUT_DESCRIPTORS";

/// Runs the test of this name again in a process of its own, for it takes away what other tests need.
fn in_a_child(name: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let name = format!("event::tests::failure::{name}");
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
    false
}

#[allow(unsafe_code)]
fn limit_descriptors(count: u64) {
    let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
    // SAFETY: setrlimit reads the structure it is given.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
}

#[test]
fn t20_a_loop_without_descriptors_says_so_and_leaks_none() {
    if !in_a_child("t20_a_loop_without_descriptors_says_so_and_leaks_none") {
        return;
    }
    limit_descriptors(64);
    let (mine, _theirs) = UnixStream::pair().unwrap();
    for _ in 0..2 {
        let mut loops = Vec::new();
        let error = loop {
            match EventLoop::new() {
                Ok(event_loop) => loops.push(event_loop),
                Err(error) => break error,
            }
        };
        assert!(loops.len() > 10, "{} loops, in the second round as in the first", loops.len());
        let said = error.to_string();
        assert!(said.starts_with("event loop: ") && said.ends_with("(os error 24)"), "{said}");
        // What is left goes to duplicates, and then a loop that is there still works.
        let mut event_loop = loops.pop().unwrap();
        let (log, me) = (Log::new(), event_loop.add(bystander()).unwrap());
        let error = loop {
            if let Err(error) = (Cx { event_loop: &mut event_loop, me }).watch(&mine, Interest::READ, 0) {
                break error;
            }
        };
        assert!(error.to_string().ends_with("(os error 24)"), "{error}");
        event_loop.remove(me);
        drop(loops);
        let (bell, _) = add_bell(&mut event_loop, 1, &log);
        bell.write(1).unwrap();
        assert_eq!(event_loop.turn(Wait::Block).unwrap(), 1);
    }
}
