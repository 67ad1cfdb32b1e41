//! What requests ask for, as checked types.

use std::ffi::CStr;

use crate::fs::wire::*;

/// What a request asks for: only checked names, sizes and flags.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // The variants are FUSE's opcodes, their fields FUSE's arguments.
pub enum Op<'a> {
    Init {
        body: InitIn,
        flags: u64,
    },
    Destroy,
    Interrupt,
    Lookup {
        name: &'a CStr,
    },
    Forget {
        count: u64,
    },
    BatchForget {
        items: &'a [u8],
    },
    Getattr,
    Setattr(SetattrIn),
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    Mknod {
        body: MknodIn,
        name: &'a CStr,
    },
    Mkdir {
        body: MkdirIn,
        name: &'a CStr,
    },
    Unlink {
        name: &'a CStr,
    },
    Rmdir {
        name: &'a CStr,
    },
    Rename {
        to: u64,
        flags: u32,
        name: &'a CStr,
        new_name: &'a CStr,
    },
    Link {
        object: u64,
        name: &'a CStr,
    },
    Open(OpenIn),
    Create {
        body: CreateIn,
        name: &'a CStr,
    },
    Tmpfile(CreateIn),
    Read(ReadIn),
    Write(WriteIn),
    Flush {
        handle: u64,
    },
    Release {
        handle: u64,
    },
    Fsync {
        handle: u64,
        data_only: bool,
    },
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    CopyFileRange(CopyFileRangeIn),
    Opendir,
    Readdir(ReadIn),
    ReaddirPlus(ReadIn),
    Releasedir {
        handle: u64,
    },
    Fsyncdir {
        handle: u64,
        data_only: bool,
    },
    Statfs,
    Syncfs,
    Access {
        mask: u32,
    },
    Setxattr {
        flags: u32,
        kill_sgid: bool,
        name: &'a CStr,
        value: &'a [u8],
    },
    Getxattr {
        size: u32,
        name: &'a CStr,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
}

impl Op<'_> {
    /// No reply is expected, not even an error.
    pub fn is_silent(&self) -> bool {
        matches!(
            self,
            Op::Forget { .. } | Op::BatchForget { .. } | Op::Interrupt
        )
    }

    /// It makes an object, which belongs to the caller.
    pub fn makes(&self) -> bool {
        match self {
            Op::Symlink { .. }
            | Op::Mknod { .. }
            | Op::Mkdir { .. }
            | Op::Create { .. }
            | Op::Tmpfile(_) => true,
            Op::Rename { flags, .. } => flags & libc::RENAME_WHITEOUT != 0,
            _ => false,
        }
    }

    /// The fixed part of a reply: checked before anything is done, so that nothing is done whose outcome cannot be told.
    pub(super) fn reply_size(&self) -> usize {
        match self {
            Op::Init { .. } => size_of::<InitOut>(),
            Op::Lookup { .. }
            | Op::Symlink { .. }
            | Op::Mknod { .. }
            | Op::Mkdir { .. }
            | Op::Link { .. } => size_of::<EntryOut>(),
            Op::Create { .. } | Op::Tmpfile(_) => size_of::<EntryOut>() + size_of::<OpenOut>(),
            Op::Open(_) | Op::Opendir => size_of::<OpenOut>(),
            Op::Getattr | Op::Setattr(_) => size_of::<AttrOut>(),
            Op::Statfs => size_of::<StatfsOut>(),
            Op::Write(_) | Op::CopyFileRange(_) => size_of::<WriteOut>(),
            Op::Lseek(_) => size_of::<LseekOut>(),
            Op::Getxattr { size: 0, .. } | Op::Listxattr { size: 0 } => size_of::<GetxattrOut>(),
            Op::Read(body) | Op::Readdir(body) | Op::ReaddirPlus(body) => body.size as usize,
            Op::Getxattr { size, .. } | Op::Listxattr { size } => *size as usize,
            _ => 0,
        }
    }
}
