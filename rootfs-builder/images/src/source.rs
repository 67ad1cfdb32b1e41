//! Where the parts of an image are: files of a directory, or members of an archive.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Read, Seek},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};
use sha2::{Digest, Sha256};
use tar::EntryType;

use super::{Error, entries::Extensions};

/// Longest document of an image (OCI distribution: 4 MiB for a manifest).
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most members of an archive: an image of 128 layers has some 400.
const MAX_MEMBERS: usize = 10_000;
/// How many links lead to a member.
const MAX_LINKS: usize = 8;

/// Parts of images by their names.
pub(crate) struct Source {
    /// For messages.
    pub path: PathBuf,
    parts: Parts,
}

enum Parts {
    Directory,
    Archive(File, HashMap<String, Member>),
}

enum Member {
    /// Offset and length.
    File(u64, u64),
    /// Of another member.
    Link(String),
}

/// A part, to be read from its start.
pub(crate) enum Part<'a> {
    Whole(File),
    Section { file: &'a File, at: u64, left: u64 },
}

impl Read for Part<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Part::Whole(file) => file.read(to),
            Part::Section { file, at, left } => {
                let most = usize::try_from(*left).unwrap_or(usize::MAX).min(to.len());
                let read = file.read_at(&mut to[..most], *at)?;
                if read == 0 && most > 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                (*at, *left) = (*at + read as u64, *left - read as u64);
                Ok(read)
            }
        }
    }
}

/// How bytes are packed, by their first ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
    /// One that is not unpacked here.
    Other(&'static str),
}

impl Packing {
    fn of(start: &[u8]) -> Packing {
        match start {
            [0x1f, 0x8b, ..] => Packing::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            [b'B', b'Z', b'h', ..] => Packing::Other("bzip2"),
            [0xfd, b'7', b'z', b'X', ..] => Packing::Other("xz"),
            _ => Packing::None,
        }
    }
}

/// What is read, unpacked, whatever it is packed by.
pub(crate) fn unpacked<'a>(mut from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = [0; 4];
    let mut read = 0;
    while read < start.len() {
        match from.read(&mut start[read..])? {
            0 => break,
            more => read += more,
        }
    }
    let start = start[..read].to_vec();
    let packing = Packing::of(&start);
    let whole = io::BufReader::with_capacity(64 << 10, io::Cursor::new(start).chain(from));
    Ok(match packing {
        Packing::None => Box::new(whole),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Packing::Zstd => Box::new(Zstd {
            from: whole,
            frame: FrameDecoder::new(),
            within: false,
        }),
        Packing::Other(name) => {
            let text = format!("it is packed by {name}; gzip, zstd or nothing can be read");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
    })
}

/// Frames of zstd, one after the other (RFC 8878 §3.1): the library reads one.
struct Zstd<R> {
    from: R,
    frame: FrameDecoder,
    /// Within a frame.
    within: bool,
}

impl<R: io::BufRead> Zstd<R> {
    /// Begins the next frame; `false`: there is none.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.from.fill_buf()?.is_empty() {
            match self.frame.reset(&mut self.from) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped = (&mut self.from).take(length.into());
                    io::copy(&mut { skipped }, &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(format!("zstd: {error}"))),
            }
        }
        Ok(false)
    }
}

impl<R: io::BufRead> Read for Zstd<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within && !self.begin()? {
                return Ok(0);
            }
            self.within = true;
            while self.frame.can_collect() == 0 && !self.frame.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                let decoded = self.frame.decode_blocks(&mut self.from, one);
                decoded.map_err(|error| io::Error::other(format!("zstd: {error}")))?;
            }
            let read = self.frame.read(to)?;
            if read > 0 || to.is_empty() {
                return Ok(read);
            }
            self.within = false;
        }
    }
}

/// Reads through a SHA-256.
pub(crate) struct Hashed<R> {
    from: R,
    hash: Sha256,
}

impl<R: Read> Hashed<R> {
    pub(crate) fn new(from: R) -> Hashed<R> {
        let hash = Sha256::new();
        Hashed { from, hash }
    }

    /// Reads the rest, and tells the sum in hexadecimal.
    pub(crate) fn sum(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(hex(&self.hash.finalize()))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(to)?;
        self.hash.update(&to[..read]);
        Ok(read)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A path of an archive by its names, without `.` and what is before the first name; `None`: it
/// goes up.
pub(crate) fn plain(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

/// Opens a file. What is none is not opened: some devices do something by that alone.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let place = options.read(true).custom_flags(libc::O_PATH).open(path)?;
    open_place(&place)
}

pub(crate) fn open_place(place: &File) -> io::Result<File> {
    match place.metadata()?.is_file() {
        true => File::open(format!("/proc/self/fd/{}", place.as_raw_fd())),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// The same of a part of a layout, whose links lead nowhere else.
fn open_beneath(directory: &Path, name: &str) -> io::Result<File> {
    let directory = File::open(directory)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    open_place(&File::from(openat2(&directory, name, how)?))
}

impl Source {
    /// Of a path; what is packed as a whole is unpacked into a file without a name in `room`.
    pub(crate) fn open(path: &Path, room: &Path) -> Result<Source, Error> {
        let data = path.metadata().map_err(Error::io("use the image", path))?;
        if data.is_dir() {
            let (path, parts) = (path.into(), Parts::Directory);
            return Ok(Source { path, parts });
        }
        let file = open(path).map_err(Error::io("read the image", path))?;
        Source::archive(path, file, room)
    }

    /// Of an archive.
    pub(crate) fn archive(path: &Path, file: File, room: &Path) -> Result<Source, Error> {
        let read = || Error::io("read the archive", path);
        let mut start = [0; 4];
        let found = file.read_at(&mut start, 0).map_err(read())?;
        let mut file = match Packing::of(&start[..found]) {
            Packing::None => file,
            _ => {
                let mut whole = tempfile::tempfile_in(room).map_err(Error::io("write in", room))?;
                let mut from = unpacked(file).map_err(read())?;
                io::copy(&mut from, &mut whole).map_err(read())?;
                whole
            }
        };
        file.rewind().map_err(read())?;
        let members = members(&file).map_err(|source| Error::NoArchive {
            path: path.into(),
            source,
        })?;
        let (path, parts) = (path.into(), Parts::Archive(file, members));
        Ok(Source { path, parts })
    }

    /// Whether it is one file: what a directory has is an OCI layout, or none.
    pub(crate) fn is_archive(&self) -> bool {
        matches!(self.parts, Parts::Archive(..))
    }

    /// Whether there is a part of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match &self.parts {
            Parts::Directory => self.path.join(name).is_file(),
            Parts::Archive(_, members) => members.contains_key(name),
        }
    }

    /// A part to be read; `what` it is for.
    pub(crate) fn part(&self, what: &'static str, name: &str) -> Result<Part<'_>, Error> {
        let missing = || Error::Missing {
            image: self.path.clone(),
            what,
            name: name.into(),
        };
        match &self.parts {
            Parts::Directory => match open_beneath(&self.path, name) {
                Ok(file) => Ok(Part::Whole(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(missing()),
                Err(error) => Err(Error::io("read", self.path.join(name))(error)),
            },
            Parts::Archive(file, members) => {
                let mut name = name;
                for _ in 0..MAX_LINKS {
                    match members.get(name).ok_or_else(missing)? {
                        Member::Link(to) => name = to,
                        &Member::File(at, left) => return Ok(Part::Section { file, at, left }),
                    }
                }
                Err(missing())
            }
        }
    }

    /// A document, whole.
    pub(crate) fn document(&self, what: &'static str, name: &str) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.part(what, name)?
            .take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::io("read", self.path.join(name)))?;
        match bytes.len() as u64 > MAX_DOCUMENT {
            false => Ok(bytes),
            true => Err(Error::Wrong {
                what,
                reason: format!("it has more than {MAX_DOCUMENT} bytes"),
            }),
        }
    }
}

/// Where the members of an archive are.
fn members(file: &File) -> io::Result<HashMap<String, Member>> {
    let mut members = HashMap::new();
    let mut archive = tar::Archive::new(file);
    let mut before = Extensions::default();
    for entry in archive.entries_with_seek()?.raw(true) {
        let mut entry = entry?;
        if before.take(&mut entry)? {
            continue;
        }
        let meta = std::mem::take(&mut before).finish(&entry)?;
        let Some(path) = plain(&meta.path) else {
            continue;
        };
        let member = match meta.kind {
            EntryType::Regular | EntryType::Continuous => {
                Member::File(entry.raw_file_position(), entry.size())
            }
            // A layer that two images share.
            kind @ (EntryType::Symlink | EntryType::Link) => {
                let Some(to) = meta.link else {
                    continue;
                };
                let parent = match kind {
                    EntryType::Symlink => path.parent().unwrap_or(Path::new("")),
                    _ => Path::new(""),
                };
                Member::Link(followed(parent, &to))
            }
            _ => continue,
        };
        if members.len() >= MAX_MEMBERS {
            let text = format!("it has more than {MAX_MEMBERS} members: it is no image");
            return Err(io::Error::other(text));
        }
        members.insert(path.to_string_lossy().into_owned(), member);
    }
    Ok(members)
}

/// Where a link of an archive leads, by names alone.
fn followed(from: &Path, to: &Path) -> String {
    let mut at = from.to_path_buf();
    for component in to.components() {
        match component {
            Component::ParentDir => drop(at.pop()),
            Component::Normal(name) => at.push(name),
            Component::RootDir => at.clear(),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    at.to_string_lossy().into_owned()
}
