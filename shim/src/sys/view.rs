//! The root of a keeper that stands for a container: the container's files, as far as they are the
//! host's. Engines enter its mount namespace to copy files into a container that runs, and out of it
//! (`podman cp`).
//!
//! What is in the root is the image's and the guest's, links too, and whoever enters may be root of
//! the host. So every mount point is looked up with the root as "/"; nothing is executed, opened as a
//! device or set-id there; where the guest has what the host has not, there is an empty mount that
//! cannot be written to; and /proc, read-only, leads nowhere by a link.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use linux::{
    mount::{Depth, FsContext, attr, move_mount, open_tree},
    path::open_in_root,
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, open},
    sys::stat::{Mode, SFlag, fstat},
    unistd::fchdir,
};

use super::{files::c_path, mount::DetachedTree, stub};

const DATA: u64 = attr::NODEV | attr::NOSUID | attr::NOEXEC;

/// A root that is being made.
#[derive(Debug)]
pub struct View {
    root: DetachedTree,
    over: Vec<(CString, Over)>,
}

#[derive(Debug)]
enum Over {
    Tree(DetachedTree),
    Processes,
    Nothing,
}

impl View {
    /// Begins with a copy of the directory `root` and of nothing that is mounted in it.
    pub fn of(root: &Path, read_only: bool) -> io::Result<View> {
        Ok(View {
            root: data(root, Depth::Top, read_only)?,
            over: Vec::new(),
        })
    }

    /// Shows `source` at `path`, over what was added before.
    pub fn bind(
        &mut self,
        path: &Path,
        source: &Path,
        depth: Depth,
        read_only: bool,
    ) -> io::Result<()> {
        self.add(path, Over::Tree(data(source, depth, read_only)?))
    }

    /// Shows the processes of the pid namespace at `path`.
    pub fn processes(&mut self, path: &Path) -> io::Result<()> {
        self.add(path, Over::Processes)
    }

    /// Hides what is at `path`.
    pub fn hide(&mut self, path: &Path) -> io::Result<()> {
        self.add(path, Over::Nothing)
    }

    fn add(&mut self, path: &Path, over: Over) -> io::Result<()> {
        self.over.push((c_path(path)?, over));
        Ok(())
    }

    /// Makes it this process' root, in a mount namespace of its own. Async-signal-safe calls only.
    pub(super) fn enter(&self) -> nix::Result<()> {
        stub::keep_mounts_private()?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // A directory that every host has; nobody else sees what comes over it.
        let place = |path| open(path, flags, Mode::empty());
        move_mount(self.root.as_fd(), place(c"/proc")?.as_fd())?;
        let top = place(c"/proc")?;
        for (path, over) in &self.over {
            match open_in_root(top.as_fd(), path.as_c_str(), OFlag::O_PATH) {
                Ok(target) => over.attach(target.as_fd())?,
                // It is in what only the guest has, or behind a link of /proc, or masks nothing.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => return Err(errno),
            }
        }
        fchdir(top)?;
        stub::pivot()
    }
}

impl Over {
    fn attach(&self, target: BorrowedFd<'_>) -> nix::Result<()> {
        match self {
            Over::Tree(tree) => move_mount(tree.as_fd(), target),
            Over::Processes => {
                let attributes = DATA | attr::RDONLY | attr::NOSYMFOLLOW;
                move_mount(fresh(c"proc", attributes)?.as_fd(), target)
            }
            Over::Nothing => {
                let kind = SFlag::from_bits_truncate(fstat(target)?.st_mode) & SFlag::S_IFMT;
                let nothing = match kind == SFlag::S_IFDIR {
                    true => fresh(c"tmpfs", DATA | attr::RDONLY)?,
                    false => unreadable()?,
                };
                move_mount(nothing.as_fd(), target)
            }
        }
    }
}

/// A file system without anything that needs to be set.
fn fresh(kind: &std::ffi::CStr, attributes: u64) -> nix::Result<OwnedFd> {
    let context = FsContext::open(kind)?;
    context.create()?;
    context.mount(attributes)
}

/// A node that cannot be opened.
fn unreadable() -> nix::Result<OwnedFd> {
    use linux::mount::{MountAttr, mount_setattr};
    let node = open_tree(AT_FDCWD, c"/dev/null", Depth::Top)?;
    mount_setattr(node.as_fd(), Depth::Top, MountAttr::setting(DATA))?;
    Ok(node)
}

fn data(source: &Path, depth: Depth, read_only: bool) -> io::Result<DetachedTree> {
    let tree = DetachedTree::clone_of(source, depth)?;
    tree.set_propagation(libc::MS_PRIVATE)?;
    tree.set_data()?;
    if read_only {
        tree.set_read_only(Depth::Top)?;
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::symlink,
        path::PathBuf,
    };

    use nix::{
        sys::wait::waitpid,
        unistd::{Pid, geteuid},
    };

    use super::*;
    use crate::sys::keeper::Keeper;

    /// What a keeper with `view` shows to who looks in through `/proc/PID/root`, as root may.
    fn look(view: &View, act: impl FnOnce(&Path)) {
        let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let found = places.iter().find(|p| p.join("cgroup.procs").exists());
        let Some(cgroup) = found.filter(|_| geteuid().is_root()) else {
            return println!("NOT RUN: this needs root and cgroup v2");
        };
        let (ours, theirs) = linux::packet::pair().unwrap();
        let network = File::open("/proc/self/ns/net").unwrap();
        let cgroup = File::open(cgroup).unwrap();
        let keeper = Keeper {
            monitor: theirs.as_fd(),
            terminal: None,
            network: network.as_fd(),
            cgroup: cgroup.as_fd(),
            view: Some(view),
            title: "a keeper",
        };
        let pid = keeper.start().unwrap();
        drop(theirs);
        act(&PathBuf::from(format!("/proc/{pid}/root")));
        drop(ours);
        waitpid(Pid::from_raw(pid), None).unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_containers_files_are_there_and_what_is_the_guests_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let [root, volume] = ["root", "volume"].map(|name| dir.path().join(name));
        for name in ["proc", "tmp", "real", "ro"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("f"), "of the volume").unwrap();
        fs::write(root.join("secret"), "s").unwrap();
        // Links of the image lead to what is in it, wherever they point.
        symlink("/real", root.join("link")).unwrap();
        symlink("/../../..", root.join("out")).unwrap();
        symlink("/proc/1/exe", root.join("exe")).unwrap();
        let mut view = View::of(&root, false).unwrap();
        view.processes(Path::new("/proc")).unwrap();
        view.hide(Path::new("/tmp")).unwrap();
        view.hide(Path::new("/secret")).unwrap();
        view.hide(Path::new("/proc/stat")).unwrap();
        view.hide(Path::new("/not/there")).unwrap();
        let volume_at = |view: &mut View, path, read_only| {
            let path = Path::new(path);
            view.bind(path, &volume, Depth::Whole, read_only).unwrap();
        };
        volume_at(&mut view, "/link", false);
        volume_at(&mut view, "/ro", true);
        look(&view, |inside| {
            let all = ["exe", "link", "out", "proc", "real", "ro", "secret", "tmp"];
            assert_eq!(names(inside), all);
            assert!(names(&inside.join("proc")).contains(&"1".into()));
            fs::write(inside.join("new"), "x").unwrap();
            assert_eq!(fs::read_to_string(root.join("new")).unwrap(), "x");
            let file = |name: &str| fs::read_to_string(inside.join(name).join("f")).unwrap();
            assert_eq!([file("real"), file("ro")], ["of the volume"; 2]);
            fs::write(inside.join("real/g"), "x").unwrap();
            fs::write(inside.join("ro/h"), "x").unwrap_err();
            fs::write(inside.join("tmp/h"), "x").unwrap_err();
            for hidden in ["secret", "proc/stat"] {
                fs::read(inside.join(hidden)).unwrap_err();
            }
            // /proc is not written to, and its links lead nowhere.
            fs::write(inside.join("proc/sys/kernel/domainname"), "x").unwrap_err();
            for link in ["proc/1/exe", "proc/1/root/proc", "proc/self/status"] {
                let error = fs::metadata(inside.join(link)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{link}");
            }
        });
        assert_eq!(names(&root.join("real")), [""; 0]);
    }
}
