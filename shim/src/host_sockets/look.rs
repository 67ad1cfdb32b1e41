//! A look at a place: which sockets are there, and at which of them somebody listens.

use std::io;

use nix::sys::inotify::Inotify;

use super::{
    dial::{Kind, probe},
    place::{Found, Look, Place},
};

/// A look at a place, with what is new in it.
#[derive(Debug)]
pub(super) struct Looked {
    pub(super) look: Look,
    pub(super) new: Vec<(Found, Kind)>,
    pub(super) silent: bool,
}

impl Looked {
    /// Those in `known` are not asked again whether somebody listens.
    pub(super) fn at(
        place: &Place,
        inotify: &Inotify,
        known: &[Found],
        uid: u32,
    ) -> io::Result<Looked> {
        let look = match place.look(inotify) {
            Ok(look) => look,
            // The host has removed it, or put another one in its place.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE)
                ) =>
            {
                Look::default()
            }
            Err(error) => return Err(error),
        };
        let (mut new, mut silent) = (Vec::new(), false);
        for found in look.sockets.iter().filter(|found| !known.contains(found)) {
            let socket = place.socket(&found.path);
            match socket.ok().and_then(|(socket, _)| probe(uid, &socket)) {
                Some(Kind::Packets) => {
                    tracing::debug!(path = %found.path, "a SOCK_SEQPACKET socket is not served");
                }
                Some(kind) => new.push((found.clone(), kind)),
                None => silent = true,
            }
        }
        Ok(Looked { look, new, silent })
    }
}
