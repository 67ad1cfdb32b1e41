//! Several mounts in one share, and their going.

use super::*;

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
