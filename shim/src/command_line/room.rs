//! The directory of a container beneath `--root`, and what is written down there.
//!
//! Its making reserves the id. `state.json` is in it as soon as there is a pid to tell; the monitor
//! takes all of it away with the container. A container whose monitor has died keeps it until
//! somebody deletes the container.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    ids,
    sys::{
        files::{Failed, failed},
        process::ProcessId,
    },
};

/// Where containers are written down when no `--root` is given. Not in the directory of the
/// ledgers, whose directories are all pods'.
pub const DEFAULT_ROOT: &str = "/run/bulkhead-oci";

const STATE: &str = "state.json";
const TASKS: &str = "task.sock";
const KEEPERS: &str = "keepers.sock";
const LOG: &str = "log";
const CONFIG: &str = "config.json";
const FILES: [&str; 6] = [STATE, "state.json.new", TASKS, KEEPERS, LOG, CONFIG];

/// Why a container's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id cannot be one.
    #[error(transparent)]
    Id(#[from] ids::Error),
    /// The id is taken; runc's words.
    #[error("container with given ID already exists: {0:?}")]
    Exists(String),
    /// There is no such container; the words that engines look for.
    #[error("container does not exist: {0:?}")]
    Missing(String),
    /// A system call.
    #[error(transparent)]
    Io(#[from] Failed),
}

/// The ledger's namespace of a root: several engines may use one id, each in a root of its own.
pub fn namespace(root: &Path) -> String {
    if root == Path::new(DEFAULT_ROOT) {
        return "oci".into();
    }
    let digest = Sha256::digest(root.as_os_str().as_encoded_bytes());
    let digits = digest.iter().take(6).map(|byte| format!("{byte:02x}"));
    format!("oci-{}", digits.collect::<String>())
}

/// What is told of a container that its monitor does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// `ociVersion` of config.json.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// Absolute.
    pub bundle: PathBuf,
    /// Absolute.
    pub rootfs: PathBuf,
    /// Of config.json.
    pub annotations: HashMap<String, String>,
    /// RFC 3339.
    pub created: String,
    /// The process that stands for it.
    pub keeper: ProcessId,
    /// The daemon that looks after it.
    pub monitor: Option<ProcessId>,
}

/// A container's directory.
#[derive(Debug)]
pub struct Room {
    /// The container.
    pub id: String,
    root: PathBuf,
    path: PathBuf,
    /// The directory, by which its sockets are reached: their own paths may be longer than an
    /// address (unix(7): 108 bytes).
    directory: OwnedFd,
}

impl Room {
    /// Makes it.
    ///
    /// # Errors
    /// [`Error::Exists`] when it is there, whoever made it.
    pub fn make(root: &Path, id: &str) -> Result<Room, Error> {
        ids::check("container id", id)?;
        let private = |path: &Path, parents| {
            DirBuilder::new()
                .recursive(parents)
                .mode(0o700)
                .create(path)
        };
        private(root, true).map_err(failed("make the directory", root))?;
        let path = root.join(id);
        match private(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists(id.into()))
            }
            Err(error) => Err(failed("make the directory", &path)(error).into()),
            Ok(()) => Room::open(root, id, path),
        }
    }

    /// Finds it.
    ///
    /// # Errors
    /// [`Error::Missing`]
    pub fn find(root: &Path, id: &str) -> Result<Room, Error> {
        ids::check("container id", id)?;
        Room::open(root, id, root.join(id))
    }

    fn open(root: &Path, id: &str, path: PathBuf) -> Result<Room, Error> {
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Missing(id.into())),
            Err(error) => Err(failed("open the directory", &path)(error).into()),
            Ok(directory) => Ok(Room {
                id: id.into(),
                // The last container takes the root with it.
                root: fs::canonicalize(root).map_err(failed("find", root))?,
                path,
                directory: directory.into(),
            }),
        }
    }

    /// Lets calls about this container, and its keepers, reach the monitor of another one.
    pub fn join(&self, holder: &Room) -> Result<(), Error> {
        let place = fs::canonicalize(&holder.path).map_err(failed("find", &holder.path))?;
        for name in [TASKS, KEEPERS] {
            let path = self.file(name);
            std::os::unix::fs::symlink(place.join(name), &path).map_err(failed("make", &path))?;
        }
        Ok(())
    }

    /// The container that a namespace of /proc/PID/ns belongs to, whose keeper has that pid.
    pub fn holder(root: &Path, namespace: &Path) -> Result<Option<Room>, Error> {
        let Ok(rest) = namespace.strip_prefix("/proc") else {
            return Ok(None);
        };
        let pid = rest.components().next();
        let pid = pid.and_then(|pid| pid.as_os_str().to_str()?.parse::<i32>().ok());
        for id in Room::all(root)? {
            let room = Room::find(root, &id)?;
            let keeper = room.read()?.map(|record| record.keeper);
            if keeper.is_some_and(|keeper| Some(keeper.pid) == pid && keeper.exists()) {
                return Ok(Some(room));
            }
        }
        Ok(None)
    }

    /// The ids of all that are there, in order; none when the root is not.
    pub fn all(root: &Path) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("read the directory", root))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut ids: Vec<String> = names
            .filter(|name| ids::check("container id", name).is_ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// `--root`, absolute and without symbolic links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a file of it is.
    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The monitor's log.
    pub fn log(&self) -> PathBuf {
        self.file(LOG)
    }

    /// The container's config.json as it was at create: later edits have no effect (OCI
    /// runtime.md#create).
    pub fn config(&self) -> PathBuf {
        self.file(CONFIG)
    }

    /// A short path of a socket, while this is open.
    fn socket(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Writes it down, whole or not at all.
    pub fn write(&self, record: &Record) -> Result<(), Error> {
        let text = serde_json::to_vec(record).expect("made of strings and numbers");
        self.put(STATE, &text)
    }

    /// Keeps a copy of config.json.
    pub fn keep_config(&self, bytes: &[u8]) -> Result<(), Error> {
        self.put(CONFIG, bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (path, new) = (self.file(name), self.file("state.json.new"));
        let written = || {
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&new)?.write_all(bytes)?;
            fs::rename(&new, &path)
        };
        Ok(written().map_err(failed("write", &path))?)
    }

    /// What was written down; `None`: it is being made, or its maker died.
    pub fn read(&self) -> Result<Option<Record>, Error> {
        let path = self.file(STATE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("read", &path))?,
        };
        let record = serde_json::from_slice(&text).map_err(io::Error::other);
        Ok(record.map(Some).map_err(failed("read", &path))?)
    }

    /// Listens for calls about the container.
    pub fn listen_for_calls(&self) -> Result<UnixListener, Error> {
        let path = self.file(TASKS);
        Ok(UnixListener::bind(self.socket(TASKS)).map_err(failed("listen at", &path))?)
    }

    /// Listens for keepers.
    pub fn listen_for_keepers(&self) -> Result<UnixListener, Error> {
        let listening = || -> nix::Result<OwnedFd> {
            let listener = seqpacket()?;
            bind(listener.as_raw_fd(), &UnixAddr::new(&self.socket(KEEPERS))?)?;
            listen(&listener, Backlog::new(64)?)?;
            Ok(listener)
        };
        let listening = listening().map(UnixListener::from);
        Ok(listening.map_err(failed("listen at", &self.file(KEEPERS)))?)
    }

    /// A connection of a keeper.
    pub fn connect_keeper(&self) -> io::Result<OwnedFd> {
        let stream = seqpacket()?;
        connect(stream.as_raw_fd(), &UnixAddr::new(&self.socket(KEEPERS))?)?;
        Ok(stream)
    }

    /// A connection for calls.
    pub fn connect(&self) -> io::Result<std::os::unix::net::UnixStream> {
        std::os::unix::net::UnixStream::connect(self.socket(TASKS))
    }

    /// Takes it away. Again, or when somebody else was quicker, is fine.
    pub fn remove(&self) -> Result<(), Error> {
        for name in FILES {
            let path = self.file(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error).into());
                }
                _ => {}
            }
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &self.path)(error).into());
            }
            _ => {}
        }
        // With the last one; another one may be made at the same time.
        let _ = fs::remove_dir(&self.root);
        Ok(())
    }
}

fn seqpacket() -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once_and_free_again() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("deep/root");
        assert!(matches!(Room::find(&root, "a"), Err(Error::Missing(_))));
        assert_eq!(Room::all(&root).unwrap(), [""; 0]);
        let room = Room::make(&root, "a").unwrap();
        assert!(matches!(Room::make(&root, "a"), Err(Error::Exists(_))));
        assert_eq!(room.read().unwrap(), None);
        let record = Record {
            oci_version: "1.2.0".into(),
            id: "a".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            annotations: HashMap::from([("k".into(), "v".into())]),
            created: "2026-11-30T12:00:00Z".into(),
            keeper: ProcessId::own(),
            monitor: None,
        };
        room.write(&record).unwrap();
        assert_eq!(
            Room::find(&root, "a").unwrap().read().unwrap(),
            Some(record)
        );
        assert_eq!(Room::all(&root).unwrap(), ["a"]);
        room.remove().unwrap();
        room.remove().unwrap();
        assert!(!root.exists());
        for bad in ["", ".", "a/b", "../a", &"x".repeat(2000)] {
            assert!(matches!(Room::make(&root, bad), Err(Error::Id(_))), "{bad}");
        }
    }

    #[test]
    fn sockets_are_reached_whatever_the_length_of_their_path() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("x".repeat(200));
        let room = Room::make(&root, &"y".repeat(100)).unwrap();
        let _calls = room.listen_for_calls().unwrap();
        let _keepers = room.listen_for_keepers().unwrap();
        room.connect().unwrap();
        room.connect_keeper().unwrap();
    }

    #[test]
    fn a_record_that_is_none_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let room = Room::make(root.path(), "a").unwrap();
        fs::write(room.file(STATE), "{").unwrap();
        assert!(matches!(room.read(), Err(Error::Io(_))));
    }

    #[test]
    fn each_root_has_a_namespace() {
        assert_eq!(namespace(Path::new(DEFAULT_ROOT)), "oci");
        let others = ["/a", "/b"].map(|root| namespace(Path::new(root)));
        assert_ne!(others[0], others[1]);
        for name in others {
            ids::check("namespace", &name).unwrap();
        }
    }
}
