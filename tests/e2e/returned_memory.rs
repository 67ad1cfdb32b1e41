//! What a guest does not use any more is the host's again, and the guest's as soon as it wants it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::time::Instant;

use bulkhead_tests::{Bundle, Host, Runtime, Started, eventually};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

const MIB: u64 = 1 << 20;
/// What the containers take and free.
const TAKEN: u64 = 300 * MIB;

/// A step for each line of its input.
const HOLD: &str = r#"
import sys
def take():
    held = bytearray(b"\1") * (300 << 20)
    assert all(held[at] == 1 for at in range(0, len(held), 4096))
    return held
print("ready", flush=True)
for step in sys.stdin:
    if step == "take\n": held = take()
    elif step == "free\n": held = None
    print(step, end="", flush=True)
"#;

/// A pod whose process does what it is told.
struct Pod {
    started: Started,
    stdin: ChildStdin,
    id: &'static str,
    steps: usize,
    // Its directory stays until the pod has ended.
    _bundle: Bundle,
}

impl Pod {
    fn start(id: &'static str, words: &[&str], script: &str) -> Pod {
        let bundle = Bundle::tools().args(&["/usr/bin/python3", "-c", script]);
        bundle.write();
        let command = Runtime::Bulkhead.run_command(bundle.path(), words, id);
        let mut started = Started::spawn(command);
        let stdin = started.stdin();
        started.wait_for_output("ready");
        Pod {
            started,
            stdin,
            id,
            steps: 0,
            _bundle: bundle,
        }
    }

    fn step(&mut self, step: &str) {
        writeln!(self.stdin, "{step}").expect("it reads");
        self.steps += 1;
        assert_eq!(self.started.line(self.steps), step);
    }

    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/bulkhead/default").join(self.id)
    }

    /// Bytes of the file that is the guest's memory, as far as they are there.
    fn resident(&self) -> u64 {
        let pids = fs::read_to_string(self.cgroup().join("machine/cgroup.procs"));
        let pids = pids.expect("the pod's cgroup");
        let memory = pids.lines().find_map(guest_memory);
        memory.unwrap_or_else(|| panic!("no guest memory in {pids:?}"))
    }

    /// Waits until no more than `limit` bytes are there; in seconds.
    fn wait_for_return(&self, limit: u64) -> f64 {
        let since = Instant::now();
        eventually(
            "the guest's memory is the host's again",
            || self.resident() <= limit,
            || format!("{} of at most {limit} bytes", self.resident()),
        );
        since.elapsed().as_secs_f64()
    }

    fn end(self) {
        // The end of its input is its end.
        drop(self.stdin);
        let ran = self.started.finish();
        assert_eq!(ran.status, 0, "{ran}");
    }
}

/// A line for tests/bench.
fn figure(figure: &Value) {
    // Not behind the name of the test.
    println!("\nfigure {figure}");
}

fn guest_memory(pid: &str) -> Option<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let found = entries.flatten().find(|entry| {
        let target = fs::read_link(entry.path());
        target.is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:RAM"))
    })?;
    Some(fs::metadata(found.path()).ok()?.blocks() * 512)
}

fn configured(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    fs::write(&file, text).expect("it can be written");
    file
}

#[test]
fn memory_that_a_container_frees_is_the_hosts_and_comes_back() {
    let host = Host::now();
    let mut pod = Pod::start("returned", &[], HOLD);
    let base = pod.resident();
    for _ in 0..2 {
        pod.step("take");
        let full = pod.resident();
        assert!(full > base.max(TAKEN), "{base} before, {full} with 300 MiB");
        pod.step("free");
        let seconds = pod.wait_for_return(full - TAKEN + TAKEN / 20);
        let back = 100.0 * (full - pod.resident()) as f64 / TAKEN as f64;
        let name = "300 MiB freed: back on the host";
        figure(&json!({"name": name, "ours": back, "unit": "%", "target": 95}));
        figure(&json!({"name": "  95 % of it after", "ours": seconds, "unit": "s", "target": 10}));
    }
    // At once, while the guest still reports: nobody who wants memory hears that there is none.
    for step in ["take", "free", "take"] {
        pod.step(step);
    }
    pod.end();
    host.assert_nothing_left();
}

/// Reads what it has written, so that the guest has it as page cache.
const CACHE: &str = r#"
import os, sys
print("ready", flush=True)
for step in sys.stdin:
    with open("/tmp/file", "wb") as file:
        for _ in range(64): file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    with open("/tmp/file", "rb") as file:
        while file.read(1 << 20): pass
    print(step, end="", flush=True)
"#;

#[test]
fn page_cache_of_an_idle_pod_returns_and_not_before() {
    const CACHED: u64 = 64 * MIB;
    let config = configured("reclaim_idle_secs = 10\n");
    let path = config.path().to_str().expect("a plain path").to_owned();
    let mut pod = Pod::start("idle", &["--config", &path], CACHE);
    let base = pod.resident();
    pod.step("read");
    let full = pod.resident();
    assert!(
        full > base + CACHED / 2,
        "{base} before, {full} with a file of 64 MiB"
    );
    let seconds = pod.wait_for_return(full - CACHED + CACHED / 8);
    println!("64 MiB of page cache gone after {seconds:.1} s");
    // The file is as it was.
    pod.step("read");
    pod.end();
}

#[test]
fn a_machine_without_a_balloon_keeps_what_it_has() {
    let config = configured("return_memory = false\n");
    let path = config.path().to_str().expect("a plain path").to_owned();
    let bundle =
        Bundle::busybox().script("cat /sys/bus/virtio/devices/*/device; cat /proc/cmdline");
    let ran = bundle.run_with(Runtime::Bulkhead, &["--config", &path]);
    let text = ran.ok();
    // VIRTIO 1.2 §5: 5 is the memory balloon.
    assert!(!text.lines().any(|line| line == "0x0005"), "{text}");
    assert!(!text.contains("page_reporting"), "{text}");
    let with = bundle.run().ok();
    assert!(with.lines().any(|line| line == "0x0005"), "{with}");
}
