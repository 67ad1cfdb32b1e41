use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

/// A root with hostile links, and beside it a directory that nothing may touch.
struct Tree {
    _directory: tempfile::TempDir,
    canary: PathBuf,
    root: RootDir,
    path: PathBuf,
}

fn tree() -> Tree {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let canary = directory.path().join("canary");
    let path = directory.path().join("root");
    fs::create_dir_all(&canary).expect("mkdir");
    fs::create_dir_all(path.join("usr/lib")).expect("mkdir");
    let root = RootDir::open(&path).expect("open");
    Tree {
        _directory: directory,
        canary,
        root,
        path,
    }
}

impl Tree {
    fn link(&self, target: impl AsRef<Path>, name: &str) {
        symlink(target, self.path.join(name)).expect("symlink");
    }

    fn make(&self, path: &str, missing: Missing) -> Result<(u64, u64), Errno> {
        let fd = self.root.resolve_or_create(Path::new(path), missing)?;
        let status = stat::fstat(&fd)?;
        Ok((status.st_dev, status.st_ino))
    }

    fn id(&self, path: &str) -> (u64, u64) {
        let status = fs::symlink_metadata(self.path.join(path)).expect("it exists in the root");
        (status.dev(), status.ino())
    }

    fn canary_is_untouched(&self) {
        assert_eq!(fs::read_dir(&self.canary).expect("read").count(), 0);
    }
}

#[test]
fn an_absolute_link_out_of_the_root_leads_into_the_root() {
    let tree = tree();
    tree.link(&tree.canary, "escape");
    let inside = tree
        .canary
        .strip_prefix("/")
        .expect("absolute")
        .to_path_buf();
    let made = tree.make("/escape/file", Missing::File).expect("made");
    assert_eq!(made, tree.id(inside.join("file").to_str().expect("text")));
    tree.canary_is_untouched();
}

#[test]
fn a_relative_link_above_the_root_stays_in_the_root() {
    let tree = tree();
    tree.link("../../../../../../canary", "usr/lib/escape");
    let made = tree
        .make("/usr/lib/escape/directory", Missing::Directory)
        .expect("made");
    assert_eq!(made, tree.id("canary/directory"));
    tree.canary_is_untouched();
}

#[test]
fn dots_above_the_root_stay_in_the_root() {
    let tree = tree();
    let made = tree
        .make("/../../canary/x", Missing::Directory)
        .expect("made");
    assert_eq!(made, tree.id("canary/x"));
    tree.canary_is_untouched();
}

#[test]
fn a_dangling_link_gets_its_target_made_inside() {
    let tree = tree();
    fs::create_dir(tree.path.join("etc")).expect("mkdir");
    tree.link("../run/resolve/stub.conf", "etc/resolv.conf");
    let made = tree.make("/etc/resolv.conf", Missing::File).expect("made");
    assert_eq!(made, tree.id("run/resolve/stub.conf"));
    assert!(
        fs::symlink_metadata(tree.path.join("etc/resolv.conf"))
            .expect("stat")
            .is_symlink()
    );
}

#[test]
fn links_that_circle_are_an_error() {
    let tree = tree();
    tree.link("b", "a");
    tree.link("a", "b");
    assert_eq!(tree.make("/a/x", Missing::File), Err(Errno::ELOOP));
    // A link that doubles the path at each step ends too.
    tree.link("grow/grow", "grow");
    assert_eq!(tree.make("/grow/x", Missing::File), Err(Errno::ELOOP));
}

#[test]
fn links_of_proc_are_text_and_not_magic() {
    let tree = tree();
    fs::create_dir_all(tree.path.join("proc/self")).expect("mkdir");
    let proc_root = RootDir::open(Path::new("/proc")).expect("open");
    // /proc/self/root would lead to the host's root; as text it is "/", which is the root given: /proc itself.
    let error = proc_root.resolve(Path::new("/self/root/etc")).err();
    assert!(
        matches!(error, Some(Errno::ELOOP | Errno::ENOENT)),
        "{error:?}"
    );
    let error = proc_root
        .resolve_or_create(Path::new("/self/root/etc/passwd"), Missing::File)
        .err();
    assert!(error.is_some());
}

#[test]
fn a_file_on_the_way_is_an_error() {
    let tree = tree();
    fs::write(tree.path.join("file"), "").expect("write");
    assert_eq!(tree.make("/file/x", Missing::File), Err(Errno::ENOTDIR));
    assert!(
        tree.make("/file", Missing::Directory).is_ok(),
        "what exists is returned as it is"
    );
}

#[test]
fn a_parent_is_resolved_and_the_last_name_is_not() {
    let tree = tree();
    tree.link(&tree.canary, "node");
    let (parent, name) = tree.root.parent(Path::new("/dev/../node")).expect("parent");
    assert_eq!(name, "node");
    let status = stat::fstat(&parent).expect("fstat");
    assert_eq!(status.st_ino, tree.id(".").1);
    assert!(tree.root.parent(Path::new("/")).is_err());
    assert!(tree.root.parent(Path::new("/a/..")).is_err());
}

#[test]
fn exchanging_a_directory_for_a_link_meanwhile_never_leads_outside() {
    let tree = tree();
    fs::create_dir(tree.path.join("swing")).expect("mkdir");
    tree.link(&tree.canary, "evil");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (a, b) = (tree.path.join("swing"), tree.path.join("evil"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                nix::fcntl::renameat2(fcntl::AT_FDCWD, &a, fcntl::AT_FDCWD, &b, flags)
                    .expect("exchange");
            }
        });
        for n in 0..300 {
            // Success or an error are both right; making something in the canary is not.
            let _ = tree.make(&format!("/swing/d{n}/f"), Missing::File);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    tree.canary_is_untouched();
}

/// Any path in a root full of links: what it leads to lies in the root, and is made there.
fn hostile_paths(data: &[u8]) {
    let tree = tree();
    for (target, name) in [
        ("../../canary", "up"),
        ("/canary/x", "absolute"),
        ("loop", "loop"),
        ("/proc/self/root", "magic"),
        ("usr/lib/../../..", "deep"),
        ("dangling/a", "dangling"),
        ("..", "usr/parent"),
        ("/usr/up/a", "usr/lib/far"),
    ] {
        tree.link(target, name);
    }
    let inside = fs::metadata(&tree.path).unwrap().dev();
    for (nth, path) in data.split(|&byte| byte == b'\n').take(16).enumerate() {
        let missing = [Missing::Directory, Missing::File][nth % 2];
        let path = Path::new(OsStr::from_bytes(path));
        let found = [
            tree.root.resolve(path),
            tree.root.resolve_or_create(path, missing),
            tree.root.parent(path).map(|(parent, _)| parent),
        ];
        for fd in found.into_iter().flatten() {
            // The name that the kernel has for it, from the host's root.
            let name = fs::read_link(proc_path(&fd)).unwrap();
            assert!(name.starts_with(&tree.path), "{path:?} leads to {name:?}");
            assert_eq!(stat::fstat(&fd).unwrap().st_dev, inside);
        }
    }
    tree.canary_is_untouched();
}

#[test]
fn fuzz_agent_paths() {
    bulkhead_fuzz::run("agent_paths", hostile_paths);
}
