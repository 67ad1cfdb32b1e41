//! What the agent's answers may be made of, looked at before anything is built from them.
//!
//! A protobuf decoder keeps fields that it does not know and makes an object of every element, dozens of bytes for two that
//! came. The guest would choose how much of this process' memory and time that takes. So the encoding is walked first, without
//! keeping anything: fields that an answer does not have, and more elements than it can have, are refused.

use bulkhead_agent_protocol::agent::{
    ContainerStatsResponse, CreateProcessResponse, Empty, Listeners, ReclaimMemoryResponse,
    SocketConnection, StartProcessResponse, StartSandboxResponse, WaitProcessResponse,
};
use protobuf::Message;

/// Most files of a cgroup in one answer; there are about twenty.
const MAX_FILES: usize = 256;

/// Why an answer is not decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// It ends within a field, or a length leads past its end.
    #[error("it is cut off")]
    CutOff,
    /// A number that no encoder writes, or a wire type that is not in use.
    #[error("it is no protobuf")]
    Encoding,
    /// A field that this answer does not have.
    #[error("it has a field {0} that is not known")]
    Unknown(u64),
    /// More elements than there can be.
    #[error("it has more than {0} elements")]
    TooMany(usize),
}

/// A field's value, as far as it matters here.
enum Value<'a> {
    Number,
    Bytes(&'a [u8]),
}

/// The fields of a message (protobuf.dev/programming-guides/encoding).
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, Refusal> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(Refusal::CutOff)?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Refusal::Encoding)
    }

    fn bytes(&mut self, count: u64) -> Result<&'a [u8], Refusal> {
        let count = usize::try_from(count).map_err(|_| Refusal::CutOff)?;
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Refusal::CutOff)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Refusal> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => self.varint().map(|_| Value::Number)?,
            1 => self.bytes(8).map(|_| Value::Number)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.bytes(length)?)
            }
            5 => self.bytes(4).map(|_| Value::Number)?,
            _ => return Err(Refusal::Encoding),
        };
        Ok(Some((tag >> 3, value)))
    }
}

/// Walks a message whose fields are those up to `last`.
fn walk<'a>(
    message: &'a [u8],
    last: u64,
    mut each: impl FnMut(u64, Value<'a>) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let mut fields = Fields(message);
    while let Some((number, value)) = fields.next()? {
        if !(1..=last).contains(&number) {
            return Err(Refusal::Unknown(number));
        }
        each(number, value)?;
    }
    Ok(())
}

/// ttrpc's own envelope: a status (a code and a text; our agent adds no details) and the answer's bytes.
pub(super) fn check_envelope(message: &[u8]) -> Result<(), Refusal> {
    walk(message, 2, |number, value| match (number, value) {
        (1, Value::Bytes(status)) => walk(status, 2, |_, _| Ok(())),
        (_, Value::Bytes(_)) => Ok(()),
        (number, Value::Number) => Err(Refusal::Unknown(number)),
    })
}

/// An answer that can be checked before it is decoded.
pub(super) trait Answer: Message {
    /// Looks at its bytes.
    fn check(bytes: &[u8]) -> Result<(), Refusal>;
}

/// Answers of plain fields, each with the highest number it has (agent.proto). A field that comes again overwrites.
macro_rules! plain {
    ($($answer:ty: $last:literal),*) => {
        $(impl Answer for $answer {
            fn check(bytes: &[u8]) -> Result<(), Refusal> {
                walk(bytes, $last, |_, _| Ok(()))
            }
        })*
    };
}

plain!(
    Empty: 0,
    StartSandboxResponse: 5,
    CreateProcessResponse: 3,
    StartProcessResponse: 3,
    WaitProcessResponse: 6,
    SocketConnection: 2,
    ReclaimMemoryResponse: 1,
    // Numbers: what comes out is four bytes for one that came, at most.
    Listeners: 2
);

impl Answer for ContainerStatsResponse {
    fn check(bytes: &[u8]) -> Result<(), Refusal> {
        let mut files = 0;
        walk(bytes, 1, |number, value| {
            files += 1;
            match value {
                _ if files > MAX_FILES => Err(Refusal::TooMany(MAX_FILES)),
                Value::Bytes(file) => walk(file, 2, |_, _| Ok(())),
                Value::Number => Err(Refusal::Unknown(number)),
            }
        })
    }
}

/// Decodes an answer that is what it should be.
pub(super) fn decode<A: Answer>(bytes: &[u8]) -> Result<A, Refusal> {
    A::check(bytes)?;
    let answer = A::parse_from_bytes(bytes).map_err(|_| Refusal::Encoding)?;
    // A known number with another type than its own. Its field's memory is that of its bytes.
    match answer.special_fields().unknown_fields().iter().next() {
        Some((number, _)) => Err(Refusal::Unknown(number.into())),
        None => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_protocol::agent::CgroupFile;

    use super::*;

    #[test]
    fn what_our_agent_says_passes() {
        let stats = ContainerStatsResponse {
            files: vec![CgroupFile {
                name: "memory.stat".into(),
                value: "anon 1\n".repeat(100),
                ..CgroupFile::default()
            }],
            ..ContainerStatsResponse::default()
        };
        let bytes = stats.write_to_bytes().unwrap();
        assert_eq!(decode::<ContainerStatsResponse>(&bytes), Ok(stats));
        let listeners = Listeners {
            ipv4: vec![80, 65_535],
            ..Listeners::default()
        };
        let bytes = listeners.write_to_bytes().unwrap();
        assert_eq!(decode::<Listeners>(&bytes), Ok(listeners));
        assert_eq!(decode::<Empty>(b""), Ok(Empty::default()));
        let status = ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no container");
        let mut response = ttrpc::Response::new();
        response.set_status(status);
        response.payload = vec![1, 2, 3];
        assert_eq!(check_envelope(&response.write_to_bytes().unwrap()), Ok(()));
    }

    #[test]
    fn a_flood_of_elements_is_refused_before_one_of_them_is_made() {
        // 1 MiB of empty files would be half a million objects.
        let flood = [0x0a, 0x00].repeat(512 << 10);
        assert_eq!(
            decode::<ContainerStatsResponse>(&flood),
            Err(Refusal::TooMany(MAX_FILES))
        );
    }

    #[test]
    fn unknown_fields_are_refused_wherever_they_are() {
        // Field 7, a number.
        let unknown = [0x38, 0x01];
        let inside_file = [&[0x0a, 0x02][..], &unknown].concat();
        assert_eq!(decode::<Empty>(&unknown), Err(Refusal::Unknown(7)));
        assert_eq!(
            decode::<WaitProcessResponse>(&unknown),
            Err(Refusal::Unknown(7))
        );
        assert_eq!(
            decode::<ContainerStatsResponse>(&inside_file),
            Err(Refusal::Unknown(7))
        );
        // In the status, and the details that a status may have by its own definition.
        assert_eq!(check_envelope(&inside_file), Err(Refusal::Unknown(7)));
        let details = [0x0a, 0x02, 0x1a, 0x00];
        assert_eq!(check_envelope(&details), Err(Refusal::Unknown(3)));
        assert_eq!(check_envelope(&unknown), Err(Refusal::Unknown(7)));
        // pid as bytes: known by number, not by type.
        let bytes = [0x0a, 0x00];
        assert_eq!(
            decode::<StartProcessResponse>(&bytes),
            Err(Refusal::Unknown(1))
        );
    }

    #[test]
    fn no_bytes_make_the_walk_do_more_than_end() {
        for bytes in [
            &[0xff; 11][..],
            &[
                0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01,
            ],
            &[0x0a, 0x05, 0x00],
            &[0x0b],
            &[0x09, 0],
            &[0x80],
        ] {
            assert!(decode::<ContainerStatsResponse>(bytes).is_err());
            assert!(check_envelope(bytes).is_err());
        }
    }
}
