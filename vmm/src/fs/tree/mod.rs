//! The file system: serves one directory tree of the host to the guest.
//!
//! ```text
//! transport ── head bytes ──► guard ── Op ──► Engine ──► one method an operation ──► system calls on descriptors
//!     ▲                                         │
//!     └── reply bytes, data moved by Payload ───┘
//! ```
//!
//! Every object that the guest knows is an `O_PATH` descriptor in [`inodes`], found by one name at a time under
//! `RESOLVE_BENEATH`; no path is ever built from what the guest says. What it holds open is in [`handles`]. [`identity`] gives
//! each request its caller's uid and gid.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_vmm_config::CachePolicy;
use nix::errno::Errno;
use vm_memory::ByteValued;

use super::guard::{self, Faults, Op, REPLY_HEADER, Refusal, Request, Rule, Session};
use super::wire::{NAMES, OutHeader, init, put};
use handles::Handles;
use identity::Worker;
use inodes::Inodes;
use mounts::Mounts;
use sys::Result;

mod attributes;
pub mod detach;
mod dir;
mod files;
mod handles;
pub mod identity;
mod inodes;
mod lookup;
mod mounts;
mod names;
mod session;
mod set_id;
mod sockets;
mod stream;
pub mod sys;
mod version;
mod xattr;

/// The data of a READ or a WRITE, wherever it lies. Only the transport knows.
pub trait Payload {
    /// Reads at most `length` bytes of `file` at `offset` into the payload; how many there were.
    ///
    /// # Errors
    /// preadv(2)'s.
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize>;

    /// Writes the payload into `file` at `offset`, or at its end as of that moment; how many bytes went.
    ///
    /// # Errors
    /// pwritev2(2)'s.
    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        append: bool,
    ) -> Result<usize>;
}

/// What the transport does with a served request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is sent back.
    Silent,
    /// The reply is the bytes of the buffer, then this many bytes that the payload holds already.
    Reply {
        /// Bytes in the payload.
        data: usize,
    },
}

/// The caps on what a guest may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Inodes.
    pub inodes: usize,
    /// Open files and directories.
    pub handles: usize,
}

/// The file system.
pub struct Engine {
    root: OwnedFd,
    inodes: Inodes,
    handles: Handles,
    mounts: Mounts,
    cache: CachePolicy,
    /// INIT's flags as agreed, 0 before.
    agreed: AtomicU64,
    faults: Faults,
    requests: [AtomicU64; NAMES.len()],
    set_id: set_id::Turn,
    /// Read while a request is served; a detach takes it alone.
    gate: RwLock<()>,
}

/// Counters of an engine.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Inodes held.
    pub inodes: u64,
    /// Files and directories open.
    pub handles: u64,
    /// Requests by opcode.
    pub requests: Vec<(&'static str, u64)>,
    /// Refusals by rule.
    pub faults: Vec<(&'static str, u64)>,
}

/// One request while it is served.
struct Call<'a> {
    worker: &'a mut Worker,
    node: u64,
    uid: u32,
    gid: u32,
    out: &'a mut Vec<u8>,
}

impl Engine {
    /// An engine that serves the tree of `root`, a directory.
    ///
    /// # Errors
    /// `root` cannot be looked at.
    pub fn new(root: OwnedFd, cache: CachePolicy, limits: Limits) -> Result<Engine> {
        let engine = Engine {
            root,
            inodes: Inodes::new(limits.inodes),
            handles: Handles::new(limits.handles),
            mounts: Mounts::default(),
            cache,
            agreed: AtomicU64::new(0),
            faults: Faults::default(),
            requests: [const { AtomicU64::new(0) }; NAMES.len()],
            set_id: set_id::Turn::default(),
            gate: RwLock::new(()),
        };
        engine.forget_everything()?;
        Ok(engine)
    }

    /// Serves one request: `head` is its copied part ([`guard::head_length`]), `data` the bytes in the payload, `room` the
    /// bytes for a reply. The reply is left in `out`.
    pub fn serve(
        &self,
        worker: &mut Worker,
        head: &[u8],
        (data, room): (usize, usize),
        payload: &mut dyn Payload,
        out: &mut Vec<u8>,
    ) -> Outcome {
        out.clear();
        out.resize(REPLY_HEADER, 0);
        let request = match guard::check(head, data, room, self.session()) {
            Ok(request) => request,
            Err(refusal) => return self.refuse(head, refusal, room, out),
        };
        if let Some(count) = self.requests.get(request.header.opcode as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let _served = self.gate.read().expect("no request panics");
        let silent = request.op.is_silent();
        let result = self.call(worker, &request, payload, out);
        if silent {
            return Outcome::Silent;
        }
        finish(request.header.unique, result, out)
    }

    fn refuse(&self, head: &[u8], refusal: Refusal, room: usize, out: &mut Vec<u8>) -> Outcome {
        if let Some(rule) = refusal.rule {
            self.faults.count(rule);
        }
        if room < REPLY_HEADER {
            return Outcome::Silent;
        }
        let unique = guard::header(head).map_or(0, |header| header.unique);
        finish(unique, Err(refusal.errno), out)
    }

    /// Counts what the transport or an operation refused by a rule.
    pub fn fault(&self, rule: Rule) {
        self.faults.count(rule);
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        let requests = NAMES
            .iter()
            .zip(&self.requests)
            .map(|(name, count)| (*name, count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0);
        Stats {
            inodes: self.inodes.len() as u64,
            handles: self.handles.len() as u64,
            requests: requests.collect(),
            faults: self.faults.counts().collect(),
        }
    }

    fn session(&self) -> Session {
        let agreed = self.agreed.load(Ordering::Acquire);
        Session {
            started: agreed != 0,
            setxattr_ext: agreed & init::SETXATTR_EXT != 0,
        }
    }

    /// Closes all that the guest held: it starts over.
    fn forget_everything(&self) -> Result<()> {
        let status = sys::status(self.root.as_fd())?;
        let root = self.root.try_clone().map_err(|_| Errno::EMFILE)?;
        self.mounts.enter(root.as_fd(), &status)?;
        drop(self.handles.take(|_| true));
        self.inodes.reset(root, &status);
        Ok(())
    }

    /// Returns the number of bytes that the payload holds.
    fn call(
        &self,
        worker: &mut Worker,
        request: &Request<'_>,
        payload: &mut dyn Payload,
        out: &mut Vec<u8>,
    ) -> Result<usize> {
        let header = &request.header;
        let mut call = Call {
            worker,
            node: header.nodeid,
            uid: header.uid,
            gid: header.gid,
            out,
        };
        let c = &mut call;
        match request.op {
            Op::Read(body) => return self.read(&body, payload),
            Op::Write(body) => self.write(c, &body, payload)?,
            Op::Lookup { name } => self.lookup(c, name)?,
            Op::Forget { count } => self.inodes.forget(header.nodeid, count),
            Op::BatchForget { items } => self.batch_forget(items),
            Op::Getattr => self.getattr(c)?,
            Op::Setattr(body) => self.setattr(c, &body)?,
            Op::Readlink => self.readlink(c)?,
            Op::Symlink { name, target } => self.symlink(c, name, target)?,
            Op::Mknod { body, name } => self.mknod(c, &body, name)?,
            Op::Mkdir { body, name } => self.mkdir(c, &body, name)?,
            Op::Unlink { name } => self.unlink(c, name, 0)?,
            Op::Rmdir { name } => self.unlink(c, name, libc::AT_REMOVEDIR)?,
            Op::Rename {
                to,
                flags,
                name,
                new_name,
            } => self.rename(c, name, (to, new_name), flags)?,
            Op::Link { object, name } => self.link(c, object, name)?,
            Op::Open(body) => self.open(c, &body)?,
            Op::Create { body, name } => self.create(c, &body, name)?,
            Op::Tmpfile(body) => self.tmpfile(c, &body)?,
            Op::Flush { handle } => self.flush(handle)?,
            Op::Release { handle } | Op::Releasedir { handle } => drop(self.handles.remove(handle)),
            Op::Fsync { handle, data_only } | Op::Fsyncdir { handle, data_only } => {
                sys::sync(self.handles.get(handle)?.as_fd(), data_only)?;
            }
            Op::Fallocate(body) => self.fallocate(c, &body)?,
            Op::Lseek(body) => self.lseek(c, &body)?,
            Op::CopyFileRange(body) => self.copy_file_range(c, &body)?,
            Op::Opendir => self.opendir(c)?,
            Op::Readdir(body) => self.readdir(c, &body)?,
            Op::ReaddirPlus(body) => self.readdirplus(c, &body)?,
            Op::Statfs => self.statfs(c)?,
            Op::Syncfs => self.syncfs(c)?,
            Op::Access { mask } => self.access(c, mask)?,
            Op::Setxattr {
                flags,
                kill_sgid,
                name,
                value,
            } => {
                self.setxattr(c, name, value, (flags, kill_sgid))?;
            }
            Op::Getxattr { size, name } => self.getxattr(c, name, size)?,
            Op::Listxattr { size } => self.listxattr(c, size)?,
            Op::Removexattr { name } => self.removexattr(c, name)?,
            Op::Init { body, flags } => self.init(c, &body, flags)?,
            Op::Destroy => self.destroy()?,
            Op::Interrupt => {}
        }
        Ok(0)
    }
}

/// Completes the header of a reply in `out`.
fn finish(unique: u64, result: Result<usize>, out: &mut Vec<u8>) -> Outcome {
    let (data, error) = match result {
        Ok(data) => (data, 0),
        Err(errno) => {
            out.truncate(REPLY_HEADER);
            (0, -(errno as i32))
        }
    };
    let header = OutHeader {
        len: u32::try_from(out.len() + data).expect("a reply is at most a READ's, 1 MiB"),
        error,
        unique,
    };
    out[..REPLY_HEADER].copy_from_slice(header.as_slice());
    Outcome::Reply { data }
}

/// Appends a reply's structure.
fn reply<T: ByteValued>(call: &mut Call<'_>, value: &T) {
    put(call.out, value);
}

#[cfg(test)]
mod tests;
