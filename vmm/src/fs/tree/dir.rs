//! Reading directories.

use std::os::fd::AsFd;

use nix::errno::Errno;
use vm_memory::ByteValued;

use super::handles::Handle;
use super::inodes::Inode;
use super::stream::Entry;
use super::sys::{self, Result};
use super::{Call, Engine, reply};
use crate::fs::wire::{Attr, Dirent, EntryOut, OpenOut, ReadIn, put};

/// Bytes asked of the host at once: it answers several requests of the guest, whose buffer is a page.
const BUFFER: usize = 32 * 1024;
/// The same when so many directories are open that buffers would add up.
const SMALL_BUFFER: usize = 4 * 1024;
/// How many open files and directories that is.
const MANY: usize = 1024;

impl Engine {
    pub(super) fn opendir(&self, call: &mut Call<'_>) -> Result<()> {
        let inode = self.inodes.get(call.node)?;
        if inode.kind != libc::S_IFDIR {
            return Err(Errno::ENOTDIR);
        }
        let name = call.worker.name(inode.as_fd());
        let fd = sys::reopen(&name, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let fh = self.handles.insert(Handle::directory(inode, fd))?;
        reply(
            call,
            &OpenOut {
                fh,
                ..Default::default()
            },
        );
        Ok(())
    }

    pub(super) fn readdir(&self, call: &mut Call<'_>, body: &ReadIn) -> Result<()> {
        self.entries(
            call,
            body,
            |out, _, entry, inode| {
                put_entry(out, entry, inode);
            },
            size_of::<Dirent>(),
        )
    }

    pub(super) fn readdirplus(&self, call: &mut Call<'_>, body: &ReadIn) -> Result<()> {
        self.entries(
            call,
            body,
            |out, parent, entry, inode| {
                let found = match entry.name.to_bytes() {
                    b"." | b".." => None,
                    // Gone again, past the caps, or detached: the guest looks it up if it wants it.
                    _ => self.entry_named(parent, entry.name).ok(),
                };
                put(out, &found.unwrap_or_else(|| unknown(entry, inode)));
                put_entry(out, entry, inode);
            },
            size_of::<EntryOut>() + size_of::<Dirent>(),
        )
    }

    fn entries(
        &self,
        call: &mut Call<'_>,
        body: &ReadIn,
        put_one: impl Fn(&mut Vec<u8>, &Inode, &Entry<'_>, u64),
        head: usize,
    ) -> Result<()> {
        let handle = self.handles.get(body.fh)?;
        let stream = handle.stream.as_ref().ok_or(Errno::ENOTDIR)?;
        let mut stream = stream.lock().expect("no code panics with a stream locked");
        let start = call.out.len();
        let size = if self.handles.len() < MANY {
            BUFFER
        } else {
            SMALL_BUFFER
        };
        stream.go_to(handle.as_fd(), body.offset)?;
        loop {
            match stream.fill(handle.as_fd(), size) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // The guest gets what there is; the error comes again when it asks again.
                Err(_) if call.out.len() > start => return Ok(()),
                Err(error) => return Err(error),
            }
            let entry = stream.entry().ok_or(Errno::EIO)?;
            let record = head + entry.name.count_bytes().next_multiple_of(size_of::<u64>());
            if call.out.len() - start + record > body.size as usize {
                return if call.out.len() > start {
                    Ok(())
                } else {
                    Err(Errno::EINVAL)
                };
            }
            put_one(
                call.out,
                &handle.inode,
                &entry,
                entry.inode ^ handle.inode.number_tag,
            );
            let (length, next) = (entry.length, entry.next);
            stream.advance(length, next);
        }
    }
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry<'_>, inode: u64) {
    let name = entry.name.to_bytes();
    let head = Dirent {
        ino: inode,
        off: entry.next,
        namelen: name.len() as u32,
        type_: u32::from(entry.kind),
    };
    out.extend_from_slice(head.as_slice());
    out.extend_from_slice(name);
    out.resize(out.len().next_multiple_of(size_of::<u64>()), 0);
}

/// An entry without a node: the guest remembers nothing for it.
fn unknown(entry: &Entry<'_>, inode: u64) -> EntryOut {
    let mode = u32::from(entry.kind) << 12;
    EntryOut {
        attr: Attr {
            ino: inode,
            mode,
            ..Default::default()
        },
        ..Default::default()
    }
}
