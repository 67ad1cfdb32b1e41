//! The same bundle under runc and under Bulkhead: what the process sees of itself is the same.

mod host_sockets;
#[path = "like_runc/limits.rs"]
mod limits;
#[path = "like_runc/mounts.rs"]
mod mounts;

use bulkhead_tests::{Bundle, Runtime};
use serde_json::{Value, json};

/// Asserts that `script` prints the same under both runtimes.
#[track_caller]
fn same(bundle: impl Fn() -> Bundle, script: &str) -> String {
    same_as(Runtime::Runc, bundle, script)
}

#[track_caller]
fn same_as(peer: Runtime, bundle: impl Fn() -> Bundle, script: &str) -> String {
    let control = bundle().script(script).run_with(peer, &[]);
    let ours = bundle().script(script).run();
    assert_eq!(
        control.status, 0,
        "{peer:?} fails it: a bad test: {control}"
    );
    assert_eq!(
        ours.text(),
        control.text(),
        "left: Bulkhead, right: {peer:?}\n{ours}"
    );
    assert_eq!(ours.errors(), control.errors());
    assert_eq!(ours.status, control.status);
    ours.text()
}

fn with(change: impl Fn(&mut Value) + Clone) -> impl Fn() -> Bundle {
    move || Bundle::busybox().edit(change.clone())
}

#[test]
fn credentials_limits_and_flags() {
    let bundle = with(|config| {
        let process = &mut config["process"];
        process["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 2000], "umask": 0o027});
        process["env"] = json!(["PATH=/bin", "A=b c", "EMPTY="]);
        process["cwd"] = json!("/tmp");
        process["oomScoreAdj"] = json!(300);
        process["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 60, "hard": 61},
        ]);
    });
    same(
        bundle,
        "id -u; id -g; grep -E '^(Groups|NoNewPrivs|Seccomp|CapInh|CapPrm|CapEff|CapBnd|CapAmb|Umask)' /proc/self/status; \
         umask; pwd; env | sort; cat /proc/self/oom_score_adj; \
         grep -E 'open files|core|processes' /proc/self/limits",
    );
}

#[test]
fn scheduler_io_priority_and_domain_name() {
    let bundle = with(|config| {
        config["domainname"] = json!("hold.example");
        config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    });
    same_as(
        Runtime::Crun,
        bundle,
        "cat /proc/sys/kernel/domainname; cut -d' ' -f19,41 /proc/self/stat; ionice -p $$",
    );
}

#[test]
fn capability_sets_are_exact() {
    for (uid, sets) in [
        (
            0,
            json!({"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL", "CAP_CHOWN"]}),
        ),
        (
            1000,
            json!({"bounding": ["CAP_NET_RAW", "CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}),
        ),
        (0, Value::Null),
    ] {
        let bundle = move || {
            Bundle::busybox().edit(|config| {
                config["process"]["user"]["uid"] = json!(uid);
                config["process"]["capabilities"] = sets.clone();
                if sets.is_null() {
                    config["process"]
                        .as_object_mut()
                        .expect("an object")
                        .remove("capabilities");
                }
            })
        };
        same(bundle, "grep Cap /proc/self/status");
    }
}

#[test]
fn devices_links_and_masks() {
    same(
        with(|config| {
            config["linux"]["devices"] = json!([
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 3, "gid": 4},
                {"path": "/dev/deep/er/null", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
            ]);
        }),
        "cd /dev; for f in null zero full random urandom tty ptmx fuse deep/er/null pipe fd stdin stdout stderr; do \
         stat -c '%n %F %a %u %g %t %T' $f; readlink $f; done; \
         cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
         echo 1 > /proc/sys/kernel/printk 2>/dev/null || echo read-only; \
         head -c 4 /dev/zero | od -An -tx1; echo x > /dev/full 2>/dev/null || echo full",
    );
}

#[test]
fn mounts_and_their_options() {
    let script = "awk '{ split($0, a, \" - \"); split(a[2], b, \" \"); print $5, $6, b[1] }' /proc/self/mountinfo | grep -vE '^/ ' | grep -E '^/(x|y|z|dev/shm|dev/mqueue|dev/pts|proc/sys|proc )' | sed 's/,idmapped//' | sort";
    same(
        with(|config| {
            let mounts = config["mounts"].as_array_mut().expect("a list");
            mounts.push(json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "nodev", "size=64k", "mode=1777"]}));
            mounts.push(json!({"destination": "/x/inner", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "noatime", "size=1m"]}));
            mounts.push(json!({"destination": "/y", "type": "bind", "source": "/usr/share", "options": ["rbind", "ro", "nosuid", "nodev", "noexec"]}));
            mounts.push(json!({"destination": "/z/file", "type": "bind", "source": "/etc/hostname", "options": ["bind", "ro"]}));
        }),
        &format!(
            "{script} | sed 's/ fuse\\.virtiofs$/ FS/; s/ virtiofs$/ FS/; s/ ext4$/ FS/; s/ overlay$/ FS/; s/ erofs$/ FS/; s/ tmpfs$/ FS/'; stat -c '%a %u' /x; touch /y/new 2>/dev/null || echo read-only; touch /x/inner/new 2>/dev/null || echo read-only"
        ),
    );
}

#[test]
fn namespaces_names_and_sysctls() {
    same(
        with(|config| {
            config["hostname"] = json!("compartment");
            config["linux"]["sysctl"] =
                json!({"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"});
        }),
        "hostname; echo $$; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; \
         ls /sys/class/net; cat /proc/self/cgroup; awk '{print $1, $2, $3}' /proc/self/uid_map",
    );
}

#[test]
fn a_user_namespace_with_mappings() {
    same(
        with(|config| {
            let namespaces = config["linux"]["namespaces"]
                .as_array_mut()
                .expect("a list");
            namespaces.push(json!({"type": "user"}));
            config["linux"]["uidMappings"] =
                json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            config["linux"]["gidMappings"] =
                json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        }),
        "id -u; awk '{print $1, $2, $3}' /proc/self/uid_map /proc/self/gid_map; cat /proc/self/setgroups; grep CapEff /proc/self/status; \
         stat -c '%u %F' /proc/1",
    );
}

#[test]
fn a_time_namespace_shifts_the_clocks() {
    let bundle = Bundle::busybox().edit(|config| {
        config["linux"]["namespaces"]
            .as_array_mut()
            .expect("a list")
            .push(json!({"type": "time"}));
        config["linux"]["timeOffsets"] =
            json!({"monotonic": {"secs": 1_000_000}, "boottime": {"secs": 2_000_000}});
    });
    let uptime: f64 = bundle
        .script("cut -d' ' -f1 /proc/uptime")
        .run()
        .ok()
        .parse()
        .expect("seconds");
    assert!((2_000_000.0..2_100_000.0).contains(&uptime), "{uptime}");
}

#[test]
fn seccomp_profiles_act_alike() {
    let bundle = with(|config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 39},
                {"names": ["chmod", "fchmodat", "fchmod"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["sethostname", "no_such_call"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 11, "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
                {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 17, "args": [{"index": 0, "value": 0x0400_0000, "valueTwo": 0x0400_0000, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["setpriority"], "action": "SCMP_ACT_TRAP"},
            ],
        });
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN", "CAP_KILL"]);
        }
    });
    let text = same(
        bundle,
        "exec 2>&1; mkdir /tmp/x; chmod 700 /tmp; (hostname new); echo $?; kill -10 $$; unshare -u true; echo $?; unshare -i true; echo $?; \
         sh -c 'nice -n 3 true'; echo $?; grep ^Seccomp /proc/self/status",
    );
    assert!(text.contains("Directory not empty"), "{text}");
}

#[test]
fn rootfs_is_read_only_when_asked() {
    same(
        with(|config| config["root"]["readonly"] = json!(true)),
        "touch /x 2>&1; echo $?; touch /dev/shm/x && echo ok",
    );
}

#[test]
fn cgroup_limits_are_enforced_in_the_guest() {
    let bundle = with(|config| {
        config["linux"]["resources"] = json!({
            "pids": {"limit": 20},
            "memory": {"limit": 30 << 20},
            "cpu": {"shares": 512, "quota": 20000, "period": 100_000},
        });
        let mounts = config["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}));
    });
    same(
        bundle,
        "cd /sys/fs/cgroup; cat pids.max memory.max cpu.max; touch x 2>/dev/null || echo read-only",
    );
}

#[test]
fn running_out_of_memory_kills_inside_the_limit() {
    let bundle = Bundle::busybox()
        .edit(|config| config["linux"]["resources"] = json!({"memory": {"limit": 20 << 20}}))
        .script("(x=$(head -c 40000000 /dev/zero | tr '\\0' a); echo survived); echo $?");
    assert_eq!(bundle.run().ok().lines().last(), Some("137"));
}

#[test]
fn start_hooks_run_in_the_container() {
    let hook = |config: &mut Value| {
        config["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "grep -o '\"status\": *\"[a-z]*\"' | tr -d ' ' > /tmp/hook; hostname >> /tmp/hook; echo $W >> /tmp/hook"], "env": ["W=x", "PATH=/bin"]}]});
    };
    same(with(hook), "cat /tmp/hook");
}

/// Each hook adds its kind, the status that it was told and whether its pid lives; a failing one
/// ends the start.
#[test]
fn host_hooks_run_in_order_with_the_state() {
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = log.path().to_str().expect("a plain path").to_string();
    let run = |runtime: Runtime, failing: bool| {
        std::fs::write(&path, "").expect("writable");
        let bundle = Bundle::busybox();
        let root = bundle.root();
        let hook = |kind: &str| {
            let script = format!(
                "state=$(cat); status=$(echo \"$state\" | grep -o '\"status\": *\"[a-z]*\"' | grep -o '[a-z]*\"$' | tr -d '\"'); \
                 pid=$(echo \"$state\" | grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*$'); \
                 alive=no; if [ -n \"$pid\" ] && [ -d /proc/$pid ]; then alive=yes; fi; echo \"{kind} $status $alive $W\" >> {path}; \
                 [ {kind} != started ] || touch {}/go",
                root.display()
            );
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", format!("W={kind}")]}])
        };
        let mut hooks = json!({"createRuntime": hook("create"), "poststart": hook("started"), "poststop": hook("stopped")});
        if failing {
            hooks["createRuntime"] =
                json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo because >&2; exit 3"]}]);
        }
        // It lives until its hook has looked.
        let bundle = bundle
            .script("until [ -e /go ]; do sleep 0.1; done; echo ran")
            .edit(|config| config["hooks"] = hooks);
        let ran = bundle.run_with(runtime, &[]);
        (ran, std::fs::read_to_string(&path).expect("readable"))
    };
    let (control, expected) = run(Runtime::Runc, false);
    assert_eq!(control.text(), "ran", "{control}");
    let (ours, told) = run(Runtime::Bulkhead, false);
    assert_eq!(ours.text(), "ran", "{ours}");
    // runc 1.1 says "created" to poststart hooks, where runtime.md#lifecycle has the process
    // running by then.
    let expected = expected.replace("started created", "started running");
    assert_eq!(told, expected);
    assert_eq!(
        told,
        "create creating yes create\nstarted running yes started\nstopped stopped no stopped\n"
    );

    let (control, _) = run(Runtime::Runc, true);
    assert_ne!(control.status, 0, "{control}");
    let (ours, told) = run(Runtime::Bulkhead, true);
    ours.refused(&["createRuntime", "/bin/sh", "because"]);
    // OCI runtime.md#lifecycle: what was created is destroyed, poststop hooks included.
    assert!(told.starts_with("stopped "), "{told:?}");
}

/// The shim gives up what it does not use; a hook has it all the same.
#[test]
fn a_host_hook_has_the_capabilities_that_it_has_under_runc() {
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = log.path().to_str().expect("a plain path");
    let told = |runtime: Runtime| {
        std::fs::write(path, "").expect("writable");
        let script = format!("grep Cap /proc/self/status >> {path}; umask >> {path}");
        let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}]);
        let hooks = json!({"createRuntime": hook, "poststop": hook});
        let bundle = Bundle::busybox()
            .script("echo ran")
            .edit(|config| config["hooks"] = hooks);
        assert_eq!(bundle.run_with(runtime, &[]).ok(), "ran");
        std::fs::read_to_string(path).expect("readable")
    };
    let expected = told(Runtime::Runc);
    assert_eq!(expected.matches("CapEff:").count(), 2, "{expected}");
    assert_eq!(told(Runtime::Bulkhead), expected);
}

/// The container is killed, long before its own end.
#[test]
fn a_failing_poststart_hook_ends_the_container() {
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = log.path().to_str().expect("a plain path");
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        std::fs::write(log.path(), "").expect("writable");
        let hook = |script: String| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}]);
        let bundle = Bundle::busybox().script("sleep 1000").edit(|config| {
            config["hooks"] = json!({
                "poststart": hook("echo because >&2; exit 3".into()),
                "poststop": hook(format!("echo stopped >> {path}")),
            });
        });
        let ran = bundle.run_with(runtime, &[]);
        assert_ne!(ran.status, 0, "{ran}");
        if runtime == Runtime::Bulkhead {
            ran.refused(&["poststart", "/bin/sh", "because"]);
        }
        let told = std::fs::read_to_string(log.path()).expect("readable");
        assert_eq!(told, "stopped\n", "{runtime:?}");
    }
}
