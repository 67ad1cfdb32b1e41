use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::super::Memory;
use super::*;

/// Where the template's pages are, in the guest and in the template's file.
const START: u64 = 0x10_0000;
const PAGES: u64 = 32;

struct Machine {
    memory: Memory,
    template: File,
}

impl Machine {
    fn new() -> Machine {
        let template = tempfile::tempfile().unwrap();
        for page in 0..PAGES {
            let bytes = [page as u8 + 1; PAGE as usize];
            template.write_all_at(&bytes, START + page * PAGE).unwrap();
        }
        let memory = Memory::new(64 << 20).unwrap();
        let region = memory.ram().iter().next().unwrap();
        let place = (START, PAGES * PAGE);
        let mut lent = memory.loan().lock();
        lent.lend(region, place, &template, START).unwrap();
        drop(lent);
        Machine { memory, template }
    }

    /// A byte as the guest sees it, and as the fs process does.
    fn bytes(&self, address: u64) -> (u8, u8) {
        let guest = self.memory.ram().read_obj(GuestAddress(address)).unwrap();
        let region = self.memory.ram().iter().next().unwrap();
        let mut byte = [0];
        let file = region.file_offset().unwrap().file();
        file.read_exact_at(&mut byte, address).unwrap();
        (guest, byte[0])
    }

    fn write(&self, address: u64, byte: u8) {
        let ram = self.memory.ram();
        ram.write_obj(byte, GuestAddress(address)).unwrap();
    }

    fn own(&self, range: Range<u64>) {
        self.memory.loan().lock().own(range);
    }

    fn runs(&self) -> Vec<(u64, u64)> {
        self.memory.loan().lock().runs()
    }
}

fn page(number: u64) -> u64 {
    START + number * PAGE
}

#[test]
fn what_is_lent_is_nobody_elses_and_never_changed() {
    let machine = Machine::new();
    assert_eq!(machine.bytes(page(3)), (4, 0));
    machine.write(page(3), 99);
    assert_eq!(machine.bytes(page(3)), (99, 0));
    let mut byte = [0];
    machine.template.read_exact_at(&mut byte, page(3)).unwrap();
    assert_eq!(byte[0], 4);
    assert_eq!(machine.runs(), [(START, PAGES * PAGE)]);
}

#[test]
fn what_becomes_the_pods_own_keeps_what_the_guest_wrote() {
    let machine = Machine::new();
    machine.write(page(3) + 5, 99);
    // Pages that have a byte of it.
    machine.own(page(3) + 17..page(5) - 4000);
    assert_eq!(machine.bytes(page(3) + 5), (99, 99));
    assert_eq!(machine.bytes(page(3)), (4, 4));
    assert_eq!(machine.bytes(page(4)), (5, 5));
    assert_eq!(machine.bytes(page(5)), (6, 0));
    // It is shared now, in both directions.
    machine.write(page(4), 77);
    assert_eq!(machine.bytes(page(4)), (77, 77));
    let rest = [(START, 3 * PAGE), (page(5), (PAGES - 5) * PAGE)];
    assert_eq!(machine.runs(), rest);
    machine.own(page(3)..page(5));
    assert_eq!(machine.bytes(page(4)), (77, 77));
}

#[test]
fn what_is_forgotten_is_zero_and_never_lent_again() {
    let machine = Machine::new();
    machine.write(page(31), 99);
    machine.memory.loan().lock().forget(page(31)..page(40));
    assert_eq!(machine.bytes(page(31)), (0, 0));
    machine.write(page(31), 7);
    machine.own(page(31)..page(32));
    assert_eq!(machine.bytes(page(31)), (7, 7));
    machine.memory.clear().unwrap();
    assert_eq!(machine.runs(), []);
    assert_eq!(machine.bytes(page(0)), (0, 0));
    assert_eq!(machine.bytes(page(31)), (0, 0));
}

#[test]
fn ranges_that_nothing_is_lent_of_change_nothing() {
    let machine = Machine::new();
    for range in [
        0..0,
        0..START,
        page(PAGES)..u64::MAX,
        u64::MAX..u64::MAX,
        Range {
            start: u64::MAX - 1,
            end: 3,
        },
        page(9)..page(9),
        page(9)..page(2),
    ] {
        assert!(!machine.memory.loan().lock().has(&range), "{range:?}");
        machine.own(range);
    }
    assert_eq!(machine.runs(), [(START, PAGES * PAGE)]);
    machine.own(0..u64::MAX);
    assert_eq!(machine.runs(), []);
    assert_eq!(machine.bytes(page(31)), (32, 32));
}

#[test]
fn each_page_by_itself_is_a_piece_less() {
    let machine = Machine::new();
    for number in (0..PAGES).rev().step_by(2).chain((0..PAGES).step_by(2)) {
        machine.write(page(number) + 1, number as u8);
        machine.own(page(number)..page(number) + 1);
        assert_eq!(
            machine.bytes(page(number) + 1),
            (number as u8, number as u8)
        );
        assert_eq!(
            machine.bytes(page(number)),
            (number as u8 + 1, number as u8 + 1)
        );
    }
    assert_eq!(machine.runs(), []);
}

/// There is no moment without a mapping: who reads meanwhile sees the one or the other.
#[test]
fn who_reads_meanwhile_sees_the_same() {
    let machine = Machine::new();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for number in 0..PAGES {
                        let seen: u8 = machine
                            .memory
                            .ram()
                            .read_obj(GuestAddress(page(number) + 9))
                            .unwrap();
                        assert_eq!(seen, number as u8 + 1);
                    }
                }
            });
        }
        for number in (0..PAGES).step_by(3).chain(0..PAGES) {
            machine.own(page(number)..page(number + 1));
            thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn lent_memory_is_in_no_core_dump() {
    let machine = Machine::new();
    machine.own(page(4)..page(6));
    let lent = machine.memory.loan().lock();
    let region = &lent.regions[0];
    let ranges = [region.host, region.shadow].map(|at| at as usize..at as usize + (64 << 20));
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut seen) = (false, 0);
    for line in smaps.lines() {
        if let Some((start, _)) = line.split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            inside = ranges.iter().any(|range| range.contains(&start));
        } else if inside && line.starts_with("VmFlags:") {
            assert!(line.split_whitespace().any(|flag| flag == "dd"), "{line}");
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen}");
}
