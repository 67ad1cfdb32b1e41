//! Entries of an archive, with what stands before them: names that are too long for a header, and
//! records of PAX (pax(1), "pax Extended Header").
//!
//! The library would read these whole, however long they are, and takes a newline in a record for
//! its end: they are read here, with a limit.

use std::{
    ffi::{CString, OsString},
    io::{self, Read},
    os::unix::ffi::OsStringExt,
    path::PathBuf,
};

use nix::sys::time::TimeSpec;
use tar::{Entry, EntryType};

/// Longest description of an entry, in bytes: as Go's archive/tar has it.
const MAX_EXTENSION: u64 = 1 << 20;
/// How PAX has extended attributes.
const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// What was said of the next entry.
#[derive(Default)]
pub(crate) struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An entry as it is meant.
pub(crate) struct Meta {
    pub kind: EntryType,
    pub path: PathBuf,
    /// Of links.
    pub link: Option<PathBuf>,
    pub uid: u32,
    pub gid: u32,
    pub mtime: TimeSpec,
    /// Names and values, all that there are.
    pub attributes: Vec<(CString, Vec<u8>)>,
}

fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

fn path(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

impl Extensions {
    /// Takes an entry of `tar::Entries::raw` if it says something of the next one; `false`: it does
    /// not.
    pub(crate) fn take<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> io::Result<bool> {
        let kind = entry.header().entry_type();
        let is_one = matches!(
            kind,
            EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader
        );
        if !is_one {
            // Of all entries behind it: nobody reads those.
            return Ok(kind == EntryType::XGlobalHeader);
        }
        if entry.size() > MAX_EXTENSION {
            let text = format!("what describes an entry has more than {MAX_EXTENSION} bytes");
            return Err(wrong(text));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        if kind == EntryType::XHeader {
            self.records.extend(records(&bytes)?);
            return Ok(true);
        }
        let end = bytes.iter().position(|byte| *byte == 0);
        bytes.truncate(end.unwrap_or(bytes.len()));
        match kind {
            EntryType::GNULongName => self.path = Some(bytes),
            _ => self.link = Some(bytes),
        }
        Ok(true)
    }

    fn record(&self, key: &str) -> Option<&[u8]> {
        let mut records = self.records.iter().rev();
        let found = records.find(|(known, _)| known == key.as_bytes());
        found
            .map(|(_, value)| value.as_slice())
            .filter(|value| !value.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> io::Result<Option<T>> {
        let Some(value) = self.record(key) else {
            return Ok(None);
        };
        let number = std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok());
        let text = || {
            wrong(format!(
                "its {key} is no number: {:?}",
                value.escape_ascii().to_string()
            ))
        };
        number.map(Some).ok_or_else(text)
    }

    /// What would be unpacked as something else.
    fn refuse<R: Read>(&self, entry: &Entry<'_, R>) -> io::Result<()> {
        let kind = entry.header().entry_type();
        if kind == EntryType::GNUSparse
            || self
                .records
                .iter()
                .any(|(key, _)| key.starts_with(b"GNU.sparse."))
        {
            return Err(wrong(
                "it is written as a sparse file of GNU tar, which no engine writes",
            ));
        }
        if self
            .number::<u64>("size")?
            .is_some_and(|size| size != entry.size())
        {
            return Err(wrong(
                "its size is given by a PAX record alone: it has more than 8 GiB",
            ));
        }
        Ok(())
    }

    /// Joins it with the entry that it was said of.
    pub(crate) fn finish<R: Read>(self, entry: &Entry<'_, R>) -> io::Result<Meta> {
        self.refuse(entry)?;
        let header = entry.header();
        let bytes = match (self.record("path"), &self.path) {
            (Some(path), _) => path.to_vec(),
            (None, Some(path)) => path.clone(),
            (None, None) => header.path_bytes().into_owned(),
        };
        let link = match (self.record("linkpath"), &self.link) {
            (Some(link), _) => Some(link.to_vec()),
            (None, Some(link)) => Some(link.clone()),
            (None, None) => header.link_name_bytes().map(|bytes| bytes.into_owned()),
        };
        let owner = |key: &str, of_header: io::Result<u64>| {
            let number = match self.number::<u64>(key)? {
                Some(number) => number,
                None => of_header.unwrap_or(0),
            };
            // The last one means "no change" to the kernel.
            let fits = u32::try_from(number)
                .ok()
                .filter(|number| *number != u32::MAX);
            fits.ok_or_else(|| wrong(format!("its {key} is {number}")))
        };
        let (uid, gid) = (owner("uid", header.uid())?, owner("gid", header.gid())?);
        // Before 1970 in two's complement.
        let seconds = header.mtime().unwrap_or(0) as i64;
        let mtime = self
            .number::<f64>("mtime")?
            .map_or(seconds, |at| at.floor() as i64);
        // Archives of before 1988 have directories by their last letter.
        let kind = match header.entry_type() {
            EntryType::Regular if bytes.ends_with(b"/") => EntryType::Directory,
            kind => kind,
        };
        let attributes = self.records.iter().filter_map(|(key, value)| {
            let name = CString::new(key.strip_prefix(ATTRIBUTE)?);
            Some(
                name.map(|name| (name, value.clone()))
                    .map_err(io::Error::from),
            )
        });
        Ok(Meta {
            kind,
            attributes: attributes.collect::<io::Result<_>>()?,
            path: path(bytes),
            link: link.filter(|link| !link.is_empty()).map(path),
            uid,
            gid,
            mtime: TimeSpec::new(mtime, 0),
        })
    }
}

/// `LENGTH KEY=VALUE\n`, one after the other.
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let record = || {
            let space = bytes.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let record = (record[..equals].to_vec(), record[equals + 1..].to_vec());
            Some((record, length))
        };
        let (record, length) = record().ok_or_else(|| wrong("its PAX records are damaged"))?;
        records.push(record);
        bytes = &bytes[length..];
    }
    Ok(records)
}
