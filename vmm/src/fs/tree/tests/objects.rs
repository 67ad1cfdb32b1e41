//! Files, directories and listings.

use super::*;

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
