//! Extended attributes, by descriptor: a name in `/proc/self/fd` stands for the object itself.
//!
//! The guest may see and set `user.*`, POSIX ACLs and file capabilities. `trusted.*` would need CAP_SYS_ADMIN on the host
//! (overlayfs in the guest has `userxattr`), and the host's own security labels are not the guest's to see or set.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::sys::{self, Result};
use super::{Call, Engine, reply};
use crate::fs::wire::GetxattrOut;

fn is_shared(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(
            name,
            b"system.posix_acl_access" | b"system.posix_acl_default" | b"security.capability"
        )
}

fn check(name: &CStr) -> Result<()> {
    if is_shared(name.to_bytes()) {
        Ok(())
    } else {
        Err(Errno::EOPNOTSUPP)
    }
}

impl Engine {
    pub(super) fn setxattr(
        &self,
        call: &mut Call<'_>,
        name: &CStr,
        value: &[u8],
        (flags, kill_sgid): (u32, bool),
    ) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        check(name)?;
        if kill_sgid {
            // The host clears the bit for somebody outside the file's group without CAP_FSETID: for the caller.
            call.worker.become_caller(call.uid, call.gid, 0)?;
            call.worker.keep_set_id(false)?;
        } else {
            call.worker.keep_set_id(true)?;
        }
        sys::set_attribute(&call.worker.name(inode.as_fd()), name, value, flags as i32)
    }

    pub(super) fn getxattr(&self, call: &mut Call<'_>, name: &CStr, size: u32) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        check(name)?;
        let object = call.worker.name(inode.as_fd());
        if size == 0 {
            let size = sys::get_attribute(&object, name, &mut [])? as u32;
            reply(call, &GetxattrOut { size, padding: 0 });
            return Ok(());
        }
        let start = call.out.len();
        call.out.resize(start + size as usize, 0);
        let length = sys::get_attribute(&object, name, &mut call.out[start..])?;
        call.out.truncate(start + length);
        Ok(())
    }

    pub(super) fn listxattr(&self, call: &mut Call<'_>, size: u32) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let names = sys::list_attributes(&call.worker.name(inode.as_fd()))?;
        let shared = |name: &&[u8]| is_shared(name.strip_suffix(b"\0").unwrap_or(name));
        let names: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(shared)
            .flatten()
            .copied()
            .collect();
        if size == 0 {
            let size = names.len() as u32;
            reply(call, &GetxattrOut { size, padding: 0 });
            return Ok(());
        }
        if names.len() > size as usize {
            return Err(Errno::ERANGE);
        }
        call.out.extend_from_slice(&names);
        Ok(())
    }

    pub(super) fn removexattr(&self, call: &mut Call<'_>, name: &CStr) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        check(name)?;
        sys::remove_attribute(&call.worker.name(inode.as_fd()), name)
    }
}
