//! The share: the one directory tree of the host that a pod's guest sees, and how containers get into it.
//!
//! ```text
//! SANDBOX/pod         tmpfs, private                    mount points only, nothing is stored here
//! SANDBOX/pod/tree    a directory                       where this process makes mount points
//! SANDBOX/pod/share   tree again, read-only, MS_SHARED  what the fs process serves
//!   CONTAINER/rootfs  the container's root              attached here, propagated to the fs process
//!   CONTAINER/mounts/N  sources of bind mounts
//! ```
//!
//! Through `share` the guest cannot make, rename or remove a name outside of a container's mounts, so that no path that we
//! unmount or remove later can have been turned into something else.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::{
    fs as fs_process,
    ledger::{self, Ledger, Leftover, Resource, Ticket},
    oci::{HostBind, HostPropagation, HostRoot},
    sys::mount::{Depth, DetachedTree},
};

/// Enough for mount points: about 100 containers with 100 volumes each.
const LIMITS: &str = "mode=0755,size=16m,nr_inodes=32768";

/// Why something could not be put into the share.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {path}")]
    Io {
        /// The verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be recorded.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// It could not be taken out.
    #[error("cannot give back {0}")]
    Busy(Leftover),
    /// The fs process would not let go of it.
    #[error(transparent)]
    Detach(#[from] fs_process::Error),
}

fn io_error<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    let path = path.to_path_buf();
    move |error| Error::Io {
        action,
        path,
        source: error.into(),
    }
}

/// A pod's share.
#[derive(Debug)]
pub struct Share {
    tree: PathBuf,
    share: PathBuf,
    containers: Vec<(String, Vec<Ticket>)>,
}

impl Share {
    /// Makes it, empty.
    pub fn create(ledger: &mut Ledger) -> Result<Share, Error> {
        let pod = ledger.directory().join("pod");
        ledger.take(Resource::Directory { path: pod.clone() })?;
        make_directory(&pod)?;
        ledger.take(Resource::Mount { path: pod.clone() })?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bulkhead"), &pod, Some("tmpfs"), flags, Some(LIMITS))
            .map_err(io_error("mount a tmpfs on", &pod))?;
        change(&pod, MsFlags::MS_PRIVATE)?;
        let (tree, share) = (pod.join("tree"), pod.join("share"));
        // Inside the tmpfs, which takes them with it.
        make_directory(&tree)?;
        make_directory(&share)?;
        ledger.take(Resource::Mount {
            path: share.clone(),
        })?;
        let view = DetachedTree::clone_of(&tree, Depth::Top)
            .map_err(io_error("clone the mount of", &tree))?;
        view.set_read_only(Depth::Top)
            .map_err(io_error("make read-only", &tree))?;
        view.attach(&share).map_err(io_error("mount", &share))?;
        change(&share, MsFlags::MS_SHARED)?;
        Ok(Share {
            tree,
            share,
            containers: Vec::new(),
        })
    }

    /// What the fs process serves.
    pub fn path(&self) -> &Path {
        &self.share
    }

    /// Puts a container's root and the sources of its bind mounts into the share.
    pub fn add(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        root: &HostRoot,
        binds: &[HostBind],
    ) -> Result<(), Error> {
        self.containers.push((container.into(), Vec::new()));
        let tree = self.tree.join(container);
        make_directory(&tree)?;
        make_directory(&tree.join("rootfs"))?;
        make_directory(&tree.join("mounts"))?;
        let whole = root.read_only.then_some(Depth::Top);
        self.attach(
            ledger,
            &root.path,
            &format!("{container}/rootfs"),
            Depth::Whole,
            whole,
            HostPropagation::Private,
        )?;
        for bind in binds {
            let name = format!("{container}/mounts/{}", bind.number);
            let point = self.tree.join(&name);
            if bind.directory {
                make_directory(&point)?;
            } else {
                fs::File::create_new(&point).map_err(io_error("make the mount point", &point))?;
            }
            let depth = if bind.recursive {
                Depth::Whole
            } else {
                Depth::Top
            };
            let read_only = match (bind.read_only_whole, bind.read_only) {
                (true, _) => Some(Depth::Whole),
                (false, true) => Some(Depth::Top),
                (false, false) => None,
            };
            self.attach(
                ledger,
                &bind.source,
                &name,
                depth,
                read_only,
                bind.propagation,
            )?;
        }
        Ok(())
    }

    fn attach(
        &mut self,
        ledger: &mut Ledger,
        source: &Path,
        name: &str,
        depth: Depth,
        read_only: Option<Depth>,
        propagation: HostPropagation,
    ) -> Result<(), Error> {
        let tree = DetachedTree::clone_of(source, depth)
            .map_err(io_error("clone the mount of", source))?;
        let propagation = match propagation {
            HostPropagation::Private => libc::MS_PRIVATE,
            HostPropagation::Slave => libc::MS_SLAVE,
        };
        tree.set_propagation(propagation)
            .map_err(io_error("detach from its peers", source))?;
        if let Some(depth) = read_only {
            tree.set_read_only(depth)
                .map_err(io_error("make read-only", source))?;
        }
        let target = self.share.join(name);
        let ticket = ledger.take(Resource::Mount {
            path: target.clone(),
        })?;
        if let Some((_, tickets)) = self.containers.last_mut() {
            tickets.push(ticket);
        }
        tree.attach(&target).map_err(io_error("mount", &target))
    }

    /// Takes a container out of a live pod's share: the fs process lets go, then plain unmounts.
    pub async fn remove(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        fs: &fs_process::Fs,
    ) -> Result<(), Error> {
        let Some(index) = self.containers.iter().position(|(id, _)| id == container) else {
            return Ok(());
        };
        fs.detach(container).await?;
        for ticket in self.containers[index].1.iter().rev() {
            ledger.undo(*ticket).map_err(Error::Busy)?;
        }
        let tree = self.tree.join(container);
        remove_mount_points(&tree).map_err(io_error("remove the mount points of", &tree))?;
        self.containers.remove(index);
        Ok(())
    }
}

/// The directories and empty files that [`Share::add`] made, one level each; nothing is descended into.
fn remove_mount_points(tree: &Path) -> io::Result<()> {
    let mounts = tree.join("mounts");
    for entry in fs::read_dir(&mounts)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    fs::remove_dir(&mounts)?;
    fs::remove_dir(tree.join("rootfs"))?;
    fs::remove_dir(tree)
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(path)
        .map_err(io_error("make the directory", path))
}

fn change(path: &Path, propagation: MsFlags) -> Result<(), Error> {
    mount(None::<&str>, path, None::<&str>, propagation, None::<&str>)
        .map_err(io_error("set the propagation of", path))
}
