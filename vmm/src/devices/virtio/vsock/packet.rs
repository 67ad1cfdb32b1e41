//! The header before each packet (VIRTIO 1.2 §5.10.6): 44 little-endian bytes.

use super::super::chain::Buffers;
use super::super::fault::Fault;
use vm_memory::GuestMemoryMmap;

/// The host's address.
pub const HOST_CID: u64 = 2;
/// The guest's address. Each machine has its own device, so that every guest can be 3.
pub const GUEST_CID: u64 = 3;

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub const TYPE_STREAM: u16 = 1;

/// `flags` of [`op::SHUTDOWN`]: the sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// `flags` of [`op::SHUTDOWN`]: the sender sends no more.
pub const NO_SEND: u32 = 2;

/// What a packet is for.
pub mod op {
    /// Dials a port.
    pub const REQUEST: u16 = 1;
    /// Accepts a dial.
    pub const RESPONSE: u16 = 2;
    /// Refuses a dial or ends a connection at once.
    pub const RST: u16 = 3;
    /// Ends one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Carries bytes.
    pub const RW: u16 = 5;
    /// Tells the sender's buffer space.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a [`CREDIT_UPDATE`].
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A header, as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's address.
    pub src_cid: u64,
    /// Receiver's address.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// [`TYPE_STREAM`], or something that is refused.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// The sender's buffer space for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header at the start of a chain, however it is split.
    ///
    /// # Errors
    /// The chain is shorter than a header.
    pub fn read(memory: &GuestMemoryMmap, chain: Buffers<'_>) -> Result<Header, Fault> {
        let mut bytes = [0; HEADER_LEN];
        chain.read(memory, &mut bytes)?;
        Ok(Header::parse(&bytes))
    }

    /// Writes the header to the start of a chain.
    ///
    /// # Errors
    /// The chain is shorter than a header.
    pub fn write(&self, memory: &GuestMemoryMmap, chain: Buffers<'_>) -> Result<(), Fault> {
        chain.write(memory, &self.bytes())
    }

    /// The answer's addresses: this header's the other way round.
    pub fn reversed(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            ..Header::default()
        }
    }

    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes() {
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
        assert_eq!(Header::parse(&header.bytes()), header);
        assert_eq!(header.bytes()[28..32], [0x52, 0x51, 0x62, 0x61]);
    }
}
