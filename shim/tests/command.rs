//! The `bulkhead` command where it fails before there is a machine: one clear line, its exit code,
//! and nothing left behind.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
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
            "libexec_dir = {:?}\nstate_dir = {:?}\nkvm_device = \"/dev/null\"\n[audit]\npath = {:?}\n",
            place.path(""),
            place.path("state"),
            place.path("audit")
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
        // With an end: status 124 means that it did not come by itself.
        Command::new("timeout")
            .args(["120", env!("CARGO_BIN_EXE_bulkhead")])
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
    let bundle = place.path("bundle");
    let id_of_bundle = ["--bundle", bundle.to_str().unwrap(), "a/b"];
    assert!(place.failure(&id_of_bundle).contains("'/'"));
    // Without a bundle it is an image.
    assert!(place.failure(&["a/b"]).contains("\"a/b\" names no image"));
    assert!(place.failure(&[".."]).contains("begins with a dot"));
    assert!(
        place
            .failure(&["--memory", "47", "x"])
            .contains("at least 48")
    );
    assert!(place.failure(&["--vcpus", "33", "x"]).contains("1 to 32"));
    for option in ["--timeline-json", "--timeline-svg", "--serial"] {
        let error = place.failure(&[option, "/nowhere/file", "x"]);
        assert!(error.contains("cannot write /nowhere/file"), "{error}");
    }
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
    // Here it ends at a host without cgroup v2, or without the right to mount, or at a VMM that is
    // no program.
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
fn a_configuration_may_come_by_a_descriptor() {
    let place = Place::new();
    fs::write(place.path("config.toml"), "memory = 5\n").unwrap();
    let output = Command::new("sh")
        .args(["-c", "exec \"$0\" --config /dev/fd/7 gc 7<config.toml"])
        .arg(env!("CARGO_BIN_EXE_bulkhead"))
        .current_dir(place.path(""))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("`memory`"), "{text}");
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

/// The item of `check --json` with this name.
fn checked(output: &Output, name: &str) -> serde_json::Value {
    let items: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut items = items.as_array().unwrap().iter();
    items.find(|item| item["name"] == name).unwrap().clone()
}

#[test]
fn check_tells_a_user_who_may_not_open_kvm_how_to_be_let() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: another user than this one can be had by root only");
        return;
    }
    let place = Place::new();
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    open(place.0.path());
    fs::write(place.path("kvm"), "").unwrap();
    fs::set_permissions(place.path("kvm"), fs::Permissions::from_mode(0o660)).unwrap();
    let config = format!("kvm_device = {:?}\n", place.path("kvm"));
    fs::write(place.path("config.toml"), config).unwrap();
    // The build's directory need not be open to others.
    let program = place.path("bulkhead");
    // By another process: a test that forks in another thread would keep our descriptor for
    // writing, and the exec find the file busy.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_bulkhead"))
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    open(&program);
    let output = Command::new("timeout")
        .arg("120")
        .arg(&program)
        .arg("--config")
        .arg(place.path("config.toml"))
        .args(["check", "--json"])
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let kvm = checked(&output, "kvm");
    let (found, remedy) = (
        kvm["found"].as_str().unwrap(),
        kvm["remedy"].as_str().unwrap(),
    );
    assert!(found.contains("Permission denied"), "{found}");
    assert!(
        remedy.contains("group kvm") && remedy.contains("as root"),
        "{remedy}"
    );
    assert!(!remedy.contains("kvm_intel"), "{remedy}");
}

#[test]
fn check_says_that_a_file_is_not_kvm() {
    let place = Place::new();
    let output = place.bulkhead(&["check", "--json"]);
    let kvm = checked(&output, "kvm");
    assert_eq!(kvm["found"], "/dev/null is not KVM");
    assert!(kvm["remedy"].as_str().unwrap().contains("kvm_device"));
}

#[test]
fn without_a_command_there_is_help() {
    let place = Place::new();
    // Even with a configuration that stops everything else.
    fs::write(place.path("config.toml"), "memory = 5\n").unwrap();
    let help = place.bulkhead(&[]);
    assert_eq!((help.status.code(), help.stderr.len()), (Some(0), 0));
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(
        text.contains("Usage: bulkhead") && text.contains("Exit codes:"),
        "{text}"
    );
    assert_eq!(text.as_bytes(), place.bulkhead(&["--help"]).stdout);
}

#[test]
fn a_command_that_there_is_not_is_told_in_one_line_without_a_guess() {
    let place = Place::new();
    for verb in ["freeze", "checkpoint", "ru", "chek", "créate"] {
        let output = place.bulkhead(&[verb, "x"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains(&format!("no command {verb:?}")) && text.contains("uninstall, version"),
            "{text}"
        );
        assert!(!text.contains("similar"), "{text}");
    }
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
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(place.bulkhead(&["version"]).stdout, version.stdout);
    let text = String::from_utf8(version.stdout).unwrap();
    // As engines read runc's: NAME version VERSION, in the first line and in no other.
    let first = text.lines().next().unwrap();
    let (name, number) = first.split_once(" version ").unwrap();
    assert_eq!((name, number), ("bulkhead", env!("CARGO_PKG_VERSION")));
    assert_eq!(text.matches("version").count(), 1, "{text}");
    assert_eq!(text.matches("sha256:").count(), 4, "{text}");
}

#[test]
fn versions_are_told_to_programs_and_with_a_part_missing() {
    let place = Place::new();
    fs::remove_file(place.path("vmlinux")).unwrap();
    let output = place.bulkhead(&["version", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        place.bulkhead(&["--version", "--json"]).stdout,
        output.stdout
    );
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["version"], env!("CARGO_PKG_VERSION"));
    let part = |name: &str| {
        let parts = told["parts"].as_array().unwrap();
        parts
            .iter()
            .find(|part| part["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(part("initramfs")["sha256"].as_str().unwrap().len(), 64);
    assert!(
        part("vmlinux")["error"]
            .as_str()
            .unwrap()
            .contains("No such file")
    );
}

#[test]
fn the_own_version_comes_first_whatever_the_configuration_is() {
    let place = Place::new();
    fs::write(place.path("config.toml"), "memory = 5\n").unwrap();
    let output = place.bulkhead(&["--version"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .starts_with("bulkhead version ")
    );
}

#[test]
fn what_install_would_do_is_shown_and_not_done() {
    let place = Place::new();
    let config = place.path("containerd/config.toml");
    fs::create_dir(place.path("containerd")).unwrap();
    fs::write(&config, "version = 3\nroot = \"/x\"\n").unwrap();
    let class = place.path("etc/class.yaml");
    let words = [
        "--containerd-config",
        config.to_str().unwrap(),
        "--runtime-class",
        class.to_str().unwrap(),
    ];
    let output = place.bulkhead(&[&["install", "--dry-run"], &words[..]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "@@ -1,2 +1,8 @@",
        " root = \"/x\"",
        "+  runtime_type = \"io.containerd.bulkhead.v1\"",
        "--- /dev/null",
        "+handler: bulkhead",
    ] {
        assert!(text.lines().any(|told| told == line), "{line}: {text}");
    }
    assert_eq!(
        fs::read_to_string(&config).unwrap(),
        "version = 3\nroot = \"/x\"\n"
    );
    assert!(!place.path("etc").exists());
}

#[test]
fn templates_that_cannot_be_are_refused_and_those_of_nobody_go() {
    let place = Place::new();
    let fails = |arguments: &[&str]| {
        let output = place.bulkhead(&[&["template"], arguments].concat());
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{text}");
        text
    };
    assert!(fails(&["build", "--memory", "47"]).contains("at least 48"));
    assert!(fails(&["build", "--vcpus", "33"]).contains("1 to 32"));
    assert!(fails(&["build", "--shape", "{}"]).contains("missing field `vcpus`"));
    assert!(fails(&["build", "--shape", "{}", "--run"]).contains("cannot be used with"));
    let none = "0123456789abcdef0123456789abcdef";
    for name in [none, "../x", ""] {
        let error = fails(&["drop", name]);
        assert!(
            error.contains("no template") && error.contains("ls"),
            "{error}"
        );
    }
    assert!(fails(&["drop", none, "--all"]).contains("cannot be used with"));
    fs::remove_file(place.path("vmlinux")).unwrap();
    assert!(fails(&["build"]).contains("vmlinux"));
    assert!(!place.path("state").exists());
    let output = place.bulkhead(&["template", "ls"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("KEY") && text.lines().count() == 1,
        "{text}"
    );
    let output = place.bulkhead(&["template", "ls", "--json"]);
    assert_eq!(output.stdout, b"[]\n");
    assert!(
        place
            .bulkhead(&["template", "drop", "--all"])
            .status
            .success()
    );
    // What a builder leaves that was killed.
    let left = place
        .path("state/.templates")
        .join(format!("{none}.tmp-77"));
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("memory"), "half").unwrap();
    let output = place.bulkhead(&["gc", "--dry-run"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains(".tmp-77: of no use") && left.exists(),
        "{text}"
    );
    let output = place.bulkhead(&["gc", "--dry-run", "--json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("\"template\": \"0123") && left.exists(),
        "{text}"
    );
    let output = place.bulkhead(&["gc"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains(".tmp-77: removed"),
        "{text}"
    );
    assert!(!place.path("state").exists());
}

#[test]
fn a_template_that_cannot_be_made_leaves_the_reason_and_nothing_else() {
    let place = Place::new();
    // Here the VMM is no program, or the host has no cgroup v2. A person's second try is made.
    for _ in 0..2 {
        let output = place.bulkhead(&["template", "build", "--memory", "64"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{text}");
        let Ok(entries) = fs::read_dir(place.path("state/.templates")) else {
            assert!(text.contains("run it as root"), "{text}");
            return println!("NOT RUN: this needs root");
        };
        let paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        let [lock] = paths.as_slice() else {
            panic!("{paths:?}");
        };
        assert_eq!(lock.extension().unwrap(), "lock");
        let reason = fs::read_to_string(lock).unwrap();
        assert!(
            !reason.is_empty() && text.contains(&reason),
            "{reason}: {text}"
        );
        assert_eq!(fs::read_dir(place.path("state")).unwrap().count(), 1);
    }
    let output = place.bulkhead(&["gc"]);
    assert!(output.status.success() && output.stdout.is_empty());
}
