use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use super::*;

fn root() -> (tempfile::TempDir, RootDir) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir(directory.path().join("root")).expect("mkdir");
    let root = RootDir::open(&directory.path().join("root")).expect("open");
    (directory, root)
}

fn device(path: &str, kind: Kind, major: u32, minor: u32, mode: u32) -> Device {
    Device {
        path: path.to_owned(),
        kind: kind.into(),
        major,
        minor,
        mode,
        uid: 11,
        gid: 12,
        ..Device::default()
    }
}

#[test]
fn default_and_listed_devices_have_their_number_mode_and_owner() {
    let (directory, root) = root();
    let spec = Container {
        devices: vec![
            device("/dev/sub/disk", Kind::BLOCK, 250, 3, 0o640),
            device("/dev/pipe", Kind::FIFO, 0, 0, 0o622),
            device("/dev/null", Kind::CHAR, 1, 3, 0o600),
        ],
        ..Container::default()
    };
    make(&root, &spec, None).unwrap_or_else(|e| panic!("{e}"));
    // Twice: a restarted container finds its nodes.
    make(&root, &spec, None).unwrap_or_else(|e| panic!("{e}"));
    let status =
        |path: &str| fs::symlink_metadata(directory.path().join("root").join(path)).expect(path);
    let disk = status("dev/sub/disk");
    assert!(disk.file_type().is_block_device());
    assert_eq!(
        (disk.rdev(), disk.mode() & 0o7777),
        (stat::makedev(250, 3), 0o640)
    );
    assert_eq!((disk.uid(), disk.gid()), (11, 12));
    assert!(status("dev/pipe").file_type().is_fifo());
    assert_eq!(
        status("dev/null").mode() & 0o7777,
        0o600,
        "the spec's own entry replaces the default"
    );
    assert_eq!(status("dev/tty").rdev(), stat::makedev(5, 0));
    assert_eq!(status("dev/tty").mode() & 0o7777, 0o666);
    let link =
        |path: &str| fs::read_link(directory.path().join("root/dev").join(path)).expect("link");
    assert_eq!(link("ptmx"), Path::new("pts/ptmx"));
    assert_eq!(link("fd"), Path::new("/proc/self/fd"));
    assert_eq!(link("stderr"), Path::new("/proc/self/fd/2"));
}

#[test]
fn what_an_image_has_in_the_place_of_a_device_does_not_stay() {
    let (directory, root) = root();
    let dev = directory.path().join("root/dev");
    fs::create_dir(&dev).expect("mkdir");
    let canary = directory.path().join("canary");
    fs::write(&canary, "untouched").expect("write");
    fs::set_permissions(&canary, fs::Permissions::from_mode(0o600)).expect("chmod");
    fs::write(dev.join("null"), "a file that keeps what is written").expect("write");
    symlink(&canary, dev.join("zero")).expect("symlink");
    stat::mknod(
        &dev.join("random"),
        SFlag::S_IFCHR,
        Mode::S_IRUSR,
        stat::makedev(1, 1),
    )
    .expect("mknod");
    stat::mknod(
        &dev.join("ptmx"),
        SFlag::S_IFCHR,
        Mode::S_IRUSR,
        stat::makedev(5, 2),
    )
    .expect("mknod");
    make(&root, &Container::default(), None).unwrap_or_else(|e| panic!("{e}"));
    for (name, minor) in [("null", 3), ("zero", 5), ("random", 8)] {
        let status = fs::symlink_metadata(dev.join(name)).expect("stat");
        assert!(status.file_type().is_char_device(), "{name}");
        assert_eq!(status.rdev(), stat::makedev(1, minor), "{name}");
    }
    assert!(
        fs::symlink_metadata(dev.join("ptmx"))
            .expect("stat")
            .is_symlink()
    );
    assert_eq!(fs::read_to_string(&canary).expect("read"), "untouched");
    assert_eq!(fs::metadata(&canary).expect("stat").mode() & 0o7777, 0o600);
}

#[test]
fn device_paths_through_links_stay_in_the_root() {
    let (directory, root) = root();
    let canary = directory.path().join("canary");
    fs::create_dir(&canary).expect("mkdir");
    symlink(&canary, directory.path().join("root/dev")).expect("symlink");
    symlink("../../canary", directory.path().join("root/up")).expect("symlink");
    let spec = Container {
        devices: vec![
            device("/up/../../d", Kind::CHAR, 1, 3, 0o666),
            device("/up/e", Kind::CHAR, 1, 3, 0o666),
        ],
        ..Container::default()
    };
    make(&root, &spec, None).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(fs::read_dir(&canary).expect("read").count(), 0);
    assert!(directory.path().join("root/canary/e").exists());
}

#[test]
fn a_directory_bound_to_dev_is_left_alone() {
    let mount = |destination: &str, fstype: &str| Mount {
        destination: destination.to_owned(),
        fstype: fstype.to_owned(),
        ..Mount::default()
    };
    let spec = |mounts| Container {
        mounts,
        ..Container::default()
    };
    assert!(!wanted(&spec(vec![mount("/dev/", "bind")])));
    assert!(wanted(&spec(vec![
        mount("/dev", "tmpfs"),
        mount("/dev/x", "bind")
    ])));
}

#[test]
fn an_unmapped_owner_is_refused() {
    let mut spec = Container::default();
    let namespaces = spec.namespaces.mut_or_insert_default();
    namespaces
        .uid_mappings
        .push(bulkhead_agent_protocol::agent::IdMapping {
            container_id: 1,
            host_id: 1000,
            size: 1,
            ..Default::default()
        });
    let error = store(&spec).expect_err("0 is not mapped").to_string();
    assert!(error.contains("/dev/null: mapping its uid"), "{error}");
}

/// As the shim leaves it: read-only on the host, with files and links in the places of the nodes.
#[test]
fn a_read_only_root_has_its_devices_bound_over_files() {
    use nix::mount::{MsFlags, mount};
    let (directory, _) = root();
    let path = directory.path().join("root");
    let dev = path.join("dev");
    fs::create_dir(&dev).expect("mkdir");
    for (node, ..) in DEFAULT_NODES {
        fs::write(path.join(&node[1..]), "").expect("a file");
    }
    for (link, target, _) in LINKS {
        symlink(target, path.join(&link[1..])).expect("a link");
    }
    crate::stage::mounts::testing::in_mount_namespace(|| {
        let bind = |flags| mount(Some(&path), &path, None::<&str>, flags, None::<&str>);
        bind(MsFlags::MS_BIND).expect("bind");
        bind(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).expect("read-only");
        let root = RootDir::open(&path).expect("open");
        make(&root, &Container::default(), None).unwrap_or_else(|e| panic!("{e}"));
        for (node, major, minor) in DEFAULT_NODES {
            let status = fs::symlink_metadata(path.join(&node[1..])).expect(node);
            let number = stat::makedev(major.into(), minor.into());
            assert_eq!(status.rdev(), number, "{node}");
        }
        fs::write(dev.join("null"), "x").expect("it is the null device");
        fs::write(dev.join("new"), "x").expect_err("the root is read-only");
        String::new()
    });
}
