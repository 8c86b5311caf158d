//! `Credit`: how many bytes each side of a connection may send (virtio 1.2, section 5.10.6.3).
//!
//! Both sides count what they have sent and passed on, modulo 2^32. What the guest says of itself is believed for what
//! we send, which lands in its own memory; what we hold of its bytes is bounded by our own count alone. Pure arithmetic.

use super::packet::Header;

/// Bytes from the guest that we keep for a connection whose reader is slow.
pub const BUFFER_BYTES: u32 = 64 << 10;

/// The counts of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes that came from the guest, and how many of them we have passed on.
    received: u32,
    forwarded: u32,
    /// The last count of those passed on that the guest has been told.
    told: u32,
    /// Bytes that went to the guest.
    sent: u32,
    /// What the guest said last of its own.
    peer_alloc: u32,
    peer_forwarded: u32,
}

impl Credit {
    /// Takes in what the guest says with any packet.
    pub fn hear(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
    }

    /// How many bytes may go to the guest. None if it claims to have passed on more than it was sent.
    pub fn room(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// So many went to the guest.
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// So many came from the guest. False if that is more than we have room for.
    pub fn receive(&mut self, bytes: u32) -> bool {
        let fits = bytes <= BUFFER_BYTES - self.held();
        if fits {
            self.received = self.received.wrapping_add(bytes);
        }
        fits
    }

    /// So many of them were passed on.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.held()));
    }

    /// Bytes that came and were not passed on.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the guest knows of less than half of our room, and there is more.
    pub fn is_worth_telling(&self) -> bool {
        self.told != self.forwarded && self.received.wrapping_sub(self.told) > BUFFER_BYTES / 2
    }

    /// Writes our side into a packet to the guest.
    pub fn tell(&mut self, header: &mut Header) {
        self.told = self.forwarded;
        (header.buf_alloc, header.fwd_cnt) = (BUFFER_BYTES, self.forwarded);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn says(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn a_guest_that_lies_about_its_room_gets_none_or_what_it_asked_for() {
        let mut credit = Credit::default();
        credit.hear(&says(100, 0));
        credit.send(60);
        assert_eq!(credit.room(), 40);
        // Less than it has been sent already, more passed on than it was sent, and nothing at all.
        for (alloc, forwarded, room) in [(50, 0, 0), (100, 61, 0), (0, 60, 0), (u32::MAX, 60, u32::MAX), (100, 60, 100)]
        {
            credit.hear(&says(alloc, forwarded));
            assert_eq!(credit.room(), room, "{alloc} {forwarded}");
        }
    }

    #[test]
    fn a_guest_that_sends_more_than_there_is_room_for_is_found_out() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUFFER_BYTES));
        assert!(!credit.receive(1));
        credit.forward(10);
        assert!(!credit.receive(11) && credit.receive(10));
        assert!(!credit.receive(u32::MAX));
    }

    /// What one of the two does next.
    #[derive(Clone, Debug)]
    enum Step {
        GuestSends(u32),
        WePassOn(u32),
        WeTell,
        WeSend(u32),
        GuestPassesOn(u32),
        GuestTells,
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = || prop_oneof![0u32..100, 0u32..2 * BUFFER_BYTES];
        prop_oneof![
            bytes().prop_map(Step::GuestSends),
            bytes().prop_map(Step::WePassOn),
            Just(Step::WeTell),
            bytes().prop_map(Step::WeSend),
            bytes().prop_map(Step::GuestPassesOn),
            Just(Step::GuestTells),
        ]
    }

    proptest! {
        /// The reference counts in 64 bits and never wraps; the counts here begin shortly before they do.
        #[test]
        fn neither_side_ever_exceeds_the_others_room_and_nobody_who_has_room_is_left_waiting(
            steps in proptest::collection::vec(step(), 1..400),
            start in prop_oneof![Just(0u32), (u32::MAX - 4 * BUFFER_BYTES)..=u32::MAX],
            alloc in 1u32..200_000,
        ) {
            let mut credit = Credit {
                received: start, forwarded: start, told: start, sent: start, peer_alloc: alloc, peer_forwarded: start,
            };
            // The guest's view of us, and the truth.
            let (mut came, mut passed, mut known) = (0u64, 0u64, 0u64);
            let (mut went, mut guest_passed, mut guest_told) = (0u64, 0u64, 0u64);
            for step in steps {
                match step {
                    Step::GuestSends(bytes) => {
                        // It keeps to what it knows.
                        let room = u64::from(BUFFER_BYTES) - (came - known);
                        let bytes = u64::from(bytes).min(room);
                        prop_assert!(credit.receive(bytes as u32), "an honest guest is never refused");
                        came += bytes;
                    }
                    Step::WePassOn(bytes) => {
                        let bytes = u64::from(bytes).min(came - passed);
                        credit.forward(bytes as u32);
                        passed += bytes;
                    }
                    Step::WeTell => {
                        let mut header = Header::default();
                        credit.tell(&mut header);
                        prop_assert_eq!(header.fwd_cnt, start.wrapping_add(passed as u32));
                        prop_assert_eq!(header.buf_alloc, BUFFER_BYTES);
                        known = passed;
                    }
                    Step::WeSend(bytes) => {
                        let bytes = bytes.min(credit.room());
                        credit.send(bytes);
                        went += u64::from(bytes);
                    }
                    Step::GuestPassesOn(bytes) => guest_passed += u64::from(bytes).min(went - guest_passed),
                    Step::GuestTells => {
                        credit.hear(&says(alloc, start.wrapping_add(guest_passed as u32)));
                        guest_told = guest_passed;
                    }
                }
                prop_assert!(went - guest_passed <= u64::from(alloc), "more than the guest has room for");
                prop_assert_eq!(u64::from(credit.room()), u64::from(alloc) - (went - guest_told));
                prop_assert_eq!(u64::from(credit.held()), came - passed);
                prop_assert!(credit.held() <= BUFFER_BYTES);
                // A guest that knows of no room is told as soon as there is some.
                let blocked = came - known == u64::from(BUFFER_BYTES);
                prop_assert!(!blocked || passed == known || credit.is_worth_telling());
            }
        }
    }
}
