//! `Memory`: the guest's memory as an operator sees and moves it: the balloon's target, what is known of its state, what
//! the guest says, and the automatic balloon.
//!
//! A part of Control, with timers of its own: one asks the guest for statistics, one keeps the events about changes to one
//! pair a second. No answer waits for the guest. The device is `devices::balloon`, the policy `elastic`. Main thread.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{SystemTime, UNIX_EPOCH};

use log::info;

use super::pressure::Pressure;
use crate::devices::balloon::Order;
use crate::elastic::{Policy, Reason, Sight};
use crate::error::{Error, Kind, Result};
use crate::event::{Cx, Event, Key};
use crate::machine::Balloon;
use crate::memory::PAGE_BYTES;
use crate::qmp::balloon::{
    BalloonAuto, BalloonDetail, BalloonInfo, BalloonMove, BalloonMoveReason, BalloonStatValues, BalloonStats,
    PressureSource, SecondsOrNull,
};

const SECOND_NS: u64 = 1_000_000_000;
/// Without a change for this long, the guest is not on its way any more. Linux tries again five times a second.
const STUCK_NS: u64 = 2 * SECOND_NS;
/// Tags of its timers and of the pressure's file, in Control.
const POLL: u32 = 0x10;
const TELL: u32 = 0x11;
const PRESSURE: u32 = 0x12;

/// Tags of the guest's statistics that the policy goes by (virtio 1.2, section 5.5.6.4).
const FREE: u16 = 4;
const AVAILABLE: u16 = 6;

/// The balloon of the machine, and all that is known of it.
pub struct Memory {
    balloon: Balloon,
    /// What the guest is to have, in bytes, and since when.
    target: u64,
    set_ns: u64,
    /// What the guest said last, and when, in seconds since the epoch.
    values: Vec<(u16, u64)>,
    updated: u64,
    /// How often it is asked, in seconds; 0 is at each query.
    interval: u64,
    /// The timers: that of the next question, and that of the next events.
    timers: Option<(Key, Key)>,
    /// When events were told last; a change after that waits for its second to be over.
    told_ns: Option<u64>,
    auto: Option<Auto>,
}

/// The automatic balloon.
struct Auto {
    policy: Policy,
    floor: u64,
    pressure: Pressure,
    last: Option<BalloonMove>,
}

impl Memory {
    /// Over `balloon`, which is empty.
    ///
    /// # Errors
    /// The host does not tell of its memory pressure, if it is asked to.
    pub fn new(balloon: Balloon) -> Result<Self> {
        let auto = match &balloon.spec.auto {
            None => None,
            Some(auto) => Some(Auto {
                policy: Policy::new(balloon.memory_bytes, auto.floor_bytes),
                floor: auto.floor_bytes,
                pressure: Pressure::open(&auto.pressure)?,
                last: None,
            }),
        };
        Ok(Memory {
            target: balloon.memory_bytes,
            set_ns: 0,
            values: Vec::new(),
            updated: 0,
            interval: u64::from(auto.is_some()),
            timers: None,
            told_ns: None,
            balloon,
            auto,
        })
    }

    /// Takes its place in Control's loop.
    pub(super) fn attach(&mut self, cx: &mut Cx<'_>) -> Result<()> {
        self.timers = Some((cx.timer(POLL)?, cx.timer(TELL)?));
        if let Some(auto) = &self.auto {
            auto.pressure.watch(PRESSURE, cx)?;
        }
        self.poll_in(self.interval, cx)
    }

    /// One of its own tags: what is to be told, if anything is.
    pub(super) fn ready(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<Option<BalloonInfo>> {
        match event.tag {
            POLL => {
                if let Some(auto) = &mut self.auto {
                    auto.pressure.look(cx.now_ns());
                }
                self.ask();
                self.poll_in(self.interval, cx)?;
            }
            TELL => return self.changed(cx),
            PRESSURE => {
                if let Some(auto) = &mut self.auto {
                    auto.pressure.rang(event.is_hang_up(), cx.now_ns());
                }
            }
            _ => {}
        }
        Ok(None)
    }

    /// What is in the balloon has changed: what is to be told now, if its time has come.
    pub(super) fn changed(&mut self, cx: &mut Cx<'_>) -> Result<Option<BalloonInfo>> {
        let next_ns = self.told_ns.map_or(0, |told_ns| told_ns + SECOND_NS);
        if cx.now_ns() < next_ns {
            if let Some((_, tell)) = self.timers {
                cx.arm(tell, next_ns)?;
            }
            return Ok(None);
        }
        self.told_ns = Some(cx.now_ns());
        // Before the value is read, so that a later one is told again.
        self.balloon.counters.take_news();
        Ok(Some(BalloonInfo { actual: self.actual() }))
    }

    /// What the guest says when it is asked.
    pub(super) fn statistics(&mut self, values: Vec<(u16, u64)>, now_ns: u64) {
        self.values = values;
        self.updated = epoch_seconds();
        self.decide(now_ns);
    }

    /// The guest shall have so many bytes.
    ///
    /// # Errors
    /// Its driver is not up.
    pub(super) fn set_target(&mut self, bytes: u64, now_ns: u64) -> Result<()> {
        self.check_driver()?;
        self.move_to(bytes, now_ns);
        Ok(())
    }

    /// The guest is asked for statistics every so many seconds, or at each query if 0. The automatic balloon needs them
    /// each second.
    pub(super) fn set_interval(&mut self, seconds: u32, cx: &mut Cx<'_>) -> Result<()> {
        if self.auto.is_some() && seconds != 1 {
            return Err(Error::usage(
                "Parameter 'seconds' is 1 as long as the balloon is automatic (-balloon auto=on); accepted: 1",
            ));
        }
        self.interval = seconds.into();
        self.ask();
        self.poll_in(self.interval, cx)
    }

    /// `query-balloon` (rule D3.9).
    pub(super) fn info(&self) -> Result<BalloonInfo> {
        self.check_driver()?;
        Ok(BalloonInfo { actual: self.actual() })
    }

    /// `query-balloon-stats`.
    pub(super) fn stats(&mut self) -> Result<BalloonStats> {
        self.check_driver()?;
        if self.interval == 0 {
            self.ask();
        }
        let (stats, others) = BalloonStatValues::split(&self.values);
        Ok(BalloonStats { stats, others, last_update: self.updated, interval: self.interval })
    }

    /// `query-balloon-detail`.
    pub(super) fn detail(&self, now_ns: u64) -> Result<BalloonDetail> {
        self.check_driver()?;
        let counters = &self.balloon.counters;
        let (actual, still_ns) = (self.actual(), self.still_ns(now_ns));
        let stuck = actual != self.target && still_ns >= STUCK_NS;
        let auto = self.auto.as_ref();
        Ok(BalloonDetail {
            target: self.target,
            actual,
            residual_bytes: actual.abs_diff(self.target),
            stuck_since: SecondsOrNull(stuck.then(|| epoch_seconds().saturating_sub(still_ns / SECOND_NS))),
            reclaimed_bytes: counters.reclaimed_bytes.load(Relaxed),
            reported_bytes: counters.reported_bytes.load(Relaxed),
            resident_bytes: resident_bytes(),
            deflate_on_oom: self.balloon.spec.deflate_on_oom,
            free_page_reporting: self.balloon.spec.free_page_reporting,
            auto: BalloonAuto {
                enabled: auto.is_some(),
                floor: auto.map(|auto| auto.floor),
                pressed: auto.map(|auto| auto.pressure.is_high(now_ns)),
                source: auto.map(|auto| {
                    if auto.pressure.is_trigger() { PressureSource::Trigger } else { PressureSource::File }
                }),
                last_move: auto.and_then(|auto| auto.last.clone()),
            },
        })
    }

    fn check_driver(&self) -> Result<()> {
        if self.balloon.counters.driver.load(SeqCst) {
            return Ok(());
        }
        Err(Error::new(
            Kind::NotActive,
            "The guest's balloon driver is not up: its kernel has not come that far, or has no virtio_balloon",
        ))
    }

    fn actual(&self) -> u64 {
        self.balloon.memory_bytes - self.balloon.counters.pages.load(SeqCst) * PAGE_BYTES
    }

    /// How long nothing has moved, in nanoseconds.
    fn still_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.balloon.counters.moved_ns.load(Relaxed).max(self.set_ns))
    }

    fn move_to(&mut self, bytes: u64, now_ns: u64) {
        // No page is given away that would be missing from the target.
        let pages = (self.balloon.memory_bytes - bytes.min(self.balloon.memory_bytes)) / PAGE_BYTES;
        self.target = self.balloon.memory_bytes - pages * PAGE_BYTES;
        self.set_ns = now_ns;
        // The balloon lives in this loop. Its configuration counts pages in 32 bits, and -m ends far below.
        let _ = self.balloon.orders.send(Order::SetTarget(u32::try_from(pages).unwrap_or(u32::MAX)));
    }

    fn ask(&self) {
        let _ = self.balloon.orders.send(Order::AskStatistics);
    }

    /// Arms the timer of the next question, or none if it is not to be asked by itself.
    fn poll_in(&self, seconds: u64, cx: &mut Cx<'_>) -> Result<()> {
        let Some((poll, _)) = self.timers else { return Ok(()) };
        if seconds == 0 { cx.cancel(poll) } else { cx.arm(poll, cx.now_ns() + seconds * SECOND_NS) }
    }

    /// Lets the policy look at fresh statistics.
    fn decide(&mut self, now_ns: u64) {
        let (target, actual, still_ns) = (self.target, self.actual(), self.still_ns(now_ns));
        let value = |tag| self.values.iter().rev().find(|(other, _)| *other == tag).map(|(_, value)| *value);
        let (Some(auto), Some(available)) = (&mut self.auto, value(AVAILABLE).or_else(|| value(FREE))) else { return };
        let pressed = auto.pressure.is_high(now_ns);
        let settled = actual == target || still_ns >= STUCK_NS;
        let sight = Sight { now_ns, target, actual, settled, available, pressed };
        let Some((to, reason)) = auto.policy.decide(&sight) else { return };
        let (reason, why) = match reason {
            Reason::HostPressed => (BalloonMoveReason::HostPressed, "the host is pressed"),
            Reason::GuestNeeds => (BalloonMoveReason::GuestNeeds, "the guest is short"),
        };
        info!("balloon: {} to {} MiB: {why}, {} MiB available in the guest", target >> 20, to >> 20, available >> 20);
        auto.last = Some(BalloonMove { at: epoch_seconds(), from: target, to, reason });
        self.move_to(to, now_ns);
    }
}

fn epoch_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The monitor's resident memory, its guest's included; 0 where there is no /proc.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    PAGE_BYTES * pages
}
