use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

use super::*;

/// A directory with a root in it, and everything that is in either, so that what appears outside of the root is seen.
struct World(tempfile::TempDir);

impl World {
    fn new(directories: &[&str]) -> World {
        let dir = tempfile::tempdir().unwrap();
        for directory in ["root", "outside"].iter().chain(directories) {
            fs::create_dir_all(dir.path().join(directory)).unwrap();
        }
        World(dir)
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root")
    }

    fn link(&self, target: &str, name: &str) {
        symlink(target, self.root().join(name)).unwrap();
    }

    fn make(&self, points: &[MountPoint]) -> Result<(), Error> {
        make(&self.root(), points, (0, 0))
    }

    /// Names relative to the directory that the root is in.
    fn all(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut left = vec![self.0.path().to_path_buf()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let path = entry.path();
                let name = path.strip_prefix(self.0.path()).unwrap();
                found.insert(name.to_str().unwrap().to_owned());
                if entry.file_type().unwrap().is_dir() {
                    left.push(path);
                }
            }
        }
        found
    }

    /// What `points` adds.
    #[track_caller]
    fn adds(&self, points: &[MountPoint]) -> Vec<String> {
        let before = self.all();
        self.make(points).unwrap();
        self.all().difference(&before).cloned().collect()
    }
}

fn point(path: &str, kind: PointKind) -> MountPoint {
    MountPoint {
        path: path.into(),
        kind,
        covered: true,
    }
}

fn directory(path: &str) -> MountPoint {
    point(path, PointKind::Directory)
}

fn file(path: &str) -> MountPoint {
    point(path, PointKind::File)
}

#[test]
fn what_is_missing_is_made_with_its_parents_and_what_is_there_stays() {
    let world = World::new(&["root/proc"]);
    fs::set_permissions(world.root().join("proc"), fs::Permissions::from_mode(0o511)).unwrap();
    let points = [
        directory("/proc"),
        directory("//dev/./"),
        file("/etc/deep/hosts"),
        directory("/var/secrets/token"),
    ];
    let expected = [
        "root/dev",
        "root/etc",
        "root/etc/deep",
        "root/etc/deep/hosts",
        "root/var",
        "root/var/secrets",
        "root/var/secrets/token",
    ];
    assert_eq!(world.adds(&points), expected);
    assert_eq!(world.adds(&points), [""; 0]);
    let kind = |name: &str| {
        let found = fs::symlink_metadata(world.root().join(name)).unwrap();
        (found.is_dir(), found.mode() & 0o7777)
    };
    assert_eq!(kind("proc"), (true, 0o511));
    assert_eq!(kind("var/secrets"), (true, DIRECTORY_MODE.bits()));
    assert_eq!(kind("etc/deep/hosts"), (false, FILE_MODE.bits()));
}

#[test]
fn what_lies_beneath_an_earlier_mount_is_not_made_in_the_root() {
    let world = World::new(&[]);
    let points = [
        // Before /run is covered.
        directory("/run/early"),
        directory("/run"),
        directory("/run/secrets/token"),
        file("/run/.containerenv"),
        // Beside it.
        directory("/running"),
    ];
    assert_eq!(
        world.adds(&points),
        ["root/run", "root/run/early", "root/running"]
    );
}

#[test]
fn a_mount_is_known_by_its_place_and_not_by_its_name() {
    let world = World::new(&["root/var", "root/run"]);
    world.link("../run", "var/run");
    let points = [
        directory("/run"),
        // kubelet's: in the tmpfs on /run.
        directory("/var/run/secrets/kubernetes.io/serviceaccount"),
    ];
    assert_eq!(world.adds(&points), [""; 0]);
    let points = [directory("/var/run"), directory("/run/x")];
    assert_eq!(world.adds(&points), [""; 0]);
}

#[test]
fn links_lead_inside_the_root_whatever_they_name() {
    for (link, made) in [
        ("/absolute", "root/absolute"),
        ("../../outside/relative", "root/outside/relative"),
        ("/../../outside/up", "root/outside/up"),
        ("/proc/self/cwd/x", "root/proc/self/cwd/x"),
        ("down", "root/etc/down"),
    ] {
        for kind in [PointKind::Directory, PointKind::File] {
            let world = World::new(&["root/etc"]);
            world.link(link, "etc/link");
            let added = world.adds(&[point("/etc/link", kind)]);
            assert!(added.contains(&made.to_string()), "{link}: {added:?}");
            assert!(
                added.iter().all(|name| name.starts_with("root/")),
                "{link}: {added:?}"
            );
        }
    }
}

#[test]
fn a_way_through_dots_cannot_leave_the_root() {
    let world = World::new(&[]);
    assert_eq!(
        world.adds(&[directory("/../../outside/x/../y")]),
        ["root/outside", "root/outside/x", "root/outside/y"]
    );
}

#[test]
fn links_in_a_circle_end() {
    let world = World::new(&[]);
    world.link("b", "a");
    world.link("a", "b");
    let error = world.make(&[directory("/a/x")]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ELOOP));
    assert!(error.to_string().contains("/a/x"), "{error}");
}

#[test]
fn a_file_on_the_way_is_an_error_and_a_pipe_is_not_opened() {
    let world = World::new(&[]);
    nix::unistd::mkfifo(&world.root().join("pipe"), Mode::S_IRWXU).unwrap();
    let error = world.make(&[directory("/pipe/x")]).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOTDIR));
    assert_eq!(world.adds(&[file("/pipe")]), [""; 0]);
}

#[test]
fn devices_stand_under_their_own_names() {
    let world = World::new(&["root/dev"]);
    world.link("/outside-of-dev", "dev/null");
    world.link("elsewhere", "dev/ptmx");
    world.link("elsewhere", "dev/fd");
    let node = |path| MountPoint {
        covered: false,
        ..point(path, PointKind::Node)
    };
    let link = |path, target, replace| point(path, PointKind::Link(target, replace));
    let added = world.adds(&[
        node("/dev/null"),
        node("/dev/deep/node"),
        link("/dev/ptmx", "pts/ptmx", true),
        link("/dev/fd", "/proc/self/fd", false),
        link("/dev/stdin", "/proc/self/fd/0", false),
    ]);
    assert_eq!(
        added,
        ["root/dev/deep", "root/dev/deep/node", "root/dev/stdin"]
    );
    let dev = |name: &str| world.root().join("dev").join(name);
    assert!(fs::symlink_metadata(dev("null")).unwrap().is_file());
    assert_eq!(fs::read_link(dev("ptmx")).unwrap(), Path::new("pts/ptmx"));
    assert_eq!(fs::read_link(dev("fd")).unwrap(), Path::new("elsewhere"));
}

#[test]
fn a_user_namespaces_root_owns_what_is_made() {
    if !Uid::effective().is_root() {
        panic!("files are given away: run this as root");
    }
    let world = World::new(&["root/etc"]);
    make(&world.root(), &[file("/etc/new/file")], (100_000, 200_000)).unwrap();
    for name in ["etc/new", "etc/new/file"] {
        let found = fs::metadata(world.root().join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (100_000, 200_000), "{name}");
    }
    assert_eq!(fs::metadata(world.root().join("etc")).unwrap().uid(), 0);
}

#[test]
fn a_mode_is_that_of_runc_whatever_our_umask_is() {
    let world = World::new(&[]);
    // Of this thread alone: libtest's other tests go on.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            stat::umask(Mode::from_bits_truncate(0o077));
            world.make(&[directory("/d"), file("/f")]).unwrap();
        });
    });
    let mode = |name: &str| fs::metadata(world.root().join(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("d"), DIRECTORY_MODE.bits());
    assert_eq!(mode("f"), FILE_MODE.bits());
}
