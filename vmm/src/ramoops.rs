//! The guest's last words: the region into which Linux's ramoops driver writes the console and panic records.
//!
//! The guest is told where it is on the command line ([`cmdline_words`]); after the vCPUs have stopped the bytes are read as
//! what they are, a guest's ([`parse`]). The layout is that of fs/pstore/ram.c and ram_core.c of Linux 6.12: zones one after
//! the other, dump records first, then the console; each zone is
//!
//! ```text
//! u32 magic "DBGC"   u32 start (next write, modulo the data's size)   u32 size (bytes in use)   data…
//! ```
//!
//! and a dump record's text begins with `====<seconds>.<microseconds>-D`, a line feed, then `Panic#<n> Part<n>`.

use crate::arch::x86_64::layout;

/// PERSISTENT_RAM_SIG.
const MAGIC: u32 = 0x4347_4244;
const HEADER: usize = 12;
/// One dump record takes the first half, the console the second.
const RECORD_SIZE: usize = (layout::RAMOOPS_SIZE / 2) as usize;
/// Longest line that is kept, in bytes.
const MAX_LINE: usize = 512;
/// Most lines that are kept.
const MAX_LINES: usize = 64;

/// What the region tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastWords {
    /// There is a record of a kernel panic (an oops alone is none).
    pub panicked: bool,
    /// The last lines, oldest first, printable characters only: of the panic's record, else of the console.
    pub lines: Vec<String>,
}

/// How the guest is told of the region.
pub fn cmdline_words() -> Vec<String> {
    vec![
        format!("ramoops.mem_address={:#x}", layout::RAMOOPS),
        format!("ramoops.mem_size={:#x}", layout::RAMOOPS_SIZE),
        format!("ramoops.record_size={RECORD_SIZE:#x}"),
        format!(
            "ramoops.console_size={:#x}",
            layout::RAMOOPS_SIZE as usize - RECORD_SIZE
        ),
        "ramoops.ftrace_size=0".into(),
        "ramoops.pmsg_size=0".into(),
        "ramoops.ecc=0".into(),
    ]
}

/// Reads the region's bytes, whatever they are.
pub fn parse(region: &[u8]) -> LastWords {
    let (dump, console) = region.split_at(RECORD_SIZE.min(region.len()));
    let dump = zone(dump).unwrap_or_default();
    let (panicked, text) = match panic_text(&dump) {
        Some(text) => (true, text.to_vec()),
        None => (false, zone(console).unwrap_or_default()),
    };
    LastWords {
        panicked,
        lines: last_lines(&text),
    }
}

/// The bytes of a zone in the order in which they were written; nothing when it was never used or is damaged.
fn zone(bytes: &[u8]) -> Option<Vec<u8>> {
    let field = |at: usize| -> Option<u32> {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if field(0)? != MAGIC {
        return None;
    }
    let data = &bytes[HEADER.min(bytes.len())..];
    let (start, size) = (field(4)? as usize, field(8)? as usize);
    if size > data.len() || start > size {
        return None;
    }
    // Once it has wrapped the oldest byte is at `start`; before, start equals size.
    let mut text = data[start..size].to_vec();
    text.extend(&data[..start]);
    Some(text)
}

/// The text of a dump record that a panic wrote, without its two header lines.
fn panic_text(record: &[u8]) -> Option<&[u8]> {
    let rest = record.strip_prefix(b"====")?;
    let rest = &rest[rest.iter().position(|&byte| byte == b'\n')? + 1..];
    rest.starts_with(b"Panic#").then(|| {
        let end = rest.iter().position(|&byte| byte == b'\n');
        &rest[end.map_or(rest.len(), |end| end + 1)..]
    })
}

fn last_lines(text: &[u8]) -> Vec<String> {
    let mut lines: Vec<String> = text
        .rsplit(|&byte| byte == b'\n')
        .map(clean)
        .filter(|line| !line.is_empty())
        .take(MAX_LINES)
        .collect();
    lines.reverse();
    lines
}

/// A line that is safe in a log or on a terminal: printable ASCII, cut at [`MAX_LINE`].
fn clean(line: &[u8]) -> String {
    let printable = |&byte: &u8| match byte {
        b' '..=b'~' => char::from(byte),
        b'\t' => ' ',
        _ => '?',
    };
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.iter().take(MAX_LINE).map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATA: usize = RECORD_SIZE - HEADER;

    /// Writes as ram_core.c does: a ring once the data is full.
    fn write_zone(region: &mut [u8], at: usize, text: &[u8]) {
        let zone = &mut region[at..at + RECORD_SIZE];
        zone[..4].copy_from_slice(&MAGIC.to_le_bytes());
        let mut start = 0;
        for &byte in text {
            zone[HEADER + start] = byte;
            start = (start + 1) % DATA;
        }
        let size = text.len().min(DATA);
        if text.len() < DATA {
            start = size;
        }
        zone[4..8].copy_from_slice(&(start as u32).to_le_bytes());
        zone[8..12].copy_from_slice(&(size as u32).to_le_bytes());
    }

    fn region() -> Vec<u8> {
        vec![0; layout::RAMOOPS_SIZE as usize]
    }

    #[test]
    fn a_panic_record_is_found_and_its_last_lines_kept() {
        let mut region = region();
        let text = "====1.234567-D\nPanic#1 Part1\n<6>[    0.1] hello\n<0>[    1.2] Kernel panic - not syncing: x\n";
        write_zone(&mut region, 0, text.as_bytes());
        write_zone(&mut region, RECORD_SIZE, b"console line\n");
        let words = parse(&region);
        assert!(words.panicked);
        assert_eq!(
            words.lines,
            [
                "<6>[    0.1] hello",
                "<0>[    1.2] Kernel panic - not syncing: x"
            ]
        );
    }

    #[test]
    fn an_oops_is_no_panic_and_the_console_speaks() {
        let mut region = region();
        write_zone(&mut region, 0, b"====1.234567-D\nOops#1 Part1\nBUG\n");
        write_zone(&mut region, RECORD_SIZE, b"one\ntwo\x1b[31m\r\n");
        let words = parse(&region);
        assert!(!words.panicked);
        assert_eq!(words.lines, ["one", "two?[31m"]);
    }

    #[test]
    fn an_untouched_region_says_nothing() {
        assert_eq!(parse(&region()), LastWords::default());
        assert_eq!(parse(&[]), LastWords::default());
    }

    #[test]
    fn a_wrapped_console_is_read_from_its_oldest_byte() {
        let mut region = region();
        let lines: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
        write_zone(&mut region, RECORD_SIZE, lines.as_bytes());
        let words = parse(&region);
        assert_eq!(words.lines.len(), MAX_LINES);
        assert_eq!(words.lines.last().unwrap(), "line 19999");
        assert_eq!(words.lines[0], format!("line {}", 20_000 - MAX_LINES));
    }

    #[test]
    fn sizes_past_the_zone_are_refused() {
        for (start, size) in [(0, DATA as u32 + 1), (5, 4), (u32::MAX, u32::MAX)] {
            let mut region = region();
            region[..4].copy_from_slice(&MAGIC.to_le_bytes());
            region[4..8].copy_from_slice(&u32::to_le_bytes(start));
            region[8..12].copy_from_slice(&u32::to_le_bytes(size));
            assert_eq!(parse(&region), LastWords::default());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_talk_too_much(
            head in proptest::collection::vec(any::<u8>(), 0..64),
            text in proptest::collection::vec(any::<u8>(), 0..2048),
            signed in any::<bool>(),
            length in 0..layout::RAMOOPS_SIZE as usize + 1,
        ) {
            let mut region = region();
            for at in [0, RECORD_SIZE] {
                if signed {
                    write_zone(&mut region, at, &[&b"====0.0-D\n"[..], &text].concat());
                }
                for (to, from) in region[at + 4 * usize::from(signed)..].iter_mut().zip(&head) {
                    *to = *from;
                }
            }
            let words = parse(&region[..length]);
            prop_assert!(words.lines.len() <= MAX_LINES);
            for line in &words.lines {
                prop_assert!(line.len() <= MAX_LINE && line.bytes().all(|b| (b' '..=b'~').contains(&b)));
            }
        }
    }
}
