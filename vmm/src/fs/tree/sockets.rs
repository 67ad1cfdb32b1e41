//! Sockets of the host at which the guest's agent listens in their servers' place (docs/adr/0009).
//!
//! The guest's kernel finds a Unix socket by its inode, and bind(2) always makes a new one. So the agent binds beside the socket, at
//! its name and [`LISTEN_SUFFIX`]: nothing is made on the host, and the guest is told of the inode that is there already. Whoever
//! connects to the socket in the guest, by whatever mount and with whatever rights its mode gives, then reaches the agent.
//!
//! A guest gains nothing by this: it is one more way to look up a name.

use std::ffi::{CStr, CString};

use bulkhead_vmm_config::LISTEN_SUFFIX;
use nix::errno::Errno;

use super::inodes::Inode;
use super::sys::Result;
use super::{Call, Engine, reply};
use crate::fs::wire::MknodIn;

/// The name of the socket at which the guest's root wants to listen, if this is what a MKNOD means.
pub(super) fn listened_at(body: &MknodIn, uid: u32, name: &CStr) -> Option<CString> {
    let is_root = uid == 0;
    let is_socket = body.mode & libc::S_IFMT == libc::S_IFSOCK;
    let socket = name.to_bytes().strip_suffix(LISTEN_SUFFIX.as_bytes())?;
    // The guard has let through a plain name, and what is left of it must be one too.
    let is_name = !matches!(socket, b"" | b"." | b"..");
    (is_root && is_socket && is_name)
        .then(|| CString::new(socket).expect("a part of a string without NUL has none"))
}

impl Engine {
    /// Answers a MKNOD with a socket that exists.
    pub(super) fn listen(&self, call: &mut Call<'_>, parent: &Inode, name: &CStr) -> Result<()> {
        let entry = self.entry_named(parent, name)?;
        if entry.attr.mode & libc::S_IFMT != libc::S_IFSOCK {
            self.inodes.forget(entry.nodeid, 1);
            return Err(Errno::ENOTSOCK);
        }
        reply(call, &entry);
        Ok(())
    }
}
