//! The guard: turns the bytes of a request into an [`Op`] or refuses them, before the file system sees anything.
//!
//! The bytes are a private copy, so nothing can change after it was checked. What is refused by a rule is counted by it; an
//! opcode that this server does not have (locks, ioctl, DAX) answers `ENOSYS`, which a guest is entitled to ask, uncounted.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use super::wire::{self, InHeader, MAX_ATTRIBUTE, Opcode, OutHeader, SetxattrExtIn, WriteIn};
use arguments::operation;
pub use op::Op;

mod arguments;
mod op;

/// Bytes of the request header.
pub const HEADER: usize = size_of::<InHeader>();
/// Bytes of the reply header.
pub const REPLY_HEADER: usize = size_of::<OutHeader>();
/// Bytes of header and arguments of a WRITE; the data follows.
pub const WRITE_HEAD: usize = HEADER + size_of::<WriteIn>();
/// Most bytes of header and arguments of any other request: a SETXATTR of the largest value.
pub const MAX_HEAD: usize = HEADER + size_of::<SetxattrExtIn>() + 256 + MAX_ATTRIBUTE as usize;

/// The rules; each has a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Fewer bytes than a header.
    Header,
    /// The header's length is not that of the request.
    Length,
    /// No such opcode.
    Opcode,
    /// Arguments are cut short, too long, or a size in them is not that of the payload.
    Arguments,
    /// A name is empty, not ended by a NUL or has more than one component, or is `.` or `..`.
    Name,
    /// A size is larger than was negotiated.
    Size,
    /// The reply has no room.
    Room,
    /// A uid or gid that means "unchanged" to the host.
    Identity,
    /// A device node, or another type that mknod(2) does not make.
    Node,
    /// A flag that the operation does not have.
    Flags,
    /// Anything before INIT.
    Uninitialised,
    /// A chain of descriptors that is no request: past RAM, looping, or too long.
    Chain,
    /// An open of what is neither a regular file nor a directory.
    Special,
}

/// All rules with their names in the counters.
pub const RULES: [(Rule, &str); 13] = [
    (Rule::Header, "header"),
    (Rule::Length, "length"),
    (Rule::Opcode, "opcode"),
    (Rule::Arguments, "arguments"),
    (Rule::Name, "name"),
    (Rule::Size, "size"),
    (Rule::Room, "room"),
    (Rule::Identity, "identity"),
    (Rule::Node, "node"),
    (Rule::Flags, "flags"),
    (Rule::Uninitialised, "uninitialised"),
    (Rule::Chain, "chain"),
    (Rule::Special, "special"),
];

/// How often each rule refused.
#[derive(Default)]
pub struct Faults([AtomicU64; RULES.len()]);

impl Faults {
    /// Counts one.
    pub fn count(&self, rule: Rule) {
        self.0[rule as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts so far, those that are not zero.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        RULES
            .iter()
            .map(|(rule, name)| (*name, self.0[*rule as usize].load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
    }
}

/// A refused request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the guest is told.
    pub errno: Errno,
    /// The rule that was broken; none where the guest did nothing wrong.
    pub rule: Option<Rule>,
}

fn broken(rule: Rule) -> Refusal {
    let errno = match rule {
        Rule::Opcode => Errno::ENOSYS,
        Rule::Size => Errno::E2BIG,
        Rule::Node => Errno::EPERM,
        Rule::Identity => Errno::EOVERFLOW,
        Rule::Header | Rule::Length | Rule::Room | Rule::Chain | Rule::Uninitialised => Errno::EIO,
        Rule::Arguments | Rule::Name | Rule::Flags | Rule::Special => Errno::EINVAL,
    };
    Refusal {
        errno,
        rule: Some(rule),
    }
}

type Result<T> = std::result::Result<T, Refusal>;

/// A checked request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Its header.
    pub header: InHeader,
    /// What it asks for.
    pub op: Op<'a>,
}

/// How many bytes of a request of `total` bytes must be copied and checked: all but the data of a WRITE.
///
/// # Errors
/// The request is too long for what it is.
pub fn head_length(header: &InHeader, total: usize) -> Result<usize> {
    if header.opcode == Opcode::Write as u32 {
        return Ok(total.min(WRITE_HEAD));
    }
    match total {
        0..=MAX_HEAD => Ok(total),
        _ => Err(broken(Rule::Length)),
    }
}

/// The header of a request.
///
/// # Errors
/// There are not enough bytes.
pub fn header(bytes: &[u8]) -> Result<InHeader> {
    wire::take(&mut &bytes[..]).ok_or(broken(Rule::Header))
}

/// What was negotiated with the guest.
#[derive(Clone, Copy)]
pub struct Session {
    /// INIT has been answered.
    pub started: bool,
    /// `SETXATTR_EXT` was agreed.
    pub setxattr_ext: bool,
}

/// Checks a request: `head` is its copied part, `data` the number of bytes that follow, `room` the bytes for the reply with
/// its header.
///
/// # Errors
/// The rule that is broken.
pub fn check<'a>(
    head: &'a [u8],
    data: usize,
    room: usize,
    session: Session,
) -> Result<Request<'a>> {
    let header = header(head)?;
    let total = head.len().checked_add(data);
    if usize::try_from(header.len).ok() != total {
        return Err(broken(Rule::Length));
    }
    if !session.started && header.opcode != Opcode::Init as u32 {
        return Err(broken(Rule::Uninitialised));
    }
    let op = operation(header.opcode, &head[HEADER..], data, session)?;
    // u32::MAX asks setresuid(2) to leave an id as it is: the request would run as somebody else.
    // Requests that make nothing have it where ALLOW_IDMAP was agreed, and nobody looks at it.
    if op.makes() && (header.uid == u32::MAX || header.gid == u32::MAX) {
        return Err(broken(Rule::Identity));
    }
    if data > 0 && !matches!(op, Op::Write(_)) {
        return Err(broken(Rule::Arguments));
    }
    if !op.is_silent() && room < REPLY_HEADER + op.reply_size() {
        return Err(broken(Rule::Room));
    }
    Ok(Request { header, op })
}

#[cfg(test)]
mod tests;
