//! From the bytes of arguments to an [`Op`]: each name, size and flag by its rule.

use std::ffi::CStr;

use nix::errno::Errno;
use vm_memory::ByteValued;

use super::{Op, Refusal, Result, Rule, Session, broken};
use crate::fs::wire::{self, *};

/// Longest name, in bytes without its NUL.
const MAX_NAME: usize = 255;
/// Longest target of a symbolic link (PATH_MAX less the NUL).
const MAX_TARGET: usize = 4095;

/// An operation that a guest may ask for and this server does not have.
fn unserved() -> Refusal {
    Refusal {
        errno: Errno::ENOSYS,
        rule: None,
    }
}

/// What is left of the arguments.
struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    fn take<T: ByteValued + Default>(&mut self) -> Result<T> {
        wire::take(&mut self.0).ok_or(broken(Rule::Arguments))
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn string(&mut self, longest: usize, rule: Rule) -> Result<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| broken(rule))?;
        let bytes = text.to_bytes();
        if bytes.is_empty() {
            return Err(broken(rule));
        }
        if bytes.len() > longest {
            // The guest's kernel lets programs ask for up to 1024 bytes.
            return Err(Refusal {
                errno: Errno::ENAMETOOLONG,
                rule: None,
            });
        }
        self.0 = &self.0[bytes.len() + 1..];
        Ok(text)
    }

    /// One component: what a directory can hold, and nothing that leaves it.
    fn name(&mut self) -> Result<&'a CStr> {
        let name = self.string(MAX_NAME, Rule::Name)?;
        match name.to_bytes() {
            b"." | b".." => Err(broken(Rule::Name)),
            bytes if bytes.contains(&b'/') => Err(broken(Rule::Name)),
            _ => Ok(name),
        }
    }

    /// An extended attribute's name.
    fn attribute(&mut self) -> Result<&'a CStr> {
        self.string(MAX_NAME, Rule::Name)
    }
}

/// Reads the arguments of an opcode; all of them, and nothing beside them.
pub(super) fn operation(
    number: u32,
    bytes: &[u8],
    data: usize,
    session: Session,
) -> Result<Op<'_>> {
    let mut args = Args(bytes);
    let op = by_number(number, &mut args, data, session)?;
    if args.0.is_empty() {
        Ok(op)
    } else {
        Err(broken(Rule::Arguments))
    }
}

fn by_number<'a>(
    number: u32,
    args: &mut Args<'a>,
    data: usize,
    session: Session,
) -> Result<Op<'a>> {
    Ok(match number {
        opcode::SYNCFS => {
            args.take::<ForgetIn>()?; // One unused word of 64 bits.
            Op::Syncfs
        }
        opcode::TMPFILE => {
            let body: CreateIn = args.take()?;
            // The kernel sends the name of an unnamed dentry, "/": it means nothing.
            args.string(MAX_NAME, Rule::Name)?;
            Op::Tmpfile(checked_create(body)?)
        }
        // The birth time. Without it the guest answers statx(2) from the attributes that it has cached.
        opcode::STATX => return Err(unserved()),
        // 7 and 19 are holes in the table, and no value of the enum below.
        0 | 7 | 19 | opcode::END.. => return Err(broken(Rule::Opcode)),
        _ => match Opcode::from(number) {
            Opcode::Init => init(args)?,
            Opcode::Destroy => Op::Destroy,
            Opcode::Interrupt => {
                args.take::<InterruptIn>()?;
                Op::Interrupt
            }
            Opcode::Forget => Op::Forget {
                count: args.take::<ForgetIn>()?.nlookup,
            },
            Opcode::BatchForget => batch_forget(args)?,
            Opcode::Read | Opcode::Write | Opcode::Readdir | Opcode::Readdirplus => {
                transfer(Opcode::from(number), args, data)?
            }
            Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr | Opcode::Removexattr => {
                attribute(Opcode::from(number), args, session)?
            }
            Opcode::Open
            | Opcode::Create
            | Opcode::Opendir
            | Opcode::Flush
            | Opcode::Release
            | Opcode::Releasedir
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Fallocate
            | Opcode::Lseek
            | Opcode::CopyFileRange => handle(Opcode::from(number), args)?,
            other => entry(other, args)?,
        },
    })
}

fn init<'a>(args: &mut Args<'a>) -> Result<Op<'a>> {
    let body: InitIn = args.take()?;
    let mut flags = u64::from(body.flags);
    if flags & init::INIT_EXT != 0 {
        flags |= u64::from(args.take::<InitIn2>()?.flags2) << 32;
    }
    // Newer guests may append what we need not know.
    args.rest();
    Ok(Op::Init { body, flags })
}

fn batch_forget<'a>(args: &mut Args<'a>) -> Result<Op<'a>> {
    let count = args.take::<BatchForgetIn>()?.count as usize;
    let items = args.rest();
    if count.checked_mul(size_of::<ForgetOne>()) != Some(items.len()) {
        return Err(broken(Rule::Arguments));
    }
    Ok(Op::BatchForget { items })
}

fn transfer<'a>(number: Opcode, args: &mut Args<'a>, data: usize) -> Result<Op<'a>> {
    if matches!(number, Opcode::Write) {
        let body: WriteIn = args.take()?;
        if body.size as usize != data {
            return Err(broken(Rule::Arguments));
        }
        in_range(body.offset, u64::from(body.size))?;
        return match body.size {
            0..=MAX_DATA => Ok(Op::Write(body)),
            _ => Err(broken(Rule::Size)),
        };
    }
    let body: ReadIn = args.take()?;
    if body.size > MAX_DATA {
        return Err(broken(Rule::Size));
    }
    Ok(match number {
        Opcode::Read => {
            in_range(body.offset, u64::from(body.size))?;
            Op::Read(body)
        }
        Opcode::Readdir => Op::Readdir(body),
        _ => Op::ReaddirPlus(body),
    })
}

/// Offsets are signed to the host.
fn in_range(offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(0..=0x7fff_ffff_ffff_ffff) => Ok(()),
        _ => Err(broken(Rule::Arguments)),
    }
}

fn attribute<'a>(number: Opcode, args: &mut Args<'a>, session: Session) -> Result<Op<'a>> {
    Ok(match number {
        Opcode::Setxattr => {
            let body = if session.setxattr_ext {
                args.take::<SetxattrExtIn>()?
            } else {
                let SetxattrIn { size, flags } = args.take()?;
                SetxattrExtIn {
                    size,
                    flags,
                    ..Default::default()
                }
            };
            let name = args.attribute()?;
            let value = args.rest();
            if body.size > MAX_ATTRIBUTE {
                return Err(broken(Rule::Size));
            }
            if value.len() != body.size as usize {
                return Err(broken(Rule::Arguments));
            }
            if body.flags & !((libc::XATTR_CREATE | libc::XATTR_REPLACE) as u32) != 0 {
                return Err(broken(Rule::Flags));
            }
            let kill_sgid = body.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0;
            Op::Setxattr {
                flags: body.flags,
                kill_sgid,
                name,
                value,
            }
        }
        Opcode::Getxattr => {
            let size = args.take::<GetxattrIn>()?.size;
            let name = args.attribute()?;
            Op::Getxattr {
                size: at_most(size, MAX_ATTRIBUTE)?,
                name,
            }
        }
        Opcode::Listxattr => Op::Listxattr {
            size: at_most(args.take::<GetxattrIn>()?.size, MAX_ATTRIBUTE)?,
        },
        _ => Op::Removexattr {
            name: args.attribute()?,
        },
    })
}

fn at_most(size: u32, limit: u32) -> Result<u32> {
    if size > limit {
        Err(broken(Rule::Size))
    } else {
        Ok(size)
    }
}

fn handle<'a>(number: Opcode, args: &mut Args<'a>) -> Result<Op<'a>> {
    Ok(match number {
        Opcode::Open => Op::Open(args.take()?),
        Opcode::Create => {
            let body = checked_create(args.take()?)?;
            Op::Create {
                body,
                name: args.name()?,
            }
        }
        Opcode::Opendir => {
            args.take::<OpenIn>()?;
            Op::Opendir
        }
        Opcode::Flush => Op::Flush {
            handle: args.take::<FlushIn>()?.fh,
        },
        Opcode::Release => Op::Release {
            handle: args.take::<ReleaseIn>()?.fh,
        },
        Opcode::Releasedir => Op::Releasedir {
            handle: args.take::<ReleaseIn>()?.fh,
        },
        Opcode::Fsync | Opcode::Fsyncdir => {
            let FsyncIn {
                fh: handle,
                fsync_flags,
                ..
            } = args.take()?;
            let data_only = fsync_flags & FSYNC_DATA != 0;
            match number {
                Opcode::Fsync => Op::Fsync { handle, data_only },
                _ => Op::Fsyncdir { handle, data_only },
            }
        }
        Opcode::Fallocate => {
            let body: FallocateIn = args.take()?;
            in_range(body.offset, body.length)?;
            Op::Fallocate(body)
        }
        Opcode::Lseek => {
            let body: LseekIn = args.take()?;
            in_range(body.offset, 0)?;
            match body.whence as i32 {
                libc::SEEK_DATA | libc::SEEK_HOLE => Op::Lseek(body),
                _ => return Err(broken(Rule::Flags)),
            }
        }
        _ => {
            let body: CopyFileRangeIn = args.take()?;
            in_range(body.offset_in, body.len)?;
            in_range(body.offset_out, body.len)?;
            if body.flags != 0 {
                return Err(broken(Rule::Flags));
            }
            Op::CopyFileRange(body)
        }
    })
}

/// The bits of a mode that a creation may set.
const MODE_BITS: u32 = 0o7777;

fn checked_create(body: CreateIn) -> Result<CreateIn> {
    match body.mode & !(MODE_BITS | libc::S_IFREG) {
        0 => Ok(CreateIn {
            mode: body.mode & MODE_BITS,
            ..body
        }),
        _ => Err(broken(Rule::Node)),
    }
}

/// Pipes, sockets and regular files; of devices only overlayfs's whiteout, character 0:0, which nothing can open.
fn checked_node(body: MknodIn) -> Result<MknodIn> {
    if body.mode & !(MODE_BITS | libc::S_IFMT) != 0 {
        return Err(broken(Rule::Node));
    }
    match body.mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(MknodIn { rdev: 0, ..body }),
        libc::S_IFCHR if body.rdev == 0 => Ok(body),
        _ => Err(broken(Rule::Node)),
    }
}

fn entry<'a>(number: Opcode, args: &mut Args<'a>) -> Result<Op<'a>> {
    Ok(match number {
        Opcode::Lookup => Op::Lookup { name: args.name()? },
        Opcode::Getattr => {
            args.take::<GetattrIn>()?;
            Op::Getattr
        }
        Opcode::Setattr => Op::Setattr(args.take()?),
        Opcode::Readlink => Op::Readlink,
        Opcode::Symlink => {
            let name = args.name()?;
            Op::Symlink {
                name,
                target: args.string(MAX_TARGET, Rule::Arguments)?,
            }
        }
        Opcode::Mknod => {
            let body = checked_node(args.take()?)?;
            Op::Mknod {
                body,
                name: args.name()?,
            }
        }
        Opcode::Mkdir => {
            let body: MkdirIn = args.take()?;
            let body = MkdirIn {
                mode: body.mode & MODE_BITS,
                ..body
            };
            Op::Mkdir {
                body,
                name: args.name()?,
            }
        }
        Opcode::Unlink => Op::Unlink { name: args.name()? },
        Opcode::Rmdir => Op::Rmdir { name: args.name()? },
        Opcode::Rename => {
            let to = args.take::<RenameIn>()?.newdir;
            Op::Rename {
                to,
                flags: 0,
                name: args.name()?,
                new_name: args.name()?,
            }
        }
        Opcode::Rename2 => {
            let Rename2In {
                newdir: to, flags, ..
            } = args.take()?;
            let known = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
            let exchange = flags & libc::RENAME_EXCHANGE != 0;
            if flags & !known != 0 || (exchange && flags != libc::RENAME_EXCHANGE) {
                return Err(broken(Rule::Flags));
            }
            Op::Rename {
                to,
                flags,
                name: args.name()?,
                new_name: args.name()?,
            }
        }
        Opcode::Link => {
            let object = args.take::<LinkIn>()?.oldnodeid;
            Op::Link {
                object,
                name: args.name()?,
            }
        }
        Opcode::Statfs => Op::Statfs,
        Opcode::Access => Op::Access {
            mask: args.take::<AccessIn>()?.mask,
        },
        // Locks stay in the guest's kernel, where they exclude all containers of the pod; the rest nobody needs.
        Opcode::Getlk
        | Opcode::Setlk
        | Opcode::Setlkw
        | Opcode::Bmap
        | Opcode::Ioctl
        | Opcode::Poll
        | Opcode::NotifyReply
        | Opcode::SetupMapping
        | Opcode::RemoveMapping => {
            return Err(unserved());
        }
        _ => return Err(broken(Rule::Opcode)),
    })
}
