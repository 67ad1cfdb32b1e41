//! The file system driven by raw messages, as a hostile guest would.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use vm_memory::ByteValued;

use super::*;
use crate::fs::guard::HEADER;
use crate::fs::wire::*;

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

#[test]
fn a_farm_of_symlinks_leads_nowhere() {
    let mut guest = Guest::new();
    let outside = guest.dir.path().join("canary");
    symlink(&outside, guest.host("absolute")).unwrap();
    symlink("../canary", guest.host("relative")).unwrap();
    symlink("/", guest.host("slash")).unwrap();
    symlink("..", guest.host("up")).unwrap();
    symlink("/proc/self/root", guest.host("magic")).unwrap();
    symlink("loop", guest.host("loop")).unwrap();
    for name in ["absolute", "relative", "slash", "up", "magic", "loop"] {
        let entry = guest.lookup(ROOT_ID, name).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK, "{name}");
        assert!(guest.open(entry.nodeid, libc::O_RDWR).is_err(), "{name}");
        assert_eq!(
            guest.lookup(entry.nodeid, "canary").err(),
            Some(Errno::ENOTDIR),
            "{name}"
        );
        assert!(
            guest
                .call::<OpenOut>(Opcode::Opendir as u32, entry.nodeid, &[&[0; 8]])
                .is_err()
        );
        let create = CreateIn {
            flags: libc::O_RDWR as u32,
            mode: 0o600,
            ..Default::default()
        };
        let made = guest.bytes(
            Opcode::Create as u32,
            ROOT_ID,
            &[create.as_slice(), name.as_bytes(), b"\0"],
            &[],
        );
        assert!(made.is_err(), "{name}");
        let truncate = SetattrIn {
            valid: SetattrValid::SIZE.bits(),
            ..Default::default()
        };
        assert!(
            guest
                .call::<AttrOut>(Opcode::Setattr as u32, entry.nodeid, &[truncate.as_slice()])
                .is_err()
        );
    }
    let target = guest.lookup(ROOT_ID, "up").unwrap();
    assert_eq!(
        guest
            .bytes(Opcode::Readlink as u32, target.nodeid, &[], &[])
            .unwrap(),
        b".."
    );
    assert_eq!(fs::read_to_string(outside).unwrap(), SECRET);
}

#[test]
fn special_files_are_never_opened() {
    let mut guest = Guest::new();
    nix::unistd::mkfifo(
        &guest.host("fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o666),
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(guest.host("socket")).unwrap();
    let device = nix::sys::stat::makedev(1, 3);
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    let mut names = vec!["fifo", "socket"];
    match nix::sys::stat::mknod(
        &guest.host("null"),
        nix::sys::stat::SFlag::S_IFCHR,
        mode,
        device,
    ) {
        Ok(()) => names.push("null"),
        Err(error) => eprintln!("no device node in this test: {error}"),
    }
    for name in &names {
        let entry = guest.lookup(ROOT_ID, name).unwrap();
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDWR | libc::O_TRUNC | libc::O_NONBLOCK,
        ] {
            assert_eq!(guest.open(entry.nodeid, flags), Err(Errno::EPERM), "{name}");
        }
        let create = CreateIn {
            flags: libc::O_RDWR as u32,
            mode: 0o600,
            ..Default::default()
        };
        let made = guest.bytes(
            Opcode::Create as u32,
            ROOT_ID,
            &[create.as_slice(), name.as_bytes(), b"\0"],
            &[],
        );
        assert_eq!(made.err(), Some(Errno::EPERM), "{name}");
        let truncate = SetattrIn {
            valid: SetattrValid::SIZE.bits(),
            ..Default::default()
        };
        assert!(
            guest
                .call::<AttrOut>(Opcode::Setattr as u32, entry.nodeid, &[truncate.as_slice()])
                .is_err()
        );
    }
    let counted = guest
        .engine
        .stats()
        .faults
        .iter()
        .find(|(rule, _)| *rule == "special")
        .unwrap()
        .1;
    assert_eq!(counted as usize, names.len() * 6);
}

#[test]
fn the_roots_parent_cannot_be_named_and_a_moved_directory_does_not_lead_out() {
    let mut guest = Guest::new();
    for name in ["..", ".", "/", "a/../..", ""] {
        assert_eq!(
            guest.lookup(ROOT_ID, name).err(),
            Some(Errno::EINVAL),
            "{name:?}"
        );
    }
    fs::create_dir_all(guest.host("a/b")).unwrap();
    let a = guest.lookup(ROOT_ID, "a").unwrap();
    let b = guest.lookup(a.nodeid, "b").unwrap();
    // The host moves it out of the share; its own contents stay reachable, what is above does not become so.
    fs::rename(guest.host("a/b"), guest.dir.path().join("b")).unwrap();
    assert!(guest.lookup(b.nodeid, "..").is_err());
    assert_eq!(guest.lookup(b.nodeid, "canary").err(), Some(Errno::ENOENT));
}

#[test]
fn a_private_directory_is_served_and_belongs_to_its_owner() {
    let mut guest = Guest::new();
    fs::create_dir(guest.host("private")).unwrap();
    fs::set_permissions(guest.host("private"), fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(guest.host("private"), Some(1000), Some(1000)).unwrap();
    fs::write(guest.host("private/f"), "x").unwrap();
    let entry = guest.lookup(ROOT_ID, "private").unwrap();
    assert_eq!((entry.attr.uid, entry.attr.mode & 0o777), (1000, 0o700));
    // The guest's kernel enforces it; ACCESS answers as it would.
    guest.uid = 2000;
    let access = AccessIn {
        mask: libc::R_OK as u32,
        padding: 0,
    };
    assert_eq!(
        guest.bytes(
            Opcode::Access as u32,
            entry.nodeid,
            &[access.as_slice()],
            &[]
        ),
        Err(Errno::EACCES)
    );
    guest.uid = 1000;
    assert!(
        guest
            .bytes(
                Opcode::Access as u32,
                entry.nodeid,
                &[access.as_slice()],
                &[]
            )
            .is_ok()
    );
    let mkdir = MkdirIn {
        mode: 0o777,
        umask: 0o027,
    };
    let made: EntryOut = guest
        .call(
            Opcode::Mkdir as u32,
            entry.nodeid,
            &[mkdir.as_slice(), b"sub\0"],
        )
        .unwrap();
    assert_eq!(
        (made.attr.uid, made.attr.gid, made.attr.mode & 0o777),
        (1000, 1000, 0o750)
    );
}

#[test]
fn a_write_reads_back_and_stale_ids_do_nothing() {
    let mut guest = Guest::new();
    let create = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o644,
        ..Default::default()
    };
    let reply = guest
        .bytes(
            Opcode::Create as u32,
            ROOT_ID,
            &[create.as_slice(), b"f\0"],
            &[],
        )
        .unwrap();
    let mut reply = &reply[..];
    let (entry, open): (EntryOut, OpenOut) = (take(&mut reply).unwrap(), take(&mut reply).unwrap());
    let write = WriteIn {
        fh: open.fh,
        offset: 2,
        size: 5,
        ..Default::default()
    };
    let bytes = guest
        .bytes(
            Opcode::Write as u32,
            entry.nodeid,
            &[write.as_slice()],
            b"hello",
        )
        .unwrap();
    assert_eq!(take::<WriteOut>(&mut &bytes[..]).unwrap().size, 5);
    assert_eq!(guest.read(open.fh, 100).unwrap(), b"\0\0hello");
    let release = ReleaseIn {
        fh: open.fh,
        ..Default::default()
    };
    for _ in 0..2 {
        guest
            .bytes(
                Opcode::Release as u32,
                entry.nodeid,
                &[release.as_slice()],
                &[],
            )
            .unwrap();
    }
    assert_eq!(guest.read(open.fh, 100), Err(Errno::ESTALE));
    assert_eq!(guest.read(12345, 100), Err(Errno::EBADF));
    let forget = ForgetIn { nlookup: u64::MAX };
    guest
        .bytes(
            Opcode::Forget as u32,
            entry.nodeid,
            &[forget.as_slice()],
            &[],
        )
        .unwrap();
    assert_eq!(guest.open(entry.nodeid, 0), Err(Errno::ESTALE));
    assert_eq!(guest.engine.stats().inodes, 1);
    guest
        .bytes(Opcode::Forget as u32, ROOT_ID, &[forget.as_slice()], &[])
        .unwrap();
    guest.lookup(ROOT_ID, "f").unwrap();
}

#[test]
fn the_caps_hold_and_nothing_is_made_past_them() {
    let mut guest = Guest::with_limits(Limits {
        inodes: 5,
        handles: 3,
    });
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    for number in 0..5 {
        let name = format!("d{number}\0");
        guest
            .call::<EntryOut>(
                Opcode::Mkdir as u32,
                ROOT_ID,
                &[mkdir.as_slice(), name.as_bytes()],
            )
            .unwrap();
    }
    let past = guest.call::<EntryOut>(
        Opcode::Mkdir as u32,
        ROOT_ID,
        &[mkdir.as_slice(), b"past\0"],
    );
    assert_eq!(past.err(), Some(Errno::ENFILE));
    assert!(!guest.host("past").exists());
    let create = CreateIn {
        flags: 0,
        mode: 0o600,
        ..Default::default()
    };
    assert_eq!(
        guest.bytes(
            Opcode::Create as u32,
            ROOT_ID,
            &[create.as_slice(), b"past\0"],
            &[]
        ),
        Err(Errno::ENFILE)
    );
    assert!(!guest.host("past").exists());
    let opendir =
        |guest: &mut Guest| guest.call::<OpenOut>(Opcode::Opendir as u32, ROOT_ID, &[&[0; 8]]);
    for _ in 0..3 {
        opendir(&mut guest).unwrap();
    }
    assert_eq!(opendir(&mut guest).err(), Some(Errno::ENFILE));
}

#[test]
fn listings_show_what_was_found_and_nodes_only_for_real_entries() {
    let mut guest = Guest::new();
    for number in 0..300 {
        fs::write(guest.host(&format!("file-{number:03}")), "").unwrap();
    }
    let fh = guest
        .call::<OpenOut>(Opcode::Opendir as u32, ROOT_ID, &[&[0; 8]])
        .unwrap()
        .fh;
    for plus in [false, true] {
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let body = ReadIn {
                fh,
                offset,
                size: 4096,
                ..Default::default()
            };
            let opcode = if plus {
                Opcode::Readdirplus
            } else {
                Opcode::Readdir
            };
            let bytes = guest
                .bytes(opcode as u32, ROOT_ID, &[body.as_slice()], &[])
                .unwrap();
            assert!(bytes.len() <= 4096);
            let mut rest = &bytes[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let node = if plus {
                    take::<EntryOut>(&mut rest).unwrap().nodeid
                } else {
                    0
                };
                let entry: Dirent = take(&mut rest).unwrap();
                let name = String::from_utf8(rest[..entry.namelen as usize].to_vec()).unwrap();
                rest = &rest[(entry.namelen as usize).next_multiple_of(8)..];
                assert_eq!(node != 0, plus && !name.starts_with('.'), "{name}");
                names.push(name);
                offset = entry.off;
            }
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 302);
    }
    let tiny = ReadIn {
        fh,
        offset: 0,
        size: 16,
        ..Default::default()
    };
    assert_eq!(
        guest.bytes(Opcode::Readdir as u32, ROOT_ID, &[tiny.as_slice()], &[]),
        Err(Errno::EINVAL)
    );
    let bad = ReadIn {
        fh,
        offset: u64::MAX,
        size: 4096,
        ..Default::default()
    };
    assert!(
        guest
            .bytes(Opcode::Readdir as u32, ROOT_ID, &[bad.as_slice()], &[])
            .is_err()
    );
}

#[test]
fn an_equal_inode_number_in_another_mount_is_another_file() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let mut guest = Guest::new();
    for name in ["v1", "v2"] {
        fs::create_dir(guest.host(name)).unwrap();
        mount(
            Some("t"),
            &guest.host(name),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        fs::write(guest.host(name).join("f"), name).unwrap();
    }
    fs::write(guest.host("file"), "").unwrap();
    mount(
        Some(&guest.host("v1/f")),
        &guest.host("file"),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let number = |path: PathBuf| fs::metadata(path).unwrap().ino();
    assert_eq!(
        number(guest.host("v1/f")),
        number(guest.host("v2/f")),
        "tmpfs counts from 1"
    );
    let mut nodes = Vec::new();
    for name in ["v1", "v2"] {
        let volume = guest.lookup(ROOT_ID, name).unwrap();
        assert_eq!(volume.attr.flags & ATTR_SUBMOUNT, ATTR_SUBMOUNT);
        let entry = guest.lookup(volume.nodeid, "f").unwrap();
        assert_eq!(entry.attr.flags & ATTR_SUBMOUNT, 0);
        let fh = guest.open(entry.nodeid, 0).unwrap();
        assert_eq!(guest.read(fh, 10).unwrap(), name.as_bytes());
        nodes.push(entry.nodeid);
    }
    assert_ne!(nodes[0], nodes[1]);
    // A mounted file has no device of its own in the guest: its number tells it apart.
    let file = guest.lookup(ROOT_ID, "file").unwrap();
    assert_ne!(file.attr.ino, number(guest.host("v1/f")));
    assert_ne!(file.nodeid, nodes[0]);
    let closed = guest.engine.detach(&guest.worker, "v1").unwrap();
    assert_eq!((closed.inodes, closed.handles), (2, 1));
    umount2(&guest.host("file"), MntFlags::empty()).unwrap_err();
    guest.engine.detach(&guest.worker, "file").unwrap();
    umount2(&guest.host("file"), MntFlags::empty()).unwrap();
    umount2(&guest.host("v1"), MntFlags::empty()).unwrap();
    assert_eq!(guest.open(nodes[0], 0), Err(Errno::ESTALE));
    guest.engine.detach(&guest.worker, "v2").unwrap();
    umount2(&guest.host("v2"), MntFlags::empty()).unwrap();
}

#[test]
fn a_detached_tree_can_be_unmounted_300_times_with_files_open() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let mut guest = Guest::new();
    fs::create_dir_all(guest.host("c1/rootfs")).unwrap();
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("etc")).unwrap();
    fs::write(source.path().join("etc/hostname"), "guest").unwrap();
    let rootfs = guest.host("c1/rootfs");
    for cycle in 0..300 {
        mount(
            Some(source.path()),
            &rootfs,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let container = guest.lookup(ROOT_ID, "c1").unwrap();
        let root = guest.lookup(container.nodeid, "rootfs").unwrap();
        let etc = guest.lookup(root.nodeid, "etc").unwrap();
        let file = guest.lookup(etc.nodeid, "hostname").unwrap();
        let fh = guest.open(file.nodeid, libc::O_RDWR).unwrap();
        let dir = guest
            .call::<OpenOut>(Opcode::Opendir as u32, etc.nodeid, &[&[0; 8]])
            .unwrap();
        assert!(dir.fh > fh);
        assert_eq!(
            umount2(&rootfs, MntFlags::empty()),
            Err(Errno::EBUSY),
            "cycle {cycle}"
        );
        let closed = guest.engine.detach(&guest.worker, "c1/rootfs").unwrap();
        assert_eq!((closed.inodes, closed.handles), (3, 2), "cycle {cycle}");
        // Not even a look-up between detach and unmount opens it again.
        assert_eq!(
            guest.lookup(container.nodeid, "rootfs").err(),
            Some(Errno::ESTALE)
        );
        umount2(&rootfs, MntFlags::empty()).unwrap();
        assert_eq!(guest.read(fh, 10), Err(Errno::ESTALE));
        assert_eq!(guest.lookup(root.nodeid, "etc").err(), Some(Errno::ESTALE));
        let release = ReleaseIn {
            fh,
            ..Default::default()
        };
        guest
            .bytes(
                Opcode::Release as u32,
                file.nodeid,
                &[release.as_slice()],
                &[],
            )
            .unwrap();
    }
    // A plain directory, and what was removed in it, goes too.
    fs::create_dir(guest.host("c1/plain")).unwrap();
    fs::write(guest.host("c1/plain/f"), "").unwrap();
    let container = guest.lookup(ROOT_ID, "c1").unwrap();
    let plain = guest.lookup(container.nodeid, "plain").unwrap();
    let file = guest.lookup(plain.nodeid, "f").unwrap();
    let fh = guest.open(file.nodeid, 0).unwrap();
    fs::remove_file(guest.host("c1/plain/f")).unwrap();
    let closed = guest.engine.detach(&guest.worker, "c1/plain").unwrap();
    assert_eq!((closed.inodes, closed.handles), (2, 1));
    assert_eq!(guest.read(fh, 1), Err(Errno::ESTALE));
    for bad in ["", "/", "/etc", "..", "c1/../..", "./c1"] {
        assert!(guest.engine.detach(&guest.worker, bad).is_err(), "{bad}");
    }
    assert_eq!(
        guest
            .engine
            .detach(&guest.worker, "not/there")
            .unwrap()
            .inodes,
        0
    );
}

#[test]
fn init_again_starts_over_and_other_versions_are_answered() {
    let mut guest = Guest::new();
    fs::write(guest.host("f"), "").unwrap();
    let entry = guest.lookup(ROOT_ID, "f").unwrap();
    guest.open(entry.nodeid, 0).unwrap();
    let newer = InitIn {
        major: 8,
        minor: 0,
        ..Default::default()
    };
    assert_eq!(
        guest
            .call::<InitOut>(Opcode::Init as u32, 0, &[newer.as_slice()])
            .unwrap()
            .major,
        7
    );
    let older = InitIn {
        major: 7,
        minor: 12,
        ..Default::default()
    };
    assert!(
        guest
            .call::<InitOut>(Opcode::Init as u32, 0, &[older.as_slice()])
            .is_err()
    );
    let same = InitIn {
        major: 7,
        minor: 45,
        ..Default::default()
    };
    guest
        .call::<InitOut>(Opcode::Init as u32, 0, &[same.as_slice()])
        .unwrap();
    let stats = guest.engine.stats();
    assert_eq!((stats.inodes, stats.handles), (1, 0));
    assert_eq!(guest.open(entry.nodeid, 0), Err(Errno::ESTALE));
}

/// Where the fuzzer's messages land: a tree with one of everything.
fn zoo(guest: &mut Guest) -> Vec<u64> {
    fs::create_dir(guest.host("d")).unwrap();
    fs::write(guest.host("d/f"), "text").unwrap();
    symlink("../canary", guest.host("d/l")).unwrap();
    nix::unistd::mkfifo(
        &guest.host("d/p"),
        nix::sys::stat::Mode::from_bits_truncate(0o666),
    )
    .unwrap();
    let d = guest.lookup(ROOT_ID, "d").unwrap().nodeid;
    let mut nodes = vec![ROOT_ID, d, 0, 77];
    for name in ["f", "l", "p"] {
        nodes.push(guest.lookup(d, name).unwrap().nodeid);
    }
    guest.open(nodes[4], libc::O_RDWR).unwrap();
    guest
        .call::<OpenOut>(Opcode::Opendir as u32, d, &[&[0; 8]])
        .unwrap();
    nodes
}

/// Small numbers where the wire types have ids, handles, sizes and flags; names that try to get out.
fn argument() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        (0..8_u64).boxed(),
        any::<u64>().boxed(),
        Just(u64::MAX).boxed(),
        (0..4096_u64).boxed()
    ];
    let name = prop_oneof![
        Just(&b"f\0"[..]),
        Just(&b"d\0"[..]),
        Just(&b"l\0"[..]),
        Just(&b"..\0"[..]),
        Just(&b"new\0"[..]),
        Just(&b"../canary\0"[..]),
        Just(&b"user.x\0"[..]),
        Just(&b"system.posix_acl_access\0"[..]),
    ];
    (
        prop::collection::vec(word, 0..12),
        prop::collection::vec(name, 0..3),
        0..8_usize,
    )
        .prop_map(|(words, names, cut)| {
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            bytes.truncate(bytes.len().saturating_sub(cut / 4 * 4));
            bytes.extend(names.concat());
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_message_panics_or_reaches_the_canary(messages in prop::collection::vec((1..54_u32, 0..7_usize, argument(), any::<bool>()), 1..60)) {
        let mut guest = Guest::new();
        let nodes = zoo(&mut guest);
        let canary = guest.dir.path().join("canary");
        let before = fs::metadata(&canary).unwrap();
        for (number, node, args, data) in messages {
            // A guest may fill its host's disk; a test need not: no huge allocations.
            if number == Opcode::Fallocate as u32 || number == opcode::SYNCFS {
                continue;
            }
            let data: &[u8] = if data { b"data" } else { b"" };
            let (_, out) = guest.raw(number, nodes[node], &args, data);
            prop_assert!(out.len() <= 1 << 21);
        }
        let after = fs::metadata(&canary).unwrap();
        prop_assert_eq!(fs::read_to_string(&canary).unwrap(), SECRET);
        prop_assert_eq!((after.ino(), after.mode(), after.uid(), after.nlink()), (before.ino(), before.mode(), before.uid(), before.nlink()));
        prop_assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 2);
        prop_assert!(!after.file_type().is_fifo());
    }
}

#[test]
fn no_descriptor_is_left_behind() {
    let count = || -> io::Result<usize> {
        let own = File::open("/proc/thread-self/fd")?;
        let dir = format!("/proc/self/fd/{}", own.as_raw_fd());
        Ok(fs::read_dir(dir)?
            .filter(|e| {
                let link = e.as_ref().ok().and_then(|e| fs::read_link(e.path()).ok());
                link.is_some_and(|link| link.to_string_lossy().contains("left-behind"))
            })
            .count())
    };
    let mut guest = Guest::new();
    for number in 0..50 {
        fs::write(guest.host(&format!("left-behind-{number}")), "").unwrap();
        let entry = guest
            .lookup(ROOT_ID, &format!("left-behind-{number}"))
            .unwrap();
        guest.open(entry.nodeid, 0).unwrap();
    }
    assert_eq!(count().unwrap(), 100);
    guest.bytes(Opcode::Destroy as u32, 0, &[], &[]).unwrap();
    assert_eq!(count().unwrap(), 0);
}
