//! What a guest writes into its log.

use super::*;

/// Lines stay in their bounds, and say nothing to a terminal.
fn lines(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().build().unwrap();
    let follower = Follower::new("s", "fuzz", &crate::audit::Audit::default());
    let tail = follower.tail.clone();
    runtime.block_on(follower.run(data));
    let lines = tail.lines();
    assert!(lines.len() <= KEPT);
    for line in lines.iter().chain(&tail.trouble()) {
        assert!(line.len() <= MAX_LINE);
        assert!(!line.contains(char::is_control), "{line:?}");
    }
    let text = String::from_utf8_lossy(data);
    for limit in [64, 65, 100, 4096] {
        let shown = brief(&text, limit);
        assert!(shown.len() <= limit && !shown.contains(char::is_control));
    }
}

#[test]
fn fuzz_log_lines() {
    bulkhead_fuzz::run("log_lines", lines);
}
