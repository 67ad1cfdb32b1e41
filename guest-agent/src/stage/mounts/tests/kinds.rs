//! Sources of every kind, and tmpfs with contents.

use super::*;

#[test]
fn a_tmpfs_takes_the_mode_it_covers_and_copies_up_what_is_there() {
    let image = image();
    let var = image.root.join("var");
    fs::create_dir_all(var.join("deep/er")).expect("mkdir");
    fs::set_permissions(&var, fs::Permissions::from_mode(0o1770)).expect("chmod");
    fs::write(var.join("deep/er/file"), "contents").expect("write");
    fs::set_permissions(var.join("deep/er/file"), fs::Permissions::from_mode(0o4751))
        .expect("chmod");
    nix::unistd::chown(&var.join("deep"), Some(7.into()), Some(8.into())).expect("chown");
    nix::unistd::chown(&var, Some(9.into()), Some(10.into())).expect("chown");
    fs::set_permissions(var.join("deep"), fs::Permissions::from_mode(0o500)).expect("chmod");
    symlink("/etc/passwd", var.join("link")).expect("symlink");
    nix::unistd::mkfifo(&var.join("fifo"), Mode::S_IRUSR).expect("mkfifo");
    let mut copy = new("tmpfs", "/var", MS_RDONLY, "");
    copy.copy_up = true;
    fs::create_dir(image.root.join("tmp")).expect("mkdir");
    fs::set_permissions(image.root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("chmod");
    let spec = image.spec(vec![
        copy,
        new("tmpfs", "/tmp", 0, ""),
        new("tmpfs", "/fresh", 0, "mode=700"),
    ]);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let stat = |path: &str| fs::symlink_metadata(path).expect("stat");
        assert_eq!(mountinfo(&proc_fd)["/var"].fstype, "tmpfs");
        assert_eq!(
            fs::read_to_string("/var/deep/er/file").expect("read"),
            "contents"
        );
        assert_eq!(stat("/var/deep/er/file").mode() & 0o7777, 0o4751);
        assert_eq!(
            (
                stat("/var/deep").uid(),
                stat("/var/deep").gid(),
                stat("/var/deep").mode() & 0o7777
            ),
            (7, 8, 0o500)
        );
        assert_eq!(
            (
                stat("/var").uid(),
                stat("/var").gid(),
                stat("/var").mode() & 0o7777
            ),
            (9, 10, 0o1770)
        );
        assert_eq!(
            fs::read_link("/var/link").expect("link"),
            Path::new("/etc/passwd")
        );
        assert!(stat("/var/fifo").file_type().is_fifo());
        assert!(fs::write("/var/x", "").is_err(), "read-only in the end");
        assert_eq!(stat("/tmp").mode() & 0o7777, 0o1777);
        assert_eq!(stat("/fresh").mode() & 0o7777, 0o700);
        String::new()
    });
}

#[test]
fn files_and_sockets_are_bound_to_files() {
    let image = image();
    let file = image.source("file");
    fs::write(&file, "contents").expect("write");
    let socket = image.source("socket");
    let _listener = UnixListener::bind(&socket).expect("bind");
    let spec = image.spec(vec![
        bind(&file, "/etc/hostname", MS_RDONLY),
        bind(&socket, "/run/s.sock", 0),
        Mount {
            fstype: "bind".to_owned(),
            ..bind(&file, "/again", 0)
        },
    ]);
    in_mount_namespace(|| {
        enter(&spec);
        assert_eq!(
            fs::read_to_string("/etc/hostname").expect("read"),
            "contents"
        );
        assert!(fs::write("/etc/hostname", "").is_err());
        assert!(
            fs::metadata("/run/s.sock")
                .expect("stat")
                .file_type()
                .is_socket()
        );
        std::os::unix::net::UnixStream::connect("/run/s.sock").expect("connect");
        fs::write("/again", "contents").expect("write");
        String::new()
    });
}

#[test]
fn an_idmapped_mount_translates_owners() {
    let image = image();
    let source = image.directory("source");
    fs::write(image.beside.join("source/file"), "").expect("write");
    nix::unistd::chown(
        &image.beside.join("source/file"),
        Some(1000.into()),
        Some(1001.into()),
    )
    .expect("chown");
    // On a detached idmapped mount the "container" ids are those on disk.
    let mapping = |container_id, host_id| IdMapping {
        container_id,
        host_id,
        size: 1,
        ..IdMapping::default()
    };
    let mut mount = bind(&source, "/mapped", MS_REC);
    mount.uid_mappings = vec![mapping(1000, 5000)];
    mount.gid_mappings = vec![mapping(1001, 5001)];
    let spec = image.spec(vec![mount, bind(&source, "/plain", 0)]);
    let supported = in_mount_namespace(|| match build(&spec) {
        Err(error) if error.to_string().contains("EINVAL") => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => String::new(),
    });
    if !supported.is_empty() {
        eprintln!("SKIPPED: the file system of {source} has no idmapped mounts: {supported}");
        return;
    }
    in_mount_namespace(|| {
        enter(&spec);
        let ids = |path: &str| {
            let status = fs::metadata(path).expect("stat");
            (status.uid(), status.gid())
        };
        assert_eq!(ids("/mapped/file"), (5000, 5001));
        assert_eq!(ids("/plain/file"), (1000, 1001));
        String::new()
    });
}
