//! Fuzz targets are tests: a function of bytes that panics when something does not hold.
//!
//! ```text
//! cargo test           the corpus (tests/fuzz/corpus/TARGET), then changed inputs, always the same
//! tests/fuzz/fuzz      libFuzzer calls the same function, built with counters of what was reached
//! ```
//!
//! So a target stands beside the tests of what it attacks, sees what they see, and the product has
//! neither a feature nor a public name for it.

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use arbitrary::{self, Unstructured};

#[cfg(coverage_guided)]
mod engine;
mod mutation;

use mutation::Mutator;

/// Changed inputs of a replay, and what they may take together: a test costs CI no more than that.
const MOST_CHANGED: u32 = 1000;
const MOST_TIME: Duration = Duration::from_secs(2);

/// Runs the target `name`: its corpus and changed inputs, or as libFuzzer says.
///
/// # Panics
/// When the body does, after it has written the input; and when the target has no corpus.
pub fn run(name: &str, body: fn(&[u8])) {
    #[cfg(coverage_guided)]
    if let Ok(words) = env::var("BULKHEAD_FUZZ") {
        engine::run(&words, body);
    }
    replay(name, body);
}

fn replay(name: &str, body: fn(&[u8])) {
    let corpus = corpus(name);
    let mut inputs: Vec<Vec<u8>> = Vec::new();
    for path in &corpus {
        let input = fs::read(path).expect("a file of the corpus can be read");
        attempt(name, &input, &path.display().to_string(), body);
        inputs.push(input);
    }
    let mut mutator = Mutator::new(name);
    let since = Instant::now();
    let mut changed = 0;
    while changed < MOST_CHANGED && since.elapsed() < MOST_TIME {
        let input = mutator.next(&inputs);
        attempt(name, &input, &format!("changed input {changed}"), body);
        changed += 1;
    }
    println!(
        "{name}: {} of the corpus, {changed} changed ones",
        inputs.len()
    );
}

/// The files, in an order that does not depend on the machine.
fn corpus(name: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let entries = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("no corpus at {}: {error}", directory.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("the corpus can be listed").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    files
}

/// Calls the body; where it panics, says with what, so that the input can go into the corpus.
fn attempt(name: &str, input: &[u8], origin: &str, body: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(input))) {
        let path = env::temp_dir().join(format!("fuzz-{name}-{}", std::process::id()));
        match fs::write(&path, input) {
            Ok(()) => eprintln!("{name}: {origin} fails; it is in {}", path.display()),
            Err(error) => eprintln!("{name}: {origin} fails: {input:02x?} ({error})"),
        }
        resume_unwind(panic);
    }
}
