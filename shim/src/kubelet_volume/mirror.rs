//! One volume: what of the host's directory the guest has, and how it gets the rest.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_agent_protocol::agent::{self as wire, volume_change::Kind};
use nix::sys::inotify::WatchDescriptor;

use super::{
    Error,
    changes::{self, Step},
    host::{self, Directory, Node, Stamp},
};
use crate::{error::line, machine::agent::Agent, sys};

/// How often a volume that the host changes while it is read is read again, and after what time.
const ATTEMPTS: u32 = 50;
const AGAIN: Duration = Duration::from_millis(10);
/// Bytes of files in one message, which may have 4 MiB.
const PORTION: usize = 1 << 20;

/// A volume that containers use.
#[derive(Debug)]
pub struct Volume {
    pub number: u64,
    pub path: PathBuf,
    /// Device and inode: another directory at the path is not this volume.
    pub identity: (u64, u64),
    pub watch: WatchDescriptor,
    pub mirror: tokio::sync::Mutex<Mirror>,
}

/// What the guest has.
#[derive(Debug, Default)]
pub struct Mirror {
    pub made: bool,
    /// It has been what the host's was.
    filled: bool,
    has: Directory,
    /// The host's directory is not watched any more: it was removed, or unmounted.
    ended: bool,
    /// What was told of last.
    failure: Option<String>,
}

impl Volume {
    /// Brings it into the guest, if that has not been done. One that could not be followed is not given to another container
    /// either.
    pub async fn fill(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        if mirror.filled && mirror.failure.is_none() {
            return Ok(());
        }
        if !mirror.made {
            agent.create_volume(self.number).await?;
        }
        // From here on it must be deleted, filled or not.
        mirror.made = true;
        self.repeat(mirror, agent).await?;
        mirror.filled = true;
        mirror.failure = None;
        Ok(())
    }

    /// After events: the directory was `removed`, or its watch has `ended`. A failure is told once, and the end of it.
    pub async fn catch_up(&self, agent: &Agent, removed: bool, ended: bool) {
        let mut mirror = self.mirror.lock().await;
        if !mirror.filled || mirror.ended {
            return;
        }
        mirror.ended = ended;
        let repeated = match removed {
            // rmdir(2): it was empty.
            true => {
                let empty = Directory {
                    attributes: mirror.has.attributes,
                    ..Directory::default()
                };
                self.send(&mut mirror, agent, None, empty).await
            }
            false if mirror.ended => Ok(()),
            false => self.repeat(&mut mirror, agent).await,
        };
        let failure = repeated.err().map(|error| line(&error));
        let volume = self.path.display();
        match (&failure, &mirror.failure) {
            (Some(now), before) if before.as_ref() != Some(now) => {
                tracing::error!(%volume, error = %now, "a volume has changed on the host, and the containers of the pod still see an older version");
            }
            (None, Some(_)) => tracing::info!(%volume, "the volume is followed again"),
            _ => {}
        }
        mirror.failure = failure;
    }

    /// Makes the guest's what the host's is.
    async fn repeat(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            match self.try_repeat(mirror, agent).await {
                Err(Error::Moving) => tokio::time::sleep(AGAIN).await,
                other => return other,
            }
        }
        Err(Error::Moving)
    }

    async fn try_repeat(&self, mirror: &mut Mirror, agent: &Agent) -> Result<(), Error> {
        // Not kept open: kubelet could not unmount it.
        let opened = match open(&self.path) {
            Ok(opened) => opened,
            // Its removal has an event of its own.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(host::read("")(source)),
        };
        let found = opened.metadata().map_err(host::read(""))?;
        if (found.dev(), found.ino()) != self.identity {
            return Ok(());
        }
        let has = |name: &str| mirror.has.entries.contains_key(name);
        let wants = host::look(opened.as_fd(), has)?;
        self.send(mirror, agent, Some(&opened), wants).await
    }

    async fn send(
        &self,
        mirror: &mut Mirror,
        agent: &Agent,
        source: Option<&File>,
        wants: Directory,
    ) -> Result<(), Error> {
        let steps = changes::steps(&mirror.has, &wants);
        if steps.is_empty() {
            return Ok(());
        }
        // What a failure on the way leaves behind has to be made anew or removed.
        let touched: Vec<String> = steps
            .iter()
            .filter_map(Step::top)
            .map(String::from)
            .collect();
        let mut message = Message::new(agent, self.number);
        let sent = async {
            for step in steps {
                message.add(source, step).await?;
            }
            message.send().await
        };
        let sent = sent.await;
        match &sent {
            Ok(()) => mirror.has = wants,
            Err(_) => {
                mirror.has.attributes = host::Attributes::default();
                for name in touched {
                    mirror.has.entries.insert(name, Node::Unsure);
                }
            }
        }
        // Files of a megabyte have been in our heap.
        sys::trim_memory();
        sent
    }
}

/// Changes on their way to the agent, in messages that it takes.
struct Message<'a> {
    agent: &'a Agent,
    volume: u64,
    changes: Vec<wire::VolumeChange>,
    bytes: usize,
}

impl<'a> Message<'a> {
    fn new(agent: &'a Agent, volume: u64) -> Message<'a> {
        Message {
            agent,
            volume,
            changes: Vec::new(),
            bytes: 0,
        }
    }

    async fn add(&mut self, source: Option<&File>, step: Step) -> Result<(), Error> {
        let empty = wire::Empty::default;
        match step {
            Step::Directory(path) => self.push(path, Kind::Directory(empty())).await,
            Step::Link(path, target) => self.push(path, Kind::Link(target)).await,
            Step::Rename(path, name) => self.push(path, Kind::Rename(name)).await,
            Step::Remove(path) => self.push(path, Kind::Remove(empty())).await,
            Step::Attributes(path, attributes, modified_ns) => {
                let attributes = wire::VolumeAttributes {
                    mode: attributes.mode,
                    uid: attributes.uid,
                    gid: attributes.gid,
                    modified_ns,
                    ..wire::VolumeAttributes::default()
                };
                self.push(path, Kind::Attributes(attributes)).await
            }
            Step::File(path, stamp) => self.file(source.ok_or(Error::Moving)?, path, &stamp).await,
        }
    }

    async fn file(&mut self, volume: &File, path: String, stamp: &Stamp) -> Result<(), Error> {
        let file = host::open(volume.as_fd(), &path, stamp)?;
        let mut left = stamp.size;
        let mut first = true;
        while first || left > 0 {
            let mut bytes = Vec::new();
            let portion = left.min(PORTION as u64);
            let read = (&file).take(portion).read_to_end(&mut bytes);
            // Shorter than it was: somebody writes to it.
            if read.map_err(host::read(&path))? as u64 != portion {
                return Err(Error::Moving);
            }
            left -= portion;
            let kind = match first {
                true => Kind::File(bytes),
                false => Kind::Append(bytes),
            };
            first = false;
            self.push(path.clone(), kind).await?;
        }
        Ok(())
    }

    async fn push(&mut self, path: String, kind: Kind) -> Result<(), Error> {
        let content = match &kind {
            Kind::File(bytes) | Kind::Append(bytes) => bytes.len(),
            Kind::Link(target) => target.len(),
            _ => 0,
        };
        // With room for the numbers and lengths of the message.
        let size = content + path.len() + 64;
        if self.bytes + size > 2 * PORTION {
            self.send().await?;
        }
        self.bytes += size;
        self.changes.push(wire::VolumeChange {
            path,
            kind: Some(kind),
            ..wire::VolumeChange::default()
        });
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Error> {
        self.bytes = 0;
        let changes = std::mem::take(&mut self.changes);
        Ok(self.agent.change_volume(self.volume, changes).await?)
    }
}

/// Opens a volume's directory, which is no link.
pub fn open(path: &Path) -> io::Result<File> {
    let directory = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    File::options()
        .read(true)
        .custom_flags(directory)
        .open(path)
}
