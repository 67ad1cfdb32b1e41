//! A hostile guest: queues, names, sizes and opcodes as no driver of Linux sends them. After each
//! attack the process serves, holds no more than before, and the share is what it was.

use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;

use super::*;
use bulkhead_vmm::fs::guard::REPLY_HEADER;

/// What an attack may cost the process, in KiB. Its requests alone are up to 1 MiB each.
const MEMORY: u64 = 16 << 10;

/// A share with a file, a driver at it, and what must hold at the end.
struct Attacked {
    share: Share,
    process: FsProcess,
    driver: Driver,
    before: u64,
}

impl Attacked {
    fn new() -> Attacked {
        let share = Share::new();
        fs::write(share.at("f"), "x").unwrap();
        let (process, driver) = started(&share);
        let before = process.peak();
        Attacked {
            share,
            process,
            driver,
            before,
        }
    }

    /// It serves on the ring as it is, and after a reset.
    fn assert_works(&mut self) {
        assert_eq!(self.driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
        self.driver.frontend.get_vring_base(1).unwrap();
        self.driver.start();
        self.driver.init();
        assert_eq!(self.driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
    }

    fn end(mut self) {
        self.assert_works();
        let grown = self.process.peak() - self.before;
        assert!(grown < MEMORY, "{grown} KiB more");
        assert_eq!(self.process.end(), 0);
    }

    fn chains(&self) -> u64 {
        self.process.faults().get("chain").copied().unwrap_or(0)
    }

    /// Names in the share, and what they are.
    fn listing(&self) -> Vec<(String, u64, u32)> {
        let entries = fs::read_dir(self.share.0.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                let status = entry.metadata().unwrap();
                let name = entry.file_name().to_string_lossy().into_owned();
                (name, status.ino(), status.mode())
            })
            .collect();
        names.sort();
        names
    }
}

fn bytes<T: ByteValued>(value: &T) -> Vec<u8> {
    value.as_slice().to_vec()
}

/// The class of Dragonball's a957054dd3: the start of a buffer was checked, its end was not.
#[test]
fn dragonball_a957054dd3_buffers_that_are_not_wholly_in_one_region() {
    let mut attacked = Attacked::new();
    let ram = RAM as u64;
    let bad = [
        (ram - 4, 8),
        (ram - 8, (HIGH - ram) as u32 + 16),
        (0, u32::MAX),
        (ram, 1),
        (ram + 0x1000, 64),
        (HIGH - 1, 2),
        (HIGH + HIGH_SIZE as u64 - 1, 2),
        (HIGH + HIGH_SIZE as u64, 64),
        (0xd000_0000, 64),
        (u64::MAX, 1),
        (u64::MAX - 7, 16),
        (1 << 63, 64),
    ];
    for (nth, &(address, length)) in (0..).zip(&bad) {
        let good = attacked
            .driver
            .message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
        let readable = [good[0], (address, length, 0), good[2], good[3]];
        let writable = [good[0], good[2], good[3], (address, length, WRITE)];
        for chain in [readable, writable] {
            let used = attacked.driver.submit(&chain);
            assert_eq!(used, 0, "{length:#x} bytes at {address:#x}");
        }
        assert_eq!(attacked.chains(), 2 * (nth + 1), "{address:#x}");
    }
    // In the high part is as good as in the low one.
    let good = attacked
        .driver
        .message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
    let used = attacked
        .driver
        .submit(&[good[0], good[2], (HIGH, 4096, WRITE)]);
    assert_eq!(used as usize, REPLY_HEADER + size_of::<EntryOut>());
    attacked.end();
}

#[test]
fn chains_that_loop_leave_the_table_or_are_there_twice() {
    let mut attacked = Attacked::new();
    let driver = &mut attacked.driver;
    let good = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
    // Behind a whole request and its room: what is cut off must not make a good one of it.
    for (index, piece) in (0..).zip(good) {
        driver.descriptor(index, (piece.0, piece.1, piece.2 | NEXT), index + 1);
    }
    let mut broken = 0;
    let mut refused = |driver: &mut Driver, head: u16| {
        driver.publish(head);
        assert_eq!(driver.kick_and_hear(), 0);
        broken += 1;
    };
    for length in [0, 40, RAM as u32] {
        for past in [4, QUEUE_SIZE, u16::MAX] {
            driver.descriptor(4, (0, length, NEXT | WRITE), past);
            refused(driver, 0);
        }
        for index in 4..QUEUE_SIZE {
            let next = 4 + (index - 3) % (QUEUE_SIZE - 4);
            driver.descriptor(index, (0, length, NEXT | WRITE), next);
        }
        refused(driver, 0);
        driver.descriptor(4, (0, length, NEXT), 4);
        refused(driver, 4);
    }
    assert_eq!(attacked.chains(), broken);
    let driver = &mut attacked.driver;
    // The class of CVE-2026-45782: one head in two requests at once.
    for (index, piece) in (0..).zip(good) {
        let next = if index < 3 { NEXT } else { 0 };
        driver.descriptor(index, (piece.0, piece.1, piece.2 | next), index + 1);
    }
    for _ in 0..QUEUE_SIZE {
        driver.publish(0);
    }
    let used = driver.kick_and_hear();
    assert_eq!(driver.reply(used).unwrap().len(), size_of::<EntryOut>());
    attacked.end();
}

/// Indirect descriptors are for requests of 256 pages; there is nothing beneath an indirect one.
#[test]
fn indirect_descriptors_in_indirect_ones_and_tables_that_are_none() {
    const INNER: u64 = 0x60_0000;
    const SECOND: u64 = 0x61_0000;
    let mut attacked = Attacked::new();
    let driver = &mut attacked.driver;
    let good = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
    for (index, piece) in (0..).zip(good) {
        let next = if index < 3 { NEXT } else { 0 };
        let piece = (piece.0, piece.1, piece.2 | next);
        driver.descriptor_at(INNER, index, piece, index + 1);
        driver.descriptor_at(SECOND, index, piece, index + 1);
    }
    let whole = (INNER, 64, INDIRECT);
    let reply = REPLY_HEADER + size_of::<EntryOut>();
    assert_eq!(driver.submit(&[whole]) as usize, reply, "a table is served");
    for flags in [INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE] {
        for first in [good[0], (SECOND, 64, INDIRECT | NEXT)] {
            driver.descriptor_at(INNER, 0, (first.0, first.1, first.2 | NEXT), 1);
            driver.descriptor_at(INNER, 1, (SECOND, 64, flags), 2);
            assert_ne!(
                driver.submit(&[whole]) as usize,
                reply,
                "a table in a table"
            );
        }
    }
    // Tables of no, half a or too many descriptors, and where there is no memory.
    for (address, length) in [
        (SECOND, 0),
        (SECOND, 15),
        (SECOND, 24),
        (SECOND, u32::MAX),
        (SECOND, 16 * 0x1_0000),
        (RAM as u64 - 16, 64),
        (u64::MAX - 15, 32),
        (0xd000_0000, 64),
    ] {
        for next in [0, NEXT] {
            driver.descriptor(0, (address, length, INDIRECT | next), 0);
            driver.publish(0);
            driver.kick_and_hear();
        }
    }
    // All but the table of which the first descriptor is in memory, and is a whole chain.
    assert_eq!(attacked.chains(), 6 + 2 * 7);
    let driver = &mut attacked.driver;
    // As long as a table can be, each descriptor all of memory, in a loop.
    let last = (RAM / 16 / 2) as u16;
    for index in 0..=last.min(0x3fff) {
        driver.descriptor_at(INNER, index, (0, RAM as u32, NEXT), index + 1);
    }
    driver.descriptor_at(INNER, 0x3fff, (0, RAM as u32, NEXT), 0);
    driver.submit(&[(INNER, 0x4000 * 16, INDIRECT)]);
    attacked.end();
}

/// Each opcode with names: its arguments, how many names, and what follows them.
fn naming() -> Vec<(Opcode, Vec<u8>, usize, &'static [u8])> {
    let node = MknodIn {
        mode: libc::S_IFREG | 0o644,
        ..Default::default()
    };
    let rename = RenameIn { newdir: ROOT_ID };
    let rename2 = Rename2In {
        newdir: ROOT_ID,
        ..Default::default()
    };
    let link = LinkIn { oldnodeid: 0 };
    let attribute = SetxattrIn { size: 1, flags: 0 };
    let get = GetxattrIn {
        size: 64,
        padding: 0,
    };
    vec![
        (Opcode::Lookup, vec![], 1, b""),
        (Opcode::Unlink, vec![], 1, b""),
        (Opcode::Rmdir, vec![], 1, b""),
        (Opcode::Symlink, vec![], 1, b"target\0"),
        (Opcode::Mknod, bytes(&node), 1, b""),
        (Opcode::Mkdir, bytes(&MkdirIn::default()), 1, b""),
        (Opcode::Create, bytes(&CreateIn::default()), 1, b""),
        (Opcode::Link, bytes(&link), 1, b""),
        (Opcode::Rename, bytes(&rename), 2, b""),
        (Opcode::Rename2, bytes(&rename2), 2, b""),
        (Opcode::Setxattr, bytes(&attribute), 1, b"v"),
        (Opcode::Getxattr, bytes(&get), 1, b""),
        (Opcode::Removexattr, vec![], 1, b""),
    ]
}

/// CVE-2026-47243's class: a raw SYMLINK with an absolute name made links in the host's root; and
/// what home-grown servers did with `Path::join`.
#[test]
fn cve_2026_47243_names_that_are_not_one_component() {
    let mut attacked = Attacked::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("canary"), "canary").unwrap();
    let absolute = |name: &str| {
        let path = outside.path().join(name);
        format!("{}\0", path.to_str().unwrap()).into_bytes()
    };
    let beside = format!(
        "../{}\0",
        outside.path().file_name().unwrap().to_str().unwrap()
    );
    fs::create_dir(attacked.share.at("d")).unwrap();
    let file = attacked.driver.lookup(ROOT_ID, "f").unwrap().nodeid;
    let directory = attacked.driver.lookup(ROOT_ID, "d").unwrap().nodeid;
    let names: Vec<Vec<u8>> = vec![
        b"..\0".to_vec(),
        b".\0".to_vec(),
        b"a/b\0".to_vec(),
        b"d/..\0".to_vec(),
        b"f/\0".to_vec(),
        b"/abs\0".to_vec(),
        b"//\0".to_vec(),
        b"/\0".to_vec(),
        b"\0".to_vec(),
        b"\0\0".to_vec(),
        b"".to_vec(),
        b"no end".to_vec(),
        b"f\0f\0".to_vec(),
        [b"n".repeat(256), vec![0]].concat(),
        [b"n".repeat(4096), vec![0]].concat(),
        b"n".repeat(4096),
        absolute("canary"),
        absolute("made"),
        beside.into_bytes(),
    ];
    let before = attacked.listing();
    for (opcode, mut args, count, rest) in naming() {
        if matches!(opcode, Opcode::Link) {
            args.copy_from_slice(&file.to_ne_bytes());
        }
        // Names of attributes are no names of files: only their form and length count.
        let attribute = matches!(
            opcode,
            Opcode::Setxattr | Opcode::Getxattr | Opcode::Removexattr
        );
        for name in &names {
            for node in [ROOT_ID, directory, file] {
                let mut tries = vec![[&args, name.as_slice(), rest].concat()];
                if count == 2 {
                    tries = vec![
                        [&args, name.as_slice(), b"new\0"].concat(),
                        [&args, b"f\0".as_slice(), name].concat(),
                    ];
                }
                for message in tries {
                    let number = opcode as u32;
                    let answer = attacked
                        .driver
                        .request(number, node, &[&message], b"", 4096);
                    let errno = answer.expect_err("it is done");
                    let told = [libc::EINVAL, libc::ENAMETOOLONG].contains(&errno);
                    let told =
                        told || attribute && [libc::EOPNOTSUPP, libc::ERANGE].contains(&errno);
                    assert!(
                        told,
                        "{number}: {:?}: {errno}",
                        String::from_utf8_lossy(name)
                    );
                }
            }
        }
    }
    assert_eq!(attacked.listing(), before);
    assert_eq!(fs::read_dir(attacked.share.at("d")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_eq!(fs::read(outside.path().join("canary")).unwrap(), b"canary");
    assert!(!Path::new("/abs").exists());
    attacked.end();
}

/// The class of arcbox#474, mvm#1470 and libkrun#330: sizes that the guest names and nobody checks.
#[test]
fn sizes_that_are_not_those_of_the_payload() {
    let mut attacked = Attacked::new();
    let file = attacked.driver.lookup(ROOT_ID, "f").unwrap().nodeid;
    let fh = attacked.driver.open(file, libc::O_RDWR);
    let driver = &mut attacked.driver;
    let mut refused = |opcode: Opcode, args: &[&[u8]], data: &[u8], room: u32| {
        let number = opcode as u32;
        let answer = driver.request(number, file, args, data, room);
        let errno = answer.expect_err("it is done");
        let known = [libc::E2BIG, libc::EINVAL, libc::EIO, libc::ENODATA];
        assert!(known.contains(&errno), "{number}: {errno}");
    };
    let name: &[u8] = b"user.x\0";
    for size in [1 << 16 | 1, 1 << 20, 1 << 31, u32::MAX] {
        let get = GetxattrIn { size, padding: 0 };
        for room in [0, 4096, 1 << 20] {
            refused(Opcode::Getxattr, &[get.as_slice(), name], b"", room);
            refused(Opcode::Listxattr, &[get.as_slice()], b"", room);
        }
        let set = SetxattrIn { size, flags: 0 };
        for value in [&b""[..], b"v", &[7; 4096]] {
            refused(Opcode::Setxattr, &[set.as_slice(), name, value], b"", 64);
        }
        let read = ReadIn {
            fh,
            size: size.max((1 << 20) + 1),
            ..Default::default()
        };
        for opcode in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
            refused(opcode, &[read.as_slice()], b"", 1 << 20);
        }
        let write = WriteIn {
            fh,
            size,
            ..Default::default()
        };
        refused(Opcode::Write, &[write.as_slice()], b"data", 64);
    }
    for (size, value) in [(0, &b"v"[..]), (2, b"v"), (1, b""), (1, b"vv")] {
        let set = SetxattrIn { size, flags: 0 };
        refused(Opcode::Setxattr, &[set.as_slice(), name, value], b"", 64);
    }
    for (offset, size) in [(u64::MAX, 4), (i64::MAX as u64, 4), (1 << 63, 4)] {
        let write = WriteIn {
            fh,
            offset,
            size,
            ..Default::default()
        };
        refused(Opcode::Write, &[write.as_slice()], b"data", 64);
    }
    // FORGETs have no answer; what they count is not believed either.
    for count in [1, 3, 1 << 28, u32::MAX] {
        let forget = BatchForgetIn { count, dummy: 0 };
        let args: &[&[u8]] = &[forget.as_slice(), &[0xff; 32]];
        driver.request_unheard(Opcode::BatchForget, file, args);
    }
    assert_eq!(fs::read(attacked.share.at("f")).unwrap(), b"x");
    attacked.end();
}

#[test]
fn headers_that_lie_about_their_length() {
    let mut attacked = Attacked::new();
    let driver = &mut attacked.driver;
    for lie in [0, 1, 39, 40, 41, 44, 0x1_0000, 0x7fff_ffff, u32::MAX] {
        let chain = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
        let at = GuestAddress(REQUEST);
        driver.memory.write_obj(lie, at).unwrap();
        let used = driver.submit(&chain);
        assert_eq!(driver.reply(used), Err(libc::EIO), "{lie}");
    }
    // Long requests that are no WRITE: not even copied.
    for length in [0x1_2000, 0x10_0000, RAM as u32] {
        let mut chain = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
        driver
            .memory
            .write_obj(length, GuestAddress(REQUEST))
            .unwrap();
        chain[1] = (0, length - chain[0].1, 0);
        let used = driver.submit(&chain);
        assert_eq!(driver.reply(used), Err(libc::EINVAL), "{length:#x}");
    }
    // No room for an answer, and half of it.
    let good = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
    for room in [0, 1, 15] {
        assert_eq!(driver.submit(&[good[0], (REPLY, room, WRITE)]), 0);
    }
    for room in [16, 17, 100] {
        assert_eq!(driver.submit(&[good[0], (REPLY, room, WRITE)]), 16);
    }
    attacked.end();
}

#[test]
fn every_opcode_with_nothing_with_zeros_and_with_ones() {
    let mut attacked = Attacked::new();
    let file = attacked.driver.lookup(ROOT_ID, "f").unwrap().nodeid;
    let before = attacked.listing();
    let silent = [
        Opcode::Forget as u32,
        Opcode::BatchForget as u32,
        Opcode::Interrupt as u32,
    ];
    let numbers = (0..80).chain([4096, 0x10_0000, 0x1a00_0000, u32::MAX]);
    // INIT and DESTROY are for the end.
    let others = numbers.filter(|&number| number != 26 && number != 38);
    for number in others {
        for length in [0, 1, 8, 16, 24, 40, 64, 104, 1024] {
            for filling in [0, 0xff] {
                for node in [0, ROOT_ID, file, 12345, u64::MAX] {
                    let args = vec![filling; length];
                    let driver = &mut attacked.driver;
                    let chain = driver.message(number, node, &[&args], b"", 4096);
                    let used = driver.submit(&chain);
                    let answered = used as usize >= REPLY_HEADER;
                    assert!(answered || silent.contains(&number), "{number}: {used}");
                }
            }
        }
    }
    assert_eq!(attacked.listing(), before);
    attacked.end();
}

/// CVE-2020-35517's class: a pipe, a socket or a device of the share that the host would open.
#[test]
fn cve_2020_35517_special_files_are_not_opened() {
    let mut attacked = Attacked::new();
    let mode = Mode::from_bits_truncate(0o666);
    mkfifo(&attacked.share.at("fifo"), mode).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(attacked.share.at("socket")).unwrap();
    let zero = makedev(1, 5);
    let made = mknod(&attacked.share.at("zero"), SFlag::S_IFCHR, mode, zero);
    let mut names = vec!["fifo", "socket"];
    match made {
        Ok(()) => names.push("zero"),
        Err(error) => eprintln!("SKIPPED: no device node can be made here: {error}"),
    }
    let driver = &mut attacked.driver;
    for name in names {
        let node = driver.lookup(ROOT_ID, name).unwrap().nodeid;
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_NONBLOCK,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_DIRECTORY,
            -1,
        ] {
            let open = OpenIn {
                flags: flags as u32,
                fuse_flags: 0,
            };
            for opcode in [Opcode::Open, Opcode::Opendir] {
                let answer = driver.request(opcode as u32, node, &[open.as_slice()], b"", 4096);
                assert!(answer.is_err(), "{name}, flags {flags:#x}");
            }
            let create = CreateIn {
                flags: flags as u32,
                mode: 0o666,
                ..Default::default()
            };
            let args: &[&[u8]] = &[create.as_slice(), name.as_bytes(), b"\0"];
            let answer = driver.request(Opcode::Create as u32, ROOT_ID, args, b"", 4096);
            assert!(answer.is_err(), "{name}, flags {flags:#x}");
        }
        let truncate = SetattrIn {
            valid: SetattrValid::SIZE.bits(),
            ..Default::default()
        };
        let args: &[&[u8]] = &[truncate.as_slice()];
        let answer = driver.request(Opcode::Setattr as u32, node, args, b"", 4096);
        assert!(answer.is_err(), "{name}");
    }
    // Nor are there new ones but those that mean nothing to the host.
    for (format, device) in [
        (libc::S_IFBLK, 0x800),
        (libc::S_IFBLK, 0),
        (libc::S_IFCHR, 0x103),
        (libc::S_IFCHR, u32::MAX),
        (libc::S_IFDIR, 0),
        (libc::S_IFLNK, 0),
        (libc::S_IFMT, 0),
    ] {
        let node = MknodIn {
            mode: format | 0o666,
            rdev: device,
            ..Default::default()
        };
        let args: &[&[u8]] = &[node.as_slice(), b"node\0"];
        let answer = driver.request(Opcode::Mknod as u32, ROOT_ID, args, b"", 4096);
        assert_eq!(answer, Err(libc::EPERM), "{format:o}");
    }
    let pipe = fs::metadata(attacked.share.at("fifo")).unwrap();
    assert!(pipe.file_type().is_fifo());
    attacked.end();
}

/// CVE-2020-10717's class: descriptors without a bound.
#[test]
fn cve_2020_10717_files_and_inodes_end_where_the_configuration_says() {
    let mut attacked = Attacked::new();
    for nth in 0..MAX_INODES + 10 {
        fs::write(attacked.share.at(&format!("n{nth}")), "").unwrap();
    }
    let idle = attacked.process.open_files();
    let driver = &mut attacked.driver;
    let file = driver.lookup(ROOT_ID, "f").unwrap().nodeid;
    let open = OpenIn {
        flags: 0,
        fuse_flags: 0,
    };
    let mut opened = 0;
    let refused = loop {
        let args: &[&[u8]] = &[open.as_slice()];
        let opcode = [Opcode::Open, Opcode::Opendir][opened as usize % 2];
        let node = [file, ROOT_ID][opened as usize % 2];
        match driver.request(opcode as u32, node, args, b"", 4096) {
            Ok(_) => opened += 1,
            Err(errno) => break errno,
        }
        assert!(opened <= MAX_HANDLES, "files are opened without end");
    };
    assert_eq!((opened, refused), (MAX_HANDLES, libc::ENFILE));
    let mut found = 0;
    let refused = loop {
        match driver.lookup(ROOT_ID, &format!("n{found}")) {
            Ok(_) => found += 1,
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, libc::ENFILE);
    assert!(found <= MAX_INODES, "{found}");
    let most = idle + (MAX_HANDLES + MAX_INODES) as usize + 8;
    assert!(attacked.process.open_files() <= most);
    // DESTROY lets go of all of it.
    let driver = &mut attacked.driver;
    let gone = driver.request(Opcode::Destroy as u32, 0, &[], b"", 64);
    assert_eq!(gone, Ok(Vec::new()));
    driver.init();
    assert!(attacked.process.open_files() <= idle + 8);
    attacked.end();
}

/// Requests, descriptors and indices that change while they are looked at; the queue stops at any
/// moment and is started again.
#[test]
fn a_guest_that_rewrites_everything_while_it_is_served() {
    let mut attacked = Attacked::new();
    let memory = attacked.driver.memory.clone();
    let kick = attacked.driver.kick.try_clone().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..=2_u64 {
            let (memory, kick, stop) = (&memory, &kick, &stop);
            scope.spawn(move || {
                let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                while !stop.load(Ordering::Relaxed) {
                    dice ^= dice << 13;
                    dice ^= dice >> 7;
                    dice ^= dice << 17;
                    let (at, word) = match dice % 8 {
                        0 => (TABLE + 2 * (dice >> 8) % 256, (dice >> 32) as u16),
                        1 => (AVAILABLE + 2 * (dice >> 8) % 40, (dice >> 32) as u16 % 20),
                        2 => (USED + 2 * (dice >> 8) % 70, (dice >> 32) as u16),
                        3 => (REQUEST, [42, 44, 0xffff][(dice >> 32) as usize % 3]),
                        4 => (REQUEST + 4, (dice >> 32) as u16 % 60),
                        _ => (REQUEST + 40 + (dice >> 8) % 64, (dice >> 32) as u16),
                    };
                    memory.write_obj(word, GuestAddress(at)).unwrap();
                    if dice.is_multiple_of(64) {
                        kick.write(1).unwrap();
                    }
                }
            });
        }
        for _ in 0..200 {
            let driver = &mut attacked.driver;
            let chain = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
            for (index, piece) in (0..).zip(chain) {
                let next = if index < 3 { NEXT } else { 0 };
                driver.descriptor(index, (piece.0, piece.1, piece.2 | next), index + 1);
            }
            for _ in 0..QUEUE_SIZE {
                driver.publish(0);
                driver.kick.write(1).unwrap();
            }
            driver.frontend.get_vring_base(1).unwrap();
            driver.start();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let driver = &mut attacked.driver;
    driver.frontend.get_vring_base(1).unwrap();
    let _ = driver.call.read();
    driver.start();
    driver.init();
    // The guest may have removed its file, or made something else of it, which is its right.
    let _ = fs::remove_file(attacked.share.at("f"));
    let _ = fs::remove_dir(attacked.share.at("f"));
    fs::write(attacked.share.at("f"), "x").unwrap();
    attacked.end();
}
