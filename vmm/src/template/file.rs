//! The file that has a machine's state: a header, and the state as postcard writes it.
//!
//! ```text
//! 0  magic, with the number of the format    8 bytes
//! 8  build of the VMM that wrote it          length (u8), text
//!    CRC-32 of the payload                   le32
//!    payload                                 to the end of the file
//! ```
//!
//! Only root writes such a file, and only the VMM that has written it reads it. It is read as if
//! somebody else had.

use std::fs::File;
use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

const MAGIC: &[u8; 8] = b"BLKHTP\0\x01";
/// Of 32 vCPUs with their local APICs and extended states, and of memory in many pieces.
const MAX_BYTES: u64 = 1 << 20;

/// A template's state cannot be written or read.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file.
    #[error("the file of its state cannot be used")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("the file of its state is no such file, or that of another format")]
    Magic,
    /// Another VMM wrote it.
    #[error("it was made by another build of the VMM")]
    Build,
    /// It has changed since.
    #[error("the file of its state is damaged")]
    Damaged,
    /// It is longer than any.
    #[error("its state has more than {MAX_BYTES} bytes")]
    Long,
}

/// Writes `state` for readers of the same `build`.
///
/// # Errors
/// write(2)'s, or a state without bounds.
pub fn write(mut file: &File, build: &str, state: &impl Serialize) -> Result<(), FileError> {
    let payload = postcard::to_allocvec(state).map_err(|_| FileError::Damaged)?;
    let bytes = [&head(build)[..], &crc(&payload), &payload].concat();
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::Long);
    }
    Ok(file.write_all(&bytes)?)
}

/// Reads what [`write()`] has written for this `build`.
///
/// # Errors
/// It is not what was written.
pub fn read<T: DeserializeOwned>(file: &File, build: &str) -> Result<T, FileError> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::Long);
    }
    let rest = bytes.strip_prefix(MAGIC).ok_or(FileError::Magic)?;
    let head = head(build);
    let rest = rest
        .strip_prefix(&head[MAGIC.len()..])
        .ok_or(FileError::Build)?;
    let (sum, payload) = rest.split_at_checked(4).ok_or(FileError::Damaged)?;
    if sum != crc(payload) {
        return Err(FileError::Damaged);
    }
    match postcard::take_from_bytes(payload) {
        Ok((state, [])) => Ok(state),
        _ => Err(FileError::Damaged),
    }
}

fn head(build: &str) -> Vec<u8> {
    let build = &build.as_bytes()[..build.len().min(usize::from(u8::MAX))];
    [&MAGIC[..], &[build.len() as u8], build].concat()
}

fn crc(payload: &[u8]) -> [u8; 4] {
    crc32fast::hash(payload).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn written() -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        write(&file, "b1", &("state", 7_u64, vec![1_u8; 300])).unwrap();
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    type State = (String, u64, Vec<u8>);

    #[test]
    fn what_was_written_is_read() {
        let state: State = read(&file(&written()), "b1").unwrap();
        assert_eq!(state, ("state".into(), 7, vec![1; 300]));
    }

    #[test]
    fn no_bit_of_it_can_be_another_one() {
        let bytes = written();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read::<State>(&file(&bytes), "b1").is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            let short = read::<State>(&file(&bytes[..length]), "b1");
            assert!(short.is_err(), "{length} bytes");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(read::<State>(&file(&longer), "b1").is_err());
    }

    #[test]
    fn another_build_is_named() {
        let error = read::<State>(&file(&written()), "b2").unwrap_err();
        assert!(matches!(error, FileError::Build), "{error}");
        let error = read::<State>(&file(b"\x7fELF and so on"), "b1").unwrap_err();
        assert!(matches!(error, FileError::Magic), "{error}");
    }

    #[test]
    fn a_file_without_end_is_not_read_to_it() {
        let endless = File::open("/dev/zero").unwrap();
        assert!(matches!(
            read::<State>(&endless, "b1").unwrap_err(),
            FileError::Long
        ));
    }
}
