//! On a real cgroup2 hierarchy: the host's own, or the one beside version 1.

use std::fs::OpenOptions;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use bulkhead_agent_protocol::agent::{CgroupFile, DeviceRule};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::*;
use crate::stage::mounts::testing::{in_child, in_mount_namespace};

/// Where this host has cgroup2; `None`, said loudly, when it has it nowhere.
fn hierarchy() -> Option<PathBuf> {
    let found = [CGROUP_ROOT, "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|path| statfs(*path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC));
    if found.is_none() {
        eprintln!("SKIPPED: no cgroup2 hierarchy is mounted here; the lab runs this test");
    }
    found.map(PathBuf::from)
}

/// A cgroup of this test's own; emptied and removed at the end.
struct Own {
    cgroup: Cgroup,
    parent: PathBuf,
}

impl Own {
    fn new(resources: &Resources) -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let root = hierarchy()?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let parent = format!("bulkhead-test-{}-{count}", std::process::id());
        let cgroup = Cgroup::create_in(&root, &format!("{parent}/pod/container"), resources)
            .unwrap_or_else(|e| panic!("{e}"));
        Some(Self {
            cgroup,
            parent: root.join(parent),
        })
    }

    fn add(&self, child: &Child) {
        fs::write(
            self.cgroup.path().join("cgroup.procs"),
            child.id().to_string(),
        )
        .expect("cgroup.procs");
    }

    fn sleeper(&self) -> Child {
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep");
        self.add(&child);
        child
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.cgroup.kill_all();
        let _ = self.cgroup.delete();
        let _ = fs::remove_dir(self.parent.join("pod"));
        let _ = fs::remove_dir(&self.parent);
    }
}

fn files(list: &[(&str, &str)]) -> Resources {
    Resources {
        files: list
            .iter()
            .map(|(name, value)| CgroupFile {
                name: (*name).to_owned(),
                value: (*value).to_owned(),
                ..CgroupFile::default()
            })
            .collect(),
        ..Resources::default()
    }
}

#[test]
fn paths_that_could_leave_the_hierarchy_are_refused() {
    for path in [
        "", "/", "/a", "a/", "a//b", ".", "a/..", "../a", "a/./b", "a\0b",
    ] {
        let error = Cgroup::create_in(Path::new("/nowhere"), path, &Resources::default());
        assert!(
            matches!(error, Err(CgroupError::InvalidPath { .. })),
            "{path:?}"
        );
    }
}

#[test]
fn limits_are_written_in_order_and_errors_name_file_and_value() {
    let Some(mut own) = Own::new(&files(&[
        ("cgroup.max.descendants", "7"),
        ("cgroup.max.descendants", "8"),
    ])) else {
        return;
    };
    let value = fs::read_to_string(own.cgroup.path().join("cgroup.max.descendants")).expect("read");
    assert_eq!(value, "8\n");
    for (name, value, words) in [
        (
            "cgroup.max.depth",
            "lots",
            vec!["cgroup.max.depth", "\"lots\"", "Invalid argument"],
        ),
        (
            "nothing.max",
            "1",
            vec![
                "nothing.max",
                "\"1\"",
                "no controller \"nothing\"",
                "No such file",
            ],
        ),
        (
            "../cgroup.procs",
            "1",
            vec!["../cgroup.procs", "plain file name"],
        ),
    ] {
        let error = own
            .cgroup
            .apply(&files(&[(name, value)]))
            .expect_err(name)
            .to_string();
        for word in words {
            assert!(error.contains(word), "{error}");
        }
    }
}

#[test]
fn a_failed_creation_leaves_no_cgroup_and_an_existing_one_is_an_error() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    let root = hierarchy().expect("it was there");
    let path = own.parent.join("pod/second");
    let relative = path
        .strip_prefix(&root)
        .expect("beneath")
        .to_str()
        .expect("text");
    let error = Cgroup::create_in(&root, relative, &files(&[("nothing.max", "1")]))
        .expect_err("no such file");
    assert!(error.to_string().contains("nothing.max"), "{error}");
    assert!(!path.exists());
    let relative = own
        .cgroup
        .path()
        .strip_prefix(&root)
        .expect("beneath")
        .to_str()
        .expect("text");
    let error = Cgroup::create_in(&root, relative, &Resources::default()).expect_err("it exists");
    assert!(error.to_string().ends_with("exists already"), "{error}");
    assert!(own.cgroup.path().exists());
}

#[test]
fn controllers_are_enabled_down_to_the_container() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    let read = |path: &Path| fs::read_to_string(path.join("cgroup.controllers")).expect("read");
    assert_eq!(read(own.cgroup.path()), read(&own.parent));
    if read(&own.parent).trim().is_empty() {
        eprintln!("SKIPPED in part: this hierarchy has no controllers; the lab runs this test");
    }
}

#[test]
fn frozen_processes_stand_still_and_run_again() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    let mut child = own.sleeper();
    own.cgroup.freeze().expect("freeze");
    let state = |wanted: &str| {
        let events = fs::read_to_string(own.cgroup.path().join("cgroup.events")).expect("read");
        assert!(events.contains(wanted), "{events}");
    };
    state("frozen 1");
    own.cgroup.freeze().expect("twice is once");
    own.cgroup.thaw().expect("thaw");
    state("frozen 0");
    own.cgroup.freeze().expect("freeze");
    own.cgroup.kill_all().expect("frozen processes die too");
    child.wait().expect("wait");
}

#[test]
fn all_processes_beneath_are_counted_killed_and_their_cgroups_removed() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    // As an init system in the container would nest them.
    let deep = own.cgroup.path().join("system/service");
    fs::create_dir_all(&deep).expect("mkdir");
    let mut children = [own.sleeper(), own.sleeper()];
    fs::write(deep.join("cgroup.procs"), children[1].id().to_string()).expect("move");
    let mut pids: Vec<u32> = children.iter().map(Child::id).collect();
    pids.sort_unstable();
    assert_eq!(own.cgroup.pids().expect("pids"), pids);
    own.cgroup.kill_all().expect("kill");
    // A reaper that comes late: delete has to wait for it.
    let reaper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        children.iter_mut().for_each(|child| {
            child.wait().expect("wait");
        });
    });
    own.cgroup.delete().expect("delete");
    reaper.join().expect("the reaper ends");
    assert!(!own.cgroup.path().exists());
    own.cgroup.delete().expect("twice is once");
}

#[test]
fn a_container_cannot_nest_cgroups_without_end() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    let mut path = own.cgroup.path().to_path_buf();
    let mut depth = 0;
    while depth < 100 {
        path.push("d");
        if fs::create_dir(&path).is_err() {
            break;
        }
        depth += 1;
    }
    assert_eq!(depth, 32);
    own.cgroup.delete().expect("delete");
}

#[test]
fn a_new_cgroup_is_empty_and_nothing_was_killed_in_it() {
    let Some(own) = Own::new(&Resources::default()) else {
        return;
    };
    assert!(own.cgroup.open_fd().try_clone_to_owned().is_ok());
    assert_eq!(own.cgroup.pids().expect("pids"), Vec::<u32>::new());
    assert_eq!(
        own.cgroup.memory_events_oom_kill().expect("memory.events"),
        0
    );
}

#[test]
fn a_process_killed_for_memory_is_counted() {
    let Some(mut own) = Own::new(&Resources::default()) else {
        return;
    };
    if !own.cgroup.path().join("memory.max").exists() {
        eprintln!("SKIPPED: this hierarchy has no memory controller; the lab runs this test");
        return;
    }
    let mut limits = vec![("memory.max", "16777216")];
    if own.cgroup.path().join("memory.swap.max").exists() {
        limits.push(("memory.swap.max", "0"));
    }
    own.cgroup.apply(&files(&limits)).expect("limits");
    let procs = own.cgroup.path().join("cgroup.procs");
    let hog = std::panic::catch_unwind(|| {
        in_child(|| {
            fs::write(&procs, "0").expect("enter the cgroup");
            // Written, not only reserved.
            vec![1u8; 64 << 20].len().to_string()
        })
    });
    assert!(hog.is_err(), "64 MiB do not fit into 16");
    assert_eq!(
        own.cgroup.memory_events_oom_kill().expect("memory.events"),
        1
    );
}

/// Which of these device numbers a process in the cgroup may open for reading, for writing, and for both.
fn openable(own: &Own, devices: &[(u64, u64)]) -> Vec<String> {
    use nix::mount::{MsFlags, mount};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |(major, minor): &(u64, u64)| directory.path().join(format!("{major}:{minor}"));
    let procs = own.cgroup.path().join("cgroup.procs");
    let text = in_mount_namespace(|| {
        // A /tmp may be mounted nodev.
        let (tmpfs, flags) = (Some("tmpfs"), MsFlags::empty());
        mount(tmpfs, directory.path(), tmpfs, flags, None::<&str>).expect("a tmpfs");
        for device in devices {
            let number = makedev(device.0, device.1);
            mknod(&path(device), SFlag::S_IFCHR, Mode::S_IRWXU, number).expect("mknod");
        }
        fs::write(&procs, "0").expect("enter the cgroup");
        let may = |device, read, write, letter| {
            let opened = OpenOptions::new()
                .read(read)
                .write(write)
                .open(path(device));
            if opened.is_ok() { letter } else { '-' }
        };
        let lines = devices.iter().map(|device| {
            let (read, write) = (may(device, true, false, 'r'), may(device, false, true, 'w'));
            let both = may(device, true, true, 'b');
            format!("{}:{} {read}{write}{both}\n", device.0, device.1)
        });
        lines.collect()
    });
    text.lines().map(str::to_owned).collect()
}

fn rule(allow: bool, major: i64, minor: i64, access: u32) -> DeviceRule {
    DeviceRule {
        allow,
        kind: u32::from(b'c'),
        major,
        minor,
        access,
        ..DeviceRule::default()
    }
}

#[test]
fn the_kernel_enforces_device_rules_and_an_update_replaces_them() {
    let Some(mut own) = Own::new(&Resources::default()) else {
        return;
    };
    let devices = [(1, 3), (1, 5), (1, 11)];
    assert_eq!(
        openable(&own, &devices),
        ["1:3 rwb", "1:5 rwb", "1:11 ---"],
        "kmsg is no default device"
    );
    let mut update = Resources {
        devices: vec![rule(true, 1, 11, 2), rule(false, 1, 5, 4)],
        ..Resources::default()
    };
    own.cgroup.apply(&update).expect("apply");
    assert_eq!(
        openable(&own, &devices)[2],
        "1:11 ---",
        "without set_devices the rules stay"
    );
    update.set_devices = true;
    own.cgroup.apply(&update).expect("apply");
    assert_eq!(openable(&own, &devices), ["1:3 rwb", "1:5 r--", "1:11 r--"]);
    update.devices.clear();
    own.cgroup.apply(&update).expect("apply");
    assert_eq!(
        openable(&own, &devices),
        ["1:3 rwb", "1:5 rwb", "1:11 ---"],
        "replaced, not added"
    );
}

#[test]
fn the_verifier_takes_long_lists() {
    let mut resources = Resources {
        devices: (0..1000)
            .map(|n| rule(n % 3 != 0, n % 7, n, 1 + (n as u32) % 7))
            .collect(),
        ..Resources::default()
    };
    let Some(mut own) = Own::new(&resources) else {
        return;
    };
    resources.devices = (0..devices::MAX_RULES as i64)
        .map(|n| rule(n % 2 == 0, n, n, 7))
        .collect();
    resources.set_devices = true;
    own.cgroup.apply(&resources).expect("the longest list");
}
