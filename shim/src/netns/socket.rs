//! A blocking socket of rtnetlink in the calling thread's network namespace.

use std::io;

use linux::netlink::{Answer, Netlink, Refusal};
use nix::{errno::Errno, sys::socket::SockProtocol};

use super::message::Message;

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
    pub(crate) fn is_gone(&self) -> bool {
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

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure {
            error: refusal.errno.into(),
            words: Some(refusal.text).filter(|words| !words.is_empty()),
        }
    }
}

/// The socket.
pub(crate) struct Socket(Netlink);

impl Socket {
    pub(crate) fn open() -> Result<Socket, Failure> {
        Ok(Socket(Netlink::open(SockProtocol::NetlinkRoute)?))
    }

    /// Has something done.
    pub(crate) fn request(&mut self, message: Message) -> Result<(), Failure> {
        Ok(self.0.request(&mut message.bytes(0), |_| {})?)
    }

    /// Asks for one thing; the kernel answers with it.
    pub(crate) fn get(&mut self, message: Message) -> Result<Message, Failure> {
        let mut answer = None;
        let read = |found: Answer<'_>| answer = parse(found);
        self.0.request(&mut message.bytes(0), read)?;
        answer.ok_or_else(Failure::malformed)
    }

    /// Asks for all of a kind, as they are at one moment.
    pub(crate) fn dump(&mut self, message: Message) -> Result<Vec<Message>, Failure> {
        for _ in 0..DUMPS {
            let mut all = Vec::new();
            let read = |found: Answer<'_>| all.push(parse(found));
            if self.0.dump(&mut message.bytes(0), read)? {
                let whole = all.into_iter().collect::<Option<_>>();
                return whole.ok_or_else(Failure::malformed);
            }
        }
        Err(Errno::EAGAIN.into())
    }
}

fn parse(found: Answer<'_>) -> Option<Message> {
    Message::parse(found.kind, found.flags, found.body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::line, netns::Step};

    #[test]
    fn the_kernels_words_are_in_the_error_once() {
        let refusal = Refusal {
            errno: Errno::EINVAL,
            text: "no such thing".to_owned(),
        };
        let refused: Result<(), Failure> = Err(refusal.into());
        let text = line(&refused.step("ask about", "eth0").unwrap_err());
        assert_eq!(
            text,
            "cannot ask about eth0 in the pod's network namespace: Invalid argument (os error 22) (no such thing)"
        );
    }
}
