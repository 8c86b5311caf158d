//! The header of every packet (virtio 1.2, section 5.10.6), and the numbers in it. Pure functions over bytes.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered: streams.
pub const STREAM: u16 = 1;

/// What a packet asks for.
pub mod op {
    /// Open a connection.
    pub const REQUEST: u16 = 1;
    /// It is open.
    pub const RESPONSE: u16 = 2;
    /// It is closed, or there is none.
    pub const RST: u16 = 3;
    /// The sender will not send or receive any more.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// How much the sender has room for.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Say how much you have room for.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: the sender will receive no more, and send no more.
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

/// The two ports that tell a connection from all others: there is one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A header as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes that the sender has room for in all, and how many it has passed on since the beginning.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads one.
    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Header {
        let word = |at: usize| bytes[at..at + 4].iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Header {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let words = [
            self.src_cid as u32,
            (self.src_cid >> 32) as u32,
            self.dst_cid as u32,
            (self.dst_cid >> 32) as u32,
            self.src_port,
            self.dst_port,
            self.len,
            u32::from(self.kind) | u32::from(self.op) << 16,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// One to the guest whose context id is `cid`.
    pub fn to_guest(cid: u32, ports: Ports, kind: u16, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: cid.into(),
            src_port: ports.host,
            dst_port: ports.guest,
            kind,
            op,
            ..Header::default()
        }
    }

    /// The ports of one that came from the guest.
    pub fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lies_in_memory_as_the_specification_says_and_is_read_back() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let bytes = header.bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x24, 0x23, 0x22, 0x21]);
        assert_eq!(bytes[28..32], [0x52, 0x51, 0x62, 0x61], "type, then op");
        assert_eq!(bytes[40..], [0x94, 0x93, 0x92, 0x91]);
        assert_eq!(Header::read(&bytes), header);
    }
}
