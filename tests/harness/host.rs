//! What a run may not leave behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::failure;

/// The host's processes, mounts, cgroups, sockets and Bulkhead's directories at one moment.
#[derive(Debug, PartialEq, Eq)]
pub struct Host {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    sockets: BTreeSet<String>,
    directories: BTreeSet<String>,
}

impl Host {
    /// Looks.
    pub fn now() -> Host {
        failure::watch();
        Host {
            processes: processes(),
            mounts: mounts(),
            cgroups: walk(Path::new("/sys/fs/cgroup")),
            sockets: named_sockets(),
            directories: walk(Path::new("/run/bulkhead")),
        }
    }

    /// Asserts that nothing has been added since.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.assert_nothing_left_but(&[]);
    }

    /// Asserts that nothing has been added since, but processes with one of these words.
    #[track_caller]
    pub fn assert_nothing_left_but(&self, words: &[&str]) {
        let mut now = Host::now();
        now.processes
            .retain(|process| !words.iter().any(|word| process.contains(word)));
        let added = |before: &BTreeSet<String>, after: &BTreeSet<String>| -> Vec<String> {
            after.difference(before).cloned().collect()
        };
        let left = [
            ("processes", added(&self.processes, &now.processes)),
            ("mounts", added(&self.mounts, &now.mounts)),
            ("cgroups", added(&self.cgroups, &now.cgroups)),
            ("sockets", added(&self.sockets, &now.sockets)),
            ("directories", added(&self.directories, &now.directories)),
        ];
        let left: Vec<_> = left
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .collect();
        assert!(left.is_empty(), "left behind: {left:#?}");
    }
}

/// User processes that Bulkhead could have started: every process but kernel threads, by pid and name.
fn processes() -> BTreeSet<String> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(|pid| {
            // Gone between the two reads: not left behind. An empty command line: a kernel thread or a zombie.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let zombie = stat.rsplit(')').next()?.trim_start().starts_with('Z');
            let ours = zombie && stat.contains("(bulkhead");
            (!command.is_empty() || ours).then(|| {
                format!(
                    "{pid} {}",
                    String::from_utf8_lossy(&command).replace('\0', " ")
                )
            })
        })
        .collect()
}

fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    text.lines()
        .map(|line| line.split(' ').take(5).collect::<Vec<_>>().join(" "))
        .collect()
}

fn named_sockets() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
    text.lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|path| path.contains("bulkhead") || path.starts_with("/run/containerd/s/"))
        .map(str::to_owned)
        .collect()
}

fn walk(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut queue = vec![root.to_path_buf()];
    while let Some(dir) = queue.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.insert(entry.path().display().to_string());
                queue.push(entry.path());
            }
        }
    }
    found
}
