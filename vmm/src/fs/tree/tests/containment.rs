//! Nothing leads out of the share.

use super::*;

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
