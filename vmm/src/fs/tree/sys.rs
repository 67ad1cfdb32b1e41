//! The system calls of the file system: every `unsafe` of the tree is here.
//!
//! Names are C strings that the guard has checked; directories are descriptors. Nothing here takes a path of more than one
//! component except `"N"` in `/proc/self/fd`, which [`FdName`] makes.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// A system call's result.
pub type Result<T> = std::result::Result<T, Errno>;

/// How a name may be resolved: below its directory, over mounts, but through no symbolic link and no `/proc` link.
const RESOLVE: u64 =
    libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;

/// statx(2)'s bit for the mount id that is never used again (Linux 6.8).
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

/// The name of a descriptor in `/proc/self/fd`, relative to a thread whose working directory that is
/// ([`Worker`](super::identity::Worker)). It stands for the object itself: following it crosses no path.
pub struct FdName([u8; 12]);

impl FdName {
    /// The name of `fd`.
    pub fn new(fd: BorrowedFd<'_>) -> FdName {
        let mut text = [0u8; 12];
        let mut value = fd.as_raw_fd().unsigned_abs();
        let mut at = text.len() - 1;
        loop {
            at -= 1;
            text[at] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        text.copy_within(at.., 0);
        let length = text.len() - 1 - at;
        text[length..].fill(0);
        FdName(text)
    }

    /// The name as a C string.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).expect("a descriptor has at most 10 digits")
    }
}

fn owned(ret: i64) -> Result<OwnedFd> {
    let fd = Errno::result(ret)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn done(ret: i64) -> Result<()> {
    Errno::result(ret).map(drop)
}

/// openat2(2) of one name in a directory under [`RESOLVE`].
pub fn open_beneath(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> Result<OwnedFd> {
    // SAFETY: open_how is plain integers; zero is a valid value of each.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = RESOLVE;
    // SAFETY: name is NUL-terminated and how lives over the call, with its true size.
    owned(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    })
}

/// Opens again what a descriptor stands for, through `/proc/self/fd`.
pub fn reopen(name: &FdName, flags: i32) -> Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated.
    owned(i64::from(unsafe {
        libc::openat(
            libc::AT_FDCWD,
            name.as_c_str().as_ptr(),
            flags | libc::O_CLOEXEC,
        )
    }))
}

/// What statx(2) says of an object, with the mount that it was reached through.
#[derive(Clone, Copy)]
pub struct Status {
    /// The raw answer.
    pub raw: libc::statx,
    /// The mount's id: unique over the kernel's life where the kernel can say so.
    pub mount: u64,
    /// `mount` will not be used for another mount.
    pub mount_is_unique: bool,
}

impl Status {
    /// The device as one number.
    pub fn device(&self) -> u64 {
        u64::from(self.raw.stx_dev_major) << 32 | u64::from(self.raw.stx_dev_minor)
    }

    /// The file type bits of the mode.
    pub fn kind(&self) -> u32 {
        u32::from(self.raw.stx_mode) & libc::S_IFMT
    }
}

/// statx(2) of a descriptor's object.
pub fn status(fd: BorrowedFd<'_>) -> Result<Status> {
    // Both bits: a kernel older than 6.8 ignores the second and answers the first.
    let raw = statx(
        fd,
        libc::STATX_BASIC_STATS | libc::STATX_MNT_ID | STATX_MNT_ID_UNIQUE,
    )?;
    Ok(Status {
        raw,
        mount: raw.stx_mnt_id,
        mount_is_unique: raw.stx_mask & STATX_MNT_ID_UNIQUE != 0,
    })
}

/// The mount id that `/proc/self/mountinfo` uses, which the kernel may use again after an unmount.
pub fn mountinfo_id(fd: BorrowedFd<'_>) -> Result<u64> {
    statx(fd, libc::STATX_MNT_ID).map(|raw| raw.stx_mnt_id)
}

fn statx(fd: BorrowedFd<'_>, mask: u32) -> Result<libc::statx> {
    // SAFETY: statx is plain integers; zero is a valid value of each.
    let mut raw: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the empty path is a constant and raw is written for its whole size at most.
    done(i64::from(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_SYNC_AS_STAT,
            mask,
            &raw mut raw,
        )
    }))?;
    Ok(raw)
}

/// fstatfs(2).
pub fn file_system(fd: BorrowedFd<'_>) -> Result<libc::statvfs64> {
    // SAFETY: statvfs64 is plain integers; zero is a valid value of each.
    let mut raw: libc::statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: raw is ours and of the right type.
    done(i64::from(unsafe {
        libc::fstatvfs64(fd.as_raw_fd(), &raw mut raw)
    }))?;
    Ok(raw)
}

/// mkdirat(2).
pub fn make_directory(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<()> {
    // SAFETY: name is NUL-terminated.
    done(i64::from(unsafe {
        libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode)
    }))
}

/// mknodat(2).
pub fn make_node(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: u64) -> Result<()> {
    // SAFETY: name is NUL-terminated.
    done(i64::from(unsafe {
        libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device)
    }))
}

/// symlinkat(2).
pub fn make_symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // SAFETY: both strings are NUL-terminated.
    done(i64::from(unsafe {
        libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr())
    }))
}

/// linkat(2) of what a descriptor stands for.
pub fn make_link(object: &FdName, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // SAFETY: both strings are NUL-terminated. AT_SYMLINK_FOLLOW follows the /proc link to the object and no further.
    done(i64::from(unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            object.as_c_str().as_ptr(),
            dir.as_raw_fd(),
            name.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    }))
}

/// unlinkat(2); `flags` is 0 or `AT_REMOVEDIR`.
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> Result<()> {
    // SAFETY: name is NUL-terminated.
    done(i64::from(unsafe {
        libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags)
    }))
}

/// renameat2(2).
pub fn rename(
    from: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    new_name: &CStr,
    flags: u32,
) -> Result<()> {
    // SAFETY: both names are NUL-terminated.
    done(unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            name.as_ptr(),
            to.as_raw_fd(),
            new_name.as_ptr(),
            flags,
        )
    })
}

/// readlinkat(2) of a symbolic link's own descriptor, appended to `out`.
pub fn read_link(fd: BorrowedFd<'_>, out: &mut Vec<u8>) -> Result<()> {
    let mut text = [0u8; libc::PATH_MAX as usize];
    // SAFETY: text is writable for the length given.
    let length = Errno::result(unsafe {
        libc::readlinkat(
            fd.as_raw_fd(),
            c"".as_ptr(),
            text.as_mut_ptr().cast(),
            text.len(),
        )
    })?;
    out.extend_from_slice(&text[..length as usize]);
    Ok(())
}

/// The path of a descriptor's object in this mount namespace, as `/proc` tells it.
pub fn path_of(name: &FdName) -> Result<Vec<u8>> {
    let mut text = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: text is writable for the length given and the name is NUL-terminated.
    let length = Errno::result(unsafe {
        libc::readlinkat(
            libc::AT_FDCWD,
            name.as_c_str().as_ptr(),
            text.as_mut_ptr().cast(),
            text.len(),
        )
    })?;
    text.truncate(length as usize);
    Ok(text)
}

/// fchmodat(2) of what a descriptor stands for.
pub fn change_mode(object: &FdName, mode: u32) -> Result<()> {
    // SAFETY: the name is NUL-terminated.
    done(i64::from(unsafe {
        libc::fchmodat(libc::AT_FDCWD, object.as_c_str().as_ptr(), mode, 0)
    }))
}

/// fchownat(2) of a descriptor's object; `u32::MAX` leaves an id as it is.
pub fn change_owner(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the empty path is a constant.
    done(i64::from(unsafe {
        libc::fchownat(
            fd.as_raw_fd(),
            c"".as_ptr(),
            uid,
            gid,
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
        )
    }))
}

/// utimensat(2) of what a descriptor stands for: access time, modification time.
pub fn change_times(object: &FdName, times: &[libc::timespec; 2]) -> Result<()> {
    // SAFETY: the name is NUL-terminated and there are two times.
    done(i64::from(unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            object.as_c_str().as_ptr(),
            times.as_ptr(),
            0,
        )
    }))
}

/// ftruncate(2).
pub fn truncate(fd: BorrowedFd<'_>, size: i64) -> Result<()> {
    // SAFETY: no memory is passed.
    done(i64::from(unsafe {
        libc::ftruncate64(fd.as_raw_fd(), size)
    }))
}

/// truncate(2) of what a descriptor stands for.
pub fn truncate_object(object: &FdName, size: i64) -> Result<()> {
    // SAFETY: the name is NUL-terminated.
    done(i64::from(unsafe {
        libc::truncate64(object.as_c_str().as_ptr(), size)
    }))
}

/// fallocate(2).
pub fn allocate(fd: BorrowedFd<'_>, mode: i32, offset: i64, length: i64) -> Result<()> {
    // SAFETY: no memory is passed.
    done(i64::from(unsafe {
        libc::fallocate64(fd.as_raw_fd(), mode, offset, length)
    }))
}

/// lseek(2).
pub fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> Result<u64> {
    // SAFETY: no memory is passed.
    let at = Errno::result(unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) })?;
    Ok(at as u64)
}

/// copy_file_range(2).
pub fn copy_range(
    from: BorrowedFd<'_>,
    mut from_offset: i64,
    to: BorrowedFd<'_>,
    mut to_offset: i64,
    length: usize,
) -> Result<usize> {
    // SAFETY: both offsets are ours and live over the call.
    let copied = Errno::result(unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            length,
            0,
        )
    })?;
    Ok(copied as usize)
}

/// fsync(2), or fdatasync(2) when only the data matters.
pub fn sync(fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
    // SAFETY: no memory is passed.
    done(i64::from(unsafe {
        if data_only {
            libc::fdatasync(fd.as_raw_fd())
        } else {
            libc::fsync(fd.as_raw_fd())
        }
    }))
}

/// syncfs(2).
pub fn sync_file_system(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no memory is passed.
    done(i64::from(unsafe { libc::syncfs(fd.as_raw_fd()) }))
}

/// Does what close(2) does to a file of which the file system wants to know (NFS reports its write errors here).
pub fn flush(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the duplicate is ours alone and closed once.
    done(i64::from(unsafe {
        let copy = libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0);
        if copy < 0 { copy } else { libc::close(copy) }
    }))
}

/// getdents64(2) into `buffer`; how many bytes it filled.
pub fn directory_entries(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: buffer is writable for the length given.
    let filled = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    })?;
    Ok(filled as usize)
}

/// setxattr(2) of what a descriptor stands for.
pub fn set_attribute(object: &FdName, name: &CStr, value: &[u8], flags: i32) -> Result<()> {
    // SAFETY: both names are NUL-terminated and value is readable for its length.
    done(i64::from(unsafe {
        libc::setxattr(
            object.as_c_str().as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    }))
}

/// getxattr(2) of what a descriptor stands for; an empty buffer asks for the size.
pub fn get_attribute(object: &FdName, name: &CStr, value: &mut [u8]) -> Result<usize> {
    // SAFETY: both names are NUL-terminated and value is writable for its length.
    let length = Errno::result(unsafe {
        libc::getxattr(
            object.as_c_str().as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    })?;
    Ok(length as usize)
}

/// listxattr(2) of what a descriptor stands for, whole.
pub fn list_attributes(object: &FdName) -> Result<Vec<u8>> {
    // XATTR_LIST_MAX is 64 KiB.
    let mut names = vec![0u8; 65536];
    // SAFETY: the name is NUL-terminated and names is writable for its length.
    let length = Errno::result(unsafe {
        libc::listxattr(
            object.as_c_str().as_ptr(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    })?;
    names.truncate(length as usize);
    Ok(names)
}

/// removexattr(2) of what a descriptor stands for.
pub fn remove_attribute(object: &FdName, name: &CStr) -> Result<()> {
    // SAFETY: both names are NUL-terminated.
    done(i64::from(unsafe {
        libc::removexattr(object.as_c_str().as_ptr(), name.as_ptr())
    }))
}

/// preadv(2) into buffers that are described by `parts`.
///
/// # Safety
/// Each part is writable memory for its length while the call lasts, and nothing in the program keeps a reference into it.
pub unsafe fn read_parts(fd: BorrowedFd<'_>, offset: u64, parts: &[libc::iovec]) -> Result<usize> {
    let count = parts.len().min(libc::UIO_MAXIOV as usize) as i32;
    // SAFETY: the caller vouches for the parts.
    let read = Errno::result(unsafe {
        libc::preadv64(fd.as_raw_fd(), parts.as_ptr(), count, offset as i64)
    })?;
    Ok(read as usize)
}

/// pwritev2(2) from buffers that are described by `parts`, at `offset` or at the end of the file.
///
/// # Safety
/// Each part is readable memory for its length while the call lasts, which others may change meanwhile.
pub unsafe fn write_parts(
    fd: BorrowedFd<'_>,
    offset: u64,
    parts: &[libc::iovec],
    append: bool,
) -> Result<usize> {
    let count = parts.len().min(libc::UIO_MAXIOV as usize) as i32;
    let written = if append {
        // SAFETY: the caller vouches for the parts.
        unsafe {
            libc::pwritev2(
                fd.as_raw_fd(),
                parts.as_ptr(),
                count,
                offset as i64,
                libc::RWF_APPEND,
            )
        }
    } else {
        // SAFETY: the caller vouches for the parts.
        unsafe { libc::pwritev64(fd.as_raw_fd(), parts.as_ptr(), count, offset as i64) }
    };
    Ok(Errno::result(written)? as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptors_name_is_its_number() {
        for fd in [0, 7, 10, 1_048_575] {
            // SAFETY: the number is only printed, never used as a descriptor.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            let name = FdName::new(borrowed);
            assert_eq!(name.as_c_str().to_str().unwrap(), fd.to_string());
        }
    }

    #[test]
    fn symlinks_and_parents_do_not_resolve() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let open = |name: &CStr, flags| open_beneath(root.as_fd(), name, flags, 0);
        assert_eq!(open(c"link", libc::O_RDONLY).unwrap_err(), Errno::ELOOP);
        assert_eq!(open(c"..", libc::O_PATH).unwrap_err(), Errno::EXDEV);
        let link = open(c"link", libc::O_PATH | libc::O_NOFOLLOW).unwrap();
        assert_eq!(status(link.as_fd()).unwrap().kind(), libc::S_IFLNK);
    }
}
