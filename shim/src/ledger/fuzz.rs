//! A ledger that a crash has cut off, or somebody has written over.

use super::*;

/// Nothing outside of the sandbox' places is ever given back, and what is held survives being
/// written anew.
fn ledger(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (owner, held, next) = record::replay(&text);
    let (state, directory) = (Path::new("/s"), Path::new("/s/n/a"));
    for entry in &held {
        assert!(next > entry.id.0 || next == u64::MAX);
        let shown = entry.resource.to_string();
        if !entry.resource.belongs_to(directory, state) {
            continue;
        }
        match &entry.resource {
            Resource::Directory { path } | Resource::File { path } | Resource::Mount { path } => {
                assert!(
                    path.starts_with("/s/n/a/") && !shown.contains("/../"),
                    "{path:?}"
                );
            }
            Resource::Cgroup { path, .. } => assert!(path.starts_with("/sys/fs/cgroup/")),
            Resource::ShimCgroup { path, home } => {
                assert!(path.starts_with("/sys/fs/cgroup/") && home.starts_with("/sys/fs/cgroup"));
            }
            Resource::Claim { path, .. } => assert!(path.starts_with("/s/.claims/")),
            Resource::Process { id, .. } => assert!(id.pid > 1),
            Resource::Redirect(redirect) => assert!(redirect.is_plausible()),
        }
    }
    let lines = owner.map(Line::Owner).into_iter();
    let lines = lines.chain(held.iter().cloned().map(Line::Take));
    let shorter: Vec<u8> = lines.flat_map(|line| line.text()).collect();
    let shorter = String::from_utf8(shorter).expect("JSON is text");
    let (again, held_again, _) = record::replay(&shorter);
    assert_eq!((again, held_again), (owner, held));
}

#[test]
fn fuzz_ledger() {
    bulkhead_fuzz::run("ledger", ledger);
}
