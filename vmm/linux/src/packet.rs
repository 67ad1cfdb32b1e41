//! Packets with descriptors beside them: SOCK_SEQPACKET sockets and SCM_RIGHTS (unix(7)).

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::Result;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use crate::retry;

/// The kernel's limit of descriptors a packet (`SCM_MAX_FD`): with room for that many, none is cut
/// off for want of space.
pub const MOST_DESCRIPTORS: usize = 253;

/// What came.
#[derive(Debug)]
pub struct Packet {
    /// Length of what was written into the buffer; 0 at the end of the connection.
    pub length: usize,
    /// The descriptors beside it; they close at an exec.
    pub descriptors: Vec<OwnedFd>,
    /// The packet was longer than the buffer.
    pub too_long: bool,
    /// Descriptors were lost: there was no room for them, or the process may open no more.
    pub lost: bool,
}

/// Two connected sockets; they close at an exec.
///
/// # Errors
/// `EMFILE`.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// Sends a packet and copies of `descriptors`. No signal is raised when the other side has gone.
///
/// # Errors
/// `EAGAIN` where the socket does not block; `EBADF`; `EPIPE` or `ECONNRESET`: the other side has
/// gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[RawFd]) -> Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let beside = &rights[..usize::from(!descriptors.is_empty())];
    let parts = [IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    retry(|| sendmsg::<()>(socket.as_raw_fd(), &parts, beside, flags, None)).map(drop)
}

/// Receives a packet into `bytes`, with room for as many descriptors as `most`. Without room the
/// kernel makes none.
///
/// # Errors
/// `EAGAIN` where the socket does not block; `ECONNRESET`: the other side has gone with packets of
/// ours unread.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8], most: usize) -> Result<Packet> {
    let room = match most {
        0 => 0,
        // SAFETY: CMSG_SPACE is arithmetic.
        _ => unsafe { libc::CMSG_SPACE((most * size_of::<RawFd>()) as u32) as usize },
    };
    // Aligned as a cmsghdr.
    let mut space = vec![0u64; room.div_ceil(size_of::<u64>())];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a msghdr is integers and pointers; zero is a valid value of each.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = space.as_mut_ptr().cast();
    message.msg_controllen = room;
    let length = retry(|| {
        // SAFETY: what the message refers to outlives the call and has the lengths that it says.
        Errno::result(unsafe {
            libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC)
        })
    })?;
    Ok(Packet {
        length: length as usize,
        descriptors: taken(&message),
        too_long: message.msg_flags & libc::MSG_TRUNC != 0,
        lost: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The descriptors of a message that recvmsg(2) has just filled, also of one that was cut off: they
/// are ours to close.
fn taken(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has set msg_controllen to what it has written, and the records in it are
    // whole; the descriptors in them were made for us alone, and each is taken once.
    unsafe {
        let mut record = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = record.as_ref() {
            if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let length = header.cmsg_len - libc::CMSG_LEN(0) as usize;
                let numbers = libc::CMSG_DATA(record).cast::<RawFd>();
                for index in 0..length / size_of::<RawFd>() {
                    let number = numbers.add(index).read_unaligned();
                    descriptors.push(OwnedFd::from_raw_fd(number));
                }
            }
            record = libc::CMSG_NXTHDR(message, record);
        }
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn packets_keep_their_bounds_and_their_descriptors() {
        let (left, right) = pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(left.as_fd(), b"one", &[null.as_raw_fd(); 3]).unwrap();
        send(left.as_fd(), b"two", &[]).unwrap();
        drop(left);
        let mut bytes = [0; 8];
        let one = receive(right.as_fd(), &mut bytes, MOST_DESCRIPTORS).unwrap();
        assert_eq!(
            (&bytes[..one.length], one.descriptors.len()),
            (&b"one"[..], 3)
        );
        let flags = nix::fcntl::fcntl(&one.descriptors[0], nix::fcntl::FcntlArg::F_GETFD);
        assert_eq!(flags.unwrap() & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        let two = receive(right.as_fd(), &mut bytes, MOST_DESCRIPTORS).unwrap();
        assert_eq!(
            (&bytes[..two.length], two.descriptors.len()),
            (&b"two"[..], 0)
        );
        assert!(!two.too_long && !two.lost);
        let end = receive(right.as_fd(), &mut bytes, 0).unwrap();
        assert_eq!(end.length, 0);
    }

    #[test]
    fn what_does_not_fit_is_said_and_nothing_is_kept() {
        let (left, right) = pair().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        let most = [write.as_raw_fd(); MOST_DESCRIPTORS];
        let mut bytes = [0; 2];
        for room in [0, 1, 2, MOST_DESCRIPTORS] {
            send(left.as_fd(), b"four", &most).unwrap();
            let packet = receive(right.as_fd(), &mut bytes, room).unwrap();
            assert!(packet.too_long);
            assert_eq!(packet.lost, room < MOST_DESCRIPTORS, "{room}");
            // The kernel fills the space that alignment has left.
            assert!((room..=room.next_multiple_of(2)).contains(&packet.descriptors.len()));
        }
        assert!(send(left.as_fd(), b"x", &[-1]).is_err());
        // A pipe ends with its last writer: a copy that was kept would keep it from that.
        drop(write);
        assert_eq!(nix::unistd::read(&read, &mut bytes), Ok(0));
    }
}
