//! virtio-net (virtio 1.2, section 5.1): packets between the guest's queues and a tap of the host.
//!
//! All of it lives in one loop: queues, tap, limit. Checksums and segments are passed on as they are, both ways. A NIC
//! without a tap is one without a cable: its link is down, what the guest sends is dropped. How a packet gets into the
//! guest's buffers is `receive`'s, how it gets out of them `transmit`'s. Runs in the loop of the NIC's iothread, or main's
//! (rules D1.3, D1.6, D1.8).

mod control;
mod counters;
mod receive;
mod transmit;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use log::{info, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::devices::counters::add;
use crate::error::{Error, Result};
use crate::event::{Cx, Done, Event, Interest, Key, Receiver, Sender, channel};
use crate::memory::GuestRam;
use crate::qos::{Bucket, Direction, Limits, Wait};
use crate::sys::tap::{Offloads, Tap};
use crate::virtio::{Chain, Completions, DEVICE_TAG, Device, FaultLog, Page, Verdict};
use receive::{Receive, Stop};
use transmit::{Sent, Transmit};

pub use counters::{NetCounters, Way};

/// What every NIC offers.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS;
/// ... and one with several pairs of queues.
const SEVERAL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;

/// Where the words of the configuration space lie (section 5.1.4).
const CONFIG_STATUS: usize = 6;
const CONFIG_PAIRS: usize = 8;
const CONFIG_MTU: usize = 10;

/// The tags of what the NIC waits for itself: its operator, the limit, and the queues of its tap.
const ORDERS: u32 = DEVICE_TAG;
const LIMIT: u32 = DEVICE_TAG + 1;
const TAPS: u32 = DEVICE_TAG + 2;

/// What Control wants of a NIC; the slip is ended when it is so.
pub enum Order {
    /// Other limits, checked.
    SetLimits(Limits, Done<()>),
    /// The cable is plugged in, or pulled.
    SetLink(bool, Done<()>),
    /// A NIC without a tap gets one: hot-plug. It comes back, with the reason, if it cannot be watched.
    Plug(Box<Cable>, Done<Plugged>),
    /// It loses its taps, which come back in the slip, and is called so from then on.
    Unplug(String, Done<Vec<Tap>>),
}

/// What becomes of a plug: nothing is left over, or the cable, with the reason.
pub type Plugged = std::result::Result<(), (Box<Cable>, Error)>;

/// What a running NIC is plugged into.
pub struct Cable {
    /// The name that messages use from then on.
    pub id: String,
    /// The tap.
    pub tap: Tap,
    /// The largest packet that it carries, in bytes behind the Ethernet header.
    pub mtu: u16,
    /// Where its packets are counted.
    pub counters: Arc<NetCounters>,
}

/// What a NIC is to the guest, with or without a tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// The name that QMP and messages use.
    pub id: String,
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet behind the Ethernet header that the guest is to send, in bytes.
    pub mtu: u16,
    /// Pairs of queues.
    pub pairs: usize,
    /// Descriptors of each queue.
    pub queue_size: u16,
}

/// A receiving and a sending queue, and the queue of the tap that they belong to.
struct Pair {
    tap: Option<Tap>,
    watch: Option<Key>,
    interest: Interest,
    receive: Receive,
    transmit: Transmit,
    /// There may be something to read: the tap has not said otherwise.
    readable: bool,
    /// There is no room to write.
    full: bool,
    /// The limit holds what is to be read until then, or others have their turn before.
    limited_ns: Option<u64>,
    /// The kernel puts packets into it.
    used: bool,
}

/// One NIC.
pub struct Net {
    setup: Setup,
    queue_sizes: Vec<u16>,
    ram: Arc<GuestRam>,
    pairs: Vec<Pair>,
    /// What the present driver agreed on.
    agreed: u64,
    /// Pairs that it uses.
    active: usize,
    running: bool,
    /// The operator has not pulled the cable.
    plugged: bool,
    /// What the driver was told of the link.
    link: bool,
    /// The tap's interface was down when the last packet was sent.
    down: bool,
    bucket: Bucket,
    timer: Option<Key>,
    armed_ns: Option<u64>,
    counters: Arc<NetCounters>,
    orders: (Sender<Order>, Receiver<Order>),
    /// The slips of a plug and an unplug, until the driver has been told.
    plugs: Vec<Done<Plugged>>,
    unplugs: Vec<(Vec<Tap>, Done<Vec<Tap>>)>,
    /// The configuration does not say yet how large a packet may be.
    resized: bool,
    log: FaultLog,
}

impl Net {
    /// A NIC on the queues of a tap: none, or one a pair. What the bucket holds outlives drivers and pauses.
    pub fn new(setup: Setup, taps: Vec<Tap>, bucket: Bucket, ram: Arc<GuestRam>) -> Self {
        let link = !taps.is_empty();
        let mut taps = taps.into_iter();
        let pairs: Vec<Pair> = (0..setup.pairs)
            .map(|_| Pair {
                tap: taps.next(),
                watch: None,
                interest: Interest::NONE,
                receive: Receive::new(ram.clone(), setup.queue_size),
                transmit: Transmit::new(ram.clone()),
                readable: false,
                full: false,
                limited_ns: None,
                used: true,
            })
            .collect();
        let mut queue_sizes = vec![setup.queue_size; 2 * setup.pairs];
        if setup.pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let counters = NetCounters::default();
        counters.link.store(link, Relaxed);
        counters.tap.store(link, Relaxed);
        Net {
            setup,
            queue_sizes,
            ram,
            pairs,
            agreed: 0,
            active: 0,
            running: false,
            plugged: true,
            link,
            down: false,
            bucket,
            timer: None,
            armed_ns: None,
            counters: Arc::new(counters),
            orders: channel(),
            plugs: Vec::new(),
            unplugs: Vec::new(),
            resized: false,
            log: FaultLog::default(),
        }
    }

    /// The way to tell it what is wanted.
    pub fn orders(&self) -> Sender<Order> {
        self.orders.0.clone()
    }

    /// What it has done, for whoever asks.
    pub fn counters(&self) -> Arc<NetCounters> {
        self.counters.clone()
    }

    fn has(&self, feature: u32) -> bool {
        self.agreed & 1 << feature != 0
    }

    /// The queue of control commands. A driver that does not know of several pairs finds it behind the first
    /// (section 5.1.2).
    fn control_queue(&self) -> Option<usize> {
        let place = if self.has(VIRTIO_NET_F_MQ) { 2 * self.setup.pairs } else { 2 };
        self.has(VIRTIO_NET_F_CTRL_VQ).then_some(place)
    }

    /// Whether packets go.
    fn is_up(&self) -> bool {
        self.plugged && self.pairs.first().is_some_and(|pair| pair.tap.is_some())
    }

    /// The tap is gone: the link is down from now on, as when the cable is pulled.
    fn lose_tap(&mut self, cx: Option<&mut Cx<'_>>) {
        if self.pairs.iter().all(|pair| pair.tap.is_none()) {
            return;
        }
        warn!("netdev \"{}\": its tap is gone; the link is down", self.setup.id);
        let watches: Vec<Key> = self.pairs.iter_mut().filter_map(|pair| pair.watch.take()).collect();
        if let Some(cx) = cx {
            watches.into_iter().for_each(|watch| cx.unwatch(watch));
        }
        self.pairs.iter_mut().for_each(|pair| pair.tap = None);
        self.counters.tap.store(false, Relaxed);
    }

    /// Has the driver's pairs used by the kernel, and no others.
    fn use_pairs(&mut self, active: usize) {
        self.active = active;
        self.counters.pairs.store(active as u64, Relaxed);
        for (place, pair) in self.pairs.iter_mut().enumerate().skip(1) {
            let used = place < active;
            if let Some(tap) = &pair.tap
                && std::mem::replace(&mut pair.used, used) != used
                && let Err(e) = tap.set_used(used)
            {
                warn!("netdev \"{}\": queue {place} of its tap: {e}", self.setup.id);
            }
        }
    }

    fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.plugged, up) == up {
            return;
        }
        info!("netdev \"{}\": link {}", self.setup.id, if up { "up" } else { "down" });
        for tap in self.pairs.iter().filter_map(|pair| pair.tap.as_ref()) {
            if up {
                // What was sent to a NIC without a cable does not arrive later.
                tap.discard();
            }
        }
        if let Some(tap) = self.pairs.first().and_then(|pair| pair.tap.as_ref())
            && let Err(e) = tap.set_carrier(up)
        {
            // The guest knows, which is what matters.
            info!("netdev \"{}\": show the host its link: {e}", self.setup.id);
        }
    }

    /// What the present driver leaves to others.
    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
            ufo: self.has(VIRTIO_NET_F_GUEST_UFO),
        }
    }

    /// Makes a tap ready for the present driver: what lies in it may be in more segments than that agreed to, and was for
    /// nobody.
    fn prepare(&self, tap: &Tap) {
        if let Err(e) = tap.set_offloads(self.offloads()) {
            // The host then does itself what it may not leave to the guest.
            info!("netdev \"{}\": offloads of its tap: {e}", self.setup.id);
        }
        tap.discard();
    }

    /// Goes on with a tap, which is watched. Limits and counters begin anew.
    fn plug(&mut self, cable: Cable, watch: Key) {
        let Cable { id, tap, mtu, counters } = cable;
        info!("netdev \"{id}\": plugged in, MTU {mtu}");
        (self.setup.id, self.resized) = (id, self.setup.mtu != mtu);
        self.setup.mtu = mtu;
        self.bucket = Bucket::new(&Limits::default());
        counters.tap.store(true, Relaxed);
        counters.pairs.store(self.active as u64, Relaxed);
        self.counters = counters;
        self.plugged = true;
        self.prepare(&tap);
        if let Some(pair) = self.pairs.first_mut() {
            (pair.tap, pair.watch, pair.interest, pair.used) = (Some(tap), Some(watch), Interest::NONE, true);
            (pair.readable, pair.full, pair.limited_ns) = (true, false, None);
        }
    }

    /// Goes on without its taps. Chains that wait for packets go on waiting.
    fn unplug(&mut self, cx: &mut Cx<'_>) -> Vec<Tap> {
        info!("netdev \"{}\": unplugged", self.setup.id);
        for pair in &mut self.pairs {
            if let Some(watch) = pair.watch.take() {
                cx.unwatch(watch);
            }
            // What came from the one network is not for who is in the next.
            pair.receive.forget_packet();
            (pair.full, pair.limited_ns) = (false, None);
        }
        self.counters.tap.store(false, Relaxed);
        self.down = false;
        self.pairs.iter_mut().filter_map(|pair| pair.tap.take()).collect()
    }

    /// A chain of a receiving queue.
    fn take_buffer(&mut self, place: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let later = Verdict::Later(Direction::Read, Wait::UNTIL_TOLD);
        if !self.is_up() {
            return later;
        }
        let pair = &mut self.pairs[place];
        // A chain that cannot be used at the moment stays in the ring, and the driver does not kick for the next.
        if !pair.readable || pair.limited_ns.is_some() {
            return later;
        }
        if !pair.receive.add(chain) {
            add(&self.counters.receive.errors, 1);
            self.log.warn(now_ns, &self.setup.id, &"a receive buffer that is outside guest memory, or too short");
            return Verdict::Used(0);
        }
        if pair.receive.is_ready() {
            self.pump(place, now_ns, false);
        }
        Verdict::Pending
    }

    /// Reads what there is, as far as chains and limit allow.
    fn pump(&mut self, place: usize, now_ns: u64, all: bool) {
        let pair = &mut self.pairs[place];
        let Some(tap) = &pair.tap else { return };
        match pair.receive.pump(tap, &mut self.bucket, &self.counters.receive, now_ns, all) {
            Stop::Empty => pair.readable = false,
            Stop::Chains => {}
            Stop::Until(until_ns) => pair.limited_ns = Some(until_ns),
            // Its watch tells of the hang-up; until then nothing more is read.
            Stop::Gone => pair.readable = false,
        }
    }

    /// A chain of a sending queue.
    fn send(&mut self, place: usize, chain: &Chain, now_ns: u64) -> Verdict {
        let up = self.is_up();
        let pair = &mut self.pairs[place];
        let Some(tap) = pair.tap.as_ref().filter(|_| up) else {
            add(&self.counters.transmit.dropped, 1);
            return Verdict::Used(0);
        };
        match pair.transmit.send(chain, tap, &mut self.bucket, &self.counters.transmit, now_ns) {
            Sent::Done => {
                if self.down {
                    self.down = false;
                    info!("netdev \"{}\": the interface of its tap is up again", self.setup.id);
                }
                Verdict::Used(0)
            }
            Sent::Down => {
                if !self.down {
                    self.down = true;
                    warn!(
                        "netdev \"{}\": the interface of its tap is down, and what the guest sends is dropped: set it up with \
                         `ip link set up`",
                        self.setup.id
                    );
                }
                Verdict::Used(0)
            }
            Sent::Bad(why) | Sent::Lost(why) => {
                self.log.warn(now_ns, &self.setup.id, &why);
                Verdict::Used(0)
            }
            Sent::Limited(wait) => Verdict::Later(Direction::Write, Wait { other_may_go: false, ..wait }),
            Sent::Full => {
                pair.full = true;
                Verdict::Later(Direction::Write, Wait::UNTIL_TOLD)
            }
            Sent::Gone => {
                add(&self.counters.transmit.dropped, 1);
                Verdict::Used(0)
            }
        }
    }

    /// Has the taps watched for what can be used: packets while there are chains for them, room while it is missed.
    fn look_out(&mut self, cx: &mut Cx<'_>) {
        let up = self.is_up();
        for (place, pair) in self.pairs.iter_mut().enumerate() {
            let reads = self.running && up && place < self.active && !pair.readable;
            let writes = self.running && up && pair.full;
            let interest = match (reads, writes) {
                (false, false) => Interest::NONE,
                (true, false) => Interest::READ,
                (false, true) => Interest::WRITE,
                (true, true) => Interest::BOTH,
            };
            if let Some(watch) = pair.watch
                && std::mem::replace(&mut pair.interest, interest) != interest
                && let Err(e) = cx.set_interest(watch, interest)
            {
                warn!("netdev \"{}\": {e}", self.setup.id);
            }
        }
        let until_ns = self.pairs.iter().filter_map(|pair| pair.limited_ns).min().filter(|_| self.running);
        if let (Some(timer), Some(until_ns)) = (self.timer, until_ns)
            && self.armed_ns != Some(until_ns)
        {
            self.armed_ns = Some(until_ns);
            if let Err(e) = cx.arm(timer, until_ns) {
                warn!("netdev \"{}\": {e}", self.setup.id);
            }
        }
    }

    fn take_orders(&mut self, cx: &mut Cx<'_>) {
        while let Some(order) = self.orders.1.receive() {
            match order {
                Order::SetLimits(limits, done) => {
                    self.bucket.set(cx.now_ns(), &limits);
                    self.pairs.iter_mut().for_each(|pair| pair.limited_ns = None);
                    done.end(());
                }
                Order::SetLink(up, done) => {
                    self.set_link(up);
                    done.end(());
                }
                Order::Plug(cable, done) => match cx.watch(&cable.tap, Interest::NONE, TAPS) {
                    Ok(watch) => {
                        self.plug(*cable, watch);
                        self.plugs.push(done);
                    }
                    Err(e) => done.end(Err((cable, e))),
                },
                Order::Unplug(id, done) => {
                    let taps = self.unplug(cx);
                    self.setup.id = id;
                    self.unplugs.push((taps, done));
                }
            }
        }
    }
}

impl Device for Net {
    fn id(&self) -> &str {
        &self.setup.id
    }

    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    /// The same with and without a tap: a kernel that cannot do some of it does not ask for it.
    fn features(&self) -> u64 {
        if self.setup.pairs > 1 { FEATURES | SEVERAL } else { FEATURES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Section 5.1.4.
    fn write_config(&self, page: &Page) {
        page.set_config(0, &self.setup.mac);
        page.set_config(CONFIG_STATUS, &(if self.link { VIRTIO_NET_S_LINK_UP as u16 } else { 0 }).to_le_bytes());
        page.set_config(CONFIG_PAIRS, &(self.setup.pairs as u16).to_le_bytes());
        page.set_config(CONFIG_MTU, &self.setup.mtu.to_le_bytes());
    }

    fn begin(&mut self, features: u64, _page: &Page, _now_ns: u64) {
        self.agreed = features;
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        for pair in &mut self.pairs {
            pair.receive.begin(mergeable);
            pair.transmit.begin();
            (pair.readable, pair.full, pair.limited_ns) = (true, false, None);
        }
        self.pairs.iter().filter_map(|pair| pair.tap.as_ref()).for_each(|tap| self.prepare(tap));
        // Several are used when the driver says so (section 5.1.6.5.5).
        self.use_pairs(1);
    }

    fn set_running(&mut self, running: bool, cx: &mut Cx<'_>) {
        self.running = running;
        self.look_out(cx);
    }

    fn reset(&mut self) {
        self.agreed = 0;
        self.use_pairs(0);
        for pair in &mut self.pairs {
            pair.receive.begin(false);
            pair.transmit.begin();
            (pair.full, pair.limited_ns) = (false, None);
        }
    }

    fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        cx.listen(&self.orders.1, ORDERS);
        self.timer = Some(cx.timer(LIMIT)?);
        for (tag, pair) in (TAPS..).zip(&mut self.pairs) {
            if let Some(tap) = &pair.tap {
                pair.watch = Some(cx.watch(tap, Interest::NONE, tag)?);
            }
        }
        Ok(())
    }

    fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        match event.tag {
            ORDERS => self.take_orders(cx),
            LIMIT => {
                self.armed_ns = None;
                let now_ns = cx.now_ns();
                let due = |pair: &&mut Pair| pair.limited_ns.is_some_and(|until_ns| until_ns <= now_ns);
                self.pairs.iter_mut().filter(due).for_each(|pair| pair.limited_ns = None);
            }
            _ if event.is_hang_up() => self.lose_tap(Some(cx)),
            tag => {
                let Some(pair) = self.pairs.get_mut((tag - TAPS) as usize) else { return false };
                pair.readable |= event.is_readable();
                pair.full &= !event.is_writable();
            }
        }
        true
    }

    fn process(&mut self, queue: usize, chain: &Chain, now_ns: u64) -> Verdict {
        if self.control_queue() == Some(queue) {
            return self.control(chain, now_ns);
        }
        match (queue / 2, queue % 2) {
            // Nothing was promised for queues that the driver has not asked for (section 5.1.6.5.5.1).
            (place, _) if place >= self.pairs.len() => Verdict::Used(0),
            (place, 0) => self.take_buffer(place, chain, now_ns),
            (place, _) => self.send(place, chain, now_ns),
        }
    }

    fn reap(&mut self, cx: &mut Cx<'_>, completions: &mut Completions<'_>) {
        let now_ns = cx.now_ns();
        for place in 0..self.pairs.len() {
            let queue = 2 * place;
            // Chains that came before the ring ran dry are all that there will be for now.
            let pair = &self.pairs[place];
            let reads = self.running && self.is_up() && pair.readable && pair.limited_ns.is_none();
            if reads && !completions.has_more(queue) {
                self.pump(place, now_ns, true);
            }
            let finished = &mut self.pairs[place].receive.finished;
            if !finished.is_empty() {
                completions.give_back_together(queue, finished);
                finished.clear();
            }
        }
        let up = self.is_up();
        if std::mem::replace(&mut self.link, up) != up {
            self.counters.link.store(up, Relaxed);
            let status = if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
            completions.set_config(CONFIG_STATUS, &status.to_le_bytes());
        }
        if std::mem::take(&mut self.resized) {
            completions.set_config(CONFIG_MTU, &self.setup.mtu.to_le_bytes());
        }
        self.plugs.drain(..).for_each(|done| done.end(Ok(())));
        self.unplugs.drain(..).for_each(|(taps, done)| done.end(taps));
        self.look_out(cx);
    }

    /// Chains that wait for packets are the driver's to wait for, and keep nobody from a pause or a reset.
    fn in_flight(&self) -> usize {
        0
    }
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;
