//! What Landlock costs where it is asked: when a file is opened.

use std::io::{Read, Write};
use std::time::Instant;

use landlock::AccessFs;
use nix::unistd::{ForkResult, fork, pipe};

use super::*;
use crate::jail::steps;

const OPENS: u32 = 20_000;
const RUNS: usize = 15;

/// The directories between the share and the file.
const DEEP: [&str; 7] = ["1", "usr", "lib", "x86_64-linux-gnu", "a", "b", "c"];

/// What two runs took, without and with Landlock.
type Pair = ([u64; 2], [u64; 2]);

/// ns for [`OPENS`] opens and closes: by system calls alone, and as requests.
fn time(guest: &mut Guest, node: u64, restricted: bool) -> [u64; 2] {
    let (reader, writer) = pipe().unwrap();
    // SAFETY: the child uses what it has a copy of, and leaves by _exit.
    if let ForkResult::Child = unsafe { fork() }.unwrap() {
        if restricted {
            steps::no_new_privileges().unwrap();
            let share = guest.host("");
            let read = AccessFs::ReadFile | AccessFs::ReadDir;
            let rules = [
                (share.to_str().unwrap(), steps::every_right()),
                ("/proc", read),
            ];
            assert!(steps::landlock(&[], &rules).unwrap().is_some());
        }
        // /proc/self is another directory here.
        guest.worker = Worker::new().unwrap();
        let took = [calls(guest, node), requests(guest, node)];
        File::from(writer)
            .write_all(&took.map(u64::to_ne_bytes).concat())
            .unwrap();
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    }
    drop(writer);
    let mut took = [[0; 8]; 2];
    let mut reader = File::from(reader);
    for took in &mut took {
        reader.read_exact(took).expect("the child has failed");
    }
    took.map(u64::from_ne_bytes)
}

fn calls(guest: &Guest, node: u64) -> u64 {
    let inode = guest.engine.inodes.get(node).unwrap();
    let name = guest.worker.name(inode.as_fd());
    twice(|| drop(sys::reopen(&name, libc::O_RDONLY).unwrap()))
}

fn requests(guest: &mut Guest, node: u64) -> u64 {
    twice(|| {
        let release = ReleaseIn {
            fh: guest.open(node, libc::O_RDONLY).unwrap(),
            ..Default::default()
        };
        let release = release.as_slice();
        guest
            .bytes(Opcode::Release as u32, node, &[release], &[])
            .unwrap();
    })
}

/// The first round is for the caches.
fn twice(mut open_and_close: impl FnMut()) -> u64 {
    let mut round = || {
        let start = Instant::now();
        (0..OPENS).for_each(|_| open_and_close());
        start.elapsed().as_nanos() as u64
    };
    round();
    round()
}

#[test]
#[ignore = "measures: run it by name, on a quiet machine"]
fn what_landlock_costs_an_open() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.host(&DEEP.join("/"))).unwrap();
    fs::write(guest.host(&DEEP.join("/")).join("f"), "f").unwrap();
    let mut node = ROOT_ID;
    for name in DEEP.into_iter().chain(["f"]) {
        node = guest.lookup(node, name).unwrap().nodeid;
    }
    let mut pairs: Vec<Pair> = Vec::new();
    for _ in 0..RUNS {
        let without = time(&mut guest, node, false);
        pairs.push((without, time(&mut guest, node, true)));
    }
    for (kind, what) in ["system calls alone", "as requests"].iter().enumerate() {
        let median = |of: &dyn Fn(&Pair) -> f64| {
            let mut values: Vec<f64> = pairs.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[RUNS / 2]
        };
        let opens = f64::from(OPENS);
        println!(
            "an open and a close, {what}: {:.0} ns without, {:.0} ns with; ratio {:.3}",
            median(&|(without, _)| without[kind] as f64 / opens),
            median(&|(_, with)| with[kind] as f64 / opens),
            median(&|(without, with)| with[kind] as f64 / without[kind] as f64),
        );
    }
}
