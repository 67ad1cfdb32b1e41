//! Users, capabilities, filters, limits, namespaces, and attacks on exec.

use crate::guest::{Guest, fields, shell, status};
use bulkhead_agent_protocol::agent::{self, namespaces::Kind};
use ttrpc::Code;

#[tokio::test]
async fn ids_groups_and_umask_are_as_asked() {
    let guest = Guest::start().await;
    let mut spec = guest.spec(
        "one",
        "id; umask; echo $HOME; echo again > /dev/stdout; stat -c %u /proc/self/fd/1",
    );
    let process = spec.process.as_mut().unwrap();
    (
        process.uid,
        process.gid,
        process.additional_gids,
        process.umask,
    ) = (1000, 1001, vec![5, 77], 0o027);
    let output = guest.run("one", spec).await;
    assert!(
        output
            .text()
            .starts_with("uid=1000(user) gid=1001 groups=5,77"),
        "{output:?}"
    );
    assert!(
        output.text().ends_with("0027\n/home/user\nagain\n1000"),
        "{output:?}"
    );
}

#[tokio::test]
async fn the_five_capability_sets_are_exact() {
    let guest = Guest::start().await;
    let (chown, kill, net, audit) = (1 << 0, 1 << 5, 1 << 10, 1 << 29);
    let mut spec = guest.spec("one", "cat /proc/self/status");
    let process = spec.process.as_mut().unwrap();
    process.uid = 1000;
    process.capabilities = Some(agent::Capabilities {
        bounding: chown | kill | net | audit,
        effective: kill,
        permitted: kill | net | chown,
        inheritable: kill | net,
        ambient: kill,
        ..Default::default()
    })
    .into();
    // The sleeper's own status, because executing a file changes the sets (capabilities(7)): not by the program itself.
    let _streams = guest.sleeper("one", spec).await;
    let name = agent::ContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    let pid = guest
        .client
        .list_processes(crate::guest::context(), &name)
        .await
        .unwrap()
        .pids[0];
    let status = fields(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap());
    let set = |name: &str| u64::from_str_radix(&status[name], 16).unwrap();
    assert_eq!(set("CapBnd"), chown | kill | net | audit);
    assert_eq!(set("CapAmb"), kill);
    assert_eq!(set("CapInh"), kill | net);
    // A user without the file's help keeps what is ambient.
    assert_eq!((set("CapPrm"), set("CapEff")), (kill, kill));
    guest.end("one").await;
}

#[tokio::test]
async fn root_has_its_bounding_set_and_no_more() {
    let guest = Guest::start().await;
    let mut spec = guest.spec(
        "one",
        "cat /proc/self/status; cat /proc/sys/kernel/cap_last_cap",
    );
    spec.process.as_mut().unwrap().capabilities = Some(agent::Capabilities {
        bounding: 0x20,
        effective: 0x20,
        permitted: 0x20,
        ..Default::default()
    })
    .into();
    let output = guest.run("one", spec).await;
    let status = fields(&output.out);
    for set in ["CapBnd", "CapPrm", "CapEff"] {
        assert_eq!(status[set], "0000000000000020", "{set}");
    }
    assert_eq!(status["CapAmb"], "0000000000000000");
    assert_eq!(status["NoNewPrivs"], "0");
}

/// Answers EPERM to one system call of x86_64 and allows the others.
fn filter(syscall: u32) -> agent::Seccomp {
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend([jt, jf]);
        bytes.extend(k.to_ne_bytes());
        bytes
    };
    let program = [
        instruction(0x20, 0, 0, 0),           // load the number
        instruction(0x15, 0, 1, syscall),     // equal?
        instruction(0x06, 0, 0, 0x0005_0001), // RET_ERRNO EPERM
        instruction(0x06, 0, 0, 0x7fff_0000), // RET_ALLOW
    ]
    .concat();
    agent::Seccomp {
        program,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_seccomp_filter_binds_with_and_without_no_new_privileges() {
    let guest = Guest::start().await;
    for no_new_privileges in [true, false] {
        let id = format!("c{no_new_privileges}");
        let mut spec = guest.spec(&id, "mkdir /tmp/made && echo made; cat /proc/self/status");
        let process = spec.process.as_mut().unwrap();
        process.seccomp = Some(filter(libc::SYS_mkdir as u32)).into();
        process.no_new_privileges = no_new_privileges;
        process.uid = 1000;
        let output = guest.run(&id, spec).await;
        assert!(output.err.contains("not permitted"), "{output:?}");
        let status = fields(&output.out);
        assert_eq!(
            status["NoNewPrivs"],
            if no_new_privileges { "1" } else { "0" }
        );
        assert_eq!(status["Seccomp"], "2");
        assert_eq!(status["CapEff"], "0000000000000000");
    }
}

#[tokio::test]
async fn a_broken_filter_is_refused() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "true");
    spec.process.as_mut().unwrap().seccomp = Some(agent::Seccomp {
        program: vec![1, 2, 3],
        ..Default::default()
    })
    .into();
    let _streams = guest.create("one", spec).await.unwrap();
    let (_, text) = status(guest.start_process("one", "").await);
    assert!(text.contains("seccomp"), "{text}");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

#[tokio::test]
async fn limits_scheduling_and_scores_are_as_asked() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "ulimit -n; ulimit -c; awk '{print $19}' /proc/self/stat; ionice; cat /proc/self/oom_score_adj /proc/self/personality; taskset -p $$");
    let process = spec.process.as_mut().unwrap();
    let limit = |resource, soft, hard| agent::Rlimit {
        resource,
        soft,
        hard,
        ..Default::default()
    };
    process.rlimits = vec![
        limit(libc::RLIMIT_NOFILE, 100, 200),
        limit(libc::RLIMIT_CORE, 0, 0),
    ];
    process.oom_score_adj = Some(500);
    process.personality = Some(libc::ADDR_NO_RANDOMIZE as u64);
    process.io_priority = Some(agent::IoPriority {
        class: 2,
        priority: 6,
        ..Default::default()
    })
    .into();
    process.scheduler = Some(agent::Scheduler {
        nice: 7,
        ..Default::default()
    })
    .into();
    process.exec_cpu_affinity = "0".into();
    let output = guest.run("one", spec).await;
    let lines: Vec<&str> = output.text().lines().collect();
    assert_eq!(
        lines[..6],
        ["100", "0", "7", "best-effort: prio 6", "500", "00040000"],
        "{output:?}"
    );
    assert!(lines[6].ends_with("mask: 1"), "{output:?}");
}

#[tokio::test]
async fn an_impossible_limit_is_named() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "true");
    spec.process.as_mut().unwrap().rlimits = vec![agent::Rlimit {
        resource: libc::RLIMIT_NOFILE,
        soft: 10,
        hard: 5,
        ..Default::default()
    }];
    let _streams = guest.create("one", spec).await.unwrap();
    let (_, text) = status(guest.start_process("one", "").await);
    assert!(text.contains("nofile"), "{text}");
    guest.wait("one", "").await;
    guest.delete("one", "").await.unwrap();
}

fn mapped(mut spec: agent::Container) -> agent::Container {
    let mapping = agent::IdMapping {
        container_id: 0,
        host_id: 100_000,
        size: 65_536,
        ..Default::default()
    };
    let namespaces = spec.namespaces.as_mut().unwrap();
    namespaces.user = Kind::NEW.into();
    namespaces.uid_mappings = vec![mapping.clone()];
    namespaces.gid_mappings = vec![mapping];
    spec
}

#[tokio::test]
async fn a_user_namespace_maps_root_away() {
    let guest = Guest::start().await;
    let mut spec = mapped(guest.spec(
        "one",
        "id -u; cat /proc/self/uid_map; readlink /proc/self/ns/user; sleep 1000",
    ));
    spec.process.as_mut().unwrap().oom_score_adj = Some(100);
    // Each is a descriptor that the agent opens and passes: more than there are small numbers.
    spec.masked_paths = (0..30)
        .map(|n| format!("/proc/sys/kernel/none{n}"))
        .collect();
    let mut streams = guest.create("one", spec).await.unwrap();
    let pid = guest.start_process("one", "").await.unwrap();
    let seen = streams.expect("user:[").await;
    assert!(
        seen.starts_with("0\n         0     100000      65536\n"),
        "{seen}"
    );
    let status = fields(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap());
    assert_eq!(status["Uid"], "100000 100000 100000 100000");
    let mut process = shell("id -u; readlink /proc/self/ns/user; grep CapEff /proc/self/status");
    process.uid = 33;
    let output = guest.run_exec("one", "e", process).await;
    assert!(output.text().starts_with("33\nuser:["), "{output:?}");
    let mut terminal = shell("tty; echo hi > /dev/tty; id -u");
    terminal.terminal = true;
    let output = guest.run_exec("one", "t", terminal).await;
    assert!(output.out.contains("/dev/pts/0\r\nhi\r\n0"), "{output:?}");
    guest.end("one").await;
}

#[tokio::test]
async fn clocks_are_offset_in_a_time_namespace() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "cat /proc/uptime; cat /proc/self/timens_offsets");
    let namespaces = spec.namespaces.as_mut().unwrap();
    namespaces.time = Kind::NEW.into();
    namespaces.boottime = Some(agent::TimeOffset {
        secs: 10_000_000,
        ..Default::default()
    })
    .into();
    namespaces.monotonic = Some(agent::TimeOffset {
        secs: 5,
        nanosecs: 7,
        ..Default::default()
    })
    .into();
    let output = guest.run("one", spec).await;
    let uptime: f64 = output.text().split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 10_000_000.0, "{output:?}");
    assert!(
        output.out.contains("monotonic") && output.out.contains("7"),
        "{output:?}"
    );
}

#[tokio::test]
async fn sysctls_of_the_container_are_set_in_its_namespaces() {
    let guest = Guest::start().await;
    let mut spec = guest.spec(
        "one",
        "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward; ip link show lo",
    );
    spec.sysctls.insert("kernel.msgmax".into(), "4242".into());
    spec.sysctls
        .insert("net.ipv4.ip_forward".into(), "1".into());
    let output = guest.run("one", spec).await;
    assert!(
        output.text().starts_with("4242\n1\n") && output.out.contains("UP"),
        "{output:?}"
    );
    assert_ne!(
        std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap(),
        "4242\n"
    );
}

#[tokio::test]
async fn cwd_outside_of_the_root_is_refused() {
    let guest = Guest::start().await;
    let _streams = guest.sleeper("one", guest.spec("one", "")).await;
    for cwd in [
        "/proc/self/fd/3",
        "/proc/self/fd/4/..",
        "/proc/self/fd/5",
        "/proc/self/fd/6",
        "/proc/self/fd/7/../../..",
    ] {
        let process = agent::Process {
            cwd: cwd.into(),
            ..shell("pwd; ls /")
        };
        let (code, text) = status(guest.exec("one", "e", process).await.map(|_| ()));
        assert_eq!(code, Code::INVALID_ARGUMENT, "{cwd}: {text}");
    }
    // The root of a process of another mount namespace: the magic link leads out of this root.
    let name = agent::ContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    assert_eq!(
        guest
            .client
            .list_processes(crate::guest::context(), &name)
            .await
            .unwrap()
            .pids
            .len(),
        1
    );
    guest.end("one").await;

    let agent_pid = guest.pid();
    for cwd in [
        format!("/proc/{agent_pid}/root"),
        format!("/proc/{agent_pid}/cwd"),
    ] {
        let mut spec = guest.spec("two", "pwd; ls /");
        spec.namespaces.as_mut().unwrap().pid = Kind::AGENT.into();
        spec.process.as_mut().unwrap().cwd = cwd.clone();
        let (code, text) = status(guest.create("two", spec).await.map(|_| ()));
        assert_eq!(code, Code::INVALID_ARGUMENT, "{cwd}: {text}");
    }
}

#[tokio::test]
async fn a_missing_cwd_is_made_for_init_and_refused_for_exec() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "pwd; sleep 1000");
    spec.process.as_mut().unwrap().cwd = "/srv/deep/app".into();
    let mut streams = guest.create("one", spec).await.unwrap();
    guest.start_process("one", "").await.unwrap();
    streams.expect("/srv/deep/app").await;
    let process = agent::Process {
        cwd: "/nowhere".into(),
        ..shell("pwd")
    };
    let (code, text) = status(guest.exec("one", "e", process).await.map(|_| ()));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("/nowhere"), "{text}");
    guest.end("one").await;
}

#[tokio::test]
async fn a_shadowed_proc_gives_exec_nothing() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "mount -t tmpfs none /proc && mkdir -p /proc/sys/kernel /proc/self && echo 0 > /proc/sys/kernel/cap_last_cap && echo shadowed; sleep 1000");
    let all = !0;
    spec.process.as_mut().unwrap().capabilities = Some(agent::Capabilities {
        bounding: all,
        effective: all,
        permitted: all,
        ..Default::default()
    })
    .into();
    let mut streams = guest.create("one", spec).await.unwrap();
    guest.start_process("one", "").await.unwrap();
    streams.expect("shadowed").await;
    let _exec = guest
        .exec(
            "one",
            "e",
            agent::Process {
                args: vec!["/bin/sleep".into(), "1000".into()],
                ..shell("")
            },
        )
        .await
        .unwrap();
    let pid = guest.start_process("one", "e").await.unwrap();
    let status = fields(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap());
    for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    guest.end("one").await;
}

#[tokio::test]
async fn a_host_name_without_a_namespace_is_refused() {
    let guest = Guest::start().await;
    let mut spec = guest.spec("one", "true");
    spec.namespaces.as_mut().unwrap().uts = Kind::AGENT.into();
    spec.hostname = "evil".into();
    let (code, text) = status(guest.create("one", spec).await.map(|_| ()));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
}
