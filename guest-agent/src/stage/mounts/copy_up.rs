//! "tmpcopyup": a tmpfs that begins with a copy of the directory it covers.
//!
//! The directory is the image's: links are copied as links, nothing is followed, and depth costs descriptors, not
//! stack, so that a tree of any shape ends in an error at worst. Contents, owners, modes and modification times are
//! copied; hard links become files of their own; extended attributes are not copied.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{self, AtFlags, OFlag};
use nix::sys::stat::{self, FileStat, Mode, SFlag, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{self, Gid, Uid};

use crate::stage::paths;

/// Directories deeper than this are refused: each level holds two descriptors.
const MAX_DEPTH: usize = 200;

/// Where and why a copy failed.
#[derive(Debug)]
pub(super) struct CopyError {
    /// Relative to the directory copied.
    pub path: PathBuf,
    pub errno: Errno,
}

struct Level {
    from: OwnedFd,
    to: OwnedFd,
    status: FileStat,
    left: Vec<OsString>,
}

/// Copies what is in the directory `from` (O_PATH) into the directory `to`, which gets its owner too.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<(), CopyError> {
    let mut path = PathBuf::from(".");
    copy_tree(from, to, &mut path).map_err(|errno| CopyError { path, errno })
}

fn copy_tree(from: &OwnedFd, to: &OwnedFd, path: &mut PathBuf) -> Result<(), Errno> {
    let top = stat::fstat(from)?;
    unistd::fchownat(to, "", owner(&top).0, owner(&top).1, AtFlags::AT_EMPTY_PATH)?;
    let mut levels = vec![Level {
        left: names(from.as_fd())?,
        from: reopen(from.as_fd(), ".")?,
        to: reopen(to.as_fd(), ".")?,
        status: top,
    }];
    while let Some(mut level) = levels.pop() {
        let Some(name) = level.left.pop() else {
            finish_directory(&level, !levels.is_empty())?;
            path.pop();
            continue;
        };
        path.push(&name);
        let next = copy_entry(&level, &name)?;
        levels.push(level);
        match next {
            Some(_) if levels.len() >= MAX_DEPTH => return Err(Errno::ELOOP),
            Some(next) => levels.push(next),
            None => {
                path.pop();
            }
        }
    }
    Ok(())
}

fn owner(status: &FileStat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(status.st_uid)),
        Some(Gid::from_raw(status.st_gid)),
    )
}

fn mode(status: &FileStat) -> Mode {
    Mode::from_bits_truncate(status.st_mode & 0o7777)
}

fn reopen(directory: BorrowedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    fcntl::openat(directory, name, flags, Mode::empty())
}

fn names(directory: BorrowedFd) -> Result<Vec<OsString>, Errno> {
    use std::os::unix::ffi::OsStringExt;
    let mut entries = Dir::from_fd(reopen(directory, ".")?)?;
    let mut names = Vec::new();
    for entry in entries.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    Ok(names)
}

/// Copies one entry; a directory is made and returned, to be descended into.
fn copy_entry(level: &Level, name: &OsString) -> Result<Option<Level>, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let source = fcntl::openat(&level.from, name.as_os_str(), flags, Mode::empty())?;
    let status = stat::fstat(&source)?;
    let kind = SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits());
    match kind {
        SFlag::S_IFDIR => {
            // Owner-only until its contents are complete.
            stat::mkdirat(&level.to, name.as_os_str(), Mode::S_IRWXU)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let to = fcntl::openat(&level.to, name.as_os_str(), flags, Mode::empty())?;
            let from = reopen(source.as_fd(), ".")?;
            return Ok(Some(Level {
                left: names(from.as_fd())?,
                from,
                to,
                status,
            }));
        }
        SFlag::S_IFLNK => {
            let target = fcntl::readlinkat(&source, "")?;
            unistd::symlinkat(target.as_os_str(), &level.to, name.as_os_str())?;
        }
        SFlag::S_IFREG => copy_file(&source, level, name)?,
        _ => stat::mknodat(
            &level.to,
            name.as_os_str(),
            kind,
            mode(&status),
            status.st_rdev,
        )?,
    }
    finish_entry(level, name, &status, kind)?;
    Ok(None)
}

fn copy_file(source: &OwnedFd, level: &Level, name: &OsString) -> Result<(), Errno> {
    let errno = |error: io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let mut from = File::open(paths::proc_path(source)).map_err(errno)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let to = fcntl::openat(
        &level.to,
        name.as_os_str(),
        flags,
        Mode::S_IRUSR | Mode::S_IWUSR,
    )?;
    io::copy(&mut from, &mut File::from(to)).map_err(errno)?;
    Ok(())
}

/// Owner first: a change of owner takes set-user-ID bits away.
fn finish_entry(
    level: &Level,
    name: &OsString,
    status: &FileStat,
    kind: SFlag,
) -> Result<(), Errno> {
    let name = name.as_os_str();
    let (uid, gid) = owner(status);
    unistd::fchownat(&level.to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        // The name is ours: this tmpfs is not attached anywhere yet.
        stat::fchmodat(
            &level.to,
            name,
            mode(status),
            stat::FchmodatFlags::FollowSymlink,
        )?;
    }
    let (accessed, modified) = times(status);
    stat::utimensat(
        &level.to,
        name,
        &accessed,
        &modified,
        UtimensatFlags::NoFollowSymlink,
    )
}

fn finish_directory(level: &Level, with_mode: bool) -> Result<(), Errno> {
    let (uid, gid) = owner(&level.status);
    unistd::fchown(&level.to, uid, gid)?;
    // The mode of the tmpfs' root is the spec's, or was taken over when it was made.
    if with_mode {
        stat::fchmod(&level.to, mode(&level.status))?;
    }
    let (accessed, modified) = times(&level.status);
    stat::futimens(&level.to, &accessed, &modified)
}

fn times(status: &FileStat) -> (TimeSpec, TimeSpec) {
    (
        TimeSpec::new(status.st_atime, status.st_atime_nsec),
        TimeSpec::new(status.st_mtime, status.st_mtime_nsec),
    )
}
