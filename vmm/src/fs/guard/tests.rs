//! Each rule by the violation that it stops.

use std::ffi::CStr;

use super::*;
use crate::fs::wire::*;
use bulkhead_fuzz::{Unstructured, arbitrary};
use vm_memory::ByteValued;

const STARTED: Session = Session {
    started: true,
    setxattr_ext: false,
};
const ROOM: usize = 1 << 21;

fn message(opcode: u32, args: &[&[u8]]) -> Vec<u8> {
    let args = args.concat();
    let header = InHeader {
        len: (HEADER + args.len()) as u32,
        opcode,
        unique: 7,
        nodeid: ROOT_ID,
        ..Default::default()
    };
    [header.as_slice(), &args].concat()
}

fn verdict(bytes: &[u8]) -> std::result::Result<(), (Errno, Option<Rule>)> {
    verdict_in(bytes, 0, ROOM, STARTED)
}

fn verdict_in(
    bytes: &[u8],
    data: usize,
    room: usize,
    session: Session,
) -> std::result::Result<(), (Errno, Option<Rule>)> {
    check(bytes, data, room, session)
        .map(drop)
        .map_err(|refusal| (refusal.errno, refusal.rule))
}

#[track_caller]
fn refused(bytes: &[u8], rule: Rule) {
    assert_eq!(verdict(bytes).map_err(|(_, rule)| rule), Err(Some(rule)));
}

fn bytes<T: ByteValued>(value: &T) -> Vec<u8> {
    value.as_slice().to_vec()
}

/// Every opcode with names: arguments before the names, number of names.
fn naming() -> Vec<(u32, Vec<u8>, usize)> {
    vec![
        (Opcode::Lookup as u32, vec![], 1),
        (Opcode::Unlink as u32, vec![], 1),
        (Opcode::Rmdir as u32, vec![], 1),
        (Opcode::Symlink as u32, vec![], 1),
        (
            Opcode::Mknod as u32,
            bytes(&MknodIn {
                mode: libc::S_IFREG,
                ..Default::default()
            }),
            1,
        ),
        (Opcode::Mkdir as u32, bytes(&MkdirIn::default()), 1),
        (Opcode::Link as u32, bytes(&LinkIn { oldnodeid: 2 }), 1),
        (Opcode::Create as u32, bytes(&CreateIn::default()), 1),
        (Opcode::Rename as u32, bytes(&RenameIn { newdir: 1 }), 2),
        (
            Opcode::Rename2 as u32,
            bytes(&Rename2In {
                newdir: 1,
                ..Default::default()
            }),
            2,
        ),
    ]
}

#[test]
fn names_that_leave_their_directory_are_refused_by_every_operation() {
    let bad: [&[u8]; 9] = [
        b"..\0",
        b".\0",
        b"a/b\0",
        b"/abs\0",
        b"/\0",
        b"\0",
        b"../x\0",
        b"unterminated",
        b"a\0b\0c\0",
    ];
    for (opcode, args, names) in naming() {
        for name in bad {
            let first = match names {
                1 if opcode == Opcode::Symlink as u32 => {
                    message(opcode, &[&args, name, b"target\0"])
                }
                1 => message(opcode, &[&args, name]),
                _ => message(opcode, &[&args, name, b"good\0"]),
            };
            let result = verdict(&first);
            assert!(
                matches!(result, Err((_, Some(Rule::Name | Rule::Arguments)))),
                "opcode {opcode} {name:?}: {result:?}"
            );
            if names == 2 {
                let second = message(opcode, &[&args, b"good\0", name]);
                assert!(verdict(&second).is_err(), "opcode {opcode} {name:?}");
            }
        }
        let long = [b"n".repeat(256), vec![0]].concat();
        let longest = [b"n".repeat(255), vec![0]].concat();
        let rest: &[u8] = match opcode {
            _ if names == 2 => b"good\0",
            _ if opcode == Opcode::Symlink as u32 => b"target\0",
            _ => b"",
        };
        assert_eq!(
            verdict(&message(opcode, &[&args, &long, rest])),
            Err((Errno::ENAMETOOLONG, None))
        );
        assert_eq!(verdict(&message(opcode, &[&args, &longest, rest])), Ok(()));
    }
}

#[test]
fn a_symlinks_target_may_be_anything_but_too_long() {
    let symlink = |target: &[u8]| verdict(&message(Opcode::Symlink as u32, &[b"name\0", target]));
    assert_eq!(symlink(b"/etc/passwd\0"), Ok(()));
    assert_eq!(symlink(b"../../..\0"), Ok(()));
    assert!(symlink(b"\0").is_err());
    assert!(symlink(b"unterminated").is_err());
    assert!(symlink(&[vec![b'x'; 4096], vec![0]].concat()).is_err());
    assert_eq!(symlink(&[vec![b'x'; 4095], vec![0]].concat()), Ok(()));
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    refused(&[0; HEADER - 1], Rule::Header);
    refused(&[], Rule::Header);
    for lie in [0, 39, 41, 44, 46, u32::MAX] {
        let mut lookup = message(Opcode::Lookup as u32, &[b"name\0"]);
        lookup[..4].copy_from_slice(&lie.to_ne_bytes());
        refused(&lookup, Rule::Length);
    }
}

#[test]
fn a_head_longer_than_any_request_is_not_even_copied() {
    let header = |opcode: Opcode| InHeader {
        opcode: opcode as u32,
        ..Default::default()
    };
    assert!(head_length(&header(Opcode::Setxattr), MAX_HEAD + 1).is_err());
    assert_eq!(
        head_length(&header(Opcode::Setxattr), MAX_HEAD).ok(),
        Some(MAX_HEAD)
    );
    assert_eq!(
        head_length(&header(Opcode::Write), 1 << 30).ok(),
        Some(WRITE_HEAD)
    );
    assert_eq!(head_length(&header(Opcode::Write), 50).ok(), Some(50));
}

#[test]
fn unknown_opcodes_are_counted_and_known_but_unserved_ones_are_not() {
    for opcode in [0, 7, 19, 53, 54, 4096, 0x10_0000, 0x1a00_0000, u32::MAX] {
        assert_eq!(
            verdict(&message(opcode, &[])),
            Err((Errno::ENOSYS, Some(Rule::Opcode)))
        );
    }
    for opcode in [
        Opcode::Ioctl,
        Opcode::Setlkw,
        Opcode::Getlk,
        Opcode::Poll,
        Opcode::SetupMapping,
        Opcode::Bmap,
    ] {
        assert_eq!(
            verdict(&message(opcode as u32, &[&[0; 80]])),
            Err((Errno::ENOSYS, None))
        );
    }
}

#[test]
fn sizes_must_be_those_of_the_payload() {
    let write = |size, data| {
        let body = WriteIn {
            size,
            ..Default::default()
        };
        let mut head = message(Opcode::Write as u32, &[body.as_slice()]);
        head[..4].copy_from_slice(&((WRITE_HEAD + data) as u32).to_ne_bytes());
        verdict_in(&head, data, ROOM, STARTED)
    };
    assert_eq!(write(4096, 4096), Ok(()));
    assert_eq!(
        write(4097, 4096),
        Err((Errno::EINVAL, Some(Rule::Arguments)))
    );
    assert_eq!(write(0, 4096), Err((Errno::EINVAL, Some(Rule::Arguments))));
    assert_eq!(
        write(MAX_DATA + 1, MAX_DATA as usize + 1),
        Err((Errno::E2BIG, Some(Rule::Size)))
    );
    for opcode in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
        let body = ReadIn {
            size: MAX_DATA + 1,
            ..Default::default()
        };
        refused(&message(opcode as u32, &[body.as_slice()]), Rule::Size);
    }
    let setxattr = |size, value: &[u8]| {
        let body = SetxattrIn { size, flags: 0 };
        verdict(&message(
            Opcode::Setxattr as u32,
            &[body.as_slice(), b"user.x\0", value],
        ))
    };
    assert_eq!(setxattr(3, b"abc"), Ok(()));
    assert_eq!(
        setxattr(4, b"abc"),
        Err((Errno::EINVAL, Some(Rule::Arguments)))
    );
    assert_eq!(
        setxattr(u32::MAX, b"abc"),
        Err((Errno::E2BIG, Some(Rule::Size)))
    );
    let getxattr = GetxattrIn {
        size: 1 << 31,
        padding: 0,
    };
    refused(
        &message(Opcode::Getxattr as u32, &[getxattr.as_slice(), b"user.x\0"]),
        Rule::Size,
    );
    refused(
        &message(Opcode::Listxattr as u32, &[getxattr.as_slice()]),
        Rule::Size,
    );
    for count in [1, 3, u32::MAX, 1 << 28] {
        let forget = BatchForgetIn { count, dummy: 0 };
        refused(
            &message(Opcode::BatchForget as u32, &[forget.as_slice(), &[0; 32]]),
            Rule::Arguments,
        );
    }
    let forget = BatchForgetIn { count: 2, dummy: 0 };
    assert_eq!(
        verdict(&message(
            Opcode::BatchForget as u32,
            &[forget.as_slice(), &[0; 32]]
        )),
        Ok(())
    );
}

#[test]
fn offsets_past_what_the_host_can_count_are_refused() {
    let read = ReadIn {
        offset: i64::MAX as u64,
        size: 1,
        ..Default::default()
    };
    refused(
        &message(Opcode::Read as u32, &[read.as_slice()]),
        Rule::Arguments,
    );
    let fallocate = FallocateIn {
        offset: 1 << 62,
        length: 1 << 62,
        ..Default::default()
    };
    refused(
        &message(Opcode::Fallocate as u32, &[fallocate.as_slice()]),
        Rule::Arguments,
    );
    let wraps = FallocateIn {
        offset: u64::MAX,
        length: 2,
        ..Default::default()
    };
    refused(
        &message(Opcode::Fallocate as u32, &[wraps.as_slice()]),
        Rule::Arguments,
    );
    let copy = CopyFileRangeIn {
        offset_out: u64::MAX,
        ..Default::default()
    };
    refused(
        &message(Opcode::CopyFileRange as u32, &[copy.as_slice()]),
        Rule::Arguments,
    );
    let seek = LseekIn {
        whence: libc::SEEK_END as u32,
        ..Default::default()
    };
    refused(
        &message(Opcode::Lseek as u32, &[seek.as_slice()]),
        Rule::Flags,
    );
}

#[test]
fn device_nodes_are_refused_but_whiteouts_are_not() {
    let mknod = |mode, rdev| {
        let body = MknodIn {
            mode,
            rdev,
            ..Default::default()
        };
        verdict(&message(
            Opcode::Mknod as u32,
            &[body.as_slice(), b"name\0"],
        ))
    };
    assert_eq!(
        mknod(libc::S_IFBLK | 0o600, 0x800),
        Err((Errno::EPERM, Some(Rule::Node)))
    );
    assert_eq!(
        mknod(libc::S_IFBLK | 0o600, 0),
        Err((Errno::EPERM, Some(Rule::Node)))
    );
    assert_eq!(
        mknod(libc::S_IFCHR | 0o600, 0x103),
        Err((Errno::EPERM, Some(Rule::Node)))
    );
    assert_eq!(
        mknod(libc::S_IFDIR | 0o700, 0),
        Err((Errno::EPERM, Some(Rule::Node)))
    );
    assert_eq!(mknod(libc::S_IFCHR, 0), Ok(()));
    for kind in [libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK, 0] {
        assert_eq!(mknod(kind | 0o6755, 0x103), Ok(()));
    }
    let create = CreateIn {
        mode: libc::S_IFCHR | 0o600,
        ..Default::default()
    };
    refused(
        &message(Opcode::Create as u32, &[create.as_slice(), b"name\0"]),
        Rule::Node,
    );
}

#[test]
fn rename_flags_that_contradict_are_refused() {
    let rename = |flags| {
        let body = Rename2In {
            newdir: 1,
            flags,
            padding: 0,
        };
        verdict(&message(
            Opcode::Rename2 as u32,
            &[body.as_slice(), b"a\0", b"b\0"],
        ))
    };
    for flags in [0, 1, 2, 4, 5] {
        assert_eq!(rename(flags), Ok(()), "{flags}");
    }
    for flags in [3, 6, 7, 8, u32::MAX] {
        assert_eq!(
            rename(flags),
            Err((Errno::EINVAL, Some(Rule::Flags))),
            "{flags}"
        );
    }
}

#[test]
fn a_caller_without_an_id_would_be_the_one_before_and_is_refused() {
    for at in [24, 28] {
        let without = |opcode: Opcode, arguments: &[&[u8]]| {
            let mut message = message(opcode as u32, arguments);
            message[at..at + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
            message
        };
        let (create, node) = (CreateIn::default(), MknodIn::default());
        let name: &[u8] = b"name\0";
        for message in [
            without(Opcode::Symlink, &[name, b"target\0"]),
            without(Opcode::Mknod, &[node.as_slice(), name]),
            without(Opcode::Mkdir, &[MkdirIn::default().as_slice(), name]),
            without(Opcode::Create, &[create.as_slice(), name]),
        ] {
            refused(&message, Rule::Identity);
        }
        let mut rename = Rename2In {
            flags: libc::RENAME_WHITEOUT,
            ..Default::default()
        };
        let whiteout = without(Opcode::Rename2, &[rename.as_slice(), name, b"new\0"]);
        refused(&whiteout, Rule::Identity);
        // What makes nothing belongs to nobody: Linux sends no id with it (ALLOW_IDMAP).
        rename.flags = 0;
        let plain = without(Opcode::Rename2, &[rename.as_slice(), name, b"new\0"]);
        for message in [plain, without(Opcode::Lookup, &[name])] {
            assert_eq!(verdict(&message), Ok(()));
        }
    }
}

#[test]
fn what_cannot_be_answered_is_not_done() {
    let mkdir = message(
        Opcode::Mkdir as u32,
        &[MkdirIn::default().as_slice(), b"name\0"],
    );
    let room = REPLY_HEADER + size_of::<EntryOut>();
    assert_eq!(verdict_in(&mkdir, 0, room, STARTED), Ok(()));
    for room in [0, 15, 16, room - 1] {
        assert_eq!(
            verdict_in(&mkdir, 0, room, STARTED),
            Err((Errno::EIO, Some(Rule::Room)))
        );
    }
    let read = message(
        Opcode::Read as u32,
        &[ReadIn {
            size: 4096,
            ..Default::default()
        }
        .as_slice()],
    );
    assert_eq!(
        verdict_in(&read, 0, 4096, STARTED),
        Err((Errno::EIO, Some(Rule::Room)))
    );
    let forget = message(Opcode::Forget as u32, &[ForgetIn { nlookup: 1 }.as_slice()]);
    assert_eq!(verdict_in(&forget, 0, 0, STARTED), Ok(()));
}

#[test]
fn nothing_comes_before_init_and_nothing_behind_the_arguments() {
    let session = Session {
        started: false,
        ..STARTED
    };
    let lookup = message(Opcode::Lookup as u32, &[b"name\0"]);
    assert_eq!(
        verdict_in(&lookup, 0, ROOM, session),
        Err((Errno::EIO, Some(Rule::Uninitialised)))
    );
    let init = InitIn {
        major: 7,
        minor: 38,
        ..Default::default()
    };
    assert_eq!(
        verdict_in(
            &message(Opcode::Init as u32, &[init.as_slice()]),
            0,
            ROOM,
            session
        ),
        Ok(())
    );
    refused(
        &message(
            Opcode::Getattr as u32,
            &[GetattrIn::default().as_slice(), b"x"],
        ),
        Rule::Arguments,
    );
    refused(
        &message(Opcode::Getattr as u32, &[&[0; 15]]),
        Rule::Arguments,
    );
    let mut longer = message(Opcode::Statfs as u32, &[]);
    longer[..4].copy_from_slice(&44_u32.to_ne_bytes());
    assert_eq!(
        verdict_in(&longer, 4, ROOM, STARTED),
        Err((Errno::EINVAL, Some(Rule::Arguments)))
    );
}

/// Any bytes are judged, and what passes is within its bounds.
fn guard(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let judge = || -> arbitrary::Result<()> {
        let (opcode, session) = (input.arbitrary::<u8>()?, input.arbitrary::<u8>()?);
        let session = Session {
            started: session & 1 == 0,
            setxattr_ext: session & 2 != 0,
        };
        let data = match input.arbitrary::<u8>()? {
            0xf0..=0xff => input.arbitrary::<u32>()? as usize,
            small => usize::from(small),
        };
        let room = input.arbitrary::<u16>()? as usize;
        let args = input.take_rest();
        let mut bytes = message(u32::from(opcode) % 60, &[args]);
        let total = u32::try_from(bytes.len() + data).unwrap_or(u32::MAX);
        bytes[..4].copy_from_slice(&total.to_ne_bytes());
        if let Ok(request) = check(&bytes, data, room, session) {
            let op = request.op;
            assert!(op.is_silent() || room >= REPLY_HEADER + op.reply_size());
            assert!(session.started || matches!(op, Op::Init { .. }));
            assert!(names(&op).all(is_one_component), "{op:?}");
        }
        let _ = check(args, data, room, session);
        let _ = header(args).map(|header| head_length(&header, data));
        Ok(())
    };
    // Too short an input says nothing.
    let _ = judge();
}

/// The names of directories' entries in an operation.
fn names<'a>(op: &Op<'a>) -> impl Iterator<Item = &'a CStr> {
    let (first, second) = match *op {
        Op::Rename { name, new_name, .. } => (Some(name), Some(new_name)),
        Op::Lookup { name }
        | Op::Symlink { name, .. }
        | Op::Mknod { name, .. }
        | Op::Mkdir { name, .. }
        | Op::Unlink { name }
        | Op::Rmdir { name }
        | Op::Link { name, .. }
        | Op::Create { name, .. } => (Some(name), None),
        _ => (None, None),
    };
    [first, second].into_iter().flatten()
}

fn is_one_component(name: &CStr) -> bool {
    let name = name.to_bytes();
    !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/') && name.len() <= 255
}

#[test]
fn fuzz_guard() {
    bulkhead_fuzz::run("guard", guard);
}
