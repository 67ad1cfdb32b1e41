//! Whether a file is a program that the guest can run: ELF, x86-64, static.
//!
//! The guest has no dynamic loader and no libraries. A dynamic /init would end in a kernel panic, "Requested init failed",
//! which says nothing about the reason, so it is refused here.

/// Why a file cannot be a guest program.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No ELF magic: a script or something else.
    #[error("it is not an ELF file: name the binary itself, not a script")]
    NotElf,
    /// ELF, but for another machine or of another class.
    #[error(
        "it is not for 64-bit x86 (class {class}, machine {machine}): build it for x86_64-unknown-linux-gnu"
    )]
    NotX86_64 {
        /// EI_CLASS: 1 is 32-bit, 2 is 64-bit.
        class: u8,
        /// e_machine: 62 is x86-64.
        machine: u16,
    },
    /// ELF, but an object file or a core dump.
    #[error("it is not a program (ELF type {kind}): name a linked executable")]
    NotExecutable {
        /// e_type.
        kind: u16,
    },
    /// It asks for a dynamic loader.
    #[error(
        "it is dynamically linked and needs {interpreter}, which the guest has not: link it with `-C target-feature=+crt-static`"
    )]
    Dynamic {
        /// The loader's path, from PT_INTERP.
        interpreter: String,
    },
    /// The header points outside the file.
    #[error("its ELF program headers lie outside the file: it is cut short or damaged")]
    Truncated,
}

// Offsets and values of the ELF-64 format (System V ABI, chapter 4 and 5).
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const PT_INTERP: u32 = 3;
const PROGRAM_HEADER_SIZE: u64 = 56;

/// Checks that `image` is a static x86-64 program. Static position-independent programs (ET_DYN without a loader) are.
pub fn check_static_program(image: &[u8]) -> Result<(), Error> {
    if !image.starts_with(b"\x7fELF") {
        return Err(Error::NotElf);
    }
    let class = *image.get(4).ok_or(Error::Truncated)?;
    let data = *image.get(5).ok_or(Error::Truncated)?;
    let machine = u16::from_le_bytes(field(image, 18)?);
    if class != CLASS_64 || data != DATA_LITTLE_ENDIAN || machine != MACHINE_X86_64 {
        return Err(Error::NotX86_64 { class, machine });
    }
    let kind = u16::from_le_bytes(field(image, 16)?);
    if kind != TYPE_EXEC && kind != TYPE_DYN {
        return Err(Error::NotExecutable { kind });
    }
    let table = u64::from_le_bytes(field(image, 32)?);
    let entry_size = u64::from(u16::from_le_bytes(field(image, 54)?));
    let entries = u64::from(u16::from_le_bytes(field(image, 56)?));
    if entries > 0 && entry_size < PROGRAM_HEADER_SIZE {
        return Err(Error::Truncated);
    }
    for index in 0..entries {
        let header = table
            .checked_add(index * entry_size)
            .ok_or(Error::Truncated)?;
        if u32::from_le_bytes(field(image, header)?) == PT_INTERP {
            return Err(Error::Dynamic {
                interpreter: interpreter(image, header)?,
            });
        }
    }
    Ok(())
}

/// The loader's path that the PT_INTERP header at `header` names.
fn interpreter(image: &[u8], header: u64) -> Result<String, Error> {
    let offset = u64::from_le_bytes(field(
        image,
        header.checked_add(8).ok_or(Error::Truncated)?,
    )?);
    let size = u64::from_le_bytes(field(
        image,
        header.checked_add(32).ok_or(Error::Truncated)?,
    )?);
    let end = offset.checked_add(size).ok_or(Error::Truncated)?;
    let range = usize::try_from(offset).map_err(|_| Error::Truncated)?
        ..usize::try_from(end).map_err(|_| Error::Truncated)?;
    let bytes = image.get(range).ok_or(Error::Truncated)?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// `N` bytes of `image` at `offset`.
fn field<const N: usize>(image: &[u8], offset: u64) -> Result<[u8; N], Error> {
    let start = usize::try_from(offset).map_err(|_| Error::Truncated)?;
    let end = start.checked_add(N).ok_or(Error::Truncated)?;
    let bytes = image.get(start..end).ok_or(Error::Truncated)?;
    bytes.try_into().map_err(|_| Error::Truncated)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A program header of the kind given, with its offset and size.
    fn program_header(kind: u32, offset: u64, size: u64) -> Vec<u8> {
        let mut header = vec![0; PROGRAM_HEADER_SIZE as usize];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        header
    }

    /// A minimal ELF file with the program headers given, and `tail` after them.
    fn elf(kind: u16, machine: u16, headers: &[Vec<u8>], tail: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[0..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[16..18].copy_from_slice(&kind.to_le_bytes());
        image[18..20].copy_from_slice(&machine.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(
            &u16::try_from(headers.len())
                .expect("a handful")
                .to_le_bytes(),
        );
        headers
            .iter()
            .for_each(|header| image.extend_from_slice(header));
        image.extend_from_slice(tail);
        image
    }

    /// A static program, as small as the check allows.
    pub(crate) fn static_program() -> Vec<u8> {
        elf(
            TYPE_DYN,
            MACHINE_X86_64,
            &[program_header(1, 0, 64)],
            b"code",
        )
    }

    /// A program that asks for the usual loader.
    pub(crate) fn dynamic_program() -> Vec<u8> {
        let loader = b"/lib64/ld-linux-x86-64.so.2\0";
        elf(
            TYPE_DYN,
            MACHINE_X86_64,
            &[program_header(PT_INTERP, 64 + 56, loader.len() as u64)],
            loader,
        )
    }

    #[test]
    fn static_programs_pass() {
        assert_eq!(check_static_program(&static_program()), Ok(()));
        assert_eq!(
            check_static_program(&elf(TYPE_EXEC, MACHINE_X86_64, &[], b"")),
            Ok(())
        );
    }

    #[test]
    fn this_static_test_binary_passes() {
        let own = std::fs::read(std::env::current_exe().expect("the running test has a path"))
            .expect("and can be read");
        assert_eq!(check_static_program(&own), Ok(()));
    }

    #[test]
    fn dynamic_program_is_refused_with_its_loader() {
        let error = check_static_program(&dynamic_program()).expect_err("it has PT_INTERP");
        assert_eq!(
            error,
            Error::Dynamic {
                interpreter: "/lib64/ld-linux-x86-64.so.2".to_owned()
            }
        );
        assert!(
            error.to_string().contains("+crt-static"),
            "the remedy is named"
        );
    }

    #[test]
    fn other_machines_and_kinds_are_refused() {
        const MACHINE_AARCH64: u16 = 183;
        let arm = elf(TYPE_EXEC, MACHINE_AARCH64, &[], b"");
        assert_eq!(
            check_static_program(&arm),
            Err(Error::NotX86_64 {
                class: 2,
                machine: 183
            })
        );
        let mut narrow = static_program();
        narrow[4] = 1;
        assert!(matches!(
            check_static_program(&narrow),
            Err(Error::NotX86_64 { class: 1, .. })
        ));
        let object = elf(1, MACHINE_X86_64, &[], b"");
        assert_eq!(
            check_static_program(&object),
            Err(Error::NotExecutable { kind: 1 })
        );
        assert_eq!(check_static_program(b"#!/bin/sh\n"), Err(Error::NotElf));
        assert_eq!(check_static_program(b""), Err(Error::NotElf));
    }

    #[test]
    fn headers_outside_the_file_are_refused() {
        let program = dynamic_program();
        for length in 4..program.len() {
            assert!(
                check_static_program(&program[..length]).is_err(),
                "cut at {length}"
            );
        }
        let mut far = static_program();
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(check_static_program(&far), Err(Error::Truncated));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(position in 4usize..120, value in any::<u8>()) {
            let mut program = dynamic_program();
            program[position] = value;
            let _ = check_static_program(&program);
        }
    }
}
