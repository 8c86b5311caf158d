//! `Chardev`: the outside end of a console: a Unix socket, the one client on it, and what is on its way between the two.
//!
//! One client at a time; others wait in the kernel until it has gone. What the guest writes goes to the client, who loses
//! nothing as long as it reads: the guest waits for it. If there is no client, or it takes nothing for a second, the last
//! [`OUTPUT_BYTES`] are kept, the oldest go and are counted, and the guest waits for nobody. What a client writes is read
//! as the guest takes it. No more than these two buffers is ever kept. What the bytes mean to a guest is its device's
//! business. Part of a handler of the main loop, which passes on the events of its watches and calls
//! [`Chardev::settle`] after whatever it does.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use log::error;

use crate::error::Result;
use crate::event::{Cx, Event, Interest, Key};
use crate::sys::socket::PrivateListener;
use crate::virtio::FaultLog;

/// Bytes of the guest's output that are kept for a client.
pub const OUTPUT_BYTES: usize = 64 << 10;
/// Bytes of a client's that are kept for the guest.
pub const INPUT_BYTES: usize = 16 << 10;
/// A client that takes nothing for so long while the guest has something for it does not read.
pub const PATIENCE_NS: u64 = 1_000_000_000;
/// How long nobody is accepted after one could not be, for want of descriptors for example.
const REST_NS: u64 = 1_000_000_000;
/// Bytes read at once.
const READ_BYTES: usize = 4096;

/// The tags of its watches count from here; they are three.
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const REST: u32 = 2;
/// How many tags it uses.
pub const TAGS: u32 = 3;

/// What others may know of it.
#[derive(Debug, Default)]
pub struct ChardevState {
    /// A client is connected.
    pub connected: AtomicBool,
    /// Bytes of the guest's that were dropped because nobody read them, since the start.
    pub lost_bytes: AtomicU64,
}

/// Where the guest's next bytes may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// There is room for so many.
    Bytes(usize),
    /// There is none, and nobody reads: the oldest go.
    Lossy,
    /// The client is to be given time until then, in nanoseconds, or until [`Chardev::ready`] says so.
    Wait(u64),
}

/// Who is connected.
struct Client {
    stream: UnixStream,
    /// None after a hang-up: what it wrote before is read without the loop's help.
    watch: Option<Key>,
    /// It will write nothing more.
    ended: bool,
    /// It will read nothing more.
    deaf: bool,
    /// Since when its socket has been full, in nanoseconds.
    full_since_ns: Option<u64>,
    /// ... for too long: it does not read.
    stuck: bool,
}

/// The socket and its client.
pub struct Chardev {
    /// What messages call it.
    name: String,
    first_tag: u32,
    listener: Option<(PrivateListener, Option<Key>)>,
    client: Option<Client>,
    /// The timer that ends a rest, and whether one is going on.
    rest: Option<Key>,
    rests: bool,
    output: VecDeque<u8>,
    input: VecDeque<u8>,
    state: Arc<ChardevState>,
    log: FaultLog,
}

impl Chardev {
    /// One for the device that messages call `name`, whose watches have the tags from `first_tag` on.
    pub fn new(name: &str, first_tag: u32, listener: Option<PrivateListener>) -> Self {
        Chardev {
            name: name.to_owned(),
            first_tag,
            listener: listener.map(|listener| (listener, None)),
            client: None,
            rest: None,
            rests: false,
            output: VecDeque::new(),
            input: VecDeque::new(),
            state: Arc::default(),
            log: FaultLog::default(),
        }
    }

    /// What others may know of it.
    pub fn state(&self) -> Arc<ChardevState> {
        self.state.clone()
    }

    /// Sets up its watches.
    ///
    /// # Errors
    /// What epoll refuses.
    pub fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.rest = Some(cx.timer(self.first_tag + REST)?);
        self.watch_listener(cx)
    }

    fn watch_listener(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        if let Some((listener, watch)) = &mut self.listener {
            *watch = Some(cx.watch(listener, Interest::READ, self.first_tag + LISTENER)?);
        }
        Ok(())
    }

    /// Listens at another socket, or at none. A client is let go; what is on its way stays.
    ///
    /// # Errors
    /// What epoll refuses.
    pub fn replace(&mut self, listener: Option<PrivateListener>, cx: &mut Cx<'_>) -> Result<()> {
        if let Some(watch) = self.client.take().and_then(|client| client.watch) {
            cx.unwatch(watch);
        }
        if let Some(watch) = self.listener.take().and_then(|(_, watch)| watch) {
            cx.unwatch(watch);
        }
        self.listener = listener.map(|listener| (listener, None));
        self.watch_listener(cx)
    }

    /// One of its watches was ready. Whether the guest may now be able to go on.
    pub fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> bool {
        match event.tag - self.first_tag {
            LISTENER => self.accept(cx),
            CLIENT => self.hear(event, cx),
            _ => self.rests = false,
        }
        true
    }

    /// Takes the next client, if there is none, or one that has hung up: what that one left unread goes.
    fn accept(&mut self, cx: &mut Cx<'_>) {
        let Some((listener, _)) = &self.listener else { return };
        match &self.client {
            Some(Client { watch: Some(_), .. }) => return,
            Some(_) => {
                self.log.warn(cx.now_ns(), &self.name, &"the next client came before the last one's input was read")
            }
            None => {}
        }
        let accepted = listener.accept().map(|stream| {
            let watch = cx.watch(&stream, Interest::READ, self.first_tag + CLIENT);
            watch.map(|watch| Client {
                stream,
                watch: Some(watch),
                ended: false,
                deaf: false,
                full_since_ns: None,
                stuck: false,
            })
        });
        match accepted {
            Ok(Ok(client)) => {
                self.client = Some(client);
                return;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => return,
            Ok(Err(e)) => self.log.warn(cx.now_ns(), &self.name, &format!("watch a client: {e}")),
            Err(e) => self.log.warn(cx.now_ns(), &self.name, &format!("accept a client: {e}")),
        }
        if let Some(rest) = self.rest {
            self.rests = cx.arm(rest, cx.now_ns() + REST_NS).is_ok();
        }
    }

    /// The client has written, has read, or has gone.
    fn hear(&mut self, event: Event, cx: &mut Cx<'_>) {
        let Some(client) = &mut self.client else { return };
        if event.is_hang_up() {
            client.deaf = true;
            client.full_since_ns = None;
            if let Some(watch) = client.watch.take() {
                cx.unwatch(watch);
            }
        }
        if event.is_writable() {
            client.full_since_ns = None;
            self.flush(cx.now_ns());
        }
        if event.is_hang_up() {
            self.read_rest();
        } else if event.is_readable() {
            self.read();
        }
    }

    /// Reads once, if there is room for what a read brings. False if there was nothing to be had.
    fn read(&mut self) -> bool {
        let Some(client) = &mut self.client else { return false };
        let room = (INPUT_BYTES - self.input.len()).min(READ_BYTES);
        if client.ended || room == 0 {
            return false;
        }
        let mut bytes = [0; READ_BYTES];
        match client.stream.read(&mut bytes[..room]) {
            Ok(count) => {
                self.input.extend(&bytes[..count]);
                client.ended = count == 0;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // Of one that has hung up nothing more will come.
            Err(e) if e.kind() == ErrorKind::WouldBlock => client.ended = client.watch.is_none(),
            Err(_) => client.ended = true,
        }
        !client.ended
    }

    /// Reads what somebody who has hung up has left, as far as there is room, and forgets who has left nothing more.
    fn read_rest(&mut self) {
        while self.read() {}
        self.client.take_if(|client| client.ended);
    }

    /// Writes what the client takes. Nothing while its socket is full.
    fn flush(&mut self, now_ns: u64) {
        let Some(client) = &mut self.client else { return };
        while !self.output.is_empty() && !client.deaf && client.full_since_ns.is_none() {
            match write(&client.stream, &self.output) {
                Ok(count) => {
                    self.output.drain(..count);
                    client.stuck = false;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => client.full_since_ns = Some(now_ns),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // It has closed that direction. If it has gone, a hang-up tells.
                Err(_) => client.deaf = true,
            }
        }
    }

    /// Where the guest's next bytes may go, at `now_ns`.
    pub fn room(&mut self, now_ns: u64) -> Room {
        if self.output.len() == OUTPUT_BYTES {
            self.flush(now_ns);
        }
        let room = OUTPUT_BYTES - self.output.len();
        if room > 0 {
            return Room::Bytes(room);
        }
        let Some(client) = self.client.as_mut().filter(|client| !client.deaf && !client.stuck) else {
            return Room::Lossy;
        };
        let until_ns = client.full_since_ns.unwrap_or(now_ns).saturating_add(PATIENCE_NS);
        if now_ns < until_ns {
            return Room::Wait(until_ns);
        }
        // Epoll tells of room only when there is a lot of it.
        client.full_since_ns = None;
        self.flush(now_ns);
        let room = OUTPUT_BYTES - self.output.len();
        if room > 0 {
            return Room::Bytes(room);
        }
        if let Some(client) = &mut self.client {
            client.stuck = true;
        }
        self.log.warn(now_ns, &self.name, &"the client does not read: the oldest output is dropped");
        Room::Lossy
    }

    /// Takes bytes of the guest's. Those that there is no room for go, the oldest first.
    pub fn put(&mut self, bytes: &[u8]) {
        let excess = (self.output.len() + bytes.len()).saturating_sub(OUTPUT_BYTES).min(self.output.len());
        self.output.drain(..excess);
        self.output.extend(bytes);
        self.lose(excess as u64);
    }

    /// Counts bytes of the guest's that were dropped, or are not even looked at.
    pub fn lose(&self, bytes: u64) {
        self.state.lost_bytes.fetch_add(bytes, Relaxed);
    }

    /// What the client has written and the guest has not taken.
    pub fn input(&mut self) -> &mut VecDeque<u8> {
        if self.input.is_empty() && self.client.as_ref().is_some_and(|client| client.watch.is_none()) {
            // No event will tell of what somebody who has gone has left.
            self.read_rest();
        }
        &mut self.input
    }

    /// To be called after anything that was done with it: writes what there is, and asks to be told of what can be served.
    pub fn settle(&mut self, cx: &mut Cx<'_>) {
        self.flush(cx.now_ns());
        let mut interests = [None, None];
        if let Some((_, Some(watch))) = self.listener {
            let free = self.client.as_ref().is_none_or(|client| client.watch.is_none());
            interests[0] = Some((watch, if free && !self.rests { Interest::READ } else { Interest::NONE }));
        }
        if let Some(client) = &self.client
            && let Some(watch) = client.watch
        {
            let reads = !client.ended && self.input.len() < INPUT_BYTES;
            let writes = !client.deaf && client.full_since_ns.is_some();
            let interest = match (reads, writes) {
                (true, true) => Interest::BOTH,
                (true, false) => Interest::READ,
                (false, true) => Interest::WRITE,
                (false, false) => Interest::NONE,
            };
            interests[1] = Some((watch, interest));
        }
        for (watch, interest) in interests.into_iter().flatten() {
            if let Err(e) = cx.set_interest(watch, interest) {
                error!("{}: {e}", self.name);
            }
        }
        let connected = self.client.as_ref().is_some_and(|client| client.watch.is_some());
        self.state.connected.store(connected, Relaxed);
    }
}

fn write(mut stream: &UnixStream, output: &VecDeque<u8>) -> std::io::Result<usize> {
    let (first, second) = output.as_slices();
    stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)])
}
