//! What is asked of NICs: their limits and links go on to their own threads, what they have done is read from words that
//! these publish.
//!
//! The answer to a change is the NIC's: it comes when it is so. Main thread.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

use super::throttle::merge;
use crate::devices::net::{Order, Way};
use crate::error::{Error, Kind, Result};
use crate::event::{Done, Lost, Sender};
use crate::machine::{Nic, NicSlot};
use crate::qmp::net::{NetdevCounters, NetdevLimits, NetdevStats, NetdevThrottle, SetLink};
use crate::qos::Quantity::{Bps, BpsRead, BpsWrite, Iops, IopsRead, IopsWrite};
use crate::qos::Spelling;

/// Has the NIC that `asked` names limited as it says.
pub(super) fn set_throttle(asked: &NetdevThrottle, slots: &mut [NicSlot], done: Done<Result<Value>>) {
    let (nic, orders) = match find(asked.id(), slots) {
        Ok(found) => found,
        Err(error) => return done.end(Err(error)),
    };
    let limits = merge(|name| asked.number(name), Spelling::NicQmp, &nic.limits);
    if let Err(refusal) = limits.check(Spelling::NicQmp) {
        return done.end(Err(Error::usage(format!("Parameter {refusal}"))));
    }
    nic.limits = limits;
    tell(asked.id(), orders, done, |done| Order::SetLimits(limits, done));
}

/// Plugs the cable of the NIC that `asked` names in, or pulls it.
pub(super) fn set_link(asked: &SetLink, slots: &mut [NicSlot], done: Done<Result<Value>>) {
    match find(&asked.name, slots) {
        Ok((_, orders)) => tell(&asked.name, orders, done, |done| Order::SetLink(asked.up, done)),
        Err(error) => done.end(Err(error)),
    }
}

fn find<'s>(id: &str, slots: &'s mut [NicSlot]) -> Result<(&'s mut Nic, &'s Sender<Order>)> {
    let mut plugged = slots.iter_mut().filter_map(|slot| Some((slot.nic.as_mut()?, &slot.orders)));
    let nic = plugged.find(|(nic, _)| nic.device == id || nic.netdev == id);
    nic.ok_or_else(|| Error::new(Kind::NotFound, format!("Device '{id}' not found")))
}

/// Sends the order that `make` puts the slip in; its end is the answer.
fn tell(id: &str, orders: &Sender<Order>, done: Done<Result<Value>>, make: impl FnOnce(Done<()>) -> Order) {
    let id = id.to_owned();
    let slip = Done::posted(move |end: std::result::Result<(), Lost>| {
        let gone = |Lost| Error::new(Kind::NotActive, format!("Device '{id}' has failed and is not served any more"));
        done.end(end.map(|()| json!({})).map_err(gone));
    });
    // A NIC that is gone drops the slip, which is posted all the same.
    let _ = orders.send(make(slip));
}

/// One slot of `query-netstats`; none if nothing is plugged into it.
pub(super) fn stats(slot: &NicSlot) -> Option<NetdevStats> {
    let nic = slot.nic.as_ref()?;
    let limit = |quantity| nic.limits.of(quantity).rate;
    Some(NetdevStats {
        id: nic.device.clone(),
        tap: nic.tap.clone().filter(|_| nic.counters.tap.load(Relaxed)),
        mac: slot.mac.to_string(),
        link: nic.counters.link.load(Relaxed),
        queue_pairs: slot.queue_pairs.into(),
        active_pairs: nic.counters.pairs.load(Relaxed),
        receive: way(&nic.counters.receive),
        transmit: way(&nic.counters.transmit),
        limits: (!nic.limits.is_none()).then(|| NetdevLimits {
            bps: limit(Bps),
            bps_rd: limit(BpsRead),
            bps_wr: limit(BpsWrite),
            pps: limit(Iops),
            pps_rd: limit(IopsRead),
            pps_wr: limit(IopsWrite),
        }),
    })
}

fn way(way: &Way) -> NetdevCounters {
    let get = |counter: &AtomicU64| counter.load(Relaxed);
    NetdevCounters {
        packets: get(&way.packets),
        bytes: get(&way.bytes),
        dropped: get(&way.dropped),
        errors: get(&way.errors),
        throttled: get(&way.held.operations),
        throttle_total_time_ns: get(&way.held.total_ns),
        throttle_longest_time_ns: get(&way.held.longest_ns),
    }
}
