//! Limits: programs that try to exceed each, and what they see of it.

use bulkhead_tests::{Bundle, Ran, Runtime};
use serde_json::{Value, json};

use super::{same, with};

/// A container with these resources that can see its cgroup, and write there if `rights` is "rw".
fn limited(resources: Value, rights: &'static str) -> impl Fn() -> Bundle {
    with(move |config| limit(config, resources.clone(), rights))
}

fn limit(config: &mut Value, resources: Value, rights: &str) {
    config["linux"]["resources"] = resources;
    let mounts = config["mounts"].as_array_mut().expect("a list");
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    mounts.push(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "relatime", rights],
    }));
}

#[test]
fn a_fork_bomb_ends_at_its_limit() {
    let text = same(
        limited(json!({"pids": {"limit": 20}}), "ro"),
        "(n=0; while :; do sleep 100 & n=$((n+1)); echo $n > /tmp/n; done) 2>/dev/null; \
         read n < /tmp/n; echo $n; cd /sys/fs/cgroup; read max < pids.max; echo $max; \
         while read word count; do echo $word; [ $count -gt 0 ] && echo refused; done < pids.events",
    );
    // Beside the shell and its subshell.
    assert_eq!(text.lines().next(), Some("18"), "{text}");
}

#[test]
fn memory_ends_at_its_limit() {
    let resources =
        json!({"memory": {"limit": 20 << 20, "swap": 20 << 20, "reservation": 10 << 20}});
    let script = "(x=$(head -c 40000000 /dev/zero | tr '\\0' a); echo survived); echo $?; cd /sys/fs/cgroup; \
                  cat memory.max memory.low memory.swap.max; grep -q '^oom_kill 0$' memory.events || echo killed";
    let run = |runtime| -> Ran {
        let bundle = limited(resources.clone(), "ro")().script(script);
        bundle.run_with(runtime, &[])
    };
    let (control, ours) = (run(Runtime::Runc), run(Runtime::Bulkhead));
    assert!(control.text().ends_with("killed"), "{control}");
    assert_eq!(ours.text(), control.text(), "left: Bulkhead, right: runc");
    // runc does not say so.
    assert!(ours.errors().contains("ran out of memory"), "{ours}");
}

/// A tenth of a processor, for some seconds: it stands still in most periods.
#[test]
fn a_busy_loop_has_its_share_and_no_more() {
    let resources = json!({"cpu": {"quota": 20_000, "period": 200_000}});
    let script = "cut -d' ' -f1 /proc/uptime; timeout 5 sh -c 'while :; do :; done'; cut -d' ' -f1 /proc/uptime; \
                  cd /sys/fs/cgroup; cat cpu.max cpu.stat";
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let ran = limited(resources.clone(), "ro")()
            .script(script)
            .run_with(runtime, &[]);
        let text = ran.ok();
        let mut lines = text.lines();
        let mut seconds = || {
            lines
                .next()
                .expect("a line")
                .parse::<f64>()
                .expect("seconds")
        };
        let wall = -seconds() + seconds();
        assert_eq!(lines.next(), Some("20000 200000"), "{runtime:?}: {text}");
        let count = |name: &str| {
            let words = text.lines().filter_map(|line| line.split_once(' '));
            let mut found = words
                .filter(|(word, _)| *word == name)
                .map(|(_, value)| value);
            let value = found.next().unwrap_or_else(|| panic!("no {name}: {text}"));
            value.parse::<f64>().expect("a number")
        };
        // How much it gets beyond its share depends on how late the kernel looks: here, on an
        // emulated processor that others want too. That it is held back nearly always does not.
        let (periods, throttled) = (count("nr_periods"), count("nr_throttled"));
        assert!(periods >= 5.0, "{runtime:?}: {text}");
        assert!(throttled > periods / 2.0, "{runtime:?}: {text}");
        assert!(count("usage_usec") / 1e6 < wall, "{runtime:?}: {text}");
    }
}

#[test]
fn processors_are_those_of_the_set() {
    same(
        limited(json!({"cpu": {"cpus": "0", "mems": "0"}}), "ro"),
        "cat /sys/fs/cgroup/cpuset.cpus /sys/fs/cgroup/cpuset.cpus.effective /sys/fs/cgroup/cpuset.mems; \
         grep Cpus_allowed_list /proc/self/status; nproc; taskset -p 2 $$ >/dev/null 2>&1 || echo refused",
    );
}

#[test]
fn files_of_v2_are_set_as_given() {
    same(
        limited(
            json!({
                "memory": {"limit": 64 << 20},
                "unified": {
                    "memory.high": "33554432", "pids.max": "17", "cpu.weight": "333", "cpu.max": "30000 50000",
                    "memory.oom.group": "1",
                },
            }),
            "ro",
        ),
        "cd /sys/fs/cgroup; cat memory.max memory.high pids.max cpu.weight cpu.max memory.oom.group",
    );
}

/// Huge pages of the machine that this runs on, for runc; given back at the end.
struct Reserved(String);

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Reserved {
    fn new(pages: u32) -> Reserved {
        let before = std::fs::read_to_string(POOL).expect("readable");
        std::fs::write(POOL, pages.to_string()).expect("root may");
        let now = std::fs::read_to_string(POOL).expect("readable");
        assert_eq!(
            now.trim(),
            pages.to_string(),
            "the host has no such huge pages"
        );
        Reserved(before)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, &self.0);
    }
}

/// 8 MiB are allowed, and used; 2 MiB more are not.
#[test]
fn huge_pages_are_there_and_end_at_their_limit() {
    let _reserved = Reserved::new(16);
    let program = "
import mmap
def huge(mib):
    try:
        m = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    except OSError as error:
        return print(mib, error.errno)
    for at in range(0, mib << 20, 2 << 20):
        m[at] = 1
    print(mib, 'fine')
    return m
held = huge(8)
huge(2)
held.close()
huge(10)
huge(2)
for name in ('hugetlb.2MB.max', 'hugetlb.2MB.rsvd.max', 'hugetlb.2MB.current'):
    print(open('/sys/fs/cgroup/' + name).read().strip())
";
    let run = |runtime| -> Ran {
        let bundle = Bundle::tools().edit(|config| {
            let huge = json!([{"pageSize": "2MB", "limit": 8 << 20}]);
            limit(config, json!({"hugepageLimits": huge}), "ro");
        });
        let bundle = bundle.args(&["/usr/bin/python3", "-c", program]);
        bundle.run_with(runtime, &[])
    };
    let (control, ours) = (run(Runtime::Runc), run(Runtime::Bulkhead));
    let text = control.ok();
    assert!(text.starts_with("8 fine\n2 12\n10 12\n2 fine"), "{control}");
    assert_eq!(ours.ok(), text);
}

/// A container that has its cgroup to itself: cgroups of its own, with limits that hold.
const NEST: &str = "cd /sys/fs/cgroup && mkdir init inner && echo 0 > init/cgroup.procs && \
    echo '+pids +memory' > cgroup.subtree_control && cat inner/cgroup.controllers && echo 4 > inner/pids.max && \
    sh -c 'echo 0 > inner/cgroup.procs; (n=0; while :; do sleep 100 & n=$((n+1)); echo $n > /dev/shm/n; done) 2>/dev/null; \
           read n < /dev/shm/n; echo $n; echo 1 > inner/cgroup.kill'; \
    echo 1 > memory.max 2>/dev/null || echo 'its own limits stay'; echo 1 > cgroup.kill 2>/dev/null || echo 'as does it'";

#[test]
fn a_container_makes_cgroups_of_its_own() {
    let resources = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 40}});
    let text = same(limited(resources, "rw"), NEST);
    assert!(text.contains("memory pids\n2\n"), "{text}");
}

/// In a user namespace its root has the files for that (OCI config-linux.md#cgroup-ownership),
/// where runc gives them only with systemd's driver.
#[test]
fn a_container_in_a_user_namespace_makes_them_too() {
    let resources = json!({"pids": {"limit": 40}});
    let bundle = limited(resources, "rw")().edit(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        namespaces.expect("a list").push(json!({"type": "user"}));
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        config["linux"]["uidMappings"] = mapping.clone();
        config["linux"]["gidMappings"] = mapping;
    });
    let ran = bundle.script(NEST).run();
    assert!(ran.ok().contains("memory pids\n2\n"), "{ran}");
}

/// Every one that OCI names, and more open files than the kernel's default allows.
#[test]
fn resource_limits_are_all_set() {
    // As systemd has it on a host; the lab's has none. For runc: in the guest it is so anyway.
    std::fs::write("/proc/sys/fs/nr_open", "1073741816").expect("root may");
    let limits: Vec<Value> = [
        ("AS", 1_u64 << 40, 1_u64 << 41),
        ("CORE", 1 << 20, 1 << 21),
        ("CPU", 1000, 2000),
        ("DATA", 1 << 40, 1 << 41),
        ("FSIZE", 1 << 30, 1 << 31),
        ("LOCKS", 5, 6),
        ("MEMLOCK", 1 << 20, 1 << 21),
        ("MSGQUEUE", 1000, 2000),
        ("NICE", 5, 6),
        ("NOFILE", 2_000_000, 1_073_741_816_u64),
        ("NPROC", 70, 71),
        ("RSS", 1 << 30, 1 << 31),
        ("RTPRIO", 5, 6),
        ("RTTIME", 1000, 2000),
        ("SIGPENDING", 50, 60),
        ("STACK", 4 << 20, 8 << 20),
    ]
    .into_iter()
    .map(|(name, soft, hard)| json!({"type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard}))
    .collect();
    let bundle = with(move |config| config["process"]["rlimits"] = json!(limits));
    let text = same(
        bundle,
        "cat /proc/self/limits; ulimit -n 3000000 && ulimit -n",
    );
    assert!(text.contains("1073741816"), "{text}");
}

/// What the kernel refuses under runc, too.
#[test]
fn limits_that_cannot_be_are_refused_under_both() {
    for resources in [
        json!({"cpu": {"cpus": "0-4095"}}),
        json!({"cpu": {"mems": "0-1023"}}),
        json!({"unified": {"nothing.max": "1"}}),
        json!({"unified": {"memory.nothing": "1"}}),
        json!({"unified": {"memory.max": "lots"}}),
        json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 3 << 20}]}),
        json!({"cpu": {"quota": 500, "period": 100_000}}),
        json!({"memory": {"limit": 20 << 20, "swap": 10 << 20}}),
        json!({"memory": {"swap": 10 << 20}}),
        json!({"memory": {"limit": 4096}}),
    ] {
        let run = |runtime| {
            limited(resources.clone(), "ro")()
                .script("echo ran")
                .run_with(runtime, &[])
        };
        let (control, ours) = (run(Runtime::Runc), run(Runtime::Bulkhead));
        assert_ne!(control.status, 0, "{resources}: {control}");
        assert!(!ours.text().contains("ran"), "{resources}: {ours}");
        ours.refused(&[]);
    }
}
