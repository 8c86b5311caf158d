//! From the balloon's specification to its device, if this memory can be given back. Main thread.

use std::sync::Arc;

use crate::config::spec::{BalloonSpec, VmSpec};
use crate::devices::balloon::{Balloon, BalloonNews};
use crate::error::{Context, Error, Result};
use crate::event::Sender;
use crate::machine::{Notice, inventory};
use crate::memory::{self, GuestRam};

const WHAT: &str = "-balloon: look at guest memory";

/// The balloon, if this memory can be given back in pages.
pub fn balloon(
    asked: &BalloonSpec,
    spec: &VmSpec,
    ram: &Arc<GuestRam>,
    notices: &Sender<Notice>,
) -> Result<(Balloon, inventory::Balloon)> {
    suits(ram)?;
    let notices = notices.clone();
    let report = Box::new(move |news: BalloonNews| {
        // As in `block`.
        let _ = notices.send(Notice::Balloon(news));
    });
    let device = Balloon::new(ram.clone(), asked.deflate_on_oom, asked.free_page_reporting, report);
    let part = inventory::Balloon {
        spec: asked.clone(),
        memory_bytes: spec.memory_bytes,
        counters: device.counters(),
        orders: device.orders(),
    };
    Ok((device, part))
}

/// Whether this memory can be given back in the guest's pages (rules D3.2, D3.3).
///
/// # Errors
/// It consists of huge pages, or of a file that can have no holes: mistakes of the user's.
pub fn suits(ram: &GuestRam) -> Result<()> {
    let page_bytes = memory::page_bytes(ram).context(|| WHAT)?;
    if page_bytes != memory::PAGE_BYTES {
        return Err(Error::usage(format!(
            "-balloon: guest memory consists of pages of {} KiB (-mem-path), and the guest gives away pages of {} KiB, of \
             which none could go back to the host (rules D3.2, D3.3); accepted: one of the two options, or a -mem-path that \
             is not on hugetlbfs",
            page_bytes >> 10,
            memory::PAGE_BYTES >> 10
        )));
    }
    memory::can_discard(ram).map_err(|e| {
        Error::usage(
            "-balloon: the file system of -mem-path can make no holes in a file, so none of its memory could go back to the \
             host; accepted: another path, mem-share=off, or no balloon",
        )
        .because(e)
    })
}
