//! Pods that go on from a template: as if each had booted, and no two alike in what must differ.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_tests::{Bundle, Host, Ran, Started, run, soak};
use serde_json::Value;
use tempfile::TempDir;

/// A state directory of its own, with a template of `bulkhead run`.
pub struct Node {
    dir: TempDir,
    /// `template` of its configuration.
    mode: &'static str,
}

impl Node {
    pub fn new(mode: &'static str) -> Node {
        let dir = TempDir::with_prefix_in("bulkhead-node-", "/run").expect("a tmpfs");
        let node = Node { dir, mode };
        let state = node.dir.path().join("state");
        let text = format!(
            "template = \"{mode}\"\nstate_dir = \"{}\"\n",
            state.display()
        );
        fs::write(node.config(), text).expect("writable");
        node
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("bulkhead");
        command.arg("--config").arg(self.config()).args(words);
        command
    }

    fn ok(&self, words: &[&str]) -> String {
        run(&mut self.command(words)).ok()
    }

    fn built(mode: &'static str) -> Node {
        let node = Node::new(mode);
        let made = node.ok(&["template", "build", "--run"]);
        assert!(made.ends_with(": made"), "{made}");
        node
    }

    fn run(&self, id: &str, script: &str) -> Ran {
        let bundle = Bundle::busybox().script(script);
        bundle.write();
        let path = bundle.path().to_str().expect("a plain path");
        run(&mut self.command(&["run", "--bundle", path, id]))
    }

    /// The directory of its only template.
    fn template(&self) -> PathBuf {
        let templates = self.dir.path().join("state/.templates");
        let entries = fs::read_dir(templates).expect("a directory");
        let mut paths = entries.map(|entry| entry.expect("an entry").path());
        paths.find(|path| path.is_dir()).expect("a template")
    }

    /// Until a builder that nobody waits for has published it.
    fn wait_for_template(&self) {
        let there = || {
            let listed = self.ok(&["template", "ls", "--json"]);
            listed.contains("\"refused\": null")
        };
        bulkhead_tests::eventually("a template is made", there, || {
            format!("{} {}", self.mode, self.ok(&["template", "ls"]))
        });
    }

    /// Nothing of a pod or a builder is in its state, whatever templates are.
    fn assert_idle(&self) {
        let state = self.dir.path().join("state");
        let names = |path: &Path| -> BTreeSet<String> {
            let entries = fs::read_dir(path).into_iter().flatten();
            entries
                .map(|entry| {
                    entry
                        .expect("an entry")
                        .file_name()
                        .to_string_lossy()
                        .into()
                })
                .collect()
        };
        for name in names(&state) {
            let within = names(&state.join(&name));
            let half = within.iter().any(|name| name.contains(".tmp-"));
            let free = name.starts_with('.') || within.is_empty();
            assert!(free && !half, "{name}: {within:?}");
        }
    }
}

/// What a guest says of itself, a line each.
const TELL: &str = "cat /proc/sys/kernel/random/boot_id
    head -c 16 /dev/urandom | od -An -tx1
    grep stack /proc/self/maps
    date +%s
    nproc; grep MemTotal /proc/meminfo; uname -r; cat /proc/sys/kernel/random/entropy_avail
    dd if=/dev/zero of=/tmp/x bs=64k count=20 2>/dev/null; cmp -n 1310720 /tmp/x /dev/zero && echo same";

#[test]
fn clones_are_alike_and_differ_in_what_must_differ() {
    let host = Host::now();
    let cold = Node::new("off").run("cold", TELL).ok();
    let node = Node::built("required");
    let learned = fs::metadata(node.template().join("touched"));
    assert!(learned.expect("a file").len() > 0, "nothing was learned");
    let clones: Vec<String> = ["one", "two"].map(|id| node.run(id, TELL).ok()).into();
    let lines = |text: &str| -> Vec<String> { text.lines().map(str::to_owned).collect() };
    let all: Vec<Vec<String>> = [&cold, &clones[0], &clones[1]]
        .map(|text| lines(text))
        .into();
    let line = |nth: usize| -> BTreeSet<&str> { all.iter().map(|one| &*one[nth]).collect() };
    for (nth, what) in ["boot id", "random bytes", "stack's place"]
        .into_iter()
        .enumerate()
    {
        assert_eq!(line(nth).len(), 3, "{what}: {all:#?}");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("after 1970").as_secs();
    for one in &all {
        let theirs: u64 = one[3].parse().expect("seconds");
        assert!(now.abs_diff(theirs) < 120, "{theirs} and {now}");
    }
    let same = |one: &Vec<String>| one[4..].to_vec();
    assert_eq!(same(&all[1]), same(&all[2]));
    assert_eq!(same(&all[0]), same(&all[1]), "as one that has booted");
    node.assert_idle();
    drop(node);
    host.assert_nothing_left();
}

/// Many in a row, and some at once that go on when their template has gone.
#[test]
fn clones_in_a_row_and_four_at_once_leave_nothing() {
    let node = Node::built("required");
    let host = Host::now();
    for nth in 0..if soak() { 100 } else { 6 } {
        let ran = node.run(&format!("row-{nth}"), "echo $((6 * 7)); exit 3");
        assert_eq!((ran.status, ran.text().trim()), (3, "42"), "{ran}");
    }
    let bundle = Bundle::busybox().script("echo up; read line; echo got $line");
    bundle.write();
    let path = bundle.path().to_str().expect("a plain path");
    let start = |nth: usize| {
        let id = format!("at-once-{nth}");
        Started::spawn(node.command(&["run", "--bundle", path, &id]))
    };
    let pods: Vec<Started> = (0..4).map(start).collect();
    for pod in &pods {
        pod.wait_for_output("up");
    }
    node.ok(&["template", "drop", "--all"]);
    for (nth, mut pod) in pods.into_iter().enumerate() {
        let mut stdin = pod.stdin();
        writeln!(stdin, "{nth}").expect("it reads");
        assert_eq!(pod.finish_with(stdin).ok(), format!("up\ngot {nth}"));
    }
    host.assert_nothing_left();
    let refused = node.run("late", "true");
    assert_eq!(refused.status, 125, "{refused}");
    assert!(refused.errors().contains("template"), "{refused}");
    host.assert_nothing_left();
}

#[test]
fn a_template_that_was_changed_is_dropped_and_the_pod_boots() {
    // The store's own tests damage each file at each place.
    let node = Node::built("auto");
    let path = node.template().join("memory");
    let mut bytes = fs::read(&path).expect("a file");
    bytes[5 << 20] ^= 1;
    fs::write(&path, bytes).expect("root may");
    assert_eq!(node.run("boots", "echo it boots").ok(), "it boots");
    // The pod that has booted has another one made.
    node.wait_for_template();
    assert_eq!(node.run("clone", "echo it goes on").ok(), "it goes on");
}

/// What no seal tells: the guest's kernel is damaged. One pod fails by its guest's end, and says so;
/// nobody meets the template again.
#[test]
fn a_template_whose_guest_dies_is_used_once() {
    let host = Host::now();
    let node = Node::built("built");
    let template = node.template();
    let memory = fs::File::options()
        .write(true)
        .open(template.join("memory"))
        .expect("root may");
    // The kernel begins at 16 MiB.
    for page in 0..1024 {
        let at = (16 << 20) + page * 4096;
        memory.write_all_at(&[0xcc; 4096], at).expect("room");
    }
    let data = memory.metadata().expect("a file");
    let manifest = template.join("manifest.json");
    let text = fs::read(&manifest).expect("a manifest");
    let mut value: Value = serde_json::from_slice(&text).expect("JSON");
    let seal = &mut value["memory"]["ctime_ns"];
    assert!(seal.is_i64(), "{value}");
    *seal = (data.ctime() * 1_000_000_000 + data.ctime_nsec()).into();
    fs::write(&manifest, value.to_string()).expect("root may");

    let failed = node.run("dies", "echo never");
    assert_eq!(failed.status, 125, "{failed}");
    assert!(failed.errors().contains("guest"), "{failed}");
    let listed = node.ok(&["template", "ls"]);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    assert_eq!(node.run("boots", "echo it boots").ok(), "it boots");
    drop(node);
    host.assert_nothing_left();
}

/// Wherever a builder is when it is killed, the next one finishes, and `gc` finds the rest.
#[test]
fn a_killed_builder_leaves_nothing_that_is_not_found() {
    let host = Host::now();
    let node = Node::new("required");
    for millis in [150, 2500, 5000] {
        let mut child = node
            .command(&["template", "build", "--run"])
            .spawn()
            .expect("it starts");
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }
    node.ok(&["gc"]);
    node.assert_idle();
    host.assert_nothing_left();
    node.ok(&["template", "build", "--run"]);
    assert_eq!(node.run("clone", "echo fine").ok(), "fine");
    node.assert_idle();
}
