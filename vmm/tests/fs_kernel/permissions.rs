//! Who may do what: owners, modes, lists, set-id bits, capabilities, mapped ids.

use super::*;

/// CVE-2021-20263's class among them: a capability that outlives a write.
#[test]
fn attributes_acls_and_capabilities() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("f"), b"").unwrap();
    let path = c_path(&m.at("f"));
    let set = |name: &str, value: &[u8]| {
        let name = CString::new(name).unwrap();
        // SAFETY: the strings are NUL-terminated and value is readable for its length.
        Errno::result(unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        })
    };
    set("user.colour", b"blue").unwrap();
    assert_eq!(set("security.selinux", b"1"), Err(Errno::EOPNOTSUPP));
    // cap_net_bind_service+ep, revision 2.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("security.capability", &capability).unwrap();
    let mut names = [0_u8; 256];
    // SAFETY: names is writable for its length.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let listed = String::from_utf8_lossy(&names[..length as usize]).into_owned();
    assert!(
        listed.contains("user.colour\0") && listed.contains("security.capability\0"),
        "{listed:?}"
    );
    let host = c_path(&m.host("f"));
    // SAFETY: names is writable for its length.
    let length = unsafe {
        libc::getxattr(
            host.as_ptr(),
            c"user.colour".as_ptr(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    };
    assert_eq!(&names[..length as usize], b"blue");
    // A write drops the capability.
    File::options()
        .append(true)
        .open(m.at("f"))
        .unwrap()
        .write_all(b"x")
        .unwrap();
    // SAFETY: names is writable for its length.
    let gone = unsafe {
        libc::getxattr(
            host.as_ptr(),
            c"security.capability".as_ptr(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    };
    assert_eq!(gone, -1);
}

/// One ACL entry: tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn access_control_lists_decide_and_are_inherited() {
    let m = Mounted::new(CACHED);
    fs::create_dir(m.at("d")).unwrap();
    fs::set_permissions(m.at("d"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = c_path(&m.at("d"));
    // user::rwx user:1000:rwx group::r-x mask::rwx other::r-x
    let list = acl(&[
        (1, 7, u32::MAX),
        (2, 7, 1000),
        (4, 5, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 5, u32::MAX),
    ]);
    for name in [c"system.posix_acl_access", c"system.posix_acl_default"] {
        // SAFETY: the strings are NUL-terminated and the list is readable for its length.
        let result = unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                list.as_ptr().cast(),
                list.len(),
                0,
            )
        };
        Errno::result(result).unwrap();
    }
    shell_as(1000, 1000, &m.at("d"), "umask 077; echo x > by-acl");
    let denied = std::panic::catch_unwind(|| shell_as(1001, 1001, &m.at("d"), "echo x > denied"));
    assert!(denied.is_err());
    // A default ACL takes the umask's place: the mask is what open's 0666 leaves of it.
    assert_eq!(
        fs::metadata(m.host("d/by-acl")).unwrap().mode() & 0o777,
        0o664
    );
}

/// The same calls on the bare file system and on the share.
#[test]
fn access_control_lists_are_those_of_the_bare_file_system() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o777)).unwrap();
    program("acl.py", &["outside"], bare.path());
    let control = program("acl.py", &["inside"], bare.path());
    let m = Mounted::new(CACHED);
    program("acl.py", &["outside"], m.share.path());
    assert_same(&control, &program("acl.py", &["inside"], m.point.path()));
}

#[test]
fn set_id_bits_and_capabilities_go_as_on_the_bare_file_system() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let control = program("set_id.py", &[], bare.path());
    let m = Mounted::new(CACHED);
    assert_same(&control, &program("set_id.py", &[], m.point.path()));
}

/// A user namespace that maps `inside` and the nine ids behind it to `outside`.
fn user_namespace(inside: u32, outside: u32) -> File {
    use std::os::unix::process::CommandExt;

    let mut command = std::process::Command::new("sleep");
    // SAFETY: the child calls nothing but unshare(2) before it executes.
    unsafe {
        command.arg("60").pre_exec(|| {
            Errno::result(libc::unshare(libc::CLONE_NEWUSER))?;
            Ok(())
        });
    }
    let mut holder = command.spawn().unwrap();
    let proc = format!("/proc/{}", holder.id());
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("{proc}/{map}"), format!("{inside} {outside} 10")).unwrap();
    }
    let namespace = File::open(format!("{proc}/ns/user")).unwrap();
    holder.kill().unwrap();
    holder.wait().unwrap();
    namespace
}

#[test]
fn a_mount_of_other_ids_shows_and_makes_mapped_owners() {
    use nix::mount::{MntFlags, umount2};
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }

    let m = Mounted::new(CACHED);
    fs::set_permissions(m.at("."), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(m.at("of root"), "").unwrap();
    let mapped = tempfile::tempdir().unwrap();
    fs::set_permissions(mapped.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // What belongs to 0 on the share belongs to 1000 on the mount.
    let namespace = user_namespace(0, 1000);
    let attributes = MountAttr {
        set: 0x10_0000, // MOUNT_ATTR_IDMAP
        clear: 0,
        propagation: 0,
        user_namespace: namespace.as_raw_fd() as u64,
    };
    let (from, to) = (c_path(m.point.path()), c_path(mapped.path()));
    // SAFETY: the paths are NUL-terminated, the attributes have the size that is passed, and the
    // descriptor is closed once.
    unsafe {
        let open_tree_clone = 1;
        let tree = libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            from.as_ptr(),
            open_tree_clone,
        );
        Errno::result(tree).unwrap();
        Errno::result(libc::syscall(
            libc::SYS_mount_setattr,
            tree,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttr>(),
        ))
        .expect("the share can be mapped");
        let empty_from = 4; // MOVE_MOUNT_F_EMPTY_PATH
        let moved = libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            empty_from,
        );
        Errno::result(moved).unwrap();
        libc::close(tree as i32);
    }
    let owner = |path: &Path| {
        let status = fs::symlink_metadata(path).unwrap();
        (status.uid(), status.gid())
    };
    assert_eq!(owner(&mapped.path().join("of root")), (1000, 1000));
    let script =
        "echo x > f; mkdir d; ln -s f s; mkfifo p; mv f g; chmod 600 g; echo y >> g; cat g";
    shell_as(1000, 1000, mapped.path(), script);
    for name in ["g", "d", "s", "p"] {
        assert_eq!(owner(&m.host(name)), (0, 0), "{name}");
        assert_eq!(owner(&mapped.path().join(name)), (1000, 1000), "{name}");
    }
    std::os::unix::fs::chown(mapped.path().join("g"), Some(1003), Some(1004)).unwrap();
    assert_eq!(owner(&m.host("g")), (3, 4));
    umount2(mapped.path(), MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn what_a_user_makes_is_that_users() {
    let m = Mounted::new(CACHED);
    fs::set_permissions(m.at("."), fs::Permissions::from_mode(0o777)).unwrap();
    shell_as(
        1000,
        1001,
        m.point.path(),
        "umask 027; echo x > f; mkdir d; ln -s x s; mkfifo p; touch d/g",
    );
    for (name, mode) in [("f", 0o640), ("d", 0o750), ("p", 0o640)] {
        let host = fs::metadata(m.host(name)).unwrap();
        assert_eq!(
            (host.uid(), host.gid(), host.mode() & 0o777),
            (1000, 1001, mode),
            "{name}"
        );
    }
    let link = fs::symlink_metadata(m.host("s")).unwrap();
    assert_eq!((link.uid(), link.gid()), (1000, 1001));
    fs::write(m.at("root"), b"").unwrap();
    assert_eq!(fs::metadata(m.host("root")).unwrap().uid(), 0);
    shell_as(
        1000,
        1001,
        m.point.path(),
        "! echo y 2>/dev/null > root; chmod 600 f; ! chown 0 f 2>/dev/null",
    );
    shell_as(
        2000,
        2000,
        m.point.path(),
        "! cat f 2>/dev/null; ! rm -f d/g 2>/dev/null",
    );
    assert!(m.host("d/g").exists());
}

#[test]
fn set_id_bits_go_when_others_write_and_cannot_be_smuggled_in() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("suid"), b"x").unwrap();
    let mode = |name: &str| fs::metadata(m.host(name)).unwrap().mode() & 0o7777;
    fs::set_permissions(m.at("suid"), fs::Permissions::from_mode(0o6777)).unwrap();
    assert_eq!(mode("suid"), 0o6777);
    // Root keeps them, others do not.
    File::options()
        .append(true)
        .open(m.at("suid"))
        .unwrap()
        .write_all(b"y")
        .unwrap();
    assert_eq!(mode("suid"), 0o6777);
    shell_as(1000, 1000, m.point.path(), "echo z >> suid");
    assert_eq!(mode("suid"), 0o777);
    fs::set_permissions(m.at("suid"), fs::Permissions::from_mode(0o6777)).unwrap();
    shell_as(1000, 1000, m.point.path(), ": > suid");
    assert_eq!(mode("suid"), 0o777);
    // CVE-2022-0358: a file made in a set-group-id directory of a foreign group keeps no executable
    // set-group-id bit.
    fs::create_dir(m.at("shared")).unwrap();
    std::os::unix::fs::chown(m.at("shared"), Some(0), Some(42)).unwrap();
    fs::set_permissions(m.at("shared"), fs::Permissions::from_mode(0o2777)).unwrap();
    shell_as(
        1000,
        1000,
        &m.at("shared"),
        "python3 -c 'import os; os.umask(0); os.close(os.open(\"f\", os.O_CREAT | os.O_WRONLY, 0o2777))'",
    );
    let made = fs::metadata(m.host("shared/f")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o7777),
        (1000, 42, 0o777)
    );
}
