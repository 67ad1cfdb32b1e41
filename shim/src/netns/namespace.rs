//! A network namespace of somebody else's, and work in it.

use std::{
    fs::{File, OpenOptions},
    io,
    net::{SocketAddr, TcpListener},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::{Error, Step, socket::Socket};

/// What a thread here needs; the default of 2 MiB would only be address space.
const STACK: usize = 256 << 10;

/// A network namespace, held open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    pub(crate) path: PathBuf,
    /// Its number among the kernel's namespaces, never two at a time with the same one.
    pub(crate) inode: u64,
}

impl Namespace {
    /// # Errors
    /// [`Error::Namespace`] when it is none, [`Error::Host`] when it is the host's own.
    pub(crate) fn open(path: &Path) -> Result<Namespace, Error> {
        let error = |source| Error::Namespace {
            path: path.into(),
            source,
        };
        let (file, inode) = open(path).map_err(error)?;
        let inode = inode
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it is no namespace"))
            .map_err(error)?;
        Namespace::of(file, inode, path)
    }

    fn of(file: File, inode: u64, path: &Path) -> Result<Namespace, Error> {
        // Redirecting the host's interfaces would take the host off its network.
        for host in ["/proc/self/ns/net", "/proc/1/ns/net"] {
            if std::fs::metadata(host).is_ok_and(|host| host.ino() == inode) {
                return Err(Error::Host { path: path.into() });
            }
        }
        Ok(Namespace {
            file,
            path: path.into(),
            inode,
        })
    }

    /// The namespace with this path and number; `None` when there is none any more.
    pub(crate) fn find(path: &Path, inode: u64) -> Result<Option<Namespace>, Error> {
        match open(path) {
            Ok((file, Some(found))) if found == inode => Namespace::of(file, found, path).map(Some),
            Ok(_) => Ok(None),
            Err(source) if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                Ok(None)
            }
            Err(source) => Err(Error::Namespace {
                path: path.into(),
                source,
            }),
        }
    }

    /// Listens on TCP addresses in the namespace; an answer for each.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn listen(&self, addresses: &[SocketAddr]) -> Result<Vec<io::Result<TcpListener>>, Error> {
        self.enter(|_| Ok(addresses.iter().map(TcpListener::bind).collect()))
    }

    /// Does work in the namespace, in a thread that ends with it: nothing of it stays, neither the thread nor the socket.
    pub(crate) fn enter<T: Send, E: From<Error> + Send>(
        &self,
        work: impl FnOnce(&mut Socket) -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let error = |source| Error::Namespace {
            path: self.path.clone(),
            source,
        };
        let inside = || {
            // It changes this thread alone.
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
            let mut socket = Socket::open().step("ask about", "the pod's interfaces")?;
            work(&mut socket)
        };
        thread::scope(|scope| {
            thread::Builder::new()
                .name("network".into())
                .stack_size(STACK)
                .spawn_scoped(scope, inside)
                .map_err(error)?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The file, and its inode if it is a namespace.
fn open(path: &Path) -> io::Result<(File, Option<u64>)> {
    let file = OpenOptions::new()
        .read(true)
        // A path that was used again may be a pipe, whose open would wait.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let kind = nix::sys::statfs::fstatfs(&file)?.filesystem_type();
    let inode = file.metadata()?.ino();
    Ok((
        file,
        (kind == nix::sys::statfs::NSFS_MAGIC).then_some(inode),
    ))
}
