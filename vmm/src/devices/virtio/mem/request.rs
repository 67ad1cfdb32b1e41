//! What a driver asks for, and what it is told (VIRTIO 1.2 §5.15.6).

use super::blocks::State;

/// Bytes of struct virtio_mem_req.
pub const REQUEST: usize = 24;
/// Bytes of struct virtio_mem_resp.
pub const RESPONSE: usize = 10;

/// The driver wants to use blocks.
pub const PLUG: u16 = 0;
/// It does not want them any more.
pub const UNPLUG: u16 = 1;
/// It wants none.
pub const UNPLUG_ALL: u16 = 2;
/// It asks what they are.
pub const STATE: u16 = 3;

/// A request, of which nothing was checked yet.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// One of the above, or nothing that there is.
    pub kind: u16,
    /// Guest physical address of the first block.
    pub address: u64,
    /// How many.
    pub count: u16,
}

impl Request {
    /// From struct virtio_mem_req.
    pub fn parse(bytes: &[u8; REQUEST]) -> Request {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Request {
            kind: half(0),
            address: u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")),
            count: half(16),
        }
    }
}

/// The answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// It is done.
    Ack,
    /// What the blocks are.
    State(State),
    /// It would plug more than was asked for.
    Nack,
    /// It breaks a rule.
    Error,
}

impl Response {
    /// As the driver reads it.
    pub fn bytes(self) -> [u8; RESPONSE] {
        let (kind, state) = match self {
            Response::Ack | Response::State(State::Plugged) => (0, 0),
            Response::State(State::Unplugged) => (0, 1),
            Response::State(State::Mixed) => (0, 2),
            Response::Nack => (1, 0),
            Response::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}
