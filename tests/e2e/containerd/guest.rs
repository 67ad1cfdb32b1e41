//! A hand in the guest's memory, which only a test has.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
const INITRAMFS: &str = "/usr/local/libexec/bulkhead/initramfs";

/// The pages of the agent's code, as the guest's kernel has them in its page cache.
pub fn code_of_the_agent() -> Vec<Vec<u8>> {
    let archive = fs::read(INITRAMFS).expect("an installed guest image");
    let start = archive.windows(4).position(|word| word == b"\x7fELF");
    let program = &archive[start.expect("the agent is in it")..];
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&program[at..at + size]);
        u64::from_le_bytes(bytes) as usize
    };
    // elf(5): e_phoff, e_phentsize, e_phnum; p_type, p_flags, p_offset, p_filesz.
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let headers = (0..count).map(|n| table + n * size);
    let code = headers.filter(|at| number(*at, 4) == 1 && number(at + 4, 4) & 1 == 1);
    let pages = code.flat_map(|at| {
        let (offset, length) = (number(at + 8, 8), number(at + 32, 8));
        (offset.next_multiple_of(PAGE)..offset + length - PAGE).step_by(PAGE)
    });
    pages.map(|at| program[at..at + PAGE].to_vec()).collect()
}

/// Fills every page of a machine that is one of these with undefined instructions; how many there were.
pub fn spoil(vmm: i32, pages: &[Vec<u8>]) -> usize {
    let key = |page: &[u8]| <[u8; 16]>::try_from(&page[..16]).expect("sixteen");
    let known: HashMap<[u8; 16], &Vec<u8>> = pages.iter().map(|page| (key(page), page)).collect();
    let own = ram_of(vmm);
    let size = own.metadata().expect("a memfd").len();
    let mut places = vec![(&own, 0, size)];
    let path = format!("/proc/{vmm}/mem");
    let memory = File::options().read(true).write(true).open(path);
    let memory = memory.expect("root may");
    let lent = lent_to(vmm).into_iter();
    places.extend(lent.map(|(start, end)| (&memory, start, end)));
    let mut chunk = vec![0; 1 << 20];
    let mut found = 0;
    for (memory, start, end) in places {
        for at in (start..end).step_by(chunk.len()) {
            let length = chunk.len().min((end - at) as usize);
            let length = memory.read_at(&mut chunk[..length], at).expect("readable");
            for (n, page) in chunk[..length].chunks_exact(PAGE).enumerate() {
                if known.get(&key(page)).is_some_and(|known| *known == page) {
                    // UD2.
                    let undefined = [0x0f, 0x0b].repeat(PAGE / 2);
                    let at = at + (n * PAGE) as u64;
                    memory.write_all_at(&undefined, at).expect("writable");
                    found += 1;
                }
            }
        }
    }
    found
}

/// The memfd that is its RAM.
fn ram_of(vmm: i32) -> File {
    let directory = format!("/proc/{vmm}/fd");
    let listed = fs::read_dir(&directory).expect("it runs");
    let paths = listed.map(|entry| entry.expect("readable").path());
    let mut memfds = paths.filter(|path| {
        let target = fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:RAM")
    });
    let path = memfds.next().expect("RAM is a memfd");
    let opened = File::options().read(true).write(true).open(path);
    opened.expect("root may")
}

/// Where in its own memory are pages that a template lends.
fn lent_to(vmm: i32) -> Vec<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{vmm}/maps")).expect("it runs");
    // `memory`, which is mapped privately; each page that is written to is the machine's then.
    let lines = maps.lines().filter(|line| line.ends_with("/memory"));
    let ranges = lines.map(|line| {
        let (start, rest) = line.split_once('-').expect("a range");
        let end = rest.split(' ').next().expect("its end");
        let number = |text| u64::from_str_radix(text, 16).expect("hexadecimal");
        (number(start), number(end))
    });
    ranges.collect()
}
