//! The agent is PID 1 of the guest that it shares with the containers: none of them reaches it, nor
//! what is not its own.

use bulkhead_tests::{BULKHEAD, RUNC};

use super::Pod;

/// What debuggers and network tools are given; containerd's default set has CAP_MKNOD and CAP_KILL
/// besides.
const POWERS: [&str; 6] = [
    "--cap-add",
    "CAP_SYS_PTRACE",
    "--cap-add",
    "CAP_NET_ADMIN",
    "--cap-add",
    "CAP_DAC_READ_SEARCH",
];

/// Says what it sees, and which of its attempts had success.
const ATTACK: &str = r#"
tried() { if ( eval "$2" ) >/dev/null 2>&1; then echo "did $1"; fi; }
tried nothing true
for p in /proc/[0-9]*; do echo "sees $(cat $p/comm 2>/dev/null)"; done
awk 'NR > 1 && NF > 7 { print "socket", $8 }' /proc/net/unix
for fd in /proc/self/fd/*; do [ ${fd##*/} -le 3 ] || echo "descriptor $fd"; done
tried move 'echo $$ > /sys/fs/cgroup/cgroup.procs'
tried freeze 'echo 1 > /sys/fs/cgroup/cgroup.freeze'
tried above 'ls /sys/fs/cgroup/../agent /sys/fs/cgroup/agent'
tried mount 'mkdir -p /tmp/m; mount -t cgroup2 cgroup2 /tmp/m'
tried core 'echo "|/bin/sh" > /proc/sys/kernel/core_pattern'
tried modprobe 'echo /bin/sh > /proc/sys/kernel/modprobe'
tried hostname 'echo x > /proc/sys/kernel/hostname'
tried sysrq 'echo c > /proc/sysrq-trigger'
tried uevent 'echo /bin/sh > /sys/kernel/uevent_helper'
tried kcore 'head -c 1 /proc/kcore | grep -q .'
tried binary 'echo >> /proc/1/exe'
tried root 'ls /proc/1/root/init'
tried memory 'mknod /tmp/mem c 1 1; head -c 1 /tmp/mem'
tried port 'mknod /tmp/port c 1 4; head -c 1 /tmp/port'
tried log 'mknod /tmp/kmsg c 1 11; head -c 1 /tmp/kmsg'
tried vsock 'mknod /tmp/vsock c 10 $(sed -n "s/ vsock//p" /proc/misc); : < /tmp/vsock'
tried fuse 'mknod /tmp/fuse c 10 229; : < /tmp/fuse'
tried enter 'nsenter -t 1 -m true'
"#;

#[test]
fn no_container_reaches_the_agent() {
    for runtime in [RUNC, BULKHEAD] {
        let pod = Pod::start(runtime, &[]);
        let victim = pod.member(&["ipc", "uts", "network"], "exec sleep 100000");
        let ran = pod.run(&POWERS, ATTACK);
        let text = ran.ok();
        let told = |word: &str| -> Vec<&str> {
            let lines = text.lines();
            lines.filter(|line| line.starts_with(word)).collect()
        };
        assert_eq!(told("did "), ["did nothing"], "{runtime}: {text}");
        assert!(told("descriptor ").is_empty(), "{runtime}: {text}");
        let alien = |line: &&&str| !["sees sh", "sees cat", "sees "].contains(line);
        assert_eq!(told("sees ").iter().find(alien), None, "{runtime}: {text}");
        if runtime == BULKHEAD {
            assert!(told("socket ").is_empty(), "{text}");
        }
        // All that it may signal is its own.
        let ran = pod.run(&POWERS, "kill -9 -1; exit 3");
        assert_eq!(ran.status, 3, "{runtime}: {ran}");
        assert_eq!(victim.exec("echo alive").ok(), "alive", "{runtime}");
        victim.remove();
        pod.remove();
    }
}

#[test]
fn the_process_that_holds_a_shared_pid_namespace_has_nothing_to_give() {
    let pod = Pod::start(BULKHEAD, &[]);
    let script = "for fd in /proc/1/fd/*; do echo \"descriptor $(readlink $fd)\"; done
        ls -A /proc/1/root | sed 's/^/file /'
        (echo >> /proc/1/exe) 2>/dev/null && echo written
        grep -E '^(Cap(Prm|Eff|Inh|Amb)|NoNewPrivs|Uid)' /proc/1/status";
    let id = bulkhead_tests::fresh_id();
    let words = pod.words(
        &[&["--rm"], &POWERS[..]].concat(),
        &["ipc", "uts", "network", "pid"],
        &id,
        script,
    );
    let ran = bulkhead_tests::Engine::get().run(&words);
    let text = ran.text();
    for zero in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(
            text.contains(&format!("{zero}:\t0000000000000000")),
            "{ran}"
        );
    }
    assert!(text.contains("NoNewPrivs:\t1"), "{ran}");
    assert!(text.contains("Uid:\t65534"), "{ran}");
    let descriptors = text.lines().filter(|line| line.starts_with("descriptor"));
    assert!(
        descriptors.eq(["descriptor /dev/null"; 3]) && !text.contains("file "),
        "{ran}"
    );
    assert!(!text.contains("written"), "{ran}");
    pod.remove();
}
