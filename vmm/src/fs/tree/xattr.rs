//! Extended attributes, by descriptor: a name in `/proc/self/fd` stands for the object itself.
//!
//! | the guest's name | on the host |
//! | --- | --- |
//! | `user.*`, POSIX ACLs, `security.capability` | the same |
//! | `trusted.*` | `user.bulkhead.trusted.*`: the host's own, by which its overlays decide, are not for a guest |
//! | `user.bulkhead.*` | is not there and cannot be set |
//! | others, as security labels | not supported |
//!
//! The host has `user.*` on regular files and directories only, so that `trusted.*` of a symbolic
//! link, a pipe, a socket or a whiteout is `EPERM`. overlayfs expects that of them (it then does
//! without the origin of a copied-up one).

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::sys::{self, Result};
use super::{Call, Engine, reply};
use crate::fs::wire::GetxattrOut;

/// What the fs process itself keeps with the host's files.
const OURS: &[u8] = b"user.bulkhead.";
const TRUSTED: &[u8] = b"trusted.";
/// Longest name (XATTR_NAME_MAX).
const LONGEST: usize = 255;

fn is_trusted(name: &[u8]) -> bool {
    name.strip_prefix(TRUSTED)
        .is_some_and(|rest| !rest.is_empty())
}

/// The name on the host of what the guest calls `name`. `ours` is the error for a name that the
/// guest does not have.
fn host_name(name: &CStr, ours: Errno) -> Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if bytes.starts_with(OURS) {
        return Err(ours);
    }
    if is_trusted(bytes) {
        if OURS.len() + bytes.len() > LONGEST {
            return Err(Errno::ERANGE);
        }
        let name = CString::new([OURS, bytes].concat()).map_err(|_| Errno::EINVAL)?;
        return Ok(Cow::Owned(name));
    }
    let shared = bytes.starts_with(b"user.")
        || matches!(
            bytes,
            b"system.posix_acl_access" | b"system.posix_acl_default" | b"security.capability"
        );
    match shared {
        true => Ok(Cow::Borrowed(name)),
        false => Err(Errno::EOPNOTSUPP),
    }
}

/// The guest's name of what the host calls `name`, if the guest has it.
fn guest_name(name: &[u8]) -> Option<&[u8]> {
    if let Some(name) = name.strip_prefix(OURS) {
        return is_trusted(name).then_some(name);
    }
    let name_is_the_same = CString::new(name)
        .is_ok_and(|name| matches!(host_name(&name, Errno::ENODATA), Ok(Cow::Borrowed(_))));
    name_is_the_same.then_some(name)
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
        let name = host_name(name, Errno::EPERM)?;
        inode.seen.changed_by_guest();
        let object = call.worker.name(inode.as_fd());
        sys::set_attribute(&object, &name, value, flags as i32)?;
        // SETXATTR_ACL_KILL_SGID: by somebody outside the file's group without CAP_FSETID. Linux
        // sends it with default lists, too, which change no mode.
        if kill_sgid && *name == *c"system.posix_acl_access" {
            self.drop_set_group_id(call, &inode)?;
        }
        Ok(())
    }

    pub(super) fn getxattr(&self, call: &mut Call<'_>, name: &CStr, size: u32) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let name = host_name(name, Errno::ENODATA)?;
        let object = call.worker.name(inode.as_fd());
        if size == 0 {
            let size = sys::get_attribute(&object, &name, &mut [])? as u32;
            reply(call, &GetxattrOut { size, padding: 0 });
            return Ok(());
        }
        let start = call.out.len();
        call.out.resize(start + size as usize, 0);
        let length = sys::get_attribute(&object, &name, &mut call.out[start..])?;
        call.out.truncate(start + length);
        Ok(())
    }

    pub(super) fn listxattr(&self, call: &mut Call<'_>, size: u32) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        let names = sys::list_attributes(&call.worker.name(inode.as_fd()))?;
        let names: Vec<u8> = names
            .split(|byte| *byte == 0)
            .filter_map(guest_name)
            .flat_map(|name| name.iter().chain(b"\0"))
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
        let name = host_name(name, Errno::ENODATA)?;
        inode.seen.changed_by_guest();
        sys::remove_attribute(&call.worker.name(inode.as_fd()), &name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_the_host_and_back() {
        let host = |name: &str| {
            let name = CString::new(name).unwrap();
            host_name(&name, Errno::ENODATA).map(|name| name.to_str().unwrap().to_owned())
        };
        let trusted = "trusted.overlay.opaque";
        assert_eq!(host(trusted).unwrap(), format!("user.bulkhead.{trusted}"));
        for name in ["user.overlay.opaque", "system.posix_acl_default"] {
            assert_eq!(host(name).unwrap(), name);
            assert_eq!(guest_name(name.as_bytes()), Some(name.as_bytes()));
        }
        assert_eq!(
            guest_name(b"user.bulkhead.trusted.x"),
            Some(&b"trusted.x"[..])
        );
        for name in [
            "user.bulkhead.trusted.x",
            "user.bulkhead.",
            "user.bulkhead.node",
        ] {
            assert_eq!(host(name), Err(Errno::ENODATA), "{name}");
        }
        // The host's own, even from a file system that lists them to everybody.
        for name in [
            "trusted.overlay.opaque",
            "security.selinux",
            "user.bulkhead.trusted.",
        ] {
            assert_eq!(guest_name(name.as_bytes()), None, "{name}");
        }
        for name in ["trusted.", "security.selinux", "system.nfs4_acl", "other"] {
            assert_eq!(host(name), Err(Errno::EOPNOTSUPP), "{name}");
        }
        let longest = format!("trusted.{}", "x".repeat(LONGEST - OURS.len() - 8));
        assert!(host(&longest).is_ok());
        assert_eq!(host(&format!("{longest}x")), Err(Errno::ERANGE));
    }
}
