//! The share: the one directory tree of the host that a pod's guest sees, and how containers get into it.
//!
//! ```text
//! SANDBOX/pod         tmpfs, private                    mount points only, nothing is stored here
//! SANDBOX/pod/tree    a directory                       where this process makes mount points
//! SANDBOX/pod/share   tree again, read-only, MS_SHARED  what the fs process serves
//!   1, 2, ...         roots and sources of bind mounts  attached here, propagated to the fs process; each distinct one once
//! ```
//!
//! Through `share` the guest cannot make, rename or remove a name outside of a container's mounts, so that no path that we
//! unmount or remove later can have been turned into something else.
#![forbid(unsafe_code)]

pub mod identity;
pub mod mount_points;

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::agent as wire;
use nix::mount::{MsFlags, mount};

use crate::{
    ledger::{self, Ledger, Leftover, Resource, Ticket},
    machine::fs as fs_process,
    oci::{GUEST_SHARE, HostBind, HostPropagation, HostRoot, host_interfaces},
    share::identity::{Identity, Layout},
    sys::{
        files::{Failed, failed},
        mount as mounts,
        mount::{Depth, DetachedTree, MountLine, Object},
    },
};

/// Enough for mount points: about 100 containers with 100 volumes each.
const LIMITS: &str = "mode=0755,size=16m,nr_inodes=32768";

/// Most mounts beneath one source: the guest makes each of them when a container is made.
const MAX_SUBMOUNTS: usize = 4096;

/// Why something could not be put into the share.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] Failed),
    /// More than a guest is asked to make.
    #[error(
        "{path} has {count} mounts beneath it, {max} are possible; bind a directory with fewer, or without \"r\" in \"rbind\"", max = MAX_SUBMOUNTS
    )]
    Submounts {
        /// The source.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// The id is taken.
    #[error("container {0} has its files in the pod already")]
    Exists(String),
    /// It was not added, or is removed.
    #[error("container {0} has no files in the pod")]
    Absent(String),
    /// The host's kernel in the form of files.
    #[error(
        "{path} is in the host's {kind}, which would show the host; mount a {kind} of the guest instead"
    )]
    HostInterface {
        /// What was to be shown.
        path: PathBuf,
        /// The file system.
        kind: &'static str,
    },
    /// The same, mounted in what was to be shown.
    #[error(
        "the host's {kind} at {place} would come along with {path}; bind {path} without what is mounted in it (\"bind\" instead of \"rbind\"), or the directories in it that are wanted"
    )]
    NestedInterface {
        /// What was to be shown.
        path: PathBuf,
        /// Where in it.
        place: PathBuf,
        /// The file system.
        kind: &'static str,
    },
    /// It was none when config.json was read.
    #[error("{0} has become a device of the host, and device numbers mean nothing in a guest")]
    Device(PathBuf),
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

impl Error {
    /// Whether it was asked for what would show the host.
    pub fn is_refusal(&self) -> bool {
        use Error::{Device, HostInterface, NestedInterface};
        matches!(
            self,
            HostInterface { .. } | NestedInterface { .. } | Device(_)
        )
    }
}

/// A pod's share.
#[derive(Debug)]
pub struct Share {
    tree: PathBuf,
    share: PathBuf,
    last: u64,
    mounted: Vec<Mounted>,
    containers: Vec<Placed>,
}

/// A mount of the share.
#[derive(Debug)]
struct Mounted {
    number: u64,
    identity: Identity,
    /// How much of it is read-only on the host.
    read_only: Option<Depth>,
    directory: bool,
    ticket: Ticket,
    /// It is in its place, and the fs process has not been told to let go of it.
    serves: bool,
}

/// What a container uses of the share: who uses a mount is written nowhere else.
#[derive(Debug)]
struct Placed {
    container: String,
    root: Source,
    /// Index in the container's list of mounts, and what it shows.
    binds: Vec<(usize, Source)>,
}

impl Placed {
    fn uses(&self, number: u64) -> bool {
        let mut binds = self.binds.iter();
        self.root.number == number || binds.any(|(_, source)| source.number == number)
    }
}

/// A mount of the share as one container uses it.
#[derive(Debug)]
struct Source {
    number: u64,
    /// What it looked like when the container was made.
    layout: Layout,
}

impl Source {
    fn path(&self) -> String {
        format!("{GUEST_SHARE}/{}", self.number)
    }

    fn submounts(&self) -> Vec<wire::Submount> {
        let convert = |submount: &identity::Submount| wire::Submount {
            path: submount.place.as_os_str().as_bytes().to_vec(),
            attributes: submount.attributes,
            ..wire::Submount::default()
        };
        self.layout.beneath.iter().map(convert).collect()
    }
}

/// What is asked of a mount.
struct Wish<'a> {
    source: &'a Path,
    directory: bool,
    depth: Depth,
    read_only: Option<Depth>,
    propagation: HostPropagation,
}

impl Wish<'_> {
    fn root(root: &HostRoot) -> Wish<'_> {
        Wish {
            source: &root.path,
            directory: true,
            depth: Depth::Whole,
            read_only: root.read_only.then_some(Depth::Top),
            propagation: HostPropagation::Private,
        }
    }

    fn bind(bind: &HostBind) -> Wish<'_> {
        Wish {
            source: &bind.source,
            directory: bind.directory,
            depth: match bind.recursive {
                true => Depth::Whole,
                false => Depth::Top,
            },
            read_only: match (bind.read_only_whole, bind.read_only) {
                (true, _) => Some(Depth::Whole),
                (false, true) => Some(Depth::Top),
                (false, false) => None,
            },
            propagation: bind.propagation,
        }
    }

    /// Looks at what was opened. Whoever could swap the path since config.json was read has swapped it before this.
    fn check(
        &self,
        opened: BorrowedFd<'_>,
        found: &Object,
        mounts: &[MountLine],
        place: &Path,
    ) -> Result<(), Error> {
        let path = || self.source.to_path_buf();
        if found.is_device {
            return Err(Error::Device(path()));
        }
        let kind = host_interfaces::of_open(opened).map_err(failed("look at", self.source))?;
        if let Some(kind) = kind {
            return Err(Error::HostInterface { path: path(), kind });
        }
        let nested = match self.depth {
            Depth::Top => None,
            Depth::Whole => host_interfaces::taken_along_with(mounts, found, place),
        };
        match nested {
            Some((place, kind)) => Err(Error::NestedInterface {
                path: path(),
                place: self.source.join(place),
                kind,
            }),
            None => Ok(()),
        }
    }

    /// Whether a mount that is read-only on the host to this extent lets its user do what is asked. One that lets it do more
    /// gives the guest nothing: it got that for another container of the pod, and the user's own mount in the guest is
    /// read-only.
    fn fits(&self, read_only: Option<Depth>) -> bool {
        let strictness = |read_only| match read_only {
            None => 0,
            Some(Depth::Top) => 1,
            Some(Depth::Whole) => 2,
        };
        strictness(read_only) <= strictness(self.read_only)
    }
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
            .map_err(failed("mount a tmpfs on", &pod))?;
        change(&pod, MsFlags::MS_PRIVATE)?;
        let (tree, share) = (pod.join("tree"), pod.join("share"));
        // Inside the tmpfs, which takes them with it.
        make_directory(&tree)?;
        make_directory(&share)?;
        ledger.take(Resource::Mount {
            path: share.clone(),
        })?;
        let view = DetachedTree::clone_of(&tree, Depth::Top)
            .map_err(failed("clone the mount of", &tree))?;
        view.set_read_only(Depth::Top)
            .map_err(failed("make read-only", &tree))?;
        view.attach(&share).map_err(failed("mount", &share))?;
        change(&share, MsFlags::MS_SHARED)?;
        Ok(Share {
            tree,
            share,
            last: 0,
            mounted: Vec::new(),
            containers: Vec::new(),
        })
    }

    /// What the fs process serves.
    pub fn path(&self) -> &Path {
        &self.share
    }

    /// Puts a container's root and the sources of its bind mounts into the share. After an error, [`Share::remove`] takes out
    /// what got in.
    pub fn add<'a>(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        root: &HostRoot,
        binds: impl IntoIterator<Item = &'a HostBind>,
    ) -> Result<(), Error> {
        if self.placed(container).is_some() {
            return Err(Error::Exists(container.into()));
        }
        let root = self.mount(ledger, &Wish::root(root))?;
        let index = self.containers.len();
        self.containers.push(Placed {
            container: container.into(),
            root,
            binds: Vec::new(),
        });
        for bind in binds {
            let source = self.mount(ledger, &Wish::bind(bind))?;
            self.containers[index].binds.push((bind.mount, source));
        }
        Ok(())
    }

    /// Writes the places of a container's files into what the agent is told.
    pub fn name_sources(&self, container: &str, spec: &mut wire::Container) -> Result<(), Error> {
        let absent = || Error::Absent(container.into());
        let placed = self.placed(container).ok_or_else(absent)?;
        spec.root = placed.root.path();
        spec.root_attributes = placed.root.layout.attributes;
        spec.root_submounts = placed.root.submounts();
        for (index, source) in &placed.binds {
            let mount = spec.mounts.get_mut(*index).ok_or_else(absent)?;
            mount.source = source.path();
            mount.source_attributes = source.layout.attributes;
            mount.submounts = source.submounts();
        }
        Ok(())
    }

    /// Of a container's bind mounts, each one's index in its list of mounts and the number that it has in the share.
    pub fn places(&self, container: &str) -> impl Iterator<Item = (usize, u64)> {
        let placed = self.placed(container).into_iter();
        let binds = placed.flat_map(|placed| &placed.binds);
        binds.map(|(index, source)| (*index, source.number))
    }

    fn placed(&self, container: &str) -> Option<&Placed> {
        let mut all = self.containers.iter();
        all.find(|placed| placed.container == container)
    }

    /// A mount that shows the source: one that is there, or a new one.
    fn mount(&mut self, ledger: &mut Ledger, wish: &Wish<'_>) -> Result<Source, Error> {
        let source = wish.source;
        let opened = open(source, wish.directory).map_err(failed("open", source))?;
        let found = mounts::object(opened.as_fd()).map_err(failed("look at", source))?;
        let mounts = mounts::mounts().map_err(failed("list the mounts for", source))?;
        let place = identity::place(opened.as_fd()).map_err(failed("find the mount of", source))?;
        let (identity, layout) =
            identity::look(&place, &mounts, &found, wish.depth, wish.propagation);
        let count = layout.beneath.len();
        if count > MAX_SUBMOUNTS {
            let path = source.to_path_buf();
            return Err(Error::Submounts { path, count });
        }
        let there = self
            .mounted
            .iter()
            .find(|m| m.serves && m.identity == identity && wish.fits(m.read_only));
        if let Some(mounted) = there {
            let number = mounted.number;
            return Ok(Source { number, layout });
        }
        wish.check(opened.as_fd(), &found, &mounts, &place)?;
        let tree = DetachedTree::clone_of_open(opened.as_fd(), wish.depth)
            .map_err(failed("clone the mount of", source))?;
        let propagation = match wish.propagation {
            HostPropagation::Private => libc::MS_PRIVATE,
            HostPropagation::Slave => libc::MS_SLAVE,
        };
        tree.set_propagation(propagation)
            .map_err(failed("detach from its peers", source))?;
        // Before it can be seen: what the fs process could be made to do, it cannot do with these files.
        tree.set_inert()
            .map_err(failed("forbid devices and programs of", source))?;
        if let Some(depth) = wish.read_only {
            tree.set_read_only(depth)
                .map_err(failed("make read-only", source))?;
        }
        self.last += 1;
        let number = self.last;
        self.make_mount_point(number, &found)?;
        let target = self.share.join(number.to_string());
        let ticket = ledger.take(Resource::Mount {
            path: target.clone(),
        })?;
        // On the list before it is there, as in the ledger.
        self.mounted.push(Mounted {
            number,
            identity,
            read_only: wish.read_only,
            directory: found.directory,
            ticket,
            serves: false,
        });
        tree.attach(&target).map_err(failed("mount", &target))?;
        let mounted = self.mounted.last_mut().expect("just pushed");
        mounted.serves = true;
        Ok(Source { number, layout })
    }

    fn make_mount_point(&self, number: u64, found: &Object) -> Result<(), Error> {
        let point = self.tree.join(number.to_string());
        if found.directory {
            return Ok(make_directory(&point)?);
        }
        match fs::File::create_new(&point) {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("make the mount point", &point)(error).into()),
        }
    }

    /// Takes a container out of a live pod's share: what it was the last one to use is let go of by the fs process, then plainly
    /// unmounted. After an error it can be tried again.
    pub async fn remove(
        &mut self,
        ledger: &mut Ledger,
        container: &str,
        fs: &fs_process::Fs,
    ) -> Result<(), Error> {
        self.containers
            .retain(|placed| placed.container != container);
        // Everything that nobody uses, so that what an earlier removal could not give back is tried again with the next one.
        let (used, unused): (Vec<Mounted>, Vec<Mounted>) = std::mem::take(&mut self.mounted)
            .into_iter()
            .partition(|mounted| self.containers.iter().any(|c| c.uses(mounted.number)));
        self.mounted = used;
        let mut outcome = Ok(());
        for mut mounted in unused.into_iter().rev() {
            mounted.serves = false;
            if let Err(error) = self.give_back(ledger, &mounted, fs).await {
                outcome = Err(error);
                self.mounted.push(mounted);
            }
        }
        outcome
    }

    async fn give_back(
        &self,
        ledger: &mut Ledger,
        mounted: &Mounted,
        fs: &fs_process::Fs,
    ) -> Result<(), Error> {
        let name = mounted.number.to_string();
        fs.detach(&name).await?;
        ledger.undo(mounted.ticket).map_err(Error::Busy)?;
        let point = self.tree.join(name);
        let removed = match mounted.directory {
            true => fs::remove_dir(&point),
            false => fs::remove_file(&point),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove the mount point", &point)(error).into())
            }
            _ => Ok(()),
        }
    }
}

/// Opens a source without opening what it may be (a pipe, a socket). Symbolic links are followed, as mount(2) with `MS_BIND` does.
fn open(source: &Path, directory: bool) -> io::Result<fs::File> {
    let kind = match directory {
        true => libc::O_DIRECTORY,
        false => 0,
    };
    fs::File::options()
        .read(true)
        .custom_flags(libc::O_PATH | kind)
        .open(source)
}

fn make_directory(path: &Path) -> Result<(), Failed> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(path)
        .map_err(failed("make the directory", path))
}

fn change(path: &Path, propagation: MsFlags) -> Result<(), Failed> {
    mount(None::<&str>, path, None::<&str>, propagation, None::<&str>)
        .map_err(failed("set the propagation of", path))
}
