//! The "newc" cpio format, as the kernel's initramfs loader reads it (Documentation/driver-api/early-userspace/buffer-format).
//!
//! ```text
//! entry:   header (110 bytes of ASCII) | name and NUL | pad | data | pad
//! archive: entry ... | entry named TRAILER!!! without data
//! ```
//!
//! Both pads are zero bytes up to the next multiple of 4, counted from the start of the archive. Nothing follows the trailer's
//! own pad: the loader stops there, and tools pad to 512 only because tapes had blocks.
//!
//! Everything that differs between hosts is a constant: owner 0, modification time 0, device 0, inode numbers counted from 1.

const ALIGNMENT: usize = 4;
const TRAILER: &str = "TRAILER!!!";

// File types of st_mode.
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// One entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path without the leading slash.
    pub name: String,
    /// Permission bits.
    pub permissions: u32,
    /// What it is.
    pub content: Content,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory.
    Directory,
    /// A regular file with these bytes.
    File(Vec<u8>),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// The format's fields are 8 hexadecimal digits.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "/{name} is too large for the archive format: {bytes} bytes, and 4 GiB less one is the most"
)]
pub struct TooLarge {
    name: String,
    bytes: usize,
}

/// The archive that holds `entries` in the order given. Parents must come before what lies in them.
pub fn archive(entries: &[Entry]) -> Result<Vec<u8>, TooLarge> {
    let mut out = Vec::new();
    for (inode, entry) in (1u32..).zip(entries) {
        append(&mut out, inode, entry)?;
    }
    // The trailer is a regular entry with the type bits left out.
    append_header(
        &mut out,
        &Header {
            links: 1,
            ..Header::default()
        },
        TRAILER,
    );
    Ok(out)
}

/// The fields of a header that are not constants.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    links: u32,
    data_size: u32,
    major: u32,
    minor: u32,
}

fn append(out: &mut Vec<u8>, inode: u32, entry: &Entry) -> Result<(), TooLarge> {
    let mut header = Header {
        inode,
        links: 1,
        ..Header::default()
    };
    let mut data: &[u8] = &[];
    let kind = match &entry.content {
        Content::Directory => {
            header.links = 2;
            S_IFDIR
        }
        Content::File(bytes) => {
            data = bytes;
            header.data_size = u32::try_from(bytes.len()).map_err(|_| TooLarge {
                name: entry.name.clone(),
                bytes: bytes.len(),
            })?;
            S_IFREG
        }
        Content::CharacterDevice { major, minor } => {
            (header.major, header.minor) = (*major, *minor);
            S_IFCHR
        }
    };
    header.mode = kind | entry.permissions;
    append_header(out, &header, &entry.name);
    out.extend_from_slice(data);
    pad(out);
    Ok(())
}

fn append_header(out: &mut Vec<u8>, header: &Header, name: &str) {
    // Names come from checked manifest paths (at most PATH_MAX) or are the trailer's.
    let name_size = u32::try_from(name.len() + 1).expect("a name is at most PATH_MAX bytes");
    let fields = [
        header.inode,
        header.mode,
        0, // uid
        0, // gid
        header.links,
        0, // mtime
        header.data_size,
        0, // major of the file system's device
        0, // minor of the same
        header.major,
        header.minor,
        name_size,
        0, // checksum, used by another variant of the format
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An entry as a reader of the format sees it.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Seen {
        pub(crate) name: String,
        pub(crate) mode: u32,
        pub(crate) data: Vec<u8>,
        pub(crate) device: (u32, u32),
        pub(crate) owner_and_time: (u32, u32, u32),
    }

    /// An independent reader: it asserts magic, digits and both pads on its way to the trailer.
    pub(crate) fn read(archive: &[u8]) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(at % 4, 0, "an entry starts at a multiple of 4");
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let digits = &archive[at + 6 + index * 8..at + 14 + index * 8];
                u32::from_str_radix(std::str::from_utf8(digits).expect("ASCII"), 16)
                    .expect("hexadecimal")
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name_end = at + 110 + name_size;
            assert_eq!(archive[name_end - 1], 0);
            let name = String::from_utf8(archive[at + 110..name_end - 1].to_vec()).expect("UTF-8");
            let data_start = name_end.next_multiple_of(4);
            assert!(archive[name_end..data_start].iter().all(|byte| *byte == 0));
            let data_end = data_start + size;
            let next = data_end.next_multiple_of(4);
            assert!(archive[data_end..next].iter().all(|byte| *byte == 0));
            if name == TRAILER {
                assert_eq!(next, archive.len(), "nothing follows the trailer");
                return seen;
            }
            let data = archive[data_start..data_end].to_vec();
            let (mode, device) = (field(1), (field(9), field(10)));
            seen.push(Seen {
                name,
                mode,
                data,
                device,
                owner_and_time: (field(2), field(3), field(5)),
            });
            at = next;
        }
    }

    #[test]
    fn a_known_archive_byte_for_byte() {
        let entries = [Entry {
            name: "a".to_owned(),
            permissions: 0o644,
            content: Content::File(b"hi".to_vec()),
        }];
        let expected = concat!(
            "070701",
            "00000001",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000002",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            "hi\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0",
            "\0\0\0",
        );
        assert_eq!(archive(&entries), Ok(expected.as_bytes().to_vec()));
    }

    #[test]
    fn devices_and_directories_carry_their_type() {
        let console = Content::CharacterDevice { major: 5, minor: 1 };
        let entries = [
            Entry {
                name: "dev".to_owned(),
                permissions: 0o755,
                content: Content::Directory,
            },
            Entry {
                name: "dev/console".to_owned(),
                permissions: 0o600,
                content: console,
            },
        ];
        let seen = read(&archive(&entries).expect("small"));
        assert_eq!((seen[0].mode, seen[0].device), (0o040_755, (0, 0)));
        assert_eq!((seen[1].mode, seen[1].device), (0o020_600, (5, 1)));
    }

    proptest! {
        #[test]
        fn any_name_and_size_is_aligned_and_read_back(
            files in prop::collection::vec(("[a-z]{1,40}", prop::collection::vec(any::<u8>(), 0..40)), 0..8)
        ) {
            let entries: Vec<Entry> = files
                .iter()
                .map(|(name, data)| Entry { name: name.clone(), permissions: 0o644, content: Content::File(data.clone()) })
                .collect();
            let bytes = archive(&entries).expect("small");
            prop_assert_eq!(bytes.len() % 4, 0);
            let seen = read(&bytes);
            prop_assert_eq!(seen.len(), files.len());
            for (entry, (name, data)) in seen.iter().zip(&files) {
                prop_assert_eq!((&entry.name, &entry.data), (name, data));
                prop_assert_eq!(entry.owner_and_time, (0, 0, 0));
            }
        }
    }
}
