//! `block_set_io_throttle`: from QEMU's arguments to a drive's limits, and on to the drive's own thread.
//!
//! What a limit means is `qos`'s. The answer is the drive's: it comes when the limits hold. Main thread.

use serde_json::{Value, json};

use crate::devices::block::{Order, SetLimits};
use crate::error::{Error, Kind, Result};
use crate::event::{Done, Lost};
use crate::machine::{DiskSlot, Drive};
use crate::qmp::block::BlockIOThrottle;
use crate::qos::{Limit, Limits, Quantity, Spelling};

/// Has the drive that `asked` names, and all of its group, limited as it says.
pub(super) fn set(asked: &BlockIOThrottle, slots: &mut [DiskSlot], done: Done<Result<Value>>) {
    let mut drives: Vec<&mut Drive> = slots.iter_mut().filter_map(|slot| slot.drive.as_mut()).collect();
    let (place, limits) = match plan(asked, &drives) {
        Ok(plan) => plan,
        Err(error) => return done.end(Err(error)),
    };
    let (id, group) = (drives[place].spec.id.clone(), drives[place].spec.group.clone());
    // What `query-block` says from here on; who asks after the answer finds it true.
    drives[place].limits = limits;
    let others = drives.iter_mut().filter(|drive| drive.spec.id != id && group.is_some() && drive.spec.group == group);
    for drive in others {
        drive.limits = limits;
        // The bucket is the same: this one is told because it may be waiting for what the old limits said.
        let _ = drive.orders.send(Order::Limit(SetLimits { limits, done: Done::posted(|_| ()) }));
    }
    let set = Done::posted(move |set: std::result::Result<(), Lost>| {
        let gone = |Lost| Error::new(Kind::NotActive, format!("Device '{id}' has failed and is not served any more"));
        done.end(set.map(|()| json!({})).map_err(gone));
    });
    // A drive that is gone drops the slip, which is posted all the same.
    let _ = drives[place].orders.send(Order::Limit(SetLimits { limits, done: set }));
}

/// Whose limits become which: the drive's place.
fn plan(asked: &BlockIOThrottle, drives: &[&mut Drive]) -> Result<(usize, Limits)> {
    let id = match (asked.text("id"), asked.text("device")) {
        (Some(id), Some(device)) if id != device => {
            return Err(Error::usage(format!("Parameters 'id' and 'device' name two drives, '{id}' and '{device}'")));
        }
        (Some(id), _) | (None, Some(id)) => id,
        (None, None) => {
            return Err(Error::usage("Parameter 'id' is missing: the drive's id; accepted as 'device' too"));
        }
    };
    let place = drives.iter().position(|drive| drive.device == id || drive.spec.id == id);
    let place = place.ok_or_else(|| Error::new(Kind::NotFound, format!("Device '{id}' not found")))?;
    let drive = &drives[place];
    if asked.text("group").is_some_and(|group| drive.spec.group.as_deref() != Some(group)) {
        let now = drive.spec.group.as_ref().map_or("none".to_owned(), |group| format!("'{group}'"));
        return Err(Error::usage(format!(
            "Parameter 'group' cannot be changed while the machine runs; accepted: the drive's group, which is {now}"
        )));
    }
    let limits = merge(|name| asked.number(name), Spelling::Qmp, &drive.limits);
    limits.check(Spelling::Qmp).map_err(|refusal| Error::usage(format!("Parameter {refusal}")))?;
    Ok((place, limits))
}

/// `limits` with what is asked: `number` has the argument of that name.
pub(super) fn merge(number: impl Fn(&str) -> Option<u64>, words: Spelling, limits: &Limits) -> Limits {
    let mut merged = *limits;
    let mut iops_size = number(words.iops_size());
    for (quantity, limit) in Quantity::ALL.into_iter().zip(&mut merged.each) {
        let rate = number(&words.rate(quantity));
        let max = number(&words.max(quantity));
        let max_length = number(&words.max_length(quantity));
        if rate.is_some() || max.is_some() || max_length.is_some() {
            // A burst alone is one over the limit that there is.
            *limit = Limit { rate: rate.unwrap_or(limit.rate), max: max.unwrap_or(0), max_length };
            iops_size = iops_size.or((!quantity.is_bytes()).then_some(0));
        }
    }
    Limits { iops_size: iops_size.unwrap_or(limits.iops_size), ..merged }
}
