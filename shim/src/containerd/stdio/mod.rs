//! The standard streams of a task's process, as containerd names them.
//!
//! | name | what |
//! | --- | --- |
//! | empty | /dev/null |
//! | `/path`, `fifo:///path` | a FIFO that the client has made |
//! | `file:///path` | a file, appended to |
//! | `binary:///path?key=value` | a logger: a program that reads the output from its descriptors 3 and 4 |
//! | `keeper:TICKET` | a descriptor that the client has handed over (`handed`); its end is the stream's |
//!
//! A FIFO is held open at both ends by us, so that a client which goes away neither breaks the container's output nor ends its
//! input: another one may come. Only CloseIO ends the input.

mod handed;
mod logger;
mod progress;
mod relay;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::task::JoinHandle;

use handed::Source;
pub use handed::{Handed, SCHEME};
use logger::Logger;
use progress::Progress;
use relay::Sink;

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A form that we do not know.
    #[error("{0:?} is no stream that this shim knows: a path, fifo://, file:// and binary:// are")]
    Form(String),
    /// Nothing was handed over by this ticket, or it was used.
    #[error("no stream was handed over by the ticket {0:?}")]
    Ticket(String),
    /// It cannot be opened.
    #[error("cannot open the stream {path}")]
    Open {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A logger cannot be started.
    #[error("cannot start the logger {path}: {reason}")]
    Logger {
        /// The program.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// How containerd names the streams of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Input.
    pub stdin: String,
    /// Output.
    pub stdout: String,
    /// Errors; empty with a terminal.
    pub stderr: String,
    /// Input and output are one terminal.
    pub terminal: bool,
}

/// Whose streams they are, for a logger.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container.
    pub container: &'a str,
    /// What was handed over for streams to be, where that can be.
    pub handed: Option<&'a Handed>,
}

impl Owner<'_> {
    fn take(&self, ticket: &str, index: usize) -> Result<OwnedFd, Error> {
        let found = self.handed.and_then(|handed| handed.take(ticket, index));
        found.ok_or_else(|| Error::Ticket(ticket.into()))
    }
}

/// A parsed name.
#[derive(Debug, PartialEq, Eq)]
enum Name {
    Null,
    Fifo(PathBuf),
    File(PathBuf),
    Binary(PathBuf, Vec<String>),
    Handed(String),
}

fn parse(name: &str) -> Result<Name, Error> {
    if name.is_empty() {
        return Ok(Name::Null);
    }
    if let Some(ticket) = name.strip_prefix(SCHEME) {
        return Ok(Name::Handed(ticket.into()));
    }
    let (scheme, rest) = name.split_once("://").unwrap_or(("fifo", name));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !path.starts_with('/') {
        return Err(Error::Form(name.into()));
    }
    match scheme {
        "fifo" => Ok(Name::Fifo(rest.into())),
        "file" => Ok(Name::File(path.into())),
        "binary" => Ok(Name::Binary(path.into(), logger::arguments(query))),
        _ => Err(Error::Form(name.into())),
    }
}

/// The host's ends of a process' streams, opened.
#[derive(Debug)]
pub struct Ends {
    stdin: Option<Origin>,
    stdout: Option<Target>,
    stderr: Option<Target>,
    logger: Option<Logger>,
}

/// Where input comes from.
#[derive(Debug)]
enum Origin {
    Fifo(PathBuf),
    Handed(Source),
}

/// Where output goes.
#[derive(Debug)]
struct Target {
    sink: Sink,
    /// A FIFO's other end, in which we see what its client has not read yet.
    fifo: Option<OwnedFd>,
}

impl From<Sink> for Target {
    fn from(sink: Sink) -> Target {
        Target { sink, fifo: None }
    }
}

#[derive(Debug)]
struct Input {
    reader: OwnedFd,
    /// Keeps the FIFO from ending while no client has it open.
    holder: OwnedFd,
}

impl Ends {
    /// Opens what `names` says.
    pub async fn open(names: &Names, owner: Owner<'_>) -> Result<Ends, Error> {
        let stdin = match parse(&names.stdin)? {
            Name::Null => None,
            Name::Fifo(path) => Some(Origin::Fifo(path)),
            Name::Handed(ticket) => handed::source(owner.take(&ticket, 0)?)?.map(Origin::Handed),
            _ => return Err(Error::Form(names.stdin.clone())),
        };
        if let Name::Binary(path, arguments) = parse(&names.stdout)? {
            let started = Logger::start(&path, &arguments, owner, names.terminal).await?;
            return Ok(Ends {
                stdin,
                stdout: Some(started.stdout.into()),
                stderr: started.stderr.map(Target::from),
                logger: Some(started.logger),
            });
        }
        let stderr = match names.terminal {
            true => None,
            false => open_output(&names.stderr, owner, 2)?,
        };
        Ok(Ends {
            stdin,
            stdout: open_output(&names.stdout, owner, 1)?,
            stderr,
            logger: None,
        })
    }

    /// Which of stdin, stdout and stderr exist, and so need a stream to the guest.
    pub fn wanted(&self) -> [bool; 3] {
        [
            self.stdin.is_some(),
            self.stdout.is_some(),
            self.stderr.is_some(),
        ]
    }

    /// Joins them to the host's ends of the guest's streams, in the same order.
    pub fn join(self, streams: [Option<UnixStream>; 3]) -> io::Result<Streams> {
        let [stdin, stdout, stderr] = streams;
        let mut joined = Streams::default();
        joined.logger = self.logger;
        joined.waiting = self.stdin.zip(stdin);
        let outputs = [(self.stdout, stdout), (self.stderr, stderr)];
        for (output, (target, stream)) in joined.output.iter_mut().zip(outputs) {
            if let (Some(target), Some(stream)) = (target, stream) {
                *output = Some(Output::start(stream, target)?);
            }
        }
        Ok(joined)
    }
}

fn open_input(path: &Path) -> Result<Input, Error> {
    let error = |source| Error::Open {
        path: path.into(),
        source,
    };
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK).open(path);
    // The reader first: a FIFO without one cannot be opened for writing (fifo(7)).
    let reader = open(OpenOptions::new().read(true)).map_err(error)?;
    let holder = open(OpenOptions::new().write(true)).map_err(error)?;
    Ok(Input {
        reader: reader.into(),
        holder: holder.into(),
    })
}

fn open_output(name: &str, owner: Owner<'_>, index: usize) -> Result<Option<Target>, Error> {
    match parse(name)? {
        Name::Null => Ok(None),
        Name::Fifo(path) => open_fifo(&path).map(Some),
        Name::File(path) => Ok(Some(open_file(&path)?.into())),
        // stdout's logger has both.
        Name::Binary(..) => Ok(None),
        Name::Handed(ticket) => handed::target(owner.take(&ticket, index)?),
    }
}

fn open_fifo(path: &Path) -> Result<Target, Error> {
    let error = |source| Error::Open {
        path: path.into(),
        source,
    };
    let kind = fs::metadata(path).map_err(error)?.file_type();
    if !kind.is_fifo() {
        return Ok(open_file(path)?.into());
    }
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK).open(path);
    // A reader of ours too, and first: a client that closes its end and comes back finds everything, and we never a broken pipe.
    let reader = open(OpenOptions::new().read(true)).map_err(error)?;
    let writer = open(OpenOptions::new().write(true)).map_err(error)?;
    Ok(Target {
        sink: Sink::pipe(writer.into()).map_err(error)?,
        fifo: Some(reader.into()),
    })
}

fn open_file(path: &Path) -> Result<Sink, Error> {
    let error = |source| Error::Open {
        path: path.into(),
        source,
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(error)?;
    }
    let file: File = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(error)?;
    Ok(Sink::File(file))
}

/// A running relay of output.
#[derive(Debug)]
struct Output {
    relay: JoinHandle<()>,
    progress: Progress,
}

impl Output {
    fn start(stream: UnixStream, target: Target) -> io::Result<Output> {
        let progress = Progress::new(target.fifo);
        let relay = relay::drain(stream, target.sink, progress.passed())?;
        Ok(Output { relay, progress })
    }
}

/// The running streams of a process. Dropping them stops all.
#[derive(Debug, Default)]
pub struct Streams {
    /// The input before the process is started.
    waiting: Option<(Origin, UnixStream)>,
    holder: Option<OwnedFd>,
    input: Option<JoinHandle<()>>,
    /// stdout's and stderr's.
    output: [Option<Output>; 2],
    logger: Option<Logger>,
}

impl Streams {
    /// Begins to pass the input on. Not before the process is started: a client whose writing is taken earlier may come to its
    /// input's end before it has a task on which to call CloseIO (`ctr` 1.7 forgets the call then).
    pub fn open_input(&mut self) -> Result<(), Error> {
        let Some((origin, stream)) = self.waiting.take() else {
            return Ok(());
        };
        let path = match origin {
            Origin::Fifo(path) => path,
            Origin::Handed(source) => return self.feed(source, stream),
        };
        let input = open_input(&path)?;
        self.holder = Some(input.holder);
        let fed = relay::feed(input.reader, stream);
        self.input = Some(fed.map_err(|source| Error::Open { path, source })?);
        Ok(())
    }

    fn feed(&mut self, source: Source, stream: UnixStream) -> Result<(), Error> {
        let failed = |source| Error::Open {
            path: "the standard input".into(),
            source,
        };
        match source {
            Source::Watched(fd) => {
                self.input = Some(relay::feed(fd, stream).map_err(failed)?);
            }
            // It ends with the file.
            Source::Plain(fd) => drop(crate::io::feed(fd, stream).map_err(failed)?),
        }
        Ok(())
    }

    /// Takes no more input: the process has ended, and what comes is somebody else's.
    pub fn stop_input(&mut self) {
        self.waiting = None;
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }

    /// Lets the input end when its last client has closed it.
    pub fn close_input(&mut self) {
        self.holder = None;
    }

    /// Waits until the client has read the first so many bytes of stdout and of stderr, which the guest says the process had written.
    ///
    /// An exit is told after this, because clients take it for the end of the output (containerd 1.7's then closes its FIFOs, read
    /// or not). A client that reads nothing for [`progress::PATIENCE`] holds up nothing, nor does one that is slow, or a guest that counts
    /// what never comes, for longer than `limit`.
    pub fn heard(&self, written: [u64; 2], limit: Duration) -> impl Future<Output = ()> + use<> {
        let outputs = self
            .output
            .each_ref()
            .map(|output| output.as_ref().map(|output| output.progress.clone()));
        progress::heard(outputs, written, limit)
    }

    /// Waits until all output has been passed on; the process has ended. A process that it has left behind may keep its output
    /// open for ever, and a client may never read: hence `limit`. `false`: it has passed.
    pub async fn finish(mut self, limit: Duration) -> bool {
        self.holder = None;
        self.stop_input();
        let output = &mut self.output;
        let all = async {
            for output in output.iter_mut().flatten() {
                // It ends by itself, or with a panic that was logged.
                let _ = (&mut output.relay).await;
            }
        };
        let in_time = tokio::time::timeout(limit, all).await.is_ok();
        // Aborted or ended, they have let go of the logger's pipes before it is asked to end.
        for output in std::mem::take(&mut self.output).into_iter().flatten() {
            // One that has ended was waited for above, and must not be again.
            if !output.relay.is_finished() {
                output.relay.abort();
                let _ = output.relay.await;
            }
        }
        if let Some(logger) = self.logger.take() {
            logger.finish().await;
        }
        in_time
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let output = self.output.iter().flatten().map(|output| &output.relay);
        for relay in self.input.iter().chain(output) {
            relay.abort();
        }
    }
}
