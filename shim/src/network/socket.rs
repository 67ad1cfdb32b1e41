//! A blocking socket of rtnetlink in the calling thread's network namespace.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
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
#[error("{error}{}", .words.as_ref().map(|words| format!(" ({words})")).unwrap_or_default())]
pub struct Failure {
    /// Not a `source`: what this says has it in it.
    error: io::Error,
    /// What the kernel says beyond the number.
    words: Option<String>,
}

impl Failure {
    /// The errno.
    pub fn errno(&self) -> Option<i32> {
        self.error.raw_os_error()
    }

    /// Whether what was asked about is not there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ENODEV | libc::ENOENT | libc::ENXIO | libc::EINVAL)
        )
    }

    fn malformed() -> Failure {
        io::Error::from(io::ErrorKind::InvalidData).into()
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { error, words: None }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        io::Error::from(errno).into()
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
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
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
        Err(Errno::EAGAIN.into())
    }

    fn send(&mut self, message: &Message) -> Result<(), Failure> {
        self.sequence += 1;
        let bytes = message.bytes(self.sequence);
        // An unconnected netlink socket sends to the kernel.
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
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
                rest = rest.get(message::aligned(size)..).unwrap_or_default();
                if !ours {
                    continue;
                }
                whole &= i32::from(flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(kind) {
                    // A dump that failed on its way says so at its end.
                    kind @ (libc::NLMSG_DONE | libc::NLMSG_ERROR) => {
                        return outcome(kind, flags.into(), body).map(|()| whole);
                    }
                    libc::NLMSG_NOOP => {}
                    _ => each(Message::parse(kind, flags, body).ok_or_else(Failure::malformed)?),
                }
            }
        }
    }

    fn read(&mut self) -> Result<usize, Failure> {
        loop {
            // MSG_TRUNC: the length of what there was, not of what there was room for.
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) if length <= self.buffer.len() => return Ok(length),
                // More in one piece than the kernel says it sends.
                Ok(_) => return Err(Failure::malformed()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// What NLMSG_ERROR and the NLMSG_DONE of a dump say: 0, or an errno and perhaps words.
fn outcome(kind: i32, flags: i32, body: &[u8]) -> Result<(), Failure> {
    let error = message::u32_of(body).ok_or_else(Failure::malformed)? as i32;
    if error == 0 {
        return Ok(());
    }
    // Only an error has the request, or its header, before its words.
    let request = match flags & libc::NLM_F_CAPPED {
        _ if kind == libc::NLMSG_DONE => 0,
        0 => body.get(4..).and_then(message::u32_of).unwrap_or_default() as usize,
        _ => HEADER,
    };
    let words = (flags & libc::NLM_F_ACK_TLVS != 0)
        .then(|| body.get(message::aligned(4 + request)..))
        .flatten()
        .and_then(|rest| message::find(rest, NLMSGERR_ATTR_MSG))
        .map(message::text_of);
    Err(Failure {
        error: io::Error::from_raw_os_error(error.wrapping_neg()),
        words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::line, network::Step};

    #[test]
    fn the_kernels_words_are_in_the_error_once() {
        let words = message::nested(&[(NLMSGERR_ATTR_MSG, b"no such thing\0")]);
        let number = (-libc::EINVAL).to_ne_bytes();
        let request = Message::new(libc::RTM_GETLINK, 0).bytes(1);
        let (error, done, said) = (libc::NLMSG_ERROR, libc::NLMSG_DONE, libc::NLM_F_ACK_TLVS);
        for (kind, flags, between) in [
            (error, said, &request[..]),
            (error, said | libc::NLM_F_CAPPED, &request[..HEADER]),
            (done, said, &[]),
        ] {
            let body = [&number[..], between, &words].concat();
            let error = outcome(kind, flags, &body).step("ask about", "eth0");
            let text = line(&error.unwrap_err());
            assert_eq!(
                text,
                "cannot ask about eth0 in the pod's network namespace: Invalid argument (os error 22) (no such thing)"
            );
        }
        assert!(outcome(done, 0, &[0; 4]).is_ok());
        assert!(outcome(error, 0, &[]).is_err());
    }
}
