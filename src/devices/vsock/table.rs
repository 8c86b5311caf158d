//! `Table`: the connections there are, by number, by ports, and by what their watches are called. Bounded. Main loop.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, State};
use super::packet::Ports;
use crate::event::Key;

/// Connections at a time, those of clients that have not said a port among them.
pub const MAX_CONNECTIONS: usize = 1024;
/// Clients at a time that have not said which port they want. One more, and the oldest of them has to go.
pub const MAX_GREETERS: usize = 64;
/// The first port that a client of the host's is given; they go on from there, and begin again where they end.
const FIRST_PORT: u32 = 1 << 30;

/// All connections.
pub struct Table {
    slots: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Numbers of those that have not said a port, the oldest first.
    greeters: VecDeque<usize>,
    /// Watches of connections that are gone.
    gone: Vec<Key>,
    /// How often a connection was added: two in one place are not called the same.
    added: u32,
    next_port: u32,
    first_tag: u32,
}

impl Table {
    /// A table without connections, whose watches are called `first_tag` and above.
    pub fn new(first_tag: u32) -> Self {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            greeters: VecDeque::new(),
            gone: Vec::new(),
            added: 0,
            next_port: FIRST_PORT,
            first_tag,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is room for one more.
    pub fn has_room(&self) -> bool {
        self.len() < MAX_CONNECTIONS
    }

    /// The number of the connection with these ports.
    pub fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// The number of the connection whose watch is called that.
    pub fn called(&self, tag: u32) -> Option<usize> {
        let number = tag.wrapping_sub(self.first_tag) as usize % MAX_CONNECTIONS;
        self.get(number).filter(|connection| connection.tag == tag).map(|_| number)
    }

    pub fn get(&self, number: usize) -> Option<&Connection> {
        self.slots.get(number)?.as_deref()
    }

    pub fn get_mut(&mut self, number: usize) -> Option<&mut Connection> {
        self.slots.get_mut(number)?.as_deref_mut()
    }

    /// The numbers of all connections.
    pub fn numbers(&self) -> impl Iterator<Item = usize> + use<> {
        let taken: Vec<usize> = (0..self.slots.len()).filter(|&number| self.slots[number].is_some()).collect();
        taken.into_iter()
    }

    /// Adds one, for which there is room: its number.
    pub fn add(&mut self, mut connection: Connection) -> usize {
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.added = (self.added + 1) % (1 << 20);
        connection.tag = self.first_tag + self.added * MAX_CONNECTIONS as u32 + number as u32;
        if connection.state == State::Greeting {
            self.greeters.push_back(number);
        } else {
            self.by_ports.insert(connection.ports, number);
        }
        self.slots[number] = Some(Box::new(connection));
        number
    }

    /// The client that has said nothing for the longest, if there are as many as may be.
    pub fn greeter_too_many(&self) -> Option<usize> {
        self.greeters.front().copied().filter(|_| self.greeters.len() >= MAX_GREETERS)
    }

    /// A client has said which of the guest's ports it wants; it is given one itself.
    pub fn name(&mut self, number: usize, guest: u32) {
        self.greeters.retain(|&greeter| greeter != number);
        let mut ports = Ports { host: self.next_port, guest };
        // There are a million times more than connections.
        while self.by_ports.contains_key(&ports) {
            ports.host = next_port(ports.host);
        }
        self.next_port = next_port(ports.host);
        self.by_ports.insert(ports, number);
        if let Some(connection) = self.get_mut(number) {
            connection.ports = ports;
        }
    }

    /// The guest may use the ports of a connection again, which itself stays.
    pub fn forget_ports(&mut self, number: usize) {
        if let Some(ports) = self.get(number).map(|connection| connection.ports)
            && self.find(ports) == Some(number)
        {
            self.by_ports.remove(&ports);
        }
    }

    /// Takes one out. Its watch is to be ended by who can.
    pub fn remove(&mut self, number: usize) -> Option<Box<Connection>> {
        self.forget_ports(number);
        let mut connection = self.slots.get_mut(number)?.take()?;
        self.greeters.retain(|&greeter| greeter != number);
        self.gone.extend(connection.watch.take());
        self.free.push(number);
        if self.len() == 0 {
            // The memory of a crowd is for who needs it.
            self.slots = Vec::new();
            self.free = Vec::new();
        }
        Some(connection)
    }

    /// The watches that are to be ended.
    pub fn take_gone(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.gone)
    }
}

fn next_port(port: u32) -> u32 {
    if port == u32::MAX >> 1 { FIRST_PORT } else { port + 1 }
}
