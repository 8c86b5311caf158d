//! The balloon as a driver meets it, honest or not: real chains, a real loop, real memory.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::memory::allocate;
use crate::virtio::Command;
use crate::virtio::testing::*;

const STATS: u32 = 2;
const REPORTING: u32 = 3;
const ALL: u64 = STATS_VQ | PAGE_REPORTING | VERSION_1;

/// A driver with a balloon.
struct Rig {
    guest: Guest,
    rings: Vec<Vring>,
    orders: Sender<Order>,
    counters: Arc<BalloonCounters>,
    news: Arc<Mutex<Vec<BalloonNews>>>,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(ram(), ALL)
    }

    /// A driver that has not begun.
    fn idle(ram: Arc<GuestRam>) -> Rig {
        let news = Arc::new(Mutex::new(Vec::new()));
        let told = news.clone();
        let balloon = Balloon::new(ram.clone(), true, true, Box::new(move |one| told.lock().unwrap().push(one)));
        let (orders, counters) = (balloon.orders(), balloon.counters());
        Rig { guest: Guest::new(balloon, ram), rings: Vec::new(), orders, counters, news }
    }

    fn with(ram: Arc<GuestRam>, features: u64) -> Rig {
        let mut rig = Rig::idle(ram);
        rig.start(features);
        rig
    }

    fn start(&mut self, features: u64) {
        self.guest.negotiate(features);
        self.rings = (0..5).map(|queue| self.guest.set_up(queue, 64, false)).collect();
        self.guest.driver_ok();
        self.guest.turn();
    }

    /// Sends a chain and turns the loop until nothing happens: whether it has come back.
    fn send(&mut self, queue: u32, descs: &[Desc]) -> bool {
        let head = self.rings[queue as usize].add(descs);
        self.guest.run(queue as usize);
        self.rings[queue as usize].take_used().contains(&(head, 0))
    }

    /// Sends page numbers in one buffer.
    fn frames(&mut self, queue: usize, frames: &[u32]) {
        self.put_frames(DATA, frames);
        assert!(self.send(queue as u32, &[Desc::readable(DATA, 4 * frames.len() as u32)]));
    }

    fn put_frames(&self, address: u64, frames: &[u32]) {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_le_bytes()).collect();
        self.guest.put(address, &bytes);
    }

    fn order(&mut self, order: Order) {
        assert!(self.orders.send(order).is_ok());
        self.guest.turn();
    }

    fn pages(&self) -> u64 {
        self.counters.pages.load(Relaxed)
    }

    fn reclaimed_pages(&self) -> u64 {
        self.counters.reclaimed_bytes.load(Relaxed) / PAGE_BYTES
    }

    fn reported_pages(&self) -> u64 {
        self.counters.reported_bytes.load(Relaxed) / PAGE_BYTES
    }

    fn news(&self) -> Vec<BalloonNews> {
        std::mem::take(&mut self.news.lock().unwrap())
    }

    fn touch(&self, frame: u64) {
        self.guest.put(frame * PAGE_BYTES, &[7]);
    }

    fn is_zero(&self, frame: u64) -> bool {
        self.guest.get(frame * PAGE_BYTES, 1) == [0]
    }

    fn config(&self, offset: usize) -> u32 {
        self.guest.read(reg::CONFIG + offset as u64)
    }

    fn statistics(&mut self, values: &[(u16, u64)]) -> bool {
        let bytes: Vec<u8> =
            values.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        self.guest.put(DATA, &bytes);
        self.send(STATS, &[Desc::readable(DATA, bytes.len() as u32)])
    }
}

#[test]
fn what_is_offered_is_what_was_asked_for() {
    let offered = |oom, reporting| Balloon::new(ram(), oom, reporting, Box::new(|_| ())).features();
    assert_eq!(offered(false, false), STATS_VQ);
    assert_eq!(offered(true, false), STATS_VQ | DEFLATE_ON_OOM);
    assert_eq!(offered(false, true), STATS_VQ | PAGE_REPORTING | PAGE_POISON);
}

#[test]
fn a_target_reaches_the_driver_with_an_interrupt_and_one_that_comes_later_finds_it() {
    let mut rig = Rig::idle(ram());
    rig.order(Order::SetTarget(5));
    assert_eq!((rig.config(NUM_PAGES), rig.guest.interrupts()), (5, 0), "nobody is there to be told");
    rig.start(ALL);
    assert_eq!(rig.config(NUM_PAGES), 5);
    let generation = rig.guest.read(reg::CONFIG_GENERATION);
    rig.order(Order::SetTarget(77));
    assert_eq!((rig.config(NUM_PAGES), rig.guest.interrupts()), (77, 1));
    assert_eq!(rig.guest.read(reg::INTERRUPT_STATUS), 2, "the configuration, and no ring");
    assert_ne!(rig.guest.read(reg::CONFIG_GENERATION), generation);
    rig.guest.reset();
    assert_eq!(rig.config(NUM_PAGES), 77, "it survives a reset");
}

#[test]
fn the_driver_writes_its_own_words_of_the_configuration_and_nothing_else() {
    let mut rig = Rig::new();
    rig.order(Order::SetTarget(9));
    let word = |offset: usize| reg::CONFIG + offset as u64;
    rig.guest.write(word(ACTUAL), 3);
    rig.guest.write_bytes(word(POISON_VAL) + 1, &[0xaa, 0xbb]);
    assert_eq!([NUM_PAGES, ACTUAL, 8, POISON_VAL].map(|at| rig.config(at)), [9, 3, 0, 0x00bb_aa00]);
    // Its own word and a bit of another's, all of them at once, and beyond the end.
    rig.guest.write_bytes(word(ACTUAL) - 1, &[0xff; 2]);
    rig.guest.write_bytes(word(ACTUAL), &[0xff; 8]);
    rig.guest.write_bytes(word(NUM_PAGES), &[0xff; 4]);
    rig.guest.write_bytes(word(0xfc), &[0xff; 4]);
    assert_eq!([NUM_PAGES, ACTUAL, 8, POISON_VAL].map(|at| rig.config(at)), [9, 3, 0, 0x00bb_aa00]);
    assert_eq!(rig.pages(), 0, "its word for what is in the balloon is not taken");
    rig.guest.reset();
    assert_eq!([NUM_PAGES, ACTUAL, POISON_VAL].map(|at| rig.config(at)), [9, 0, 0]);
}

#[test]
fn pages_that_are_given_away_are_gone_and_counted_once_and_come_back() {
    let mut rig = Rig::new();
    (300..310).for_each(|frame| rig.touch(frame));
    // In no order, one twice, one never touched.
    rig.frames(INFLATE, &[305, 303, 304, 303, 511]);
    assert_eq!((rig.pages(), rig.reclaimed_pages()), (4, 3));
    assert_eq!([302, 303, 304, 305, 306].map(|frame| rig.is_zero(frame)), [false, true, true, true, false]);
    // Again: it is in, and is not given back a second time.
    rig.touch(304);
    rig.frames(INFLATE, &[304]);
    assert_eq!((rig.pages(), rig.is_zero(304)), (4, false));
    rig.frames(DEFLATE, &[304, 304, 306, 303]);
    assert_eq!((rig.pages(), rig.reclaimed_pages()), (2, 3));
    rig.touch(303);
    rig.frames(INFLATE, &[303]);
    assert_eq!((rig.pages(), rig.reclaimed_pages(), rig.is_zero(303)), (3, 4, true));
}

#[test]
fn pages_outside_memory_are_passed_over_and_logged_at_a_limited_rate() {
    let mut rig = Rig::new();
    rig.touch(400);
    let high = (HIGH / PAGE_BYTES) as u32;
    let beyond = high + (HIGH_BYTES / PAGE_BYTES) as u32;
    for queue in [INFLATE, DEFLATE, INFLATE] {
        for _ in 0..100 {
            rig.frames(queue, &[u32::MAX, 512, 400, high - 1, beyond, beyond - 1]);
        }
    }
    assert_eq!((rig.pages(), rig.is_zero(400), rig.guest.status() & NEEDS_RESET), (2, true, 0));
}

#[test]
fn a_list_may_lie_in_pieces_of_any_length_and_ends_where_its_memory_does() {
    let mut rig = Rig::new();
    rig.put_frames(DATA, &[300, 301, 302]);
    let pieces = [Desc::readable(DATA, 3), Desc::readable(DATA + 3, 0), Desc::readable(DATA + 3, 8)];
    assert!(rig.send(INFLATE as u32, &pieces));
    assert_eq!(rig.pages(), 2, "the third number is not whole");
    let broken = [Desc::readable(DATA + 8, 4), Desc::readable(LOW_BYTES - 2, 4), Desc::readable(DATA, 4)];
    assert!(rig.send(INFLATE as u32, &broken));
    assert_eq!(rig.pages(), 3);
    // Nothing to read, and more numbers than there are pages.
    assert!(rig.send(INFLATE as u32, &[Desc::writable(DATA, 4)]));
    assert!(rig.send(INFLATE as u32, &[Desc::readable(0, LOW_BYTES as u32); 3]));
    assert_eq!(rig.pages(), 3);
}

#[test]
fn a_large_list_is_worked_on_in_turns_and_the_loop_serves_others_between_them() {
    let pages = 5 * PAGES_PER_TURN as u32 + 3;
    for queues in [[INFLATE, INFLATE], [INFLATE, DEFLATE]] {
        let mut rig = Rig::with(allocate(64 << 20, false, true).unwrap(), ALL);
        let list: Vec<u32> = (8192..8192 + pages).rev().collect();
        rig.put_frames(DATA, &list);
        let mut turns = 0;
        for queue in queues {
            rig.rings[queue].add(&[Desc::readable(DATA, 4 * pages)]);
            rig.guest.kick(queue);
        }
        let mut steps = vec![rig.pages()];
        while rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap() > 0 {
            turns += 1;
            steps.push(rig.pages());
        }
        assert!(turns >= 6, "{turns}");
        let step = steps.windows(2).map(|pair| pair[0].abs_diff(pair[1])).max().unwrap();
        assert!(step <= PAGES_PER_TURN as u64, "{steps:?}");
        let left: usize = queues.iter().map(|&queue| rig.rings[queue].take_used().len()).sum();
        assert!(left >= 1 && rig.guest.status() & NEEDS_RESET == 0);
        assert!(rig.pages() == u64::from(pages) || queues[1] == DEFLATE, "{}", rig.pages());
    }
}

#[test]
fn several_lists_share_the_pages_of_a_turn_and_each_is_worked_on_to_its_end() {
    let mut rig = Rig::with(allocate(64 << 20, false, true).unwrap(), ALL);
    let lists: Vec<Vec<u32>> = (0..4).map(|n| (8192 + 1500 * n..).take(1024 + 100 * n as usize).collect()).collect();
    for (list, address) in lists.iter().zip((DATA..).step_by(1 << 16)) {
        rig.put_frames(address, list);
        rig.rings[INFLATE].add(&[Desc::readable(address, 4 * list.len() as u32)]);
    }
    rig.guest.kick(INFLATE);
    let mut seen = vec![0];
    while rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap() > 0 {
        seen.push(rig.pages());
    }
    assert!(seen.windows(2).all(|pair| pair[1] - pair[0] <= PAGES_PER_TURN as u64), "{seen:?}");
    let total: usize = lists.iter().map(Vec::len).sum();
    assert_eq!((rig.pages(), rig.rings[INFLATE].take_used().len()), (total as u64, 4));
}

#[test]
fn pages_that_are_no_neighbours_are_worked_on_in_smaller_turns_until_they_are_again() {
    let mut rig = Rig::with(allocate(64 << 20, false, true).unwrap(), ALL);
    let apart = (0..2000).map(|n| 8192 + 2 * n);
    let list: Vec<u32> = apart.chain(4096..8192).collect();
    rig.put_frames(DATA, &list);
    rig.rings[INFLATE].add(&[Desc::readable(DATA, 4 * list.len() as u32)]);
    rig.guest.kick(INFLATE);
    let mut seen = vec![0];
    while rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap() > 0 {
        seen.push(rig.pages());
    }
    let steps: Vec<u64> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(steps[..3], [1024, 64, 64]);
    assert!(steps[2..10].iter().all(|step| *step == 64), "{steps:?}");
    assert_eq!(steps.iter().rev().find(|step| **step == 1024), Some(&1024), "{steps:?}");
    assert_eq!((rig.pages(), rig.rings[INFLATE].take_used().len()), (list.len() as u64, 1));
}

#[test]
fn a_reset_in_the_middle_of_a_large_list_ends_it_and_nothing_of_it_is_left() {
    let ram = allocate(64 << 20, false, true).unwrap();
    let mut rig = Rig::with(ram, ALL);
    let list: Vec<u32> = (8192..8192 + 4000).collect();
    rig.put_frames(DATA, &list);
    rig.order(Order::SetTarget(100));
    rig.rings[INFLATE].add(&[Desc::readable(DATA, 16_000)]);
    rig.guest.kick(INFLATE);
    rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap();
    assert_eq!(rig.pages(), PAGES_PER_TURN as u64);
    // Paused, so that it is still in the middle when the vCPU's thread has come to its reset.
    rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert!(rig.pages() < 4000);
    rig.guest.reset();
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.guest.turn();
    assert_eq!((rig.pages(), rig.counters.driver.load(Relaxed)), (0, false));
    rig.start(ALL);
    rig.frames(INFLATE, &[8000]);
    assert_eq!((rig.pages(), rig.counters.driver.load(Relaxed)), (1, true));
}

#[test]
fn a_pause_holds_a_large_list_where_it_is_and_a_resume_goes_on_with_it() {
    let mut rig = Rig::with(allocate(64 << 20, false, true).unwrap(), ALL);
    let list: Vec<u32> = (8192..8192 + 4000).collect();
    rig.put_frames(DATA, &list);
    rig.rings[INFLATE].add(&[Desc::readable(DATA, 16_000)]);
    rig.guest.kick(INFLATE);
    rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap();
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(SeqCst), 1);
    let pages = rig.pages();
    rig.guest.turn();
    assert!(pages < 4000 && rig.pages() == pages);
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.guest.turn();
    assert_eq!((rig.pages(), rig.rings[INFLATE].take_used().len()), (4000, 1));
}

#[test]
fn changes_are_told_once_until_somebody_looks() {
    let mut rig = Rig::new();
    assert_eq!(rig.news(), []);
    rig.frames(INFLATE, &[300]);
    rig.frames(INFLATE, &[301]);
    assert_eq!(rig.news(), [BalloonNews::Changed]);
    rig.counters.take_news();
    rig.frames(INFLATE, &[301]);
    assert_eq!(rig.news(), [], "nothing has changed");
    rig.guest.clock.store(9_000, SeqCst);
    rig.frames(DEFLATE, &[300]);
    assert_eq!((rig.news(), rig.counters.moved_ns.load(Relaxed)), (vec![BalloonNews::Changed], 9_000));
    rig.counters.take_news();
    rig.guest.reset();
    assert_eq!((rig.news(), rig.pages()), (vec![BalloonNews::Changed], 0));
}

#[test]
fn statistics_are_read_at_the_start_and_when_they_are_asked_for_and_only_then() {
    let mut rig = Rig::new();
    let told = |values: &[(u16, u64)]| vec![BalloonNews::Statistics(values.to_vec())];
    let values = [(4, 1 << 40), (0, 7), (999, u64::MAX), (4, 5)];
    assert!(!rig.statistics(&values), "the buffer is kept");
    assert_eq!(rig.news(), told(&values), "unknown ones and all");
    rig.order(Order::AskStatistics);
    assert_eq!(rig.rings[2].take_used().len(), 1, "the driver is to write new ones");
    // A silent driver keeps nobody; asking again changes nothing.
    rig.order(Order::AskStatistics);
    assert_eq!((rig.rings[2].take_used().len(), rig.news()), (0, vec![]));
    assert!(!rig.statistics(&[(5, 6)]));
    assert_eq!(rig.news(), told(&[(5, 6)]));
    // A second buffer, which nobody wanted: the older comes back, unread.
    assert!(!rig.statistics(&[(5, 9)]));
    assert_eq!((rig.rings[2].seen_used, rig.news()), (2, vec![]));
}

#[test]
fn statistics_of_any_length_are_read_as_far_as_they_are_whole_and_not_too_many() {
    let mut rig = Rig::new();
    rig.guest.put(DATA, &[1; 8192]);
    let values = |rig: &Rig| match &rig.news()[..] {
        [BalloonNews::Statistics(values)] => values.len(),
        other => panic!("{other:?}"),
    };
    for (lens, count) in [(vec![0], 0), (vec![9], 0), (vec![10], 1), (vec![7, 13, 9], 2), (vec![8192], 256)] {
        rig.order(Order::AskStatistics);
        let descs: Vec<Desc> = lens.iter().map(|&len| Desc::readable(DATA, len)).collect();
        rig.send(STATS, &descs);
        assert_eq!(values(&rig), count, "{lens:?}");
    }
    rig.order(Order::AskStatistics);
    rig.send(STATS, &[Desc::readable(LOW_BYTES - 15, 100)]);
    assert_eq!(values(&rig), 0, "a buffer that is not in memory as a whole is not read");
}

#[test]
fn the_buffer_of_statistics_keeps_neither_a_pause_nor_a_reset_and_does_not_survive_it() {
    let mut rig = Rig::new();
    assert!(!rig.statistics(&[(1, 2)]));
    let paused = rig.guest.command(Command::Pause);
    rig.guest.turn();
    assert_eq!(paused.load(SeqCst), 1);
    rig.guest.reset();
    assert!(rig.guest.worker.send(Command::Resume).is_ok());
    rig.start(ALL);
    rig.news();
    rig.order(Order::AskStatistics);
    assert_eq!((rig.rings[2].used_index(), rig.guest.status() & NEEDS_RESET), (0, 0));
    // Without the feature queue 2 is another.
    let mut rig = Rig::with(ram(), PAGE_REPORTING | VERSION_1);
    rig.touch(300);
    assert!(rig.send(2, &[Desc::writable(300 * PAGE_BYTES, 4096)]));
    assert_eq!((rig.reported_pages(), rig.news()), (1, vec![]));
}

#[test]
fn free_pages_that_are_reported_are_gone_and_are_not_in_the_balloon() {
    let mut rig = Rig::new();
    (300..330).for_each(|frame| rig.touch(frame));
    let page = |frame: u64| frame * PAGE_BYTES;
    // Two blocks; one with odd ends, of which only whole pages count; a buffer that the device may not write.
    let chain = [
        Desc::readable(page(328), 8192),
        Desc::writable(page(300), 4 * 4096),
        Desc::writable(page(310) + 1, 3 * 4096),
        Desc::writable(page(320), 4095),
    ];
    assert!(rig.send(REPORTING, &chain));
    let gone: Vec<u64> = (300..330).filter(|&frame| rig.is_zero(frame)).collect();
    assert_eq!(gone, [300, 301, 302, 303, 311, 312]);
    assert_eq!((rig.pages(), rig.reported_pages(), rig.reclaimed_pages()), (0, 6, 6));
    // The number that the specification gives the queue; one block inside another.
    assert!(rig.send(4, &[Desc::writable(page(314), 4 * 4096), Desc::writable(page(315), 4096)]));
    assert!((314..318).all(|frame| rig.is_zero(frame)) && !rig.is_zero(318));
    // Outside memory, across the end, and the end of the address space.
    for (address, len) in [(LOW_BYTES, 4096), (LOW_BYTES - 4096, 8192), (u64::MAX - 4095, 4096), (1 << 63, 1 << 31)] {
        assert!(rig.send(REPORTING, &[Desc::writable(address, len), Desc::writable(page(325), 4096)]));
        assert!(rig.is_zero(325));
        rig.touch(325);
    }
    assert_eq!((rig.reported_pages(), rig.guest.status() & NEEDS_RESET), (15, 0));
}

#[test]
fn pages_that_must_keep_their_poison_are_left_alone() {
    for (poison, features, gone) in [(0xaa, ALL | PAGE_POISON, false), (0, ALL | PAGE_POISON, true), (0xaa, ALL, true)]
    {
        let mut rig = Rig::idle(ram());
        rig.guest.write(reg::CONFIG + POISON_VAL as u64, poison);
        rig.start(features);
        rig.touch(300);
        assert!(rig.send(REPORTING, &[Desc::writable(300 * PAGE_BYTES, 4096)]));
        assert_eq!((rig.is_zero(300), rig.reported_pages() == 1), (gone, gone));
    }
}

#[test]
fn a_report_that_was_not_agreed_on_is_ignored() {
    let mut rig = Rig::with(ram(), STATS_VQ | VERSION_1);
    rig.touch(300);
    for queue in [3, 4] {
        assert!(rig.send(queue, &[Desc::writable(300 * PAGE_BYTES, 4096)]));
    }
    assert!(!rig.is_zero(300));
}

#[test]
fn a_report_of_all_memory_is_worked_on_in_turns() {
    let mut rig = Rig::with(allocate(64 << 20, false, true).unwrap(), ALL);
    (8000..16000).for_each(|frame| rig.touch(frame));
    let pages = |first: u64, count: u32| Desc::writable(first * PAGE_BYTES, count * 4096);
    rig.rings[3].add(&[pages(8000, 1500), pages(9500, 548), pages(10_048, 5952)]);
    rig.guest.kick(3);
    let mut steps = vec![0];
    while rig.guest.event_loop.turn(crate::event::Wait::Poll).unwrap() > 0 {
        steps.push(rig.reported_pages());
    }
    let step = steps.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert_eq!((step, rig.reported_pages(), rig.reclaimed_pages()), (PAGES_PER_TURN as u64, 8000, 8000));
    assert_eq!(rig.rings[3].take_used().len(), 1);
    assert!((8000..16000).all(|frame| rig.is_zero(frame)));
}

#[test]
fn a_storm_of_kicks_without_a_chain_changes_nothing() {
    let mut rig = Rig::new();
    for queue in (0..5).cycle().take(10_000) {
        rig.guest.kick(queue);
    }
    rig.guest.turn();
    assert_eq!((rig.pages(), rig.guest.status() & NEEDS_RESET), (0, 0));
}

/// What a driver does, well or not.
#[derive(Clone, Debug)]
enum Act {
    Frames { queue: usize, frames: Vec<u32>, cut: usize },
    Report { first: u64, count: u32 },
    Target(u32),
    Reset,
}

fn frame() -> impl Strategy<Value = u32> {
    let high = (HIGH / PAGE_BYTES) as u32;
    prop_oneof![10 => 300..340u32, 3 => high..high + 20, 1 => 480..540u32, 1 => any::<u32>()]
}

fn act() -> impl Strategy<Value = Act> {
    let frames = (0..2usize, proptest::collection::vec(frame(), 0..40), 0..160usize);
    prop_oneof![
        10 => frames.prop_map(|(queue, frames, cut)| Act::Frames { queue, frames, cut }),
        2 => (290..520u64, 0..30u32).prop_map(|(first, count)| Act::Report { first, count }),
        1 => any::<u32>().prop_map(Act::Target),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The balloon holds what a set would, whatever is sent, and memory is zero exactly where it was given away.
    #[test]
    fn the_count_is_that_of_a_reference_model(acts in proptest::collection::vec(act(), 1..40)) {
        static SEED: AtomicU64 = AtomicU64::new(1);
        let mut rig = Rig::new();
        let memory = |frame: u64| frame < 512 || (HIGH / PAGE_BYTES..(HIGH + HIGH_BYTES) / PAGE_BYTES).contains(&frame);
        let watched: Vec<u64> = (300..340).chain(HIGH / PAGE_BYTES..HIGH / PAGE_BYTES + 20).collect();
        let mut model = BTreeSet::new();
        for act in acts {
            let value = SEED.fetch_add(1, Relaxed) as u8 | 1;
            watched.iter().for_each(|&frame| rig.guest.put(frame * PAGE_BYTES, &[value]));
            let mut gone = BTreeSet::new();
            match act {
                Act::Frames { queue, frames, cut } => {
                    rig.put_frames(DATA, &frames);
                    let len = 4 * frames.len();
                    let cut = cut.min(len) as u32;
                    let pieces = [Desc::readable(DATA, cut), Desc::readable(DATA + u64::from(cut), len as u32 - cut)];
                    prop_assert!(rig.send(queue as u32, &pieces));
                    for frame in frames.into_iter().map(u64::from).filter(|&frame| memory(frame)) {
                        if queue == DEFLATE {
                            model.remove(&frame);
                        } else if model.insert(frame) {
                            gone.insert(frame);
                        }
                    }
                }
                Act::Report { first, count } => {
                    prop_assert!(rig.send(REPORTING, &[Desc::writable(first * PAGE_BYTES, count * 4096)]));
                    if first + u64::from(count) <= 512 {
                        gone.extend(first..first + u64::from(count));
                    }
                }
                Act::Target(pages) => {
                    rig.order(Order::SetTarget(pages));
                    prop_assert_eq!(rig.config(NUM_PAGES), pages);
                }
                Act::Reset => {
                    rig.guest.reset();
                    model.clear();
                    rig.start(ALL);
                }
            }
            prop_assert_eq!(rig.pages(), model.len() as u64);
            for &frame in &watched {
                prop_assert_eq!(rig.is_zero(frame), gone.contains(&frame), "page {}", frame);
            }
        }
        prop_assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
    }

    /// Chains that are nonsense from end to end, on every queue; one of more than 4 GiB would be no chain.
    #[test]
    fn no_chain_does_harm(chains in proptest::collection::vec(
        (0..5u32, proptest::collection::vec((any::<bool>(), prop_oneof![0..LOW_BYTES, any::<u64>()], 0..u32::MAX / 8), 1..8)),
        1..30,
    )) {
        let mut rig = Rig::new();
        // The rings themselves are not to be given away by chance.
        for (queue, parts) in chains {
            let desc = |&(write, address, len): &(bool, u64, u32)| {
                let address = address.max(DATA);
                if write { Desc::writable(address, len) } else { Desc::readable(address, len) }
            };
            let (readable, writable): (Vec<_>, Vec<_>) = parts.iter().map(desc).partition(|desc| desc.flags & WRITE == 0);
            rig.send(queue, &[readable, writable].concat());
            rig.order(Order::AskStatistics);
        }
        prop_assert_eq!(rig.guest.status() & NEEDS_RESET, 0);
        prop_assert!(rig.pages() <= 768);
    }
}

#[test]
fn the_set_of_pages_knows_memory_from_what_is_none() {
    let ram = ram();
    let mut pages = Pages::new(&ram);
    let high = HIGH / PAGE_BYTES;
    assert_eq!(pages.total(), 768);
    assert!(pages.contain(0, 512) && pages.contain(high, 256) && pages.contain(511, 1) && pages.contain(512, 0));
    assert!(
        !pages.contain(511, 2) && !pages.contain(512, 1) && !pages.contain(0, u64::MAX) && !pages.contain(u64::MAX, 1)
    );
    assert_eq!(
        [511, 512, high - 1, high, high + 255, high + 256].map(|page| pages.insert(page).is_some()),
        [true, false, false, true, true, false]
    );
    assert_eq!(
        (pages.len(), pages.insert(511), pages.remove(511), pages.remove(511)),
        (3, Some(false), Some(true), Some(false))
    );
    pages.clear();
    assert_eq!((pages.len(), pages.remove(high)), (0, Some(false)));
    ram.write_obj(1u8, GuestAddress(0)).unwrap();
}
