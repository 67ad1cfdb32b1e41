//! The size of a machine, and what its pod may take of the host.

use std::fs;
use std::path::Path;
use std::time::Instant;

use bulkhead_tests::{BULKHEAD, Bundle, Engine, Host, RUNC, Ran, Runtime, fresh_id, tail};
use tempfile::NamedTempFile;

use crate::figures::figure;
use crate::limits::update;
use crate::pods::Pod;
use crate::{Running, cgroup_of, pods_cgroup, processes, run_once, shim_of, shims_end};

const MIB: u64 = 1 << 20;
/// What a machine has beside its containers' limits, without the page array.
const OVERHEAD: u64 = 64 * MIB;

/// A configuration with which a machine has more vCPUs than this host has processors.
fn configured(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    fs::write(&file, text).expect("it can be written");
    file
}

fn words<'a>(file: &'a NamedTempFile, more: &[&'a str]) -> Vec<&'a str> {
    let path = file.path().to_str().expect("a plain path");
    [&["--runtime-config-path", path], more].concat()
}

/// A number of a control file.
#[track_caller]
fn number(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().parse().expect("a number")
}

#[test]
fn processors_follow_the_quota_and_the_list() {
    Engine::get();
    let four = configured("max_vcpus = 4\n");
    for (asked, seen) in [
        (&["--cpus", "0.5"][..], "1"),
        (&["--cpus", "2"], "2"),
        (&["--cpus", "2.5"], "3"),
        (&[], "1"),
    ] {
        let ran = run_once(BULKHEAD, &words(&four, asked), "nproc");
        assert_eq!(ran.ok(), seen, "{asked:?}");
    }
    // No more than the host has, where nobody says otherwise; a list has one where runc has one.
    let [runc, bulkhead] =
        [RUNC, BULKHEAD].map(|runtime| run_once(runtime, &["--cpus", "1000"], "nproc").ok());
    assert_eq!(runc, bulkhead);
    let on_a_list = listed("0").args(&["nproc"]);
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        assert_eq!(on_a_list.run_with(runtime, &[]).ok(), "1", "{runtime:?}");
    }
}

/// A bundle with a list of processors: the `ctr` of containerd 1.7 has no word for one.
fn listed(cpus: &str) -> Bundle {
    Bundle::busybox().edit(|config| config["linux"]["resources"]["cpu"]["cpus"] = cpus.into())
}

#[test]
fn a_quota_holds_over_seconds() {
    // Processors over four seconds; the shell is what busybox' time waits for. By the clock beside
    // it, for on a busy host the four seconds are more.
    let script = "time -p timeout 4 sh -c 'while :; do :; done' 2>&1";
    let processors = |ran: &Ran| -> f64 {
        let text = format!("{}{}", ran.text(), ran.errors());
        let [real, user, sys] = ["real ", "user ", "sys "].map(|word| {
            let line = text.lines().find_map(|line| line.strip_prefix(word));
            let time = line.and_then(|rest| rest.trim().parse::<f64>().ok());
            time.unwrap_or_else(|| panic!("{word}in {text:?}"))
        });
        (user + sys) / real
    };
    let here = std::thread::available_parallelism().expect("it is known");
    for runtime in [RUNC, BULKHEAD] {
        if here.get() > 1 {
            let both = "time -p sh -c 'for n in 1 2; do \
                        timeout 4 sh -c \"while :; do :; done\" & done; wait' 2>&1";
            let ran = run_once(runtime, &["--cpus", "1.5"], both);
            let bound = processors(&ran);
            println!("{runtime}: {bound:.2} processors with one and a half");
            assert!(bound > 0.5 && bound < 1.75, "{runtime}: {bound}: {ran}");
        }
        let free = processors(&run_once(runtime, &[], script));
        let ran = run_once(runtime, &["--cpus", "0.25"], script);
        let bound = processors(&ran);
        println!("{runtime}: {free:.2} processors without a quota, {bound:.2} with a quarter");
        // A quarter, and what a period overruns before the guest's kernel is given the processor
        // to see it.
        assert!(bound > 0.075 && bound < 0.6, "{runtime}: {bound}: {ran}");
        assert!(bound * 1.5 < free, "{runtime}: {bound} and {free}");
    }
}

/// What a container sees of its machine: processors, and MiB of memory.
#[track_caller]
fn seen(running: &Running) -> (u64, u64) {
    let ran = running.exec("nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo");
    let text = ran.ok();
    let (count, mib) = text.split_once('\n').expect("two lines");
    let number = |text: &str| text.parse().expect("a number");
    (number(count), number(mib))
}

/// The limits of a container that runs rise and fall, and its machine follows: as under runc, a
/// program uses what it was given, and what was taken is the host's again.
#[test]
fn a_machine_that_runs_grows_and_shrinks_with_its_limits() {
    Engine::get();
    let host = Host::now();
    let limits = |mib: u64, processors: u64| {
        serde_json::json!({
            "memory": {"limit": mib * MIB},
            "cpu": {"quota": processors * 100_000, "period": 100_000},
        })
    };
    let limit = (100 * MIB).to_string();
    let four = configured("max_vcpus = 4\n");
    let mut took = Vec::new();
    // More than the machine had at first.
    let fill = "head -c 150m /dev/zero | tail -c 150m | wc -c";
    for runtime in [RUNC, BULKHEAD] {
        let given = ["--cpus", "1", "--memory-limit", &limit];
        let given = match runtime {
            RUNC => given.to_vec(),
            _ => words(&four, &given),
        };
        let running = Running::start(runtime, &given, "sleep 1000");
        let small = seen(&running);
        update(&running, &limits(100, 1)).expect("the same");
        took.push([(356, 1), (356, 2)].map(|(mib, processors)| {
            let since = Instant::now();
            update(&running, &limits(mib, processors)).expect("more");
            since.elapsed().as_secs_f64() * 1e3
        }));
        assert_eq!(
            running.exec(fill).ok(),
            (150 * MIB).to_string(),
            "{runtime}"
        );
        let large = seen(&running);
        if runtime == BULKHEAD {
            assert_eq!((small.0, large.0), (1, 2));
            assert!(large.1 >= small.1 + 240, "{small:?} {large:?}");
            let cgroup = pods_cgroup();
            let ceiling = || number(&cgroup.join("machine/memory.max"));
            let high = ceiling();
            assert_eq!(high, (426 + 426 / 8 + 64) * MIB);
            update(&running, &limits(100, 1)).expect("less");
            assert_eq!(seen(&running), small);
            assert_eq!(ceiling(), (166 + 166 / 8 + 64) * MIB);
            let used = number(&cgroup.join("machine/memory.current"));
            assert!(used < 166 * MIB, "{used}");
            for _ in 0..3 {
                update(&running, &limits(356, 2)).expect("more again");
                update(&running, &limits(100, 1)).expect("less again");
            }
            assert_eq!(seen(&running), small);
        }
        running.remove();
    }
    for (n, name) in ["update: 256 MiB more", "update: another processor"]
        .iter()
        .enumerate()
    {
        figure(name, "ms", took[1][n], Some(took[0][n]));
    }
    shims_end();
    host.assert_nothing_left();
}

/// A container that owns the guest, as nearly as one can: it mounts the guest's cgroups and lifts
/// its own quota. The host's ceiling holds then: the quota and a quarter of a processor.
#[test]
fn a_guest_that_lifts_its_quota_meets_the_hosts() {
    Engine::get();
    let script = "mkdir /cg && mount -t cgroup2 none /cg; \
                  for file in $(find /cg -name cpu.max); do echo max > $file; done 2>/dev/null; \
                  cat $(find /cg -name cpu.max); while :; do :; done";
    let given = ["--cpus", "0.25", "--cap-add", "CAP_SYS_ADMIN"];
    let running = Running::start(BULKHEAD, &given, script);
    let cgroup = pods_cgroup();
    let max = fs::read_to_string(cgroup.join("cpu.max")).expect("a file");
    assert_eq!(max.trim(), "50000 100000");
    let used = || {
        let text = fs::read_to_string(cgroup.join("cpu.stat")).expect("a file");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        line.expect("cgroup-v2.rst")
            .parse::<u64>()
            .expect("a number")
    };
    let (before, since) = (used(), Instant::now());
    std::thread::sleep(std::time::Duration::from_secs(6));
    let (used, took) = (used() - before, since.elapsed());
    let share = used as f64 / took.as_micros() as f64;
    println!("the pod took {share:.2} of a processor");
    assert!(share < 0.6, "{share}");
    running.remove();
    shims_end();
}

#[test]
fn memory_follows_the_limit_and_the_guest_is_the_first_to_run_out() {
    Engine::get();
    let host = Host::now();
    // Little: filling more takes minutes here.
    let limit = 48 * MIB;
    let words = ["--memory-limit", &limit.to_string()];
    for runtime in [RUNC, BULKHEAD] {
        let running = Running::start(runtime, &words, "sleep 1000");
        let filled =
            "dd if=/dev/zero of=/dev/shm/x bs=1M count=30 2>/dev/null && rm /dev/shm/x && echo ok";
        assert_eq!(running.exec(filled).ok(), "ok", "{runtime}");
        let killed = running.exec("exec tail /dev/zero");
        assert_eq!(killed.status, 137, "{runtime}: {killed}");
        if runtime == BULKHEAD {
            let total = running
                .exec("awk '/MemTotal/ {print $2}' /proc/meminfo")
                .ok();
            let total = total.parse::<u64>().expect("KiB") << 10;
            let machine = limit + MIB + OVERHEAD;
            assert!(total > limit && total < machine, "{total} of {machine}");
            let cgroup = pods_cgroup();
            let ceiling = number(&cgroup.join("machine/memory.max"));
            assert_eq!(ceiling, (113 + 113 / 8 + 64) * MIB);
            let events = fs::read_to_string(cgroup.join("memory.events")).expect("a file");
            assert!(events.contains("\nmax 0\noom 0\noom_kill 0\n"), "{events}");
        }
        running.remove();
    }
    shims_end();
    host.assert_nothing_left();
}

/// The pod of `ctr` and those of kubelets with either driver of cgroups.
#[test]
fn all_of_a_pod_is_in_its_cgroup() {
    Engine::get();
    let name = fresh_id();
    let (plain, slice) = (
        format!("/kubepods-test/pod1/{name}"),
        format!("kubepodstest-burstable.slice:cri-containerd:{name}"),
    );
    for (words, place) in [
        (vec![], String::from("default")),
        (vec!["--cgroup", &plain], plain.clone()),
        (
            vec!["--cgroup", &slice],
            format!("kubepodstest.slice/kubepodstest-burstable.slice/cri-containerd-{name}.scope"),
        ),
    ] {
        let host = Host::now();
        let running = Running::start(BULKHEAD, &words, "sleep 1000");
        let cgroup = pods_cgroup();
        let shown = cgroup.display().to_string();
        assert!(shown.contains(place.trim_start_matches('/')), "{shown}");
        let (shim, stub) = (shim_of(&running), running.pid() as i32);
        assert_eq!(cgroup_of(shim), cgroup.join("shim"));
        let fs_process = processes(&["bulkhead-vmm fs"])[0];
        for pid in [stub, fs_process] {
            assert_eq!(cgroup_of(pid), cgroup.join("machine"));
        }
        // The guest's memory and page cache are charged there.
        let (used, most) = (
            number(&cgroup.join("memory.current")),
            number(&cgroup.join("machine/memory.max")),
        );
        assert!(used > 20 * MIB && used < most, "{used} of {most}");
        assert_eq!(most, (512 + 64 + 64) * MIB);
        running.remove();
        shims_end();
        assert!(!cgroup.exists(), "{shown}");
        host.assert_nothing_left();
    }
}

#[test]
fn annotations_of_either_engine_make_the_machine() {
    let four = configured("max_vcpus = 4\n");
    let sizes = |annotations: &[&str]| -> (String, u64) {
        let pairs: Vec<&str> = annotations
            .iter()
            .flat_map(|pair| ["--annotation", pair])
            .collect();
        let pod = Pod::start(BULKHEAD, &words(&four, &pairs));
        let ran = pod.run(
            &[],
            "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
        );
        let text = ran.ok();
        let (count, mib) = text.split_once('\n').expect("two lines");
        pod.remove();
        (count.to_owned(), mib.parse().expect("MiB"))
    };
    let containerd = [
        "io.kubernetes.cri.sandbox-cpu-quota=150000",
        "io.kubernetes.cri.sandbox-cpu-period=100000",
        "io.kubernetes.cri.sandbox-cpu-shares=1536",
        "io.kubernetes.cri.sandbox-memory=104857600",
    ];
    let (count, mib) = sizes(&containerd);
    assert_eq!(count, "2");
    assert!((101..166).contains(&mib), "{mib} MiB");
    let crio = [r#"io.kubernetes.cri-o.PodLinuxResources={"cpu_quota":250000}"#];
    let (count, mib) = sizes(&crio);
    assert_eq!(count, "3");
    assert!((400..512).contains(&mib), "{mib} MiB");
    // A request is no limit, and no less than was promised.
    assert_eq!(sizes(&["io.kubernetes.cri.sandbox-cpu-shares=2048"]).0, "2");
}

/// A container with a limit that nobody has announced: what the machine lacks comes with it, and
/// goes with it. One that asks for more than the operator allows is refused, and the pod goes on.
#[test]
fn a_container_that_joins_brings_its_memory() {
    let bounded = configured("memory_mib = 160\nmax_memory_mib = 400\n");
    let pod = Pod::start(BULKHEAD, &words(&bounded, &[]));
    let total = |limit_mib: u64| {
        let limit = (limit_mib * MIB).to_string();
        pod.run(
            &["--memory-limit", &limit],
            "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
        )
    };
    let mib = |ran: Ran| ran.ok().parse::<u64>().expect("MiB");
    let (before, with, after) = (mib(total(64)), mib(total(200)), mib(total(64)));
    assert!(with > 200 && with >= before + 90, "{before} {with}");
    assert_eq!(before, after);
    let refused = total(400);
    let says = ["linux.resources.memory.limit", "max_memory_mib"];
    assert!(
        refused.status != 0 && says.iter().all(|word| refused.errors().contains(word)),
        "{refused}"
    );
    assert_eq!(mib(total(64)), before);
    pod.remove();
}

#[test]
fn what_no_machine_can_be_is_refused_and_nothing_is_left() {
    Engine::get();
    let four = configured("max_vcpus = 4\nmax_memory_mib = 1024\n");
    let tight = configured("overhead_mib = 0\n");
    let annotated = |pair| {
        vec![
            "--annotation",
            "io.kubernetes.cri.container-type=sandbox",
            "--annotation",
            pair,
        ]
    };
    let host = Host::now();
    for (words, says) in [
        (
            words(&four, &["--cpus", "5"]),
            &["linux.resources.cpu.quota", "5 vCPUs", "max_vcpus"][..],
        ),
        (
            words(&four, &["--memory-limit", "1073741824"]),
            &["linux.resources.memory.limit", "max_memory_mib"],
        ),
        (
            words(&tight, &["--memory-limit", "20971520"]),
            &["linux.resources.memory.limit", "48", "bytes are needed"],
        ),
        (
            annotated("io.kubernetes.cri.sandbox-memory=-5"),
            &["sandbox-memory", "-5"],
        ),
        (
            annotated("io.kubernetes.cri.sandbox-cpu-quota=-7"),
            &["sandbox-cpu-quota", "-7"],
        ),
        (
            annotated("io.kubernetes.cri.sandbox-cpu-period=5"),
            &["sandbox-cpu-period", "5"],
        ),
        (
            annotated("io.kubernetes.cri-o.PodLinuxResources=["),
            &["PodLinuxResources"],
        ),
    ] {
        let ran = run_once(BULKHEAD, &words, "true");
        let errors = ran.errors();
        assert!(
            ran.status != 0 && says.iter().all(|word| errors.contains(word)),
            "{words:?}: {ran}\n{}",
            tail(&Engine::get().log())
        );
    }
    for (cpus, named) in [("0,4000", "4000"), ("1-0", "1-0")] {
        let ran = listed(cpus).args(&["true"]).run();
        ran.refused(&["linux.resources.cpu.cpus", named]);
    }
    shims_end();
    host.assert_nothing_left();
}
