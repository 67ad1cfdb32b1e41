//! The file system driven by raw messages, as a hostile guest would.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use vm_memory::ByteValued;

use super::*;
use crate::fs::guard::HEADER;
use crate::fs::wire::*;

mod containment;
mod fuzz;
mod limits;
mod mounts;
mod objects;
mod opens;
mod session;

#[derive(Default)]
struct Memory {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Payload for Memory {
    fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize> {
        self.output.resize(length, 0);
        let part = libc::iovec {
            iov_base: self.output.as_mut_ptr().cast(),
            iov_len: length,
        };
        // SAFETY: the part is all of `output`.
        unsafe { sys::read_parts(file, offset, &[part]) }
    }

    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        append: bool,
    ) -> Result<usize> {
        let iov_len = length.min(self.input.len());
        let part = libc::iovec {
            iov_base: self.input.as_mut_ptr().cast(),
            iov_len,
        };
        // SAFETY: the part is within `input`.
        unsafe { sys::write_parts(file, offset, &[part], append) }
    }
}

/// A share beside a canary that nothing may reach.
struct Guest {
    engine: Engine,
    worker: Worker,
    dir: tempfile::TempDir,
    memory: Memory,
    uid: u32,
}

const SECRET: &str = "nobody in the guest may read this";

impl Guest {
    fn new() -> Guest {
        Guest::with_limits(Limits {
            inodes: 10_000,
            handles: 1000,
        })
    }

    fn with_limits(limits: Limits) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("canary"), SECRET).unwrap();
        let root = OwnedFd::from(File::open(dir.path().join("share")).unwrap());
        let cache = CachePolicy {
            entry_ms: 0,
            attr_ms: 0,
            keep_data: false,
        };
        let engine = Engine::new(root, cache, limits).unwrap();
        let worker = Worker::new().expect("tests of the file system need root");
        let mut guest = Guest {
            engine,
            worker,
            dir,
            memory: Memory::default(),
            uid: 0,
        };
        let init = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags: init::SUBMOUNTS as u32,
        };
        let out: InitOut = guest
            .call(Opcode::Init as u32, 0, &[init.as_slice()])
            .unwrap();
        assert_eq!(
            (out.major, out.max_write, out.flags),
            (7, MAX_DATA, init::SUBMOUNTS as u32)
        );
        guest
    }

    fn host(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    fn raw(&mut self, opcode: u32, node: u64, args: &[u8], data: &[u8]) -> (Outcome, Vec<u8>) {
        let header = InHeader {
            len: (HEADER + args.len() + data.len()) as u32,
            opcode,
            unique: 99,
            nodeid: node,
            uid: self.uid,
            gid: self.uid,
            ..Default::default()
        };
        let head = [header.as_slice(), args].concat();
        self.memory.input = data.to_vec();
        let mut out = Vec::new();
        let outcome = self.engine.serve(
            &mut self.worker,
            &head,
            (data.len(), 1 << 21),
            &mut self.memory,
            &mut out,
        );
        (outcome, out)
    }

    fn bytes(&mut self, opcode: u32, node: u64, args: &[&[u8]], data: &[u8]) -> Result<Vec<u8>> {
        let (outcome, out) = self.raw(opcode, node, &args.concat(), data);
        let header: OutHeader = take(&mut &out[..]).unwrap();
        let Outcome::Reply { data } = outcome else {
            return Ok(Vec::new());
        };
        assert_eq!(
            header.len as usize,
            out.len() + data,
            "the length is that of the bytes"
        );
        assert_eq!(header.unique, 99);
        match header.error {
            0 => Ok([&out[REPLY_HEADER..], &self.memory.output[..data]].concat()),
            error => {
                assert_eq!(out.len(), REPLY_HEADER);
                Err(Errno::from_raw(-error))
            }
        }
    }

    fn call<T: ByteValued + Default>(
        &mut self,
        opcode: u32,
        node: u64,
        args: &[&[u8]],
    ) -> Result<T> {
        let bytes = self.bytes(opcode, node, args, &[])?;
        Ok(take(&mut &bytes[..]).expect("a whole reply"))
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut> {
        self.call(Opcode::Lookup as u32, parent, &[name.as_bytes(), b"\0"])
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64> {
        let body = OpenIn {
            flags: flags as u32,
            fuse_flags: 0,
        };
        self.call::<OpenOut>(Opcode::Open as u32, node, &[body.as_slice()])
            .map(|out| out.fh)
    }

    fn read(&mut self, fh: u64, size: u32) -> Result<Vec<u8>> {
        let body = ReadIn {
            fh,
            size,
            ..Default::default()
        };
        self.bytes(Opcode::Read as u32, ROOT_ID, &[body.as_slice()], &[])
    }
}
