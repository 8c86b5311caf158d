//! What limits a drive, and what each of its requests counts as (docs/qos.md has the table).
//!
//! The bucket itself is `qos`'s; what becomes of a chain that must wait is its ring's and worker's business. The drive's
//! thread.

use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::{Aside, Kind, Work};
use crate::disk::Op;
use crate::event::Done;
use crate::qos::{Bucket, Direction, Group, Limits, Request as Asked, Wait};

/// Other limits for a drive, and for all of its group if it has one; the slip is ended when they hold.
pub struct SetLimits {
    /// The limits, checked.
    pub limits: Limits,
    /// The reply slip.
    pub done: Done<()>,
}

/// What limits a drive. It outlives what the driver and the operator do to the device: no reset, no pause and no change
/// of the limits earns anything.
pub enum Throttle {
    /// A bucket of its own.
    Own(Bucket),
    /// One that it shares: whose, and its number there. The lock is held for a question, by threads of which there is
    /// one, for the drives of a group live in one loop: it is never waited for (invariant I1).
    Shared(Arc<Mutex<Group>>, usize),
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Throttle::Shared(group, member) = self {
            group.lock().unwrap_or_else(PoisonError::into_inner).leave(*member);
        }
    }
}

impl Throttle {
    pub(super) fn ask(&mut self, now_ns: u64, asked: &Asked) -> Result<(), Wait> {
        match self {
            Throttle::Own(bucket) => bucket.ask(now_ns, asked),
            Throttle::Shared(group, member) => {
                group.lock().unwrap_or_else(PoisonError::into_inner).ask(*member, now_ns, asked)
            }
        }
    }

    pub(super) fn set(&mut self, now_ns: u64, limits: &Limits) {
        match self {
            Throttle::Own(bucket) => bucket.set(now_ns, limits),
            Throttle::Shared(group, _) => {
                group.lock().unwrap_or_else(PoisonError::into_inner).set(now_ns, limits);
            }
        }
    }
}

/// What a request that makes no sense counts as: one like any other, for a guest is not to spin for free.
pub(super) const MALFORMED: Asked = Asked { direction: Direction::Read, size: 0, moved: 0 };

/// What a request counts as (docs/qos.md); none if it is free.
pub(super) fn cost(translated: &Result<Work<'_>, Aside>) -> Option<Asked> {
    match *translated {
        Ok((Op::Read { .. }, _, bytes)) => Some(Asked::new(Direction::Read, bytes.into())),
        Ok((Op::Write { .. }, _, bytes)) => Some(Asked::new(Direction::Write, bytes.into())),
        Ok((Op::WriteZeroes { len, .. }, ..)) => Some(Asked::new(Direction::Write, len)),
        Ok((Op::Discard { len, .. }, ..)) => Some(Asked { direction: Direction::Write, size: len, moved: 0 }),
        // What a guest needs to keep its data, or asks once.
        Ok((Op::Flush, ..)) | Err(Aside::Answer(VIRTIO_BLK_S_OK, _)) => None,
        Err(Aside::Invalid(Kind::Write | Kind::Unmap, _)) => Some(Asked { direction: Direction::Write, ..MALFORMED }),
        Err(Aside::Answer(..) | Aside::Invalid(..)) => Some(MALFORMED),
    }
}
