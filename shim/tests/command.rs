//! The `bulkhead` command where it fails before there is a machine: one clear line, its exit code, and nothing left behind.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A directory with a bundle that could run, and a configuration that keeps all state inside.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir_all(place.path("bundle/rootfs")).unwrap();
        for part in ["bulkhead-vmm", "vmlinux", "initramfs"] {
            fs::write(place.path(part), "\x7fELF").unwrap();
        }
        let config = format!(
            "libexec_dir = {:?}\nstate_dir = {:?}\nkvm_device = \"/dev/null\"\n",
            place.path(""),
            place.path("state")
        );
        fs::write(place.path("config.toml"), config).unwrap();
        place.bundle(
            r#"{"ociVersion": "1.2.0", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
                "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]}}"#,
        );
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bundle(&self, config: &str) {
        fs::write(self.path("bundle/config.json"), config).unwrap();
    }

    fn bulkhead(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .args(arguments)
            .current_dir(self.path("bundle"))
            .output()
            .unwrap()
    }

    /// The one line of a run that must fail with 125 and leave nothing.
    fn failure(&self, arguments: &[&str]) -> String {
        let output = self.bulkhead(&[&["run"], arguments].concat());
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert!(output.stdout.is_empty());
        assert!(!self.path("state").exists(), "{text}");
        let (line, rest) = text.split_once('\n').unwrap();
        assert_eq!(rest, "", "one line");
        line.strip_prefix("bulkhead: ").expect(line).to_string()
    }
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let place = Place::new();
    let missing = place.path("nowhere");
    let error = place.failure(&["--bundle", missing.to_str().unwrap(), "x"]);
    assert!(error.contains("nowhere: No such file"), "{error}");
    place.bundle("{");
    assert!(place.failure(&["x"]).contains("line 1"));
    fs::remove_file(place.path("bundle/config.json")).unwrap();
    assert!(place.failure(&["x"]).contains("config.json: No such file"));
}

#[test]
fn arguments_that_cannot_work_are_refused() {
    let place = Place::new();
    assert!(place.failure(&["a/b"]).contains("'/'"));
    assert!(place.failure(&[".."]).contains("begins with a dot"));
    assert!(
        place
            .failure(&["--memory", "63", "x"])
            .contains("at least 64 MiB")
    );
    assert!(place.failure(&["--vcpus", "33", "x"]).contains("1 to 32"));
    let wrong = place.bulkhead(&["run", "--wrong", "x"]);
    assert_eq!(wrong.status.code(), Some(125));
}

#[test]
fn missing_parts_come_with_a_remedy() {
    let place = Place::new();
    fs::remove_file(place.path("vmlinux")).unwrap();
    let error = place.failure(&["x"]);
    assert!(
        error.contains("vmlinux") && error.contains("install"),
        "{error}"
    );
    let config = fs::read_to_string(place.path("config.toml")).unwrap();
    let config = config.replace("/dev/null", "/dev/no-kvm");
    fs::write(place.path("config.toml"), config).unwrap();
    let error = place.failure(&["x"]);
    assert!(
        error.contains("/dev/no-kvm") && error.contains("kvm_intel"),
        "{error}"
    );
}

#[test]
fn a_machine_that_cannot_start_leaves_nothing() {
    let place = Place::new();
    // Here it ends at a host without cgroup v2, or without the right to mount, or at a VMM that is no program.
    let error = place.failure(&["x"]);
    let reasons = ["cgroup v2", "bulkhead-vmm", "mount a tmpfs", "cgroup"];
    assert!(
        reasons.iter().any(|reason| error.contains(reason)),
        "{error}"
    );
    let cgroup = Path::new("/sys/fs/cgroup/bulkhead/default/x");
    assert!(!cgroup.exists());
}

#[test]
fn an_unknown_key_of_the_configuration_stops_everything() {
    let place = Place::new();
    fs::write(place.path("config.toml"), "memory = 5\n").unwrap();
    let output = place.bulkhead(&["gc"]);
    assert_eq!(output.status.code(), Some(125));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("line 1") && text.contains("`memory`"),
        "{text}"
    );
}

#[test]
fn gc_without_pods_says_nothing() {
    let place = Place::new();
    let output = place.bulkhead(&["gc"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
    assert_eq!(place.bulkhead(&["gc", "--json"]).stdout, b"[]\n");
}

#[test]
fn check_names_each_missing_thing_with_its_remedy() {
    let place = Place::new();
    fs::remove_file(place.path("vmlinux")).unwrap();
    let output = place.bulkhead(&["check", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let items: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let parts = items
        .as_array()
        .unwrap()
        .iter()
        .find(|item| item["name"] == "parts")
        .unwrap();
    assert_eq!(parts["ok"], false);
    assert!(parts["found"].as_str().unwrap().contains("vmlinux"));
    assert!(parts["remedy"].as_str().unwrap().contains("install"));
}

#[test]
fn help_and_version_are_no_failures() {
    let place = Place::new();
    let help = place.bulkhead(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(
        String::from_utf8(help.stdout)
            .unwrap()
            .contains("Exit codes:")
    );
    let version = place.bulkhead(&["--version"]);
    let text = String::from_utf8(version.stdout).unwrap();
    assert_eq!(text.matches("sha256:").count(), 4, "{text}");
}
