//! Bad input: one clear line, code 125, and nothing left behind.

use std::fs;
use std::process::Command;

use bulkhead_tests::{Bundle, Host, Ran, Runtime, Started, must};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs `bulkhead` with these words and asserts that nothing is left.
#[track_caller]
fn refused(words: &[&str], says: &[&str]) {
    let host = Host::now();
    let mut command = Command::new("bulkhead");
    command.args(words);
    Started::spawn(command).finish().refused(says);
    host.assert_nothing_left();
}

#[track_caller]
fn refused_config(change: impl FnOnce(&mut Value), says: &[&str]) {
    refused_words(Bundle::busybox().edit(change), &[], says);
}

#[track_caller]
fn refused_words(bundle: Bundle, words: &[&str], says: &[&str]) {
    let host = Host::now();
    bundle.run_with(Runtime::Bulkhead, words).refused(says);
    host.assert_nothing_left();
}

#[test]
fn a_missing_bundle_or_config_is_named() {
    refused(&["run", "--bundle", "/nowhere", "x"], &["/nowhere"]);
    let empty = TempDir::new().expect("a temporary directory");
    let path = empty.path().to_str().expect("a plain path");
    refused(&["run", "--bundle", path, "x"], &["config.json"]);
    fs::write(
        empty.path().join("config.json"),
        "{\"ociVersion\": \"1.0.2\", ",
    )
    .expect("writable");
    refused(&["run", "--bundle", path, "x"], &["config.json", "line 1"]);
}

#[test]
fn a_bad_id_is_refused() {
    for id in ["..", "a/b", "", "a b", "\u{e9}"] {
        refused(&["run", "--bundle", "/tmp", id], &["id"]);
    }
}

#[test]
fn unknown_fields_are_tolerated() {
    let bundle = Bundle::busybox()
        .edit(|config| config["someday"] = json!({"a": [1, 2]}))
        .args(&["/bin/echo", "fine"]);
    assert_eq!(bundle.run().ok(), "fine");
}

#[test]
fn a_root_that_is_not_a_directory_is_refused() {
    refused_config(
        |config| config["root"]["path"] = json!("config.json"),
        &["config.json", "directory"],
    );
    refused_config(
        |config| config["root"]["path"] = json!("absent"),
        &["absent"],
    );
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    refused_config(
        |config| config["process"]["apparmorProfile"] = json!("docker-default"),
        &["apparmorProfile"],
    );
    refused_config(
        |config| config["process"]["selinuxLabel"] = json!("system_u:x"),
        &["selinuxLabel"],
    );
    refused_config(
        |config| config["linux"]["intelRdt"] = json!({"closID": "a"}),
        &["intelRdt"],
    );
    refused_config(
        |config| config["linux"]["mountLabel"] = json!("x"),
        &["mountLabel"],
    );
    refused_config(
        |config| config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        &["SCMP_ACT_NOTIFY"],
    );
    refused_config(
        |config| config["linux"]["namespaces"] = json!([{"type": "network", "path": "/proc/1/ns/net"}, {"type": "mount"}, {"type": "pid"}, {"type": "uts"}]),
        &["network", "/proc/1/ns/net"],
    );
    refused_config(
        |config| {
            config["mounts"].as_array_mut().expect("a list").push(json!({"destination": "/x", "type": "bind", "source": "/nowhere", "options": ["bind"]}))
        },
        &["/nowhere"],
    );
    refused_config(
        |config| {
            config["mounts"]
                .as_array_mut()
                .expect("a list")
                .push(json!({"destination": "/x", "type": "nfs", "source": "a:/b"}))
        },
        &["nfs"],
    );
}

/// The table of operations.md, field by field.
#[test]
fn limits_that_cannot_be_are_refused_by_field() {
    for (resources, words) in [
        (json!({"memory": {"limit": -5}}), ["memory.limit", "-5"]),
        (
            json!({"memory": {"reservation": -2}}),
            ["memory.reservation", "-2"],
        ),
        (
            json!({"memory": {"swap": 4096}}),
            ["memory.swap", "memory.limit"],
        ),
        (
            json!({"memory": {"kernel": 4096}}),
            ["memory.kernel", "cgroup v2"],
        ),
        (
            json!({"memory": {"kernelTCP": 4096}}),
            ["memory.kernelTCP", "cgroup v2"],
        ),
        (
            json!({"memory": {"swappiness": 60}}),
            ["memory.swappiness", "cgroup v2"],
        ),
        (
            json!({"memory": {"disableOOMKiller": true}}),
            ["disableOOMKiller", "cgroup v2"],
        ),
        (
            json!({"memory": {"useHierarchy": false}}),
            ["useHierarchy", "cgroup v2"],
        ),
        (json!({"cpu": {"quota": 10}}), ["cpu.quota", "1000"]),
        (
            json!({"cpu": {"period": 10_000_000}}),
            ["cpu.period", "1000000"],
        ),
        (json!({"cpu": {"idle": 7}}), ["cpu.idle", "0 or 1"]),
        (
            json!({"cpu": {"realtimeRuntime": 7}}),
            ["realtimeRuntime", "cgroup v2"],
        ),
        (
            json!({"cpu": {"quota": 5000, "burst": 6000}}),
            ["cpu.burst", "5000"],
        ),
        (
            json!({"cpu": {"cpus": "0-999"}}),
            ["cpu.cpus", "which this host does not have"],
        ),
        (json!({"cpu": {"cpus": "zero"}}), ["cpu.cpus", "zero"]),
        (json!({"cpu": {"mems": "1"}}), ["mems", "1"]),
        (json!({"pids": {"limit": -9}}), ["pids.limit", "-9"]),
        (
            json!({"blockIO": {"weight": 5}}),
            ["blockIO.weight", "10 to 1000"],
        ),
        (
            json!({"blockIO": {"leafWeight": 50}}),
            ["blockIO.leafWeight", "cgroup v2"],
        ),
        (
            json!({"blockIO": {"throttleWriteBpsDevice": [{"major": 511, "minor": 7, "rate": 1}]}}),
            ["io.max", "511:7"],
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 4096}]}),
            ["hugepageLimits", "3MB"],
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "two", "limit": 4096}]}),
            ["hugepageLimits", "two"],
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 1_i64 << 50}]}),
            ["hugepageLimits", "more memory"],
        ),
        (json!({"network": {"classID": 5}}), ["network", "cgroup v2"]),
        (
            json!({"rdma": {"mlx5_0": {"hcaHandles": 3}}}),
            ["rdma", "no RDMA device"],
        ),
        (
            json!({"unified": {"nothing.max": "1"}}),
            ["unified", "no controller \"nothing\""],
        ),
        (
            json!({"unified": {"memory.nothing": "1"}}),
            ["unified", "memory.nothing"],
        ),
        (
            json!({"unified": {"memory.max": "lots"}}),
            ["unified", "memory.max to \"lots\""],
        ),
        (
            json!({"unified": {"cgroup.kill": "1"}}),
            ["unified", "cgroup.kill"],
        ),
        (
            json!({"unified": {"../memory.max": "1"}}),
            ["unified", "../memory.max"],
        ),
    ] {
        refused_config(|config| config["linux"]["resources"] = resources, &words);
    }
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let host = Host::now();
    let ran = Bundle::busybox().args(&["/no/such/program"]).run();
    assert_eq!(ran.status, 127, "{ran}");
    assert!(ran.errors().contains("/no/such/program"), "{ran}");
    let ran = Bundle::busybox().args(&["/etc/passwd"]).run();
    assert_eq!(ran.status, 126, "{ran}");
    host.assert_nothing_left();
}

#[test]
fn sizes_that_cannot_boot_are_refused() {
    let bundle = || Bundle::busybox().args(&["/bin/true"]);
    refused_words(bundle(), &["--memory", "32"], &["32", "48"]);
    let small = ["--memory", "50", "--vcpus", "4"];
    refused_words(bundle(), &small, &["50", "51"]);
    refused_words(bundle(), &["--vcpus", "0"], &["vcpus", "32"]);
    refused_words(bundle(), &["--vcpus", "33"], &["vcpus", "32"]);
    refused_words(bundle(), &["--memory", "999999999"], &["memory"]);
}

#[test]
fn limits_that_no_machine_can_have_are_refused_by_their_names() {
    for (resources, says) in [
        (json!({"memory": {"limit": -5}}), &["memory.limit", "-5"]),
        (json!({"cpu": {"quota": -5}}), &["cpu.quota", "-5"]),
        (json!({"cpu": {"quota": 999}}), &["cpu.quota", "999"]),
        (
            json!({"cpu": {"quota": 1_u64 << 60}}),
            &["cpu.quota", "no machine"],
        ),
        (json!({"cpu": {"period": 999}}), &["cpu.period", "999"]),
        (json!({"cpu": {"cpus": "0-9999"}}), &["cpu.cpus", "0-9999"]),
        (json!({"cpu": {"cpus": "4000"}}), &["cpu.cpus", "4000"]),
    ] {
        let change = |config: &mut Value| config["linux"]["resources"] = resources;
        refused_config(change, says);
    }
    let dir = TempDir::new().expect("a temporary directory");
    let config = dir.path().join("config.toml");
    let path = config.to_str().expect("a plain path");
    let limits = json!({"memory": {"limit": 20 << 20}, "cpu": {"quota": 200_000}});
    let bundle = Bundle::busybox().edit(|config| config["linux"]["resources"] = limits);
    bundle.write();
    let root = bundle.path().to_str().expect("a plain path");
    for (text, says) in [
        ("overhead_mib = 0", &["memory.limit", "bytes are needed"]),
        ("max_vcpus = 1", &["cpu.quota", "max_vcpus"]),
        (
            "max_memory_mib = 80\nmemory_mib = 80",
            &["memory.limit", "max_memory_mib"],
        ),
        ("max_memory_mib = 32", &["max_memory_mib", "48"]),
        ("max_vcpus = 64", &["max_vcpus", "32"]),
    ] {
        fs::write(&config, text).expect("writable");
        refused(&["--config", path, "run", "--bundle", root, "x"], says);
    }
}

#[test]
fn a_wrong_kernel_file_is_refused() {
    let dir = TempDir::new().expect("a temporary directory");
    let config = dir.path().join("config.toml");
    fs::write(&config, "kernel = \"/etc/passwd\"\n").expect("writable");
    let path = config.to_str().expect("a plain path");
    let bundle = Bundle::busybox().args(&["/bin/true"]);
    bundle.write();
    let root = bundle.path().to_str().expect("a plain path");
    refused(
        &["--config", path, "run", "--bundle", root, "x"],
        &["/etc/passwd"],
    );
    fs::write(&config, "no_such_key = 1\n").expect("writable");
    refused(
        &["--config", path, "run", "--bundle", root, "x"],
        &["no_such_key"],
    );
}

#[test]
fn an_agent_that_never_answers_is_reported_with_how_far_the_boot_came() {
    // The agent's place is taken by a program that sleeps for ever: an initramfs with busybox as /init.
    let dir = TempDir::new().expect("a temporary directory");
    let path = |name: &str| {
        dir.path()
            .join(name)
            .to_str()
            .expect("a plain path")
            .to_owned()
    };
    fs::create_dir(path("root")).expect("writable");
    fs::copy("/bin/busybox", path("root/busybox")).expect("busybox");
    fs::write(
        path("root/init"),
        "#!/busybox sh\nwhile :; do /busybox sleep 1000; done\n",
    )
    .expect("writable");
    let script = format!(
        "chmod 755 {0}/root/init && cd {0}/root && find . | busybox cpio -o -H newc > ../initramfs",
        dir.path().display()
    );
    must(Command::new("sh").args(["-c", &script]));
    fs::write(
        path("config.toml"),
        format!(
            "initramfs = \"{}\"\nboot_timeout_secs = 8\n",
            path("initramfs")
        ),
    )
    .expect("writable");
    let bundle = Bundle::busybox().args(&["/bin/true"]);
    bundle.write();
    let config = path("config.toml");
    refused(
        &[
            "--config",
            &config,
            "run",
            "--bundle",
            bundle.path().to_str().expect("a plain path"),
            "x",
        ],
        &["agent", "8 s"],
    );
}

#[test]
fn without_kvm_it_says_so() {
    let host = Host::now();
    let bundle = Bundle::busybox().args(&["/bin/true"]);
    bundle.write();
    // A mount namespace in which /dev/kvm is missing.
    let mut command = Command::new("unshare");
    let script = format!(
        "mount --bind /tmp/.no-kvm /dev/kvm; exec bulkhead run --bundle {} x",
        bundle.path().display()
    );
    fs::write("/tmp/.no-kvm", "").expect("writable");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    Started::spawn(command).finish().refused(&["/dev/kvm"]);
    host.assert_nothing_left();
}

#[test]
fn a_full_disk_is_the_containers_error_and_ours_is_clean() {
    let small = TempDir::new().expect("a temporary directory");
    let mut mount = Command::new("mount");
    must(
        mount
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(small.path()),
    );
    let host = Host::now();
    let bundle = Bundle::busybox()
        .bind(small.path(), "/data", &["rbind"])
        .script(
            "dd if=/dev/zero of=/data/x bs=64k count=64 2>&1 | grep -o 'No space left on device'",
        );
    assert_eq!(bundle.run().ok(), "No space left on device");
    host.assert_nothing_left();
    must(Command::new("umount").arg(small.path()));
}

#[test]
fn a_killed_run_leaves_a_ledger_that_gc_replays_to_nothing() {
    let host = Host::now();
    let volume = TempDir::new().expect("a temporary directory");
    fs::write(volume.path().join("canary"), "alive").expect("writable");
    let bundle = Bundle::busybox()
        .bind(volume.path(), "/data", &["rbind"])
        .script("echo up; sleep 1000");
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    let _stdin = started.stdin();
    started.wait_for_output("up");
    started.signal(Signal::SIGKILL);
    let killed = started.finish();
    assert_eq!(killed.status, -(Signal::SIGKILL as i32));
    let gc = gc();
    assert_eq!(gc.status, 0, "{gc}");
    host.assert_nothing_left();
    assert_eq!(
        fs::read_to_string(volume.path().join("canary")).expect("not deleted"),
        "alive"
    );
}

fn gc() -> Ran {
    let mut command = Command::new("bulkhead");
    command.arg("gc");
    Started::spawn(command).finish()
}

#[test]
fn a_running_id_is_not_taken_twice() {
    let bundle = Bundle::busybox().script("echo up; cat");
    bundle.write();
    let mut first = Started::spawn(Runtime::Bulkhead.run_command(bundle.path(), &[], "twice"));
    let stdin = first.stdin();
    first.wait_for_output("up");
    let second =
        Started::spawn(Runtime::Bulkhead.run_command(bundle.path(), &[], "twice")).finish();
    second.refused(&["twice"]);
    drop(stdin);
    assert_eq!(first.finish().ok(), "up");
}

/// The container's own doing, by a file that most containers cannot write: the guest's end, told with its last words, and never an
/// exit status of the container.
#[test]
fn a_guest_that_panics_or_resets_is_told_as_such() {
    for (key, says) in [
        (
            "c",
            ["the guest's kernel panicked", "sysrq triggered crash"],
        ),
        ("b", ["the guest", "triple fault"]),
    ] {
        let script = format!("echo {key} > /proc/sysrq-trigger; sleep 60");
        let bundle = Bundle::busybox()
            .script(&script)
            .edit(|config| config["linux"]["readonlyPaths"] = json!([]));
        refused_words(bundle, &[], &says);
    }
}
