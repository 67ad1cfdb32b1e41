//! Paths that are looked up with a directory as "/".

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::{NixPath, Result, errno::Errno};

/// How often a path is looked up again.
const MAX_RETRIES: usize = 128;

/// Opens a path with `root` as "/": links are followed inside, and magic links refused
/// (openat2(2), RESOLVE_IN_ROOT). A rename or mount anywhere on the host makes ".." uncertain
/// (`EAGAIN`): the path is looked up again then. Async-signal-safe for short paths.
///
/// # Errors
/// openat2(2)'s; `EAGAIN` when that happens each time.
pub fn open_in_root<P: ?Sized + NixPath>(
    root: BorrowedFd<'_>,
    path: &P,
    flags: OFlag,
) -> Result<OwnedFd> {
    for _ in 0..MAX_RETRIES {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(root, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File, os::fd::AsFd, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("inside"), "").unwrap();
        symlink("/inside", dir.path().join("absolute")).unwrap();
        symlink("../../../inside", dir.path().join("up")).unwrap();
        symlink("/etc/passwd", dir.path().join("out")).unwrap();
        let root = File::open(dir.path()).unwrap();
        let open = |name| open_in_root(root.as_fd(), name, OFlag::O_PATH).map(drop);
        for name in ["inside", "absolute", "up", "/inside"] {
            assert_eq!(open(name), Ok(()), "{name}");
        }
        assert_eq!(open("out"), Err(Errno::ENOENT));
    }
}
