//! Malformed rings, chains, buffers and requests.

use super::{Answer, Case, Victim};
use crate::text::Outcome;
use crate::virtio::blk::{F_DISCARD, F_WRITE_ZEROES, Layout, T_DISCARD, T_IN, T_WRITE_ZEROES};
use crate::virtio::mmio::F_INDIRECT_DESC;
use crate::virtio::ring::{Desc, INDIRECT, NEXT, WRITE};

pub const CASES: &[Case] = &[
    ("next-out-of-range", |v| Ok(v.raw(T_IN, 0, |v, h, _, _| [Desc { next: v.size(), ..h }, h, h]))),
    ("next-65535", |v| Ok(v.raw(T_IN, 0, |_, h, _, _| [Desc { next: 0xffff, ..h }, h, h]))),
    ("chain-loop", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { next: 0, ..d }, s]))),
    ("chain-loop-on-itself", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { next: 0, ..h }, d, s]))),
    ("chain-of-the-whole-queue-in-a-loop", whole_queue_loop),
    ("chain-longer-than-the-queue", long_indirect),
    ("avail-jump", avail_jump),
    ("avail-backwards", avail_backwards),
    ("head-out-of-range", |v| Ok(v.heads(&[v.size()]))),
    ("head-65535", |v| Ok(v.heads(&[0xffff]))),
    ("duplicate-head", |v| Ok(v.heads(&[0, 0]))),
    ("head-inside-a-chain", |v| Ok(v.heads(&[0, 1]))),
    ("zero-length-header", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { len: 0, ..h }, d, s]))),
    ("zero-length-data", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { len: 0, ..d }, s]))),
    ("zero-length-status", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, d, Desc { len: 0, ..s }]))),
    ("header-only", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { flags: 0, ..h }, d, s]))),
    ("data-only", |v| Ok(v.raw(T_IN, 0, |_, _, d, s| [Desc { flags: WRITE, ..d }, d, s]))),
    ("status-missing", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { flags: 0, ..d }, s]))),
    ("status-inside-data", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { flags: WRITE, ..d }, s]))),
    ("status-read-only", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, d, Desc { flags: 0, ..s }]))),
    ("read-into-read-only", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { flags: NEXT, ..d }, s]))),
    ("header-short", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { len: 8, ..h }, d, s]))),
    ("header-split", |v| Ok(v.raw(T_IN, 0, split_header))),
    ("header-write-only", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { flags: NEXT | WRITE, ..h }, d, s]))),
    ("header-outside-ram", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [Desc { address: NOWHERE, ..h }, d, s]))),
    ("data-outside-ram", |v| Ok(v.data_at(NOWHERE))),
    ("data-wrapping", |v| Ok(v.data_at(u64::MAX - 100))),
    ("data-at-the-last-byte", |v| Ok(v.data_at(u64::MAX))),
    ("data-over-the-end-of-ram", |v| Ok(v.data_at(v.ram_end - 256))),
    ("data-over-the-mmio-gap", |v| Ok(v.data_at(v.disk.device.registers.base()))),
    ("status-outside-ram", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, d, Desc { address: NOWHERE, ..s }]))),
    ("data-of-4-gib", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { len: u32::MAX, ..d }, s]))),
    ("data-not-in-sectors", |v| Ok(v.raw(T_IN, 0, |_, h, d, s| [h, Desc { len: 513, ..d }, s]))),
    ("sector-max", |v| Ok(v.raw(T_IN, u64::MAX, proper))),
    ("sector-overflow-in-bytes", |v| Ok(v.raw(T_IN, u64::MAX / 512 + 1, proper))),
    ("sector-last-in-bytes", |v| Ok(v.raw(T_IN, i64::MAX as u64 / 512, proper))),
    ("indirect-bad-length", |v| Ok(v.table(|t| Desc { len: 17, ..t }))),
    ("indirect-zero-length", |v| Ok(v.table(|t| Desc { len: 0, ..t }))),
    ("indirect-huge", |v| Ok(v.table(|t| Desc { len: 0xffff_fff0, ..t }))),
    ("indirect-outside-ram", |v| Ok(v.table(|t| Desc { address: NOWHERE, ..t }))),
    ("indirect-and-next", |v| Ok(v.table(|t| Desc { flags: INDIRECT | NEXT, next: 0, ..t }))),
    ("indirect-write-only", |v| Ok(v.table(|t| Desc { flags: INDIRECT | WRITE, ..t }))),
    ("indirect-nested", nested),
    ("indirect-not-negotiated", not_negotiated),
    ("discard-huge", |v| v.ranges(T_DISCARD, F_DISCARD, 16, u32::MAX)),
    ("discard-many-segments", |v| v.ranges(T_DISCARD, F_DISCARD, 0x8000, 1)),
    ("discard-odd-length", |v| v.ranges(T_DISCARD, F_DISCARD, 17, 1)),
    ("discard-of-nothing", |v| v.ranges(T_DISCARD, F_DISCARD, 0, 1)),
    ("write-zeroes-huge", |v| v.ranges(T_WRITE_ZEROES, F_WRITE_ZEROES, 16, u32::MAX)),
    ("write-zeroes-many-segments", |v| v.ranges(T_WRITE_ZEROES, F_WRITE_ZEROES, 0x8000, 1)),
];

/// An address where no machine has memory.
const NOWHERE: u64 = 0x7f_ffff_f000;

/// The chain as it should be.
fn proper(_: &Victim, header: Desc, data: Desc, status: Desc) -> [Desc; 3] {
    [header, data, status]
}

/// The header in two halves, the second in the place of the data: there is no data, and that is allowed.
fn split_header(_: &Victim, header: Desc, _: Desc, status: Desc) -> [Desc; 3] {
    [Desc { len: 8, ..header }, Desc { address: header.address + 8, len: 8, flags: NEXT, next: 2 }, status]
}

impl Victim {
    fn size(&self) -> u16 {
        self.disk.ring.size()
    }

    /// Sends a request of three descriptors after `spoil` has had them; header, data and status are linked already.
    fn raw(&mut self, kind: u32, sector: u64, spoil: fn(&Victim, Desc, Desc, Desc) -> [Desc; 3]) -> Answer {
        self.write_chain(kind, sector, spoil);
        self.disk.ring.offer(0);
        self.send()
    }

    fn write_chain(&mut self, kind: u32, sector: u64, spoil: fn(&Victim, Desc, Desc, Desc) -> [Desc; 3]) {
        self.disk.header(kind, sector);
        let header = Desc { flags: NEXT, next: 1, ..self.disk.header_desc() };
        let data = Desc { flags: NEXT | WRITE, next: 2, ..self.data_desc(512) };
        let chain = spoil(self, header, data, self.disk.status_desc());
        for (index, desc) in (0..).zip(chain) {
            desc.write(&self.disk.ring.table(), index);
        }
    }

    fn data_at(&mut self, address: u64) -> Answer {
        self.disk.header(T_IN, 0);
        let data = Desc { address, ..self.data_desc(512) };
        let chain = [self.disk.header_desc(), data, self.disk.status_desc()];
        self.disk.offer(&chain, Layout::Direct);
        self.send()
    }

    /// Writes a proper chain and offers these heads.
    fn heads(&mut self, heads: &[u16]) -> Answer {
        self.write_chain(T_IN, 0, proper);
        heads.iter().for_each(|&head| self.disk.ring.offer(head));
        self.send()
    }

    /// Sends a proper request in an indirect table after `spoil` has had the descriptor of the table.
    fn table(&mut self, spoil: fn(Desc) -> Desc) -> Answer {
        if !self.disk.has(F_INDIRECT_DESC) {
            return Answer::NotOffered;
        }
        self.disk.header(T_IN, 0);
        let chain = [self.disk.header_desc(), self.data_desc(512), self.disk.status_desc()];
        self.disk.offer(&chain, Layout::Indirect);
        let table = Desc { address: self.disk.scratch.at(4096), len: 48, flags: INDIRECT, next: 0 };
        spoil(table).write(&self.disk.ring.table(), 0);
        self.send()
    }

    /// Sends `bytes` of discard or write-zeroes segments, each of `sectors` from the end of the disk on.
    fn ranges(&mut self, kind: u32, feature: u64, bytes: u32, sectors: u32) -> Outcome<Answer> {
        if !self.disk.has(feature) {
            return Ok(Answer::NotOffered);
        }
        for at in (0..self.memory.len()).step_by(16) {
            self.memory.write64(at, self.disk.capacity_sectors - 1);
            self.memory.write32(at + 8, sectors);
            self.memory.write32(at + 12, 0);
        }
        self.disk.header(kind, 0);
        let data = Desc { flags: 0, ..self.data_desc(bytes) };
        let chain = [self.disk.header_desc(), data, self.disk.status_desc()];
        self.disk.offer(&chain, Layout::Direct);
        Ok(self.send())
    }
}

/// Every descriptor of the queue, the last one leading back to the first.
fn whole_queue_loop(v: &mut Victim) -> Outcome<Answer> {
    v.disk.header(T_IN, 0);
    let (size, table) = (v.size(), v.disk.ring.table());
    Desc { flags: NEXT, next: 1, ..v.disk.header_desc() }.write(&table, 0);
    for index in 1..size {
        Desc { flags: NEXT | WRITE, next: (index + 1) % size, ..v.data_desc(512) }.write(&table, index);
    }
    v.disk.ring.offer(0);
    Ok(v.send())
}

/// An indirect table of more descriptors than the queue has: all else about the request is right.
fn long_indirect(v: &mut Victim) -> Outcome<Answer> {
    if !v.disk.has(F_INDIRECT_DESC) {
        return Ok(Answer::NotOffered);
    }
    v.disk.header(T_IN, 0);
    let table = v.memory.piece(0x4000, 0xc000);
    let last = v.size() + 10;
    Desc { flags: NEXT, next: 1, ..v.disk.header_desc() }.write(&table, 0);
    for index in 1..last {
        Desc { flags: NEXT | WRITE, next: index + 1, ..v.data_desc(512) }.write(&table, index);
    }
    v.disk.status_desc().write(&table, last);
    let len = 16 * (u32::from(last) + 1);
    Desc { address: table.at(0), len, flags: INDIRECT, next: 0 }.write(&v.disk.ring.table(), 0);
    v.disk.ring.offer(0);
    Ok(v.send())
}

/// More available entries than the queue holds.
fn avail_jump(v: &mut Victim) -> Outcome<Answer> {
    v.write_chain(T_IN, 0, proper);
    // A restart begins at index 0, and nothing has been offered since but one proper read at most.
    v.disk.ring.publish_index(v.size().wrapping_mul(2) + 5);
    v.disk.device.notify(0);
    Ok(v.watch())
}

/// An available index before what the device has taken.
fn avail_backwards(v: &mut Victim) -> Outcome<Answer> {
    v.write_chain(T_IN, 0, proper);
    v.disk.ring.publish_index(0u16.wrapping_sub(1));
    v.disk.device.notify(0);
    Ok(v.watch())
}

/// A table whose second descriptor is a table again.
fn nested(v: &mut Victim) -> Outcome<Answer> {
    if !v.disk.has(F_INDIRECT_DESC) {
        return Ok(Answer::NotOffered);
    }
    v.disk.header(T_IN, 0);
    let (outer, inner) = (v.memory.piece(0x4000, 48), v.memory.piece(0x5000, 48));
    Desc { flags: NEXT, next: 1, ..v.disk.header_desc() }.write(&outer, 0);
    Desc { address: inner.at(0), len: 32, flags: INDIRECT, next: 0 }.write(&outer, 1);
    Desc { flags: NEXT | WRITE, next: 1, ..v.data_desc(512) }.write(&inner, 0);
    v.disk.status_desc().write(&inner, 1);
    Desc { address: outer.at(0), len: 32, flags: INDIRECT, next: 0 }.write(&v.disk.ring.table(), 0);
    v.disk.ring.offer(0);
    Ok(v.send())
}

/// A table although the driver did not accept the feature.
fn not_negotiated(v: &mut Victim) -> Outcome<Answer> {
    if !v.disk.has(F_INDIRECT_DESC) {
        return Ok(Answer::NotOffered);
    }
    let features = v.disk.features;
    v.disk.features &= !F_INDIRECT_DESC;
    v.disk.restart()?;
    v.disk.header(T_IN, 0);
    let chain = [v.disk.header_desc(), v.data_desc(512), v.disk.status_desc()];
    v.disk.offer(&chain, Layout::Indirect);
    let answer = v.send();
    v.disk.features = features;
    Ok(answer)
}
