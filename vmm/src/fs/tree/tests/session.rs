//! Where a session begins and what its messages can be.

use super::*;

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
