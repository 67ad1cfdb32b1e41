//! Mounts whose making or flags differ between a host and a guest: in roots that are read-only, and beneath volumes.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::{Bundle, Host, Ran, Runtime, must, run};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::same;

/// A mount of the host that goes with this.
struct Mounted(PathBuf);

impl Mounted {
    fn new(words: &[&str], at: &Path) -> Mounted {
        fs::create_dir_all(at).expect("a directory");
        let mut command = Command::new("mount");
        must(command.args(words).arg(at));
        Mounted(at.into())
    }

    fn tmpfs(options: &str, at: &Path) -> Mounted {
        Mounted::new(&["-t", "tmpfs", "-o", options, "tmpfs"], at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = run(Command::new("umount").arg(&self.0)).status == 0;
        // A second panic would hide the first.
        if !unmounted && !std::thread::panicking() {
            panic!("{} is busy", self.0.display());
        }
    }
}

/// Everything in a root, with kind, mode and owner.
fn listing(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![root.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            let status = fs::symlink_metadata(&path).expect("it is there");
            let name = path.strip_prefix(root).expect("in the root").display();
            let (uid, gid) = (status.uid(), status.gid());
            found.push(format!("{name} {:o} {uid}:{gid}", status.mode()));
            if status.is_dir() {
                left.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A bundle of which nothing but /bin is left, with a read-only root.
fn bare() -> Bundle {
    let bundle = Bundle::busybox().edit(|config| config["root"]["readonly"] = json!(true));
    for name in ["dev", "etc", "proc", "sys", "tmp", "root"] {
        fs::remove_dir_all(bundle.root().join(name)).expect("busybox's root has it");
    }
    bundle
}

fn add(config: &mut Value, mount: Value) {
    let mounts = config["mounts"].as_array_mut().expect("a list");
    mounts.push(mount);
}

/// Runs what `bundle` makes under both; what is printed and what is in the root afterwards has to be the same.
#[track_caller]
fn same_root(bundle: impl Fn() -> Bundle, script: &str) -> String {
    let run = |runtime: Runtime| -> (Ran, Vec<String>) {
        let bundle = bundle().script(script);
        let ran = bundle.run_with(runtime, &[]);
        (ran, listing(&bundle.root()))
    };
    let (control, expected) = run(Runtime::Runc);
    assert_eq!(control.status, 0, "runc fails it: a bad test: {control}");
    let host = Host::now();
    let (ours, found) = run(Runtime::Bulkhead);
    assert_eq!(ours.status, 0, "{ours}");
    assert_eq!(ours.text(), control.text(), "{ours}");
    assert_eq!(found, expected);
    host.assert_nothing_left();
    ours.text()
}

#[test]
fn a_read_only_root_with_nothing_but_programs_runs() {
    let text = same_root(bare, "echo hello; ls -A /; touch /x 2>/dev/null || echo no");
    assert!(
        text.starts_with("hello\n") && text.ends_with("\nno"),
        "{text}"
    );
}

#[test]
fn a_read_only_root_gets_the_mount_points_that_it_lacks() {
    let volume = TempDir::new().expect("a temporary directory");
    fs::create_dir(volume.path().join("d")).expect("a directory");
    fs::write(volume.path().join("d/f"), "data\n").expect("writable");
    let source = |name: &str| volume.path().join(name);
    let bind = |destination: &str, name: &str, mode: &str| json!({"destination": destination, "type": "bind", "source": source(name), "options": ["rbind", mode]});
    let bundle = || {
        let bundle = bare();
        let root = bundle.root();
        fs::create_dir_all(root.join("var")).expect("a directory");
        fs::create_dir_all(root.join("run")).expect("a directory");
        symlink("/run", root.join("var/run")).expect("a link");
        symlink("/made/by/link", root.join("dangling")).expect("a link");
        symlink("../../../../../../outside", root.join("var/up")).expect("a link");
        bundle.edit(|config| {
            config["process"]["cwd"] = json!("/work/dir");
            for mount in [
                bind("/var/secrets/token", "d", "ro"),
                bind("/etc/deep/hosts", "d/f", "ro"),
                bind("/dangling/x", "d", "rw"),
                bind("/var/up/x", "d/f", "ro"),
                json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
                // In the tmpfs, by two names.
                bind("/run/inside/f", "d/f", "ro"),
                bind("/var/run/secrets/kubernetes.io/serviceaccount", "d", "ro"),
                json!({"destination": "/cache", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]}),
                bind("/cache/d", "d", "ro"),
            ] {
                add(config, mount);
            }
        })
    };
    let script = "pwd; for f in /var/secrets/token/f /etc/deep/hosts /dangling/x/f /made/by/link/x/f /var/up/x /outside/x \
                  /run/inside/f /var/run/secrets/kubernetes.io/serviceaccount/f /cache/d/f; do echo $f $(cat $f); done; \
                  touch /etc/x /made/x /var/x 2>/dev/null; ls /etc /made /var; touch /run/x /cache/x /dangling/x/new && echo written";
    let text = same_root(bundle, script);
    assert_eq!(text.matches(" data").count(), 9, "{text}");
    assert!(text.ends_with("written"), "{text}");
}

/// runc makes device nodes in the root, which cannot be opened on a `nodev` mount such as the lab's /tmp: there is no control. Bulkhead
/// makes files to bind the guest's devices over.
#[test]
fn a_read_only_root_without_a_mount_on_dev_has_its_devices() {
    let names = [
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "deep/null",
    ];
    let bundle = bare().edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| {
            let destination = mount["destination"].as_str().expect("a path");
            !destination.starts_with("/dev")
        });
        config["linux"]["devices"] =
            json!([{"path": "/dev/deep/null", "type": "c", "major": 1, "minor": 3}]);
    });
    let script = format!(
        "cd /dev; stat -c '%n %F' {}; for l in fd stdin ptmx; do readlink $l; done; echo x > null; head -c 2 zero | wc -c; \
         touch new 2>/dev/null || echo read-only",
        names.join(" ")
    );
    let ran = bundle.script(&script).run_with(Runtime::Bulkhead, &[]);
    let mut expected: String = names
        .map(|name| format!("{name} character special file\n"))
        .concat();
    expected += "/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n2\nread-only";
    assert_eq!((ran.status, ran.text()), (0, expected), "{ran}");
}

#[test]
fn a_root_that_the_host_cannot_write_is_a_clear_error() {
    let run = |runtime: Runtime| {
        let bundle = bare().script("echo hello");
        let root = bundle.root();
        let path = root.to_str().expect("a plain path");
        let _bound = Mounted::new(&["--bind", path], &root);
        must(
            Command::new("mount")
                .args(["-o", "remount,bind,ro"])
                .arg(&root),
        );
        bundle.run_with(runtime, &[])
    };
    let control = run(Runtime::Runc);
    assert!(
        control.status != 0 && control.errors().contains("read-only file system"),
        "{control}"
    );
    let host = Host::now();
    run(Runtime::Bulkhead).refused(&["/proc", "rootfs", "Read-only file system"]);
    host.assert_nothing_left();
}

/// A volume with a mount in it, one in that, one on a directory deep down and one on a file.
struct Nested {
    // Dropped in this order: the innermost first.
    _file: Mounted,
    _deep: Mounted,
    _read_only: Mounted,
    _inner: Mounted,
    directory: TempDir,
}

impl Nested {
    fn new() -> Nested {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path();
        let inner = Mounted::tmpfs("nosuid,noexec", &path.join("inner"));
        fs::copy("/bin/busybox", path.join("inner/true")).expect("busybox");
        let read_only = Mounted::tmpfs("ro,noatime", &path.join("a/b/ro"));
        let deep = Mounted::tmpfs("nodev,mode=777", &path.join("inner/deep"));
        fs::copy("/bin/busybox", path.join("inner/deep/true")).expect("busybox");
        fs::write(path.join("file"), "").expect("writable");
        let file = path.join("inner/file");
        fs::write(&file, "").expect("writable");
        let mut bind = Command::new("mount");
        must(bind.arg("--bind").args([&file, &path.join("file")]));
        Nested {
            _file: Mounted(path.join("file")),
            _deep: deep,
            _read_only: read_only,
            _inner: inner,
            directory,
        }
    }

    /// What can be done beneath /mnt, and the flags of all that is mounted there. The second look finds what the first one mounts.
    const SCRIPT: &'static str = "cd /mnt; for d in . inner inner/deep a/b/ro; do \
         touch $d/new 2>/dev/null && echo $d written || echo $d read-only; rm -f $d/new; \
         [ ! -e $d/true ] || { $d/true true 2>/dev/null && echo $d executed || echo $d noexec; }; done; \
         echo x 2>/dev/null >> file && echo file written || echo file read-only; \
         awk '$5 ~ \"^/mnt\" { print $5, $6 }' /proc/self/mountinfo | sort";
}

#[test]
fn options_of_a_recursive_bind_are_those_of_its_top() {
    let nested = Nested::new();
    for options in [
        &["rbind", "ro"][..],
        &["rbind", "ro", "nosuid", "nodev", "noexec", "noatime"],
        &["rbind", "rw"],
        &["rbind"],
        &["rbind", "noexec", "nodiratime"],
        &["rbind", "rprivate", "ro"],
        &["rbind", "rslave", "ro"],
    ] {
        let bundle = || Bundle::busybox().bind(nested.directory.path(), "/mnt", options);
        let text = same(bundle, Nested::SCRIPT);
        assert!(text.contains("inner written"), "{options:?}: {text}");
        assert!(text.contains("inner/deep written"), "{options:?}: {text}");
        assert!(text.contains("file written"), "{options:?}: {text}");
    }
}

#[test]
fn recursive_options_reach_what_is_beneath() {
    let nested = Nested::new();
    for options in [&["rbind", "rro"][..], &["rbind", "rnosuid", "rnoatime"]] {
        let bundle = || Bundle::busybox().bind(nested.directory.path(), "/mnt", options);
        same(bundle, Nested::SCRIPT);
    }
    let bundle = || Bundle::busybox().bind(nested.directory.path(), "/mnt", &["bind", "ro"]);
    let text = same(
        bundle,
        "ls -A /mnt/inner /mnt/a/b/ro; touch /mnt/x 2>&1 || echo no",
    );
    assert!(text.ends_with("no"), "{text}");
}

#[test]
fn what_is_mounted_in_a_read_only_root_is_not_read_only() {
    // Each runtime has a root of its own, whose mount must be gone before it is removed.
    let run = |runtime: Runtime| {
        let bundle = Bundle::busybox()
            .edit(|config| config["root"]["readonly"] = json!(true))
            .script(
                "touch /x 2>/dev/null || echo no; touch /data/x && echo yes; touch /data/in/x 2>/dev/null || echo no; \
                 awk '$5 ~ \"^/data\" { print $5, $6 }' /proc/self/mountinfo | sort",
            );
        let data = bundle.root().join("data");
        let _data = Mounted::tmpfs("nosuid", &data);
        let _in = Mounted::tmpfs("ro,nodev", &data.join("in"));
        bundle.run_with(runtime, &[])
    };
    let control = run(Runtime::Runc).ok();
    assert_eq!(run(Runtime::Bulkhead).ok(), control);
    assert!(control.starts_with("no\nyes\nno\n"), "{control}");
}

/// A source that is itself on a mount with flags keeps them while the configuration sets none.
#[test]
fn a_volume_has_the_flags_of_its_place_on_the_host() {
    let directory = TempDir::new().expect("a temporary directory");
    let volume = directory.path().join("volume");
    let _mounted = Mounted::tmpfs("nosuid,nodev,noexec,noatime", &volume);
    fs::create_dir(volume.join("sub")).expect("a directory");
    fs::write(volume.join("sub/file"), "").expect("writable");
    for options in [&["rbind"][..], &["rbind", "rw"], &["rbind", "ro"]] {
        let bundle = || {
            Bundle::busybox()
                .bind(&volume.join("sub"), "/mnt", options)
                .bind(&volume.join("sub/file"), "/etc/file", options)
        };
        same(
            bundle,
            "awk '$5 ~ \"^/(mnt|etc)\" { print $5, $6 }' /proc/self/mountinfo | sort",
        );
    }
}
