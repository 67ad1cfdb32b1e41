//! Any sequence of requests, on a real directory full of links that lead out of it.

use bulkhead_fuzz::{Unstructured, arbitrary};

use super::*;

/// Where messages land: one of everything, and links to what is outside.
fn farm(guest: &mut Guest) -> Vec<u64> {
    fs::create_dir(guest.host("d")).unwrap();
    fs::write(guest.host("d/f"), "text").unwrap();
    let outside = guest.dir.path().join("canary");
    for (name, target) in [
        ("absolute", outside.to_str().unwrap()),
        ("relative", "../canary"),
        ("up", ".."),
        ("root", "/"),
        ("magic", "/proc/self/root"),
        ("loop", "loop"),
    ] {
        symlink(target, guest.host(name)).unwrap();
    }
    symlink("../../canary", guest.host("d/l")).unwrap();
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    nix::unistd::mkfifo(&guest.host("d/p"), mode).unwrap();
    // Known to the guest, then moved out of the share by the host.
    fs::create_dir_all(guest.host("moved/in")).unwrap();
    let d = guest.lookup(ROOT_ID, "d").unwrap().nodeid;
    let mut nodes = vec![ROOT_ID, d, 0, 77];
    for name in ["absolute", "up", "root", "moved"] {
        nodes.push(guest.lookup(ROOT_ID, name).unwrap().nodeid);
    }
    for name in ["f", "l", "p"] {
        nodes.push(guest.lookup(d, name).unwrap().nodeid);
    }
    fs::rename(guest.host("moved"), guest.dir.path().join("moved")).unwrap();
    guest.open(nodes[8], libc::O_RDWR).unwrap();
    guest
        .call::<OpenOut>(Opcode::Opendir as u32, d, &[&[0; 8]])
        .unwrap();
    nodes
}

const NAMES: [&[u8]; 16] = [
    b"f\0",
    b"d\0",
    b"l\0",
    b"p\0",
    b"new\0",
    b"other\0",
    b"absolute\0",
    b"relative\0",
    b"up\0",
    b"root\0",
    b"magic\0",
    b"..\0",
    b"../canary\0",
    b"user.x\0",
    b"security.capability\0",
    b"system.posix_acl_access\0",
];

/// Modes, flags and bounds.
const WORDS: [u32; 16] = [
    0o100_644,
    0o40_755,
    0o120_777,
    0o20_666,
    0o140_666,
    libc::O_RDWR as u32,
    (libc::O_RDWR | libc::O_TRUNC) as u32,
    (libc::O_WRONLY | libc::O_APPEND) as u32,
    libc::O_PATH as u32,
    libc::O_NOFOLLOW as u32,
    4095,
    4096,
    4097,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX,
];

/// Bytes of an opcode's structure, and how many names follow.
fn shape(opcode: u32) -> (usize, usize) {
    match opcode {
        1 | 10 | 11 | 24 => (0, 1),
        2 | 14 | 23 | 27 | 34 | 36 | 50 => (8, 0),
        3 | 20 | 26 | 30 => (16, 0),
        4 => (88, 0),
        6 => (0, 2),
        8 | 35 | 51 => (16, 1),
        9 | 13 | 21 | 22 => (8, 1),
        12 => (8, 2),
        15 | 16 | 28 | 44 => (40, 0),
        18 | 25 | 29 | 46 => (24, 0),
        42 => (40, 0),
        43 => (32, 0),
        45 => (16, 2),
        47 => (56, 0),
        _ => (0, 0),
    }
}

fn word(input: &mut Unstructured<'_>) -> arbitrary::Result<u32> {
    Ok(match input.arbitrary::<u8>()? {
        byte @ 0..=0x7f => u32::from(byte % 16),
        0x80..=0xbf => 0,
        byte @ 0xc0..=0xef => WORDS[usize::from(byte % 16)],
        _ => input.arbitrary()?,
    })
}

fn arguments(opcode: u32, input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let (size, names) = shape(opcode);
    let mut args = Vec::new();
    while args.len() < size {
        args.extend(word(input)?.to_ne_bytes());
    }
    for _ in 0..names {
        match input.arbitrary::<u8>()? {
            0xf0..=0xff => {
                let count = usize::from(input.arbitrary::<u8>()?).min(input.len());
                args.extend(input.bytes(count)?);
            }
            known => args.extend(NAMES[usize::from(known % 16)]),
        }
    }
    if opcode == Opcode::Setxattr as u32 {
        let count = (args[0] as usize).min(input.len());
        args.extend(input.bytes(count)?);
    }
    Ok(args)
}

/// A guest may fill its host's disk, or wait for it; a test need not.
fn is_too_much(opcode: u32, args: &[u8]) -> bool {
    const MOST: u64 = 1 << 20;
    let number = |at: usize| -> u64 {
        let bytes = args.get(at..at + 8);
        bytes.map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().unwrap()))
    };
    match opcode {
        opcode::SYNCFS => true,
        _ if opcode == Opcode::Fallocate as u32 => number(16) > MOST || number(8) > MOST,
        _ if opcode == Opcode::CopyFileRange as u32 => number(40) > MOST,
        _ => false,
    }
}

/// What a host would see of a guest that got out.
#[derive(Debug, PartialEq)]
struct Outside {
    canary: (String, u64, u32, u32, u64, i64, i64),
    names: Vec<std::ffi::OsString>,
}

fn outside(guest: &Guest) -> Outside {
    let path = guest.dir.path().join("canary");
    let status = fs::metadata(&path).unwrap();
    let entries = fs::read_dir(guest.dir.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    Outside {
        canary: (
            fs::read_to_string(&path).unwrap(),
            status.ino(),
            status.mode(),
            status.uid(),
            status.nlink(),
            status.ctime(),
            status.ctime_nsec(),
        ),
        names,
    }
}

fn message(
    guest: &mut Guest,
    nodes: &mut Vec<u64>,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let opcode = u32::from(input.arbitrary::<u8>()?) % 54;
    let node = nodes[usize::from(input.arbitrary::<u8>()?) % nodes.len()];
    guest.uid = match input.arbitrary::<u8>()? {
        0xff => u32::MAX,
        byte => u32::from(byte % 2) * 1000,
    };
    let args = arguments(opcode, input)?;
    if is_too_much(opcode, &args) {
        return Ok(());
    }
    let data: &[u8] = if opcode == Opcode::Write as u32 {
        let size = u32::from_ne_bytes(args[16..20].try_into().unwrap());
        &[b'w'; 64][..size.min(64) as usize]
    } else {
        b""
    };
    guest.memory.output.clear();
    let (outcome, out) = guest.raw(opcode, node, &args, data);
    assert!(out.len() <= 1 << 21);
    for bytes in [&out, &guest.memory.output] {
        let secret = SECRET.as_bytes();
        assert!(!bytes.windows(secret.len()).any(|window| window == secret));
    }
    // The guest goes on with what it was told of.
    let makes_known = matches!(opcode, 1 | 6 | 8 | 9 | 13 | 35 | 51);
    if makes_known && matches!(outcome, Outcome::Reply { .. }) && nodes.len() < 64 {
        let mut rest = &out[REPLY_HEADER..];
        nodes.extend(take::<EntryOut>(&mut rest).map(|entry| entry.nodeid));
    }
    Ok(())
}

fn tree(data: &[u8]) {
    let mut guest = Guest::new();
    let mut nodes = farm(&mut guest);
    let before = outside(&guest);
    let mut input = Unstructured::new(data);
    while !input.is_empty() && message(&mut guest, &mut nodes, &mut input).is_ok() {}
    assert_eq!(outside(&guest), before);
    let stats = guest.engine.stats();
    assert!(stats.inodes <= 10_000 && stats.handles <= 1000);
}

#[test]
fn fuzz_tree() {
    bulkhead_fuzz::run("tree", tree);
}
