//! Which build this is: the GNU build id that the linker put into the executable.

use std::fs::File;
use std::os::unix::fs::FileExt;

const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The running executable's build id in hexadecimal, or `unknown` where it was linked without.
pub fn build_id() -> String {
    File::open("/proc/self/exe")
        .ok()
        .and_then(|file| read(&file))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// ELF-64 object file format: the program headers, and the notes that they point to.
fn read(file: &File) -> Option<String> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    let table = u64::from_le_bytes(header.get(32..40)?.try_into().ok()?);
    let size = u64::from(u16::from_le_bytes(header.get(54..56)?.try_into().ok()?));
    let count = u64::from(u16::from_le_bytes(header.get(56..58)?.try_into().ok()?));
    (0..count).find_map(|index| {
        let mut program = [0; 56];
        file.read_exact_at(&mut program, table + index * size)
            .ok()?;
        let kind = u32::from_le_bytes(program.get(..4)?.try_into().ok()?);
        let offset = u64::from_le_bytes(program.get(8..16)?.try_into().ok()?);
        let length = u64::from_le_bytes(program.get(32..40)?.try_into().ok()?);
        if kind != PT_NOTE || length > 4096 {
            return None;
        }
        let mut notes = vec![0; length as usize];
        file.read_exact_at(&mut notes, offset).ok()?;
        find_in_notes(&notes)
    })
}

fn find_in_notes(mut notes: &[u8]) -> Option<String> {
    loop {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(notes.get(at..at + 4)?.try_into().ok()?))
        };
        let padded = |length: u32| (length as usize).next_multiple_of(4);
        let (name, content, kind) = (word(0)?, word(4)?, word(8)?);
        let start = 12 + padded(name);
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            let id = notes.get(start..start + content as usize)?;
            return Some(id.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        notes = notes.get(start + padded(content)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_is_found_among_others() {
        let note = |name: &[u8; 4], kind: u32, content: &[u8]| {
            let mut note = 4_u32.to_le_bytes().to_vec();
            note.extend((content.len() as u32).to_le_bytes());
            note.extend(kind.to_le_bytes());
            note.extend(name);
            note.extend(content);
            note.resize(note.len().next_multiple_of(4), 0);
            note
        };
        let notes = [
            note(b"GNU\0", 1, &[1; 16]),
            note(b"GNU\0", 3, &[0xab, 0x01]),
        ]
        .concat();
        assert_eq!(find_in_notes(&notes), Some("ab01".into()));
        assert_eq!(find_in_notes(&notes[..30]), None);
        assert_eq!(find_in_notes(&[0xff; 40]), None);
    }

    #[test]
    fn this_executable_has_one() {
        assert!(build_id().len() >= 7);
    }
}
