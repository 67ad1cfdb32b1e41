//! Whole roots in mount namespaces of their own, judged by /proc/self/mountinfo and by what a process inside can do.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use bulkhead_agent_protocol::agent::namespaces::Kind;
use bulkhead_agent_protocol::agent::{Device, IdMapping, Mount, device};
use nix::fcntl::{OFlag, openat};
use nix::libc::{
    MS_BIND, MS_NOATIME, MS_NODEV, MS_NODIRATIME, MS_NOEXEC, MS_NOSUID, MS_NOSYMFOLLOW, MS_RDONLY,
    MS_REC, MS_RELATIME, MS_SLAVE, MS_STRICTATIME, MS_SYNCHRONOUS, MS_UNBINDABLE,
};
use nix::sys::stat::Mode;

use super::*;
use crate::container::mounts::testing::{in_child, in_mount_namespace};

/// An image's root and a directory beside it, for sources and canaries.
struct Image {
    _directory: tempfile::TempDir,
    root: PathBuf,
    beside: PathBuf,
}

fn image() -> Image {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (root, beside) = (
        directory.path().join("root"),
        directory.path().join("beside"),
    );
    for path in [&root, &beside] {
        fs::create_dir(path).expect("mkdir");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    Image {
        _directory: directory,
        root,
        beside,
    }
}

impl Image {
    fn spec(&self, mounts: Vec<Mount>) -> Container {
        Container {
            root: self.root.to_str().expect("text").to_owned(),
            mounts,
            ..Container::default()
        }
    }

    /// A directory or file beside the root.
    fn source(&self, name: &str) -> String {
        self.beside.join(name).to_str().expect("text").to_owned()
    }

    fn directory(&self, name: &str) -> String {
        let path = self.source(name);
        fs::create_dir_all(&path).expect("mkdir");
        path
    }
}

fn new(fstype: &str, destination: &str, flags: u64, data: &str) -> Mount {
    Mount {
        destination: destination.to_owned(),
        fstype: fstype.to_owned(),
        source: fstype.to_owned(),
        flags,
        data: data.to_owned(),
        ..Mount::default()
    }
}

fn bind(source: &str, destination: &str, flags: u64) -> Mount {
    Mount {
        destination: destination.to_owned(),
        source: source.to_owned(),
        flags: MS_BIND | flags,
        ..Mount::default()
    }
}

fn proc() -> Mount {
    new("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "")
}

fn build(spec: &Container) -> Result<Prepared, MountError> {
    let sources = Sources::open(spec)?;
    let fds = sources.into_fds();
    prepare(spec, Sources::from_fds(spec, fds)?)
}

/// Enters the container of `spec` for good, in a child's mount namespace.
fn enter(spec: &Container) {
    let prepared = build(spec).unwrap_or_else(|e| panic!("{e}"));
    let entered = prepared.enter_root().unwrap_or_else(|e| panic!("{e}"));
    entered.seal(spec).unwrap_or_else(|e| panic!("{e}"));
}

/// The error that building `spec` ends with.
fn refusal(spec: &Container) -> String {
    in_mount_namespace(|| match build(spec) {
        Ok(_) => panic!("it was built"),
        Err(error) => error.to_string(),
    })
}

#[derive(Debug, Clone)]
struct Line {
    options: Vec<String>,
    propagation: Vec<String>,
    fstype: String,
    superblock: Vec<String>,
}

impl Line {
    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }
}

/// The host's /proc, by which a child sees its mounts whatever it has mounted.
fn proc_fd() -> OwnedFd {
    RootDir::open(Path::new("/proc"))
        .and_then(|root| root.resolve(Path::new("/")))
        .expect("/proc")
}

/// Mount point -> the topmost mount there.
fn mountinfo(proc_fd: &OwnedFd) -> HashMap<String, Line> {
    let mut text = String::new();
    let pid = nix::unistd::getpid();
    let path = format!("{pid}/mountinfo");
    let fd = openat(proc_fd, path.as_str(), OFlag::O_RDONLY, Mode::empty()).expect("mountinfo");
    fs::File::from(fd).read_to_string(&mut text).expect("read");
    let split = |text: &str| text.split(',').map(str::to_owned).collect();
    text.lines()
        .map(|line| {
            let (before, after) = line.split_once(" - ").expect("a separator");
            let before: Vec<&str> = before.split(' ').collect();
            let after: Vec<&str> = after.split(' ').collect();
            let parsed = Line {
                options: split(before[5]),
                propagation: before[6..].iter().map(|s| (*s).to_owned()).collect(),
                fstype: after[0].to_owned(),
                superblock: split(after[2]),
            };
            (before[4].to_owned(), parsed)
        })
        .collect()
}

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
        // A source that forbids everything.
        let tmpfs = filesystem::create(&new("tmpfs", "/", all, ""), None, false).expect("tmpfs");
        let target = RootDir::open(Path::new(&strict)).expect("open");
        sys::move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
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
fn the_old_root_is_gone_after_the_pivot() {
    let image = image();
    fs::write(image.beside.join("secret"), "of the host").expect("write");
    let spec = image.spec(vec![proc()]);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        let mut points: Vec<&str> = mounts.keys().map(String::as_str).collect();
        points.sort_unstable();
        assert_eq!(points, ["/", "/proc"]);
        assert_eq!(std::env::current_dir().expect("cwd"), Path::new("/"));
        let secret = image.beside.join("secret");
        assert!(fs::read(&secret).is_err() && fs::read(Path::new("/..").join(&secret)).is_err());
        // A second chroot and climbing out of it, the classic way back.
        fs::create_dir("/jail").expect("mkdir");
        nix::unistd::chroot("/jail").expect("chroot");
        for _ in 0..64 {
            nix::unistd::chdir("..").expect("chdir");
        }
        nix::unistd::chroot(".").expect("chroot");
        assert!(fs::read(&secret).is_err());
        String::new()
    });
}

#[test]
fn links_in_destinations_never_lead_out_of_the_root() {
    let image = image();
    let source = image.directory("source");
    fs::write(image.beside.join("source/mark"), "").expect("write");
    let canary = image.directory("canary");
    let canary_inside = format!("root{canary}");
    symlink(&canary, image.root.join("absolute")).expect("symlink");
    symlink(
        "../../../../../../../../beside/canary",
        image.root.join("relative"),
    )
    .expect("symlink");
    symlink("/proc/self/root", image.root.join("magic")).expect("symlink");
    let error = refusal(&image.spec(vec![proc(), new("tmpfs", "/magic/c", 0, "")]));
    assert!(
        error.contains("ELOOP"),
        "a link that only the kernel understands: {error}"
    );
    symlink(&canary, image.root.join("dev")).expect("symlink");
    let spec = image.spec(vec![
        proc(),
        bind(&source, "/absolute/a", 0),
        bind(&source, "/relative/b", 0),
        bind(&source, "/../../../d", 0),
    ]);
    let outside = image.root.parent().expect("a parent").join(canary_inside);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        for point in [
            format!("{canary}/a"),
            "/beside/canary/b".to_owned(),
            "/d".to_owned(),
        ] {
            assert!(mounts.contains_key(&point), "{point}: {:?}", mounts.keys());
        }
        assert!(Path::new(&canary).join("a/mark").exists());
        assert!(
            Path::new(&canary).join("null").exists(),
            "/dev leads there too"
        );
        String::new()
    });
    assert_eq!(
        fs::read_dir(&canary).expect("read").count(),
        0,
        "nothing was made outside"
    );
    assert!(
        outside.join("a").exists(),
        "the mount points were made inside the root"
    );
}

#[test]
fn a_bind_source_behind_a_link_is_refused() {
    let image = image();
    image.directory("real");
    symlink(image.source("real"), image.beside.join("link")).expect("symlink");
    let error = refusal(&image.spec(vec![bind(&image.source("link"), "/x", 0)]));
    assert!(
        error.contains("mount /x (bind of ") && error.contains("symbolic link"),
        "{error}"
    );
    let error = refusal(&image.spec(vec![bind(&image.source("none"), "/x", 0)]));
    assert!(
        error.contains("open of the source failed: ENOENT"),
        "{error}"
    );
}

#[test]
fn mounts_over_proc_are_refused_but_for_files_that_only_inform() {
    let image = image();
    let directory = image.directory("directory");
    let file = image.source("file");
    fs::write(&file, "fake").expect("write");
    symlink("/proc/self", image.root.join("alias")).expect("symlink");
    symlink("/proc", image.root.join("p")).expect("symlink");
    for (mount, word) in [
        (bind(&directory, "/proc", 0), "only a proc file system"),
        (new("tmpfs", "/./proc/", 0, ""), "only a proc file system"),
        (bind(&directory, "/proc/sys", 0), "inside /proc"),
        (bind(&file, "/proc/self/attr/exec", 0), "inside /proc"),
        (bind(&file, "/alias/attr/exec", 0), "inside /proc"),
        (new("tmpfs", "/p", 0, ""), "inside /proc"),
        (
            bind(&file, "/p/../proc/sys/kernel/core_pattern", 0),
            "inside /proc",
        ),
        (new("tmpfs", "/proc/net", 0, ""), "inside /proc"),
    ] {
        let destination = mount.destination.clone();
        let error = refusal(&image.spec(vec![proc(), mount]));
        assert!(error.contains(word), "{destination}: {error}");
    }
    let spec = image.spec(vec![
        proc(),
        bind(&file, "/proc/meminfo", MS_RDONLY),
        bind(&file, "/proc/net/dev", 0),
    ]);
    in_mount_namespace(|| {
        enter(&spec);
        assert_eq!(fs::read_to_string("/proc/meminfo").expect("read"), "fake");
        String::new()
    });
}

#[test]
fn proc_behind_a_link_of_the_image_is_refused() {
    let image = image();
    fs::create_dir(image.root.join("elsewhere")).expect("mkdir");
    symlink("elsewhere", image.root.join("proc")).expect("symlink");
    let error = refusal(&image.spec(vec![proc()]));
    assert!(error.contains("symbolic link"), "{error}");
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
fn masked_and_readonly_paths_hide_and_hold() {
    let image = image();
    for directory in ["secrets", "config/deep", "proc"] {
        fs::create_dir_all(image.root.join(directory)).expect("mkdir");
    }
    fs::write(image.root.join("secrets/key"), "secret").expect("write");
    fs::write(image.root.join("file"), "secret").expect("write");
    fs::write(image.root.join("config/deep/value"), "old").expect("write");
    let mut spec = image.spec(vec![proc(), new("tmpfs", "/config/deep/t", 0, "")]);
    spec.masked_paths = ["/secrets", "/file", "/proc/kcore", "/none", "/file/below"]
        .map(String::from)
        .to_vec();
    spec.readonly_paths = ["/config", "/proc/sys", "/none"].map(String::from).to_vec();
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        assert_eq!(fs::read_dir("/secrets").expect("read").count(), 0);
        assert!(fs::write("/secrets/new", "").is_err());
        assert_eq!(fs::read("/file").expect("read"), b"");
        assert!(
            fs::set_permissions("/file", fs::Permissions::from_mode(0o0)).is_err(),
            "the agent's /dev/null"
        );
        assert!(fs::write("/config/deep/value", "new").is_err());
        assert!(
            fs::write("/config/deep/t/new", "new").is_err(),
            "mounts beneath are read-only too"
        );
        assert!(fs::write("/proc/sys/vm/swappiness", "60").is_err());
        let mounts = mountinfo(&proc_fd);
        assert!(
            mounts["/proc/sys"].has("nosuid") && mounts["/proc/sys"].has("noexec"),
            "flags are kept"
        );
        fs::write("/writable", "").expect("the root itself is writable");
        String::new()
    });
}

#[test]
fn a_readonly_root_and_dev_still_get_their_mount_points() {
    let image = image();
    let mut spec = image.spec(vec![
        new("tmpfs", "/dev", MS_RDONLY | MS_NOSUID, "mode=755"),
        new("tmpfs", "/dev/shm", 0, ""),
        new("tmpfs", "/made/below", 0, ""),
    ]);
    spec.root_readonly = true;
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        assert!(fs::write("/x", "").is_err() && fs::write("/dev/x", "").is_err());
        fs::write("/dev/shm/x", "").expect("write");
        fs::write("/made/below/x", "").expect("write");
        fs::write("/dev/null", "x").expect("devices work");
        let mounts = mountinfo(&proc_fd);
        assert!(mounts["/"].has("ro") && mounts["/dev"].has("ro") && mounts["/dev/shm"].has("rw"));
        String::new()
    });
}

#[test]
fn a_mount_point_missing_in_a_readonly_volume_is_a_clear_error() {
    let image = image();
    let volume = image.directory("volume");
    let error = refusal(&image.spec(vec![
        bind(&volume, "/volume", MS_RDONLY),
        new("tmpfs", "/volume/nested", 0, ""),
    ]));
    assert!(
        error.contains("mount /volume/nested (tmpfs)") && error.contains("read-only file system"),
        "{error}"
    );
    image.directory("volume/nested");
    let spec = image.spec(vec![
        bind(&volume, "/volume", MS_RDONLY),
        new("tmpfs", "/volume/nested", 0, ""),
    ]);
    in_mount_namespace(|| {
        enter(&spec);
        fs::write("/volume/nested/x", "").expect("write");
        assert!(fs::write("/volume/x", "").is_err());
        String::new()
    });
}

#[test]
fn recursive_attributes_reach_the_mounts_beneath() {
    let image = image();
    let source = image.directory("source/below");
    let source = Path::new(&source).parent().expect("a parent").to_owned();
    let mut recursive = bind(source.to_str().expect("text"), "/r", MS_REC);
    recursive.recursive_attr_set = sys::attr::RDONLY | sys::attr::NOEXEC | sys::attr::NOATIME;
    let mut plain = bind(source.to_str().expect("text"), "/p", MS_REC | MS_RDONLY);
    plain.recursive_attr_clear = sys::attr::NOSUID;
    let single = bind(source.to_str().expect("text"), "/s", 0);
    let spec = image.spec(vec![recursive, plain, single]);
    in_mount_namespace(|| {
        let tmpfs =
            filesystem::create(&new("tmpfs", "/", MS_NOSUID, ""), None, false).expect("tmpfs");
        let target = RootDir::open(&source.join("below")).expect("open");
        sys::move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
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

/// Runs `test` inside the container of `spec`, beside an agent that keeps its own mount namespace.
fn in_container(spec: &Container, test: impl FnOnce(HashMap<String, Line>)) -> String {
    in_child(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
        let proc_fd = proc_fd();
        enter(spec);
        test(mountinfo(&proc_fd));
        String::new()
    })
}

#[test]
fn propagation_is_what_the_spec_asks() {
    let image = image();
    let source = image.directory("source");
    let with = |name: &str, calls: &[u64]| {
        let mut mount = bind(&source, name, MS_REC);
        mount.propagation = calls.to_vec();
        mount
    };
    let mounts = || {
        vec![
            with("/default", &[]),
            with("/slave", &[MS_SLAVE | MS_REC]),
            with("/shared", &[MS_SHARED | MS_REC]),
            with("/private", &[MS_PRIVATE | MS_REC]),
            with("/unbindable", &[MS_UNBINDABLE]),
        ]
    };
    let run = |root_propagation: u64, expected: &[(&str, &[&str])]| {
        let mut spec = image.spec(mounts());
        spec.root_propagation = root_propagation;
        in_mount_namespace(|| {
            // The agent's volume is shared, as it has to be for events to pass at all.
            let tmpfs = filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
            let target = RootDir::open(Path::new(&source)).expect("open");
            sys::move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
            set_propagation(tmpfs.as_fd(), MS_SHARED, false).expect("shared");
            in_container(&spec, |mounts| {
                for (point, tags) in expected {
                    let found: Vec<&str> = mounts[*point]
                        .propagation
                        .iter()
                        .map(|tag| tag.split(':').next().expect("a name"))
                        .collect();
                    assert_eq!(
                        &found, tags,
                        "{point} with root propagation {root_propagation:#x}"
                    );
                }
            })
        });
    };
    let private: [(&str, &[&str]); 6] = [
        ("/", &[]),
        ("/default", &[]),
        ("/slave", &["master"]),
        ("/shared", &["shared", "master"]),
        ("/private", &[]),
        ("/unbindable", &["unbindable"]),
    ];
    run(0, &private);
    run(MS_PRIVATE | MS_REC, &private);
    run(
        MS_SLAVE | MS_REC,
        &[("/", &[]), ("/default", &["master"]), ("/private", &[])],
    );
    run(
        MS_SHARED | MS_REC,
        &[
            ("/", &["shared"]),
            ("/default", &["shared"]),
            ("/slave", &["master"]),
            ("/shared", &["shared"]),
            ("/private", &[]),
            ("/unbindable", &["unbindable"]),
        ],
    );
    run(MS_UNBINDABLE, &[("/", &["unbindable"]), ("/default", &[])]);
}

#[test]
fn a_shared_volume_of_a_shared_root_passes_mounts_on_and_others_do_not() {
    let image = image();
    let source = image.directory("source/below");
    let source = Path::new(&source).parent().expect("a parent").to_owned();
    for (root_propagation, reaches) in [(MS_SHARED | MS_REC, true), (0, false)] {
        let mut volume = bind(source.to_str().expect("text"), "/volume", MS_REC);
        volume.propagation = vec![MS_SHARED | MS_REC];
        let mut spec = image.spec(vec![volume]);
        spec.root_propagation = root_propagation;
        in_mount_namespace(|| {
            let tmpfs = filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
            let target = RootDir::open(&source).expect("open");
            sys::move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
            set_propagation(tmpfs.as_fd(), MS_SHARED, false).expect("shared");
            fs::create_dir(source.join("below")).expect("mkdir");
            let (own, agents) = (proc_fd(), source.join("below"));
            in_container(&spec, |_| {
                let inner =
                    filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
                let below = RootDir::open(Path::new("/volume/below")).expect("open");
                sys::move_mount(inner.as_fd(), below.as_fd()).expect("mount");
            });
            let seen = mountinfo(&own).contains_key(agents.to_str().expect("text"));
            assert_eq!(seen, reaches, "root propagation {root_propagation:#x}");
            String::new()
        });
    }
}

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

#[test]
fn descriptors_of_another_spec_are_refused() {
    let image = image();
    let spec = image.spec(vec![bind(&image.directory("source"), "/x", 0)]);
    let mut fds = Sources::open(&spec).expect("sources").into_fds();
    fds.pop();
    let error = Sources::from_fds(&spec, fds).expect_err("one is missing");
    assert_eq!(
        error.to_string(),
        "mount sources: got 1 descriptors, the spec needs 2"
    );
}

#[test]
fn a_container_with_a_user_namespace_gets_its_root_mounts_and_devices() {
    let image = image();
    // The way to the root belongs to the agent alone, as in the share.
    fs::set_permissions(
        image.root.parent().expect("a parent"),
        fs::Permissions::from_mode(0o700),
    )
    .expect("chmod");
    nix::unistd::chown(&image.root, Some(100_000.into()), Some(100_000.into())).expect("chown");
    let source = image.directory("source");
    fs::write(image.beside.join("source/file"), "contents").expect("write");
    let mapping = || IdMapping {
        container_id: 0,
        host_id: 100_000,
        size: 65_536,
        ..IdMapping::default()
    };
    let mut spec = image.spec(vec![
        proc(),
        new("tmpfs", "/dev", MS_NOSUID, "mode=755"),
        new(
            "devpts",
            "/dev/pts",
            MS_NOSUID | MS_NOEXEC,
            "newinstance,ptmxmode=0666",
        ),
        new("mqueue", "/dev/mqueue", MS_NOSUID, ""),
        new(
            "sysfs",
            "/sys",
            MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
            "",
        ),
        bind(&source, "/data", MS_RDONLY),
    ]);
    let namespaces = spec.namespaces.mut_or_insert_default();
    namespaces.user = Kind::NEW.into();
    namespaces.uid_mappings = vec![mapping()];
    namespaces.gid_mappings = vec![mapping()];
    spec.devices = vec![Device {
        path: "/dev/fuse".to_owned(),
        kind: device::Kind::CHAR.into(),
        major: 10,
        minor: 229,
        mode: 0o640,
        uid: 3,
        gid: 4,
        ..Device::default()
    }];
    spec.masked_paths = vec!["/proc/version".to_owned(), "/proc/acpi".to_owned()];
    spec.readonly_paths = vec!["/proc/sys".to_owned()];
    spec.root_readonly = true;
    in_mount_namespace(|| {
        let sources = Sources::open(&spec).unwrap_or_else(|e| panic!("{e}"));
        user_namespace_child(&spec, sources);
        String::new()
    });
}

/// The container of `spec` in namespaces of its own, all owned by a new user namespace.
fn user_namespace_child(spec: &Container, sources: Sources) {
    use nix::sched::{CloneFlags, unshare};
    use nix::unistd::{pipe, read, write};
    let (unshared, tell_unshared) = pipe().expect("pipe");
    let (mapped, tell_mapped) = pipe().expect("pipe");
    let parent = nix::unistd::getpid();
    let namespaces = spec.namespaces.get_or_default().clone();
    // A sibling with the agent's rights writes the maps of this process once it has unshared.
    // SAFETY: the child is a copy of this single-threaded process and leaves by _exit.
    let mapper = match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Child => {
            let mut byte = [0];
            let _ = read(&unshared, &mut byte);
            let result = crate::container::idmap::write_maps(
                parent.as_raw(),
                &namespaces.uid_mappings,
                &namespaces.gid_mappings,
            );
            let _ = write(&tell_mapped, b"m");
            // SAFETY: _exit ends the process.
            unsafe { nix::libc::_exit(i32::from(result.is_err())) }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET,
    )
    .expect("unshare");
    write(&tell_unshared, b"u").expect("write");
    let mut byte = [0];
    read(&mapped, &mut byte).expect("read");
    let status = nix::sys::wait::waitpid(mapper, None).expect("wait");
    assert!(
        matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)),
        "{status:?}"
    );
    nix::unistd::setgroups(&[]).expect("setgroups");
    nix::unistd::setresgid(0.into(), 0.into(), 0.into()).expect("setresgid");
    nix::unistd::setresuid(0.into(), 0.into(), 0.into()).expect("setresuid");
    // The first child is PID 1 of the new pid namespace, whose /proc it mounts.
    in_child(|| {
        let prepared = prepare(spec, sources).unwrap_or_else(|e| panic!("{e}"));
        let entered = prepared.enter_root().unwrap_or_else(|e| panic!("{e}"));
        entered.seal(spec).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(fs::read_to_string("/data/file").expect("read"), "contents");
        fs::write("/dev/null", "x").expect("the null device opens");
        assert!(fs::File::open("/dev/zero").is_ok());
        let fuse = fs::metadata("/dev/fuse").expect("stat");
        assert_eq!(
            (fuse.uid(), fuse.gid(), fuse.mode() & 0o7777),
            (3, 4, 0o640)
        );
        assert_eq!(fuse.rdev(), nix::sys::stat::makedev(10, 229));
        assert_eq!(fs::read("/proc/version").expect("masked"), b"");
        assert_eq!(
            fs::read_link("/proc/self").expect("own pid namespace"),
            Path::new("1")
        );
        assert!(fs::write("/proc/sys/kernel/domainname", "x").is_err());
        assert!(fs::write("/x", "").is_err(), "read-only root");
        String::new()
    });
}
