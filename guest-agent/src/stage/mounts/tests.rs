//! Whole roots in mount namespaces of their own, judged by /proc/self/mountinfo and by what a process inside can do.
mod hostile;
mod kinds;
mod options;
mod propagation;
mod readonly;
mod user_namespace;

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
use crate::stage::mounts::testing::{in_child, in_mount_namespace};

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
