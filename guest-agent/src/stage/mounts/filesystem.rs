//! New file systems: tmpfs, proc, sysfs, devpts, mqueue, cgroup2 and whatever else the guest's kernel has.

use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_agent_protocol::agent::Mount;
use nix::errno::Errno;
use nix::libc::MS_RDONLY;

use super::flags;
use linux::mount::{FsContext, attr};

/// What failed while a file system was made, with the kernel's words about it.
#[derive(Debug)]
pub struct FsError {
    pub action: String,
    pub errno: Errno,
    pub detail: String,
}

/// A file system for `mount`, configured and detached, not attached anywhere yet.
///
/// `mode` becomes a tmpfs' mode unless the spec gives one. With `writable`, MS_RDONLY is left for later, because
/// something has to be written first (mount points of other mounts, a copy of what it covers).
pub fn create(mount: &Mount, mode: Option<u32>, writable: bool) -> Result<OwnedFd, FsError> {
    let fstype = fstype(&mount.fstype);
    let context =
        FsContext::open(&c_string(fstype)?).map_err(|errno| fail(None, "fsopen", fstype, errno))?;
    configure(&context, mount, mode)?;
    if mount.flags & MS_RDONLY != 0 && !writable && own_superblock(fstype) {
        set(&context, "ro", None)?;
    }
    context
        .create()
        .map_err(|errno| fail(Some(&context), "creation of", fstype, errno))?;
    let mut change = flags::attributes(mount.flags, mount.clear_flags, attr::RELATIME);
    if writable {
        change.set &= !attr::RDONLY;
    }
    context
        .mount(change.set)
        .map_err(|errno| fail(Some(&context), "fsmount of", fstype, errno))
}

/// Applies the options of `mount` to the file system that is mounted at `existing` (the "remount" option).
pub fn reconfigure(mount: &Mount, existing: BorrowedFd) -> Result<(), FsError> {
    let context = FsContext::pick(existing).map_err(|errno| fail(None, "fspick", "", errno))?;
    configure(&context, mount, None)?;
    context
        .reconfigure()
        .map_err(|errno| fail(Some(&context), "reconfiguration", "", errno))
}

/// The kernel's name: the guest has cgroup v2 only, whichever version the spec names.
fn fstype(name: &str) -> &str {
    match name {
        "cgroup" => "cgroup2",
        other => other,
    }
}

/// Whether every mount has a superblock of its own. "ro" on a shared one would change it for everybody, or fail.
fn own_superblock(fstype: &str) -> bool {
    !matches!(fstype, "proc" | "sysfs" | "cgroup2" | "mqueue" | "devpts")
}

fn configure(context: &FsContext, mount: &Mount, mode: Option<u32>) -> Result<(), FsError> {
    if !mount.source.is_empty() {
        set(context, "source", Some(&mount.source))?;
    }
    for option in flags::superblock_options(mount.flags, mount.clear_flags) {
        context
            .set(option, None)
            .map_err(|errno| fail(Some(context), "option", &option.to_string_lossy(), errno))?;
    }
    let options: Vec<&str> = match mount.fstype.as_str() {
        // Options of type "cgroup" select v1 controllers, which v2 has no options for.
        "cgroup" => Vec::new(),
        fstype => split_options(fstype, &mount.data),
    };
    if let Some(mode) = mode
        && !options.iter().any(|option| option.starts_with("mode="))
    {
        set(context, "mode", Some(&format!("{mode:o}")))?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => set(context, key, Some(value))?,
            // Every devpts mount is a new instance since Linux 4.7; the old option says nothing more.
            None if option == "newinstance" && mount.fstype == "devpts" => {}
            None => set(context, option, None)?,
        }
    }
    Ok(())
}

/// The options of `data`. In tmpfs' "mpol=bind:0,2" a comma before a digit belongs to the value, as in mount(8).
fn split_options<'a>(fstype: &str, data: &'a str) -> Vec<&'a str> {
    let mut options = Vec::new();
    let mut start = 0;
    for (index, _) in data.match_indices(',') {
        let digit_follows = data[index + 1..].starts_with(|c: char| c.is_ascii_digit());
        if fstype == "tmpfs" && digit_follows {
            continue;
        }
        options.push(&data[start..index]);
        start = index + 1;
    }
    options.push(&data[start..]);
    options.retain(|option| !option.is_empty());
    options
}

fn set(context: &FsContext, key: &str, value: Option<&str>) -> Result<(), FsError> {
    let name = c_string(key)?;
    let text = value.map(c_string).transpose()?;
    context.set(&name, text.as_deref()).map_err(|errno| {
        let option = match value {
            Some(value) => format!("{key}={value}"),
            None => key.to_owned(),
        };
        fail(Some(context), "option", &option, errno)
    })
}

fn c_string(text: &str) -> Result<CString, FsError> {
    CString::new(text).map_err(|_| fail(None, "a NUL byte in", text, Errno::EINVAL))
}

fn fail(context: Option<&FsContext>, action: &str, on: &str, errno: Errno) -> FsError {
    let mut detail = context.map(FsContext::message).unwrap_or_default();
    if detail.is_empty()
        && let Some(hint) = hint(on, errno)
    {
        detail = hint.to_owned();
    }
    if !detail.is_empty() {
        detail.insert_str(0, " (");
        detail.push(')');
    }
    FsError {
        action: format!("{action} {on}").trim_end().to_owned(),
        errno,
        detail,
    }
}

/// Why the kernel refuses these to a container with a user namespace: it must own what the file system shows.
fn hint(fstype: &str, errno: Errno) -> Option<&'static str> {
    match (fstype, errno) {
        ("sysfs", Errno::EPERM) => Some(
            "sysfs shows a network namespace: it must be a new one, owned by the container's user namespace",
        ),
        ("proc", Errno::EPERM) => Some(
            "proc shows a pid namespace: it must be a new one, owned by the container's user namespace",
        ),
        ("mqueue", Errno::EPERM) => Some(
            "mqueue shows an ipc namespace: it must be a new one, owned by the container's user namespace",
        ),
        (_, Errno::ENODEV) => Some("the guest's kernel does not have this file system"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_at_commas() {
        assert_eq!(split_options("tmpfs", ""), Vec::<&str>::new());
        assert_eq!(
            split_options("ext4", "a=1,,b,2"),
            vec!["a=1", "b", "2"],
            "empty options are nothing"
        );
        assert_eq!(
            split_options("tmpfs", "size=1m,mpol=bind:0,2,mode=755"),
            vec!["size=1m", "mpol=bind:0,2", "mode=755"]
        );
    }
}
