//! Words of the FUSE protocol (`linux/fuse.h`, 7.38) that fuse-backend-rs 0.14 does not have, and moving wire types in and
//! out of bytes.

pub use fuse_backend_rs::abi::fuse_abi::*;
use vm_memory::ByteValued;

/// Flags of INIT that the engine understands; `linux/fuse.h` documents each.
pub mod init {
    #![allow(missing_docs)] // The names are the protocol's own.
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// Opcodes past the end of fuse-backend-rs's table.
pub mod opcode {
    /// Flush a whole file system.
    pub const SYNCFS: u32 = 50;
    /// Create an unnamed file.
    pub const TMPFILE: u32 = 51;
    /// Attributes with the birth time.
    pub const STATX: u32 = 52;
    /// One more than the last opcode known here.
    pub const END: u32 = 53;
}

/// Minor version of the protocol that INIT answers.
pub const MINOR: u32 = 38;
/// Oldest minor version of a guest that is served (Linux 5.4); older ones use shorter structures.
pub const OLDEST_MINOR: u32 = 31;
/// Most bytes of data in one READ or WRITE.
pub const MAX_DATA: u32 = 1 << 20;
/// Pages in [`MAX_DATA`].
pub const MAX_DATA_PAGES: u16 = 256;
/// Most bytes of an extended attribute's value (XATTR_SIZE_MAX).
pub const MAX_ATTRIBUTE: u32 = 1 << 16;

/// `fuse_attr.flags`: the directory is the root of another mount.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Answer to OPEN: keep what is cached of the file.
pub const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// Answer to OPEN: close(2) need not be told.
pub const OPEN_NO_FLUSH: u32 = 1 << 5;
/// Answer to OPEN: direct writes inside the file may run in parallel.
pub const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// `fuse_open_in.open_flags`, `fuse_create_in.open_flags`: clear set-id bits when the file is truncated.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `fuse_write_in.write_flags`: the guest's page cache writes back, the offset is exact.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `fuse_write_in.write_flags`: clear set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `fuse_setxattr_in.setxattr_flags`: clear the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `fuse_fsync_in.fsync_flags`: only the data.
pub const FSYNC_DATA: u32 = 1 << 0;

/// `fuse_setxattr_in` as INIT's `SETXATTR_EXT` extends it.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct SetxattrExtIn {
    /// Bytes of the value.
    pub size: u32,
    /// setxattr(2)'s flags.
    pub flags: u32,
    /// `FUSE_SETXATTR_*`.
    pub setxattr_flags: u32,
    /// Zero.
    pub padding: u32,
}
// SAFETY: four integers without padding; any bytes are a valid value.
unsafe impl ByteValued for SetxattrExtIn {}

/// Takes a wire type off the front of `bytes`.
pub fn take<T: ByteValued + Default>(bytes: &mut &[u8]) -> Option<T> {
    let (front, rest) = bytes.split_at_checked(size_of::<T>())?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(front);
    *bytes = rest;
    Some(value)
}

/// Appends a wire type to a reply.
pub fn put<T: ByteValued>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_slice());
}

/// Names of the opcodes, for counters.
pub const NAMES: [&str; opcode::END as usize] = [
    "0",
    "lookup",
    "forget",
    "getattr",
    "setattr",
    "readlink",
    "symlink",
    "7",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "rename",
    "link",
    "open",
    "read",
    "write",
    "statfs",
    "release",
    "19",
    "fsync",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "flush",
    "init",
    "opendir",
    "readdir",
    "releasedir",
    "fsyncdir",
    "getlk",
    "setlk",
    "setlkw",
    "access",
    "create",
    "interrupt",
    "bmap",
    "destroy",
    "ioctl",
    "poll",
    "notify_reply",
    "batch_forget",
    "fallocate",
    "readdirplus",
    "rename2",
    "lseek",
    "copy_file_range",
    "setupmapping",
    "removemapping",
    "syncfs",
    "tmpfile",
    "statx",
];
