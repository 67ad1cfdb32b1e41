//! How long things take beside runc, in one run of the lab. Printed, not judged: an emulated host is no place for limits.

use std::time::{Duration, Instant};

use bulkhead_tests::{BULKHEAD, Engine, IMAGE, RUNC, fresh_id, soak};

use crate::Running;

/// The median of some samples, after one that warms up.
fn median(mut sample: impl FnMut()) -> Duration {
    sample();
    let mut taken: Vec<Duration> = (0..if soak() { 10 } else { 3 })
        .map(|_| {
            let since = Instant::now();
            sample();
            since.elapsed()
        })
        .collect();
    taken.sort();
    taken[taken.len() / 2]
}

#[test]
fn commands_take_this_long() {
    for runtime in [RUNC, BULKHEAD] {
        let whole = median(|| {
            Engine::get().ok(&[
                "run",
                "--rm",
                "--runtime",
                runtime,
                IMAGE,
                &fresh_id(),
                "/bin/true",
            ]);
        });
        let running = Running::start(runtime, &[], "sleep 1000");
        let exec = median(|| assert_eq!(running.exec("true").status, 0));
        running.remove();
        println!("{runtime}: ctr run --rm true {whole:?}, ctr task exec true {exec:?}");
    }
}
