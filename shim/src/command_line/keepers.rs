//! What a keeper and its monitor say to each other: packets on a connection that lasts as long as
//! the process that it is about.
//!
//! | packet | from | meaning |
//! | --- | --- | --- |
//! | `H` and a ticket, three descriptors | keeper | here are the streams of the process that will be named so |
//! | `K` and a pid | keeper | the engine knows the process by it: from now on its end is told, and the end of this connection ends it |
//! | `S` and a number | keeper | a signal |
//! | one byte | monitor | after the hello: the streams are taken; after that, the exit status |

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use tokio::io::unix::AsyncFd;

use crate::sys::keeper::SIGNAL;

const HELLO: u8 = b'H';
const KEPT: u8 = b'K';

/// Longest packet: a hello with two ids.
const LONGEST: usize = 512;

/// Names a process of a container: its init when `exec` is empty.
pub fn ticket(container: &str, exec: &str) -> String {
    match exec {
        "" => container.into(),
        // No id has a slash.
        exec => format!("{container}/{exec}"),
    }
}

/// A keeper's side.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// Introduces itself on a fresh connection.
    ///
    /// # Errors
    /// There is no monitor.
    pub fn begin(
        socket: OwnedFd,
        ticket: &str,
        streams: [BorrowedFd<'_>; 3],
    ) -> io::Result<Connection> {
        let mut packet = vec![HELLO];
        packet.extend(ticket.as_bytes());
        let streams = streams.map(|stream| stream.as_raw_fd());
        linux::packet::send(socket.as_fd(), &packet, &streams)?;
        Ok(Connection(socket))
    }

    /// Waits until the monitor has the streams: who names them to it earlier may be quicker than
    /// they are.
    ///
    /// # Errors
    /// There is no monitor any more.
    pub fn heard(&self) -> io::Result<()> {
        match self.status()? {
            Some(_) => Ok(()),
            None => Err(io::Error::other("the container's monitor has ended")),
        }
    }

    /// Says that the process is to live, and by which pid it is known.
    pub fn kept(&self, pid: i32) -> io::Result<()> {
        let mut packet = vec![KEPT];
        packet.extend(pid.to_ne_bytes());
        Ok(linux::packet::send(self.0.as_fd(), &packet, &[])?)
    }

    /// Passes a signal on.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        let number = u8::try_from(number).map_err(io::Error::other)?;
        Ok(linux::packet::send(self.0.as_fd(), &[SIGNAL, number], &[])?)
    }

    /// Waits for the process' exit status; `None`: the monitor has gone.
    pub fn status(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        let packet = linux::packet::receive(self.0.as_fd(), &mut byte, 0)?;
        Ok((packet.length == 1).then_some(byte[0]))
    }

    /// For who waits for more than one thing.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a keeper says.
#[derive(Debug)]
pub(super) enum Word {
    Hello(String, [OwnedFd; 3]),
    Kept(i32),
    Signal(u32),
}

/// The next word of a keeper; `None`: it has gone, or it is none of ours.
pub(super) async fn next(socket: &AsyncFd<OwnedFd>) -> Option<Word> {
    loop {
        let mut ready = socket.readable().await.ok()?;
        let mut bytes = [0; LONGEST];
        let received = ready.try_io(|fd| {
            // Non-blocking by the accept.
            linux::packet::receive(fd.get_ref().as_fd(), &mut bytes, 3).map_err(io::Error::from)
        });
        let Ok(received) = received else { continue };
        let packet = received.ok()?;
        if packet.too_long || packet.lost {
            return None;
        }
        return word(&bytes[..packet.length], packet.descriptors);
    }
}

fn word(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Option<Word> {
    match bytes.split_first()? {
        (&HELLO, ticket) => Some(Word::Hello(
            String::from_utf8(ticket.to_vec()).ok()?,
            descriptors.try_into().ok()?,
        )),
        (&KEPT, pid) => Some(Word::Kept(i32::from_ne_bytes(pid.try_into().ok()?))),
        (&SIGNAL, &[number]) => Some(Word::Signal(number.into())),
        _ => None,
    }
}

/// Tells a keeper how to end. One that has gone needs no word.
pub(super) fn tell(socket: &AsyncFd<OwnedFd>, status: u32) {
    let status = (status & 0xff) as u8;
    let _ = linux::packet::send(socket.get_ref().as_fd(), &[status], &[]);
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tokio::io::Interest;

    use super::*;
    use crate::sys::watch;

    fn pair() -> (OwnedFd, AsyncFd<OwnedFd>) {
        let (keeper, monitor) = linux::packet::pair().unwrap();
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&monitor, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        (keeper, watch(monitor, Interest::READABLE).unwrap())
    }

    #[tokio::test]
    async fn words_arrive_as_they_were_said() {
        let (keeper, monitor) = pair();
        let null = File::open("/dev/null").unwrap();
        let keeper = Connection::begin(keeper, "a/b", [null.as_fd(); 3]).unwrap();
        keeper.signal(15).unwrap();
        keeper.kept(77).unwrap();
        let Some(Word::Hello(ticket, _)) = next(&monitor).await else {
            panic!("a hello comes first");
        };
        assert_eq!(ticket, "a/b");
        assert!(matches!(next(&monitor).await, Some(Word::Signal(15))));
        assert!(matches!(next(&monitor).await, Some(Word::Kept(77))));
        tell(&monitor, 0x107);
        assert_eq!(keeper.status().unwrap(), Some(7));
        drop(monitor);
        assert_eq!(keeper.status().unwrap(), None);
    }

    #[tokio::test]
    async fn who_says_nonsense_is_not_heard() {
        for (bytes, count) in [
            (&b"X"[..], 0),
            (b"", 0),
            (b"H", 2),
            (b"H\xff", 3),
            (b"K123", 0),
            (b"K12345", 0),
            (b"S", 0),
            (b"S12", 0),
            (&[b'H'; LONGEST + 1], 3),
        ] {
            let (keeper, monitor) = pair();
            let null = File::open("/dev/null").unwrap();
            let fds = vec![null.as_raw_fd(); count];
            linux::packet::send(keeper.as_fd(), bytes, &fds).unwrap();
            assert!(next(&monitor).await.is_none(), "{bytes:?}");
        }
    }
}
