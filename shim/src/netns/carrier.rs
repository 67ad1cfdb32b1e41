//! Whether the links of a pod's interfaces carry frames, told when it changes: the far end of a wire goes down, a bridge's port is
//! disabled. What the guest sends would be lost, and its kernel should know as the namespace's does.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};

use super::{
    Error, Step,
    message::{Message, field},
    namespace::Namespace,
};

/// netdevice(7)'s IFF_LOWER_UP.
const LOWER_UP: u32 = 0x1_0000;

/// The links of some interfaces of one namespace.
#[derive(Debug)]
pub struct Carriers {
    namespace: Namespace,
    /// Index of each interface, in the order of the machine's devices, and whether it carried frames when we last looked.
    devices: Vec<(u32, Option<bool>)>,
    heard: OwnedFd,
}

impl Carriers {
    /// Listens from now on. All links come with the first [`Carriers::changes`].
    pub(crate) fn listen(namespace: Namespace, indices: &[u32]) -> Result<Carriers, Error> {
        let heard = namespace.enter(|_| {
            let opened = subscribe();
            opened.map_err(Into::into).step("hear of", "links")
        })?;
        Ok(Carriers {
            namespace,
            devices: indices.iter().map(|index| (*index, None)).collect(),
            heard,
        })
    }

    /// The devices whose links have changed since the last call. Call it once at first, and then when the descriptor is readable.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn changes(&mut self) -> Result<Vec<(u32, bool)>, Error> {
        self.empty();
        // Not what was heard but what is: a message may have been lost, and the last one counts.
        let links = self.namespace.enter(|socket| {
            let ask = Message::new(libc::RTM_GETLINK, 0);
            socket.dump(ask).step("list", "links")
        })?;
        let mut changed = Vec::new();
        for (device, (index, known)) in (0..).zip(&mut self.devices) {
            let up = links
                .iter()
                .find(|link| link.number(field::INDEX) == *index)
                .is_some_and(|link| link.number(field::LINK_FLAGS) & LOWER_UP != 0);
            if known.replace(up) != Some(up) {
                changed.push((device, up));
            }
        }
        Ok(changed)
    }

    /// Reads what has been heard: it only says that there is a reason to look.
    fn empty(&self) {
        let mut buffer = [0_u8; 4096];
        loop {
            match recv(self.heard.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(_) | Err(Errno::EINTR) => {}
                // Too much came at once: some of it is lost, which does not matter.
                Err(Errno::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Carriers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.heard.as_fd()
    }
}

/// A socket that hears of every change of a link in the thread's namespace.
fn subscribe() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let route = SockProtocol::NetlinkRoute;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, route)?;
    bind(
        fd.as_raw_fd(),
        &NetlinkAddr::new(0, libc::RTMGRP_LINK as u32),
    )?;
    Ok(fd)
}
