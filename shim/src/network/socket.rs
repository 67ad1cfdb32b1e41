//! A blocking socket of rtnetlink in the calling thread's network namespace.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::message::{self, HEADER, Message};

/// The kernel fills at most 32 KiB of a reader's buffer with a dump (netlink(7)).
const BUFFER: usize = 32 << 10;
/// Attribute of an error: the kernel's words.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// How often a dump begins again because the namespace changed under it.
const DUMPS: usize = 20;

/// Why the kernel did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", .words.as_ref().map(|words| format!(" ({words})")).unwrap_or_default())]
pub struct Failure {
    source: io::Error,
    /// What the kernel says beyond the number.
    words: Option<String>,
}

impl Failure {
    /// The errno.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether what was asked about is not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ENODEV | libc::ENOENT | libc::ENXIO | libc::EINVAL)
        )
    }
}

impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Failure {
        Failure {
            source,
            words: None,
        }
    }
}

impl Failure {
    fn malformed() -> Failure {
        io::Error::from(io::ErrorKind::InvalidData).into()
    }
}

/// The socket.
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(super) fn open() -> Result<Socket, Failure> {
        // SAFETY: makes a descriptor from numbers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: new, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Errors come with words, and without a copy of the request. A kernel that cannot do either says less.
        for option in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
            let yes: libc::c_int = 1;
            // SAFETY: reads one int.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const yes).cast(),
                    size_of_val(&yes) as libc::socklen_t,
                );
            }
        }
        Ok(Socket {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Has something done.
    pub(super) fn request(&mut self, mut message: Message) -> Result<(), Failure> {
        message.flags |= (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.send(&message)?;
        self.receive(&mut |_| {})?;
        Ok(())
    }

    /// Asks for one thing; the kernel answers with it.
    pub(super) fn get(&mut self, mut message: Message) -> Result<Message, Failure> {
        message.flags |= (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.send(&message)?;
        let mut answer = None;
        self.receive(&mut |message| answer = Some(message))?;
        answer.ok_or_else(Failure::malformed)
    }

    /// Asks for all of a kind, as they are at one moment.
    pub(super) fn dump(&mut self, mut message: Message) -> Result<Vec<Message>, Failure> {
        message.flags |= (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        for _ in 0..DUMPS {
            self.send(&message)?;
            let mut all = Vec::new();
            if self.receive(&mut |message| all.push(message))? {
                return Ok(all);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN).into())
    }

    fn send(&mut self, message: &Message) -> Result<(), Failure> {
        self.sequence += 1;
        let bytes = message.bytes(self.sequence);
        // SAFETY: reads the buffer. An unconnected netlink socket sends to the kernel.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        match sent {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    /// Up to the end of the answer. `false`: what was dumped changed meanwhile.
    fn receive(&mut self, each: &mut dyn FnMut(Message)) -> Result<bool, Failure> {
        let mut whole = true;
        loop {
            let length = self.read()?;
            let mut rest = &self.buffer[..length];
            while rest.len() >= HEADER {
                let size = message::u32_of(rest).unwrap_or_default() as usize;
                let body = rest.get(HEADER..size).ok_or_else(Failure::malformed)?;
                let half = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
                let (kind, flags) = (half(4), half(6));
                let ours = message::u32_of(&rest[8..]) == Some(self.sequence);
                rest = rest.get((size + 3) & !3..).unwrap_or_default();
                if !ours {
                    continue;
                }
                whole &= i32::from(flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(kind) {
                    // A dump that failed on its way says so at its end.
                    libc::NLMSG_DONE if body.len() >= 4 => {
                        return outcome(flags, body).map(|()| whole);
                    }
                    libc::NLMSG_DONE => return Ok(whole),
                    libc::NLMSG_ERROR => return outcome(flags, body).map(|()| whole),
                    libc::NLMSG_NOOP => {}
                    _ => each(Message::parse(kind, flags, body).ok_or_else(Failure::malformed)?),
                }
            }
        }
    }

    fn read(&mut self) -> Result<usize, Failure> {
        loop {
            let (buffer, room) = (self.buffer.as_mut_ptr().cast(), self.buffer.len());
            // SAFETY: writes into the buffer, no more than it holds; MSG_TRUNC only changes the number that comes back.
            let length = unsafe { libc::recv(self.fd.as_raw_fd(), buffer, room, libc::MSG_TRUNC) };
            let error = io::Error::last_os_error();
            if let Ok(length) = usize::try_from(length) {
                // Longer: more in one piece than the kernel says it sends.
                return (length <= room)
                    .then_some(length)
                    .ok_or_else(Failure::malformed);
            }
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
    }
}

/// What NLMSG_ERROR says: 0, or an errno and perhaps words.
fn outcome(flags: u16, body: &[u8]) -> Result<(), Failure> {
    let error = message::u32_of(body).ok_or_else(Failure::malformed)? as i32;
    if error == 0 {
        return Ok(());
    }
    let flags = i32::from(flags);
    let request = match flags & libc::NLM_F_CAPPED {
        0 => body.get(4..).and_then(message::u32_of).unwrap_or_default() as usize,
        _ => HEADER,
    };
    let words = (flags & libc::NLM_F_ACK_TLVS != 0)
        .then(|| body.get((4 + request + 3) & !3..))
        .flatten()
        .and_then(|rest| message::find(rest, NLMSGERR_ATTR_MSG))
        .map(message::text_of);
    Err(Failure {
        source: io::Error::from_raw_os_error(error.wrapping_neg()),
        words,
    })
}
