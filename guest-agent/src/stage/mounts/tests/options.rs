//! Flags, options and attributes of mounts.

use super::*;

#[test]
fn every_flag_of_a_bind_mount_is_set_and_cleared() {
    const FLAGS: [(u64, &str); 6] = [
        (MS_RDONLY, "ro"),
        (MS_NOSUID, "nosuid"),
        (MS_NODEV, "nodev"),
        (MS_NOEXEC, "noexec"),
        (MS_NODIRATIME, "nodiratime"),
        (MS_NOSYMFOLLOW, "nosymfollow"),
    ];
    let image = image();
    let plain = image.directory("plain");
    let strict = image.directory("strict");
    let all = FLAGS.iter().fold(0, |all, (flag, _)| all | flag);
    let mut mounts: Vec<Mount> = FLAGS
        .iter()
        .map(|(flag, name)| bind(&plain, &format!("/set-{name}"), *flag))
        .collect();
    for (flag, name) in FLAGS {
        let mut mount = bind(&strict, &format!("/clear-{name}"), 0);
        mount.clear_flags = flag;
        mounts.push(mount);
    }
    mounts.push(bind(&strict, "/kept", 0));
    for (flag, name) in [
        (MS_NOATIME, "noatime"),
        (MS_RELATIME, "relatime"),
        (MS_STRICTATIME, "strict"),
    ] {
        mounts.push(bind(&plain, &format!("/time-{name}"), flag));
    }
    let spec = image.spec(mounts);
    in_mount_namespace(|| {
        // A source that forbids nothing, and one that forbids everything.
        for (path, flags) in [(&plain, 0), (&strict, all)] {
            let tmpfs = new("tmpfs", "/", flags, "");
            let tmpfs = filesystem::create(&tmpfs, None, false).expect("tmpfs");
            let target = RootDir::open(Path::new(path)).expect("open");
            move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
        }
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        for (_, name) in FLAGS {
            let set = &mounts[&format!("/set-{name}")];
            let cleared = &mounts[&format!("/clear-{name}")];
            for (_, other) in FLAGS {
                assert_eq!(set.has(other), other == name, "set {name}: {set:?}");
                assert_eq!(
                    cleared.has(other),
                    other != name,
                    "clear {name}: {cleared:?}"
                );
            }
            assert!(
                mounts["/kept"].has(name),
                "what the source forbids stays forbidden"
            );
        }
        assert!(mounts["/time-noatime"].has("noatime"));
        assert!(mounts["/time-relatime"].has("relatime"));
        let strict = &mounts["/time-strict"];
        assert!(
            !strict.has("relatime") && !strict.has("noatime"),
            "{strict:?}"
        );
        String::new()
    });
}

#[test]
fn every_file_system_is_mounted_with_its_options() {
    let image = image();
    let spec = image.spec(vec![
        proc(),
        new(
            "tmpfs",
            "/dev",
            MS_NOSUID | MS_STRICTATIME,
            "mode=755,size=65536k",
        ),
        new(
            "devpts",
            "/dev/pts",
            MS_NOSUID | MS_NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        new(
            "tmpfs",
            "/dev/shm",
            MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_SYNCHRONOUS,
            "mode=1777,size=1m",
        ),
        new(
            "mqueue",
            "/dev/mqueue",
            MS_NOSUID | MS_NOEXEC | MS_NODEV,
            "",
        ),
        new(
            "sysfs",
            "/sys",
            MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY,
            "",
        ),
        new(
            "cgroup",
            "/sys/fs/cgroup",
            MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY,
            "none",
        ),
    ]);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        let types: Vec<&str> = [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/shm",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
        ]
        .map(|path| mounts[path].fstype.as_str())
        .to_vec();
        assert_eq!(
            types,
            [
                "proc", "tmpfs", "devpts", "tmpfs", "mqueue", "sysfs", "cgroup2"
            ]
        );
        assert!(mounts["/sys"].has("ro") && mounts["/sys/fs/cgroup"].has("ro"));
        assert!(mounts["/proc"].has("noexec") && mounts["/proc"].has("rw"));
        let has = |path: &str, option: &str| mounts[path].superblock.iter().any(|o| o == option);
        assert!(has("/dev/shm", "size=1024k") && has("/dev/shm", "sync"));
        assert!(
            has("/dev/pts", "ptmxmode=666")
                && has("/dev/pts", "mode=620")
                && has("/dev/pts", "gid=5")
        );
        // The devpts is the container's own.
        assert_eq!(fs::read_dir("/dev/pts").expect("read").count(), 1);
        assert_eq!(
            fs::metadata("/dev/shm").expect("stat").mode() & 0o7777,
            0o1777
        );
        assert_eq!(
            fs::read_link("/dev/ptmx").expect("link"),
            Path::new("pts/ptmx")
        );
        assert!(
            fs::metadata("/dev/ptmx")
                .expect("stat")
                .file_type()
                .is_char_device()
        );
        fs::write("/dev/null", "x").expect("the null device");
        String::new()
    });
}

#[test]
fn errors_name_the_mount_and_what_the_kernel_says() {
    let image = image();
    let file = image.source("file");
    fs::write(&file, "").expect("write");
    fs::create_dir(image.root.join("directory")).expect("mkdir");
    let mut copy_up = new("proc", "/x", 0, "");
    copy_up.copy_up = true;
    let mut mapped = new("tmpfs", "/x", 0, "");
    mapped.uid_mappings.push(IdMapping::default());
    let mut two = new("tmpfs", "/x", 0, "");
    two.propagation.push(MS_SLAVE | MS_UNBINDABLE);
    for (mount, words) in [
        (
            new("tmpfs", "/x", 0, "size=lots"),
            vec![
                "mount /x (tmpfs)",
                "option size=lots",
                "EINVAL",
                "Bad value",
            ],
        ),
        (
            new("tmpfs", "/x", 0, "nonsense"),
            vec!["option nonsense", "Unknown parameter"],
        ),
        (
            new("nosuchfs", "/x", 0, ""),
            vec!["nosuchfs", "ENODEV", "kernel does not have"],
        ),
        (new("tmpfs", "/", 0, ""), vec!["root.path"]),
        (new("tmpfs", "/a/..", 0, ""), vec!["root.path"]),
        (copy_up, vec!["tmpcopyup"]),
        (mapped, vec!["bind mounts only"]),
        (two, vec!["exactly one"]),
        (
            bind(&file, "/directory", 0),
            vec!["mount /directory", "the mount point is"],
        ),
    ] {
        let error = refusal(&image.spec(vec![mount]));
        for word in words {
            assert!(error.contains(word), "{error}");
        }
    }
}

#[test]
fn recursive_attributes_reach_the_mounts_beneath() {
    let image = image();
    let source = image.directory("source/below");
    let source = Path::new(&source).parent().expect("a parent").to_owned();
    let mut recursive = bind(source.to_str().expect("text"), "/r", MS_REC);
    recursive.recursive_attr_set =
        linux::mount::attr::RDONLY | linux::mount::attr::NOEXEC | linux::mount::attr::NOATIME;
    let mut plain = bind(source.to_str().expect("text"), "/p", MS_REC | MS_RDONLY);
    plain.recursive_attr_clear = linux::mount::attr::NOSUID;
    let single = bind(source.to_str().expect("text"), "/s", 0);
    let spec = image.spec(vec![recursive, plain, single]);
    in_mount_namespace(|| {
        let tmpfs =
            filesystem::create(&new("tmpfs", "/", MS_NOSUID, ""), None, false).expect("tmpfs");
        let target = RootDir::open(&source.join("below")).expect("open");
        move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        for option in ["ro", "noexec", "noatime"] {
            assert!(
                mounts["/r"].has(option) && mounts["/r/below"].has(option),
                "{option}"
            );
        }
        assert!(
            mounts["/p"].has("ro") && mounts["/p/below"].has("rw"),
            "ro is not recursive"
        );
        assert!(!mounts["/p/below"].has("nosuid") && mounts["/r/below"].has("nosuid"));
        assert!(
            !mounts.contains_key("/s/below"),
            "bind without rbind brings one mount"
        );
        String::new()
    });
}

#[test]
fn a_remount_changes_what_is_mounted_already() {
    use nix::libc::MS_REMOUNT;
    let image = image();
    let again = new("tmpfs", "/x", MS_REMOUNT | MS_NOSUID, "size=2m");
    let spec = image.spec(vec![
        new("tmpfs", "/x", MS_NODEV, "size=1m"),
        again,
        new("", "/x", MS_REMOUNT | MS_NOATIME, ""),
    ]);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let x = &mountinfo(&proc_fd)["/x"];
        assert!(x.superblock.iter().any(|o| o == "size=2048k"), "{x:?}");
        assert!(
            x.has("nosuid") && x.has("noatime") && x.has("nodev"),
            "{x:?}"
        );
        String::new()
    });
    let error = refusal(&image.spec(vec![new("", "/nothing", MS_REMOUNT, "")]));
    assert!(
        error.contains("mount /nothing") && error.contains("ENOENT"),
        "{error}"
    );
}
