//! `bulkhead run`: what goes in comes out, and the exit status is the container's.

mod images;
mod returned_memory;
mod system_calls;
mod templates;

use std::fs;
use std::io::Write;
use std::process::{ChildStdin, Command};
use std::time::{Duration, SystemTime};

use bulkhead_tests::{Bundle, Host, Runtime, Started, must, sha256, soak};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

/// The share takes no device nodes: they are bound over files there. runc makes them, where the host's file system has them.
#[test]
fn devices_are_there_without_a_mount_on_dev() {
    let bundle = Bundle::busybox().edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| {
            let destination = mount["destination"].as_str().expect("a path");
            !destination.starts_with("/dev")
        });
        config["root"]["readonly"] = false.into();
    });
    let script = "for name in null zero full random urandom tty; do stat -c '%n %F %t,%T %a %u' /dev/$name; done
        echo x >/dev/null && head -c 3 /dev/zero | od -An -tx1 && readlink /dev/stdin";
    assert_eq!(
        bundle.script(script).run().ok(),
        "/dev/null character special file 1,3 666 0\n\
         /dev/zero character special file 1,5 666 0\n\
         /dev/full character special file 1,7 666 0\n\
         /dev/random character special file 1,8 666 0\n\
         /dev/urandom character special file 1,9 666 0\n\
         /dev/tty character special file 5,0 666 0\n \
         00 00 00\n/proc/self/fd/0"
    );
}

#[test]
fn output_errors_and_status_come_back_and_nothing_is_left() {
    let host = Host::now();
    let ran = Bundle::busybox()
        .script("echo out; echo err >&2; exit 7")
        .run();
    assert_eq!(
        (ran.status, ran.text().as_str(), ran.errors().as_str()),
        (7, "out", "err\n"),
        "{ran}"
    );
    host.assert_nothing_left();
}

#[test]
fn a_shell_pipeline_runs() {
    let ran = Bundle::busybox()
        .script("seq 1 1000 | grep 7 | sort -rn | head -n 3 | tr '\\n' ' '")
        .run();
    assert_eq!(ran.ok(), "997 987 979 ");
}

#[test]
fn exit_statuses_are_exact() {
    let statuses: Vec<i32> = if soak() {
        (0..=255).collect()
    } else {
        vec![0, 1, 125, 126, 127, 255]
    };
    for status in statuses {
        let ran = Bundle::busybox().script(&format!("exit {status}")).run();
        assert_eq!(ran.status, status, "{ran}");
    }
}

#[test]
fn a_killed_process_ends_with_128_and_the_signal() {
    for signal in [Signal::SIGKILL, Signal::SIGSEGV] {
        // As a child of the shell it cannot be pid 1, which ignores what it does not handle.
        let script = format!("sh -c 'kill -{} $$'; exit $?", signal as i32);
        let ran = Bundle::busybox().script(&script).run();
        assert_eq!(ran.status, 128 + signal as i32, "{ran}");
    }
}

#[test]
fn a_stream_of_64_mib_goes_through_stdin_to_stdout_intact() {
    let bytes: Vec<u8> = (0..64 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let digest = sha256(&bytes);
    let bundle = Bundle::busybox().args(&["/bin/cat"]);
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    let writer = started.feed(bytes);
    let ran = started.finish();
    assert_eq!(ran.status, 0, "{ran}");
    writer
        .join()
        .expect("the writer does not panic")
        .expect("cat reads all");
    assert_eq!((ran.stdout.len(), sha256(&ran.stdout)), (64 << 20, digest));
}

#[test]
fn the_last_output_of_a_short_process_is_not_lost() {
    for _ in 0..if soak() { 50 } else { 2 } {
        let ran = Bundle::busybox()
            .script("dd if=/dev/zero bs=1M count=8 2>/dev/null; echo end")
            .run();
        assert_eq!(ran.stdout.len(), (8 << 20) + 4, "status {}", ran.status);
    }
}

#[test]
fn stdin_ends_where_the_callers_does() {
    let bundle = Bundle::busybox().script("cat; echo after");
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    drop(started.stdin());
    assert_eq!(started.finish().ok(), "after");
}

#[test]
fn python_runs_from_a_debian_root() {
    let ran = Bundle::debian()
        .args(&[
            "/usr/bin/python3",
            "-c",
            "import sys, os; print(sum(range(10**6)), os.getpid(), sys.platform)",
        ])
        .run();
    assert_eq!(ran.ok(), "499999500000 1 linux");
}

#[test]
fn an_image_unpacked_by_umoci_runs() {
    let dir = TempDir::new().expect("a temporary directory");
    let image = dir.path().join("image");
    let made = TempDir::new().expect("a temporary directory");
    let busybox = Bundle::busybox();
    let tag = format!("{}:test", image.display());
    let umoci = |words: &[&str]| {
        must(Command::new("umoci").args(words));
    };
    umoci(&["init", "--layout", image.to_str().expect("a plain path")]);
    umoci(&["new", "--image", &tag]);
    umoci(&[
        "insert",
        "--image",
        &tag,
        busybox.root().to_str().expect("a plain path"),
        "/",
    ]);
    umoci(&[
        "config",
        "--image",
        &tag,
        "--config.cmd",
        "/bin/sh",
        "--config.env",
        "GREETING=hello",
    ]);
    let bundle = made.path().join("bundle");
    umoci(&[
        "unpack",
        "--image",
        &tag,
        bundle.to_str().expect("a plain path"),
    ]);
    let kept = TempDir::new().expect("a temporary directory");
    fs::rename(&bundle, kept.path().join("b")).expect("the same file system");
    let inner = kept.path().join("b");
    for entry in fs::read_dir(&inner).expect("the bundle") {
        let entry = entry.expect("an entry");
        fs::rename(entry.path(), kept.path().join(entry.file_name()))
            .expect("the same file system");
    }
    let ran = Bundle::adopt(kept).script("echo $GREETING").run();
    assert_eq!(ran.ok(), "hello");
}

#[test]
fn two_hundred_children_are_reaped() {
    let script = "i=0; while [ $i -lt 200 ]; do (exit 3) & i=$((i+1)); done; wait; ls -d /proc/[0-9]* | wc -l";
    let left: u32 = Bundle::busybox()
        .script(script)
        .run()
        .ok()
        .trim()
        .parse()
        .expect("a number");
    assert!(left <= 4, "{left} processes are left in the container");
}

#[test]
fn an_orphan_that_keeps_stdout_open_does_not_hold_up_the_exit() {
    let ran = Bundle::busybox().script("sleep 1000 & echo done").run();
    assert_eq!(ran.ok(), "done");
}

#[test]
fn sigterm_reaches_the_container() {
    let bundle = Bundle::busybox()
        .script("trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done");
    let mut started = bundle.start(Runtime::Bulkhead, &[]);
    let stdin = started.stdin();
    started.wait_for_output("ready");
    started.signal(Signal::SIGTERM);
    let ran = started.finish();
    drop(stdin);
    assert_eq!(
        (ran.status, ran.text().as_str()),
        (9, "ready\ncaught"),
        "{ran}"
    );
}

#[test]
fn memory_and_vcpus_are_what_was_asked_for() {
    for (vcpus, memory) in [("1", "48"), ("4", "64"), ("2", "256"), ("4", "3500")] {
        let bundle =
            Bundle::busybox().script("nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo");
        let ran = bundle.run_with(Runtime::Bulkhead, &["--vcpus", vcpus, "--memory", memory]);
        let text = ran.ok();
        let (seen_vcpus, seen_memory) = text.split_once('\n').expect("two lines");
        let (seen_memory, memory): (u32, u32) = (
            seen_memory.parse().expect("a number"),
            memory.parse().expect("a number"),
        );
        assert_eq!(seen_vcpus, vcpus);
        assert!(
            seen_memory <= memory && seen_memory * 10 >= memory * 6,
            "{seen_memory} MiB of {memory}"
        );
    }
}

#[test]
fn memory_and_vcpus_follow_the_limits_where_nothing_was_asked_for() {
    let bundle = Bundle::busybox()
        .edit(|config| {
            config["linux"]["resources"] = json!({
                "memory": {"limit": 100 << 20}, "cpu": {"cpus": "0", "quota": 50_000},
            });
        })
        .script(
            "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo; \
             grep Cpus_allowed_list /proc/self/status | cut -f 2",
        );
    let text = bundle.run().ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[2]), ("1", "0"), "{text}");
    let mib: u32 = lines[1].parse().expect("a number");
    assert!((101..100 + 2 + 64).contains(&mib), "{text}");
    // What is said on the command line counts.
    let text = bundle
        .run_with(Runtime::Bulkhead, &["--vcpus", "2", "--memory", "256"])
        .ok();
    let mib: u32 = text
        .lines()
        .nth(1)
        .expect("three")
        .parse()
        .expect("a number");
    assert!((200..256).contains(&mib), "{text}");
}

#[test]
fn the_timeline_has_every_phase_in_order() {
    let dir = TempDir::new().expect("a temporary directory");
    let file = dir.path().join("timeline.json");
    let bundle = Bundle::busybox().args(&["/bin/true"]);
    let ran = bundle.boot(&["--timeline-json", file.to_str().expect("a plain path")]);
    ran.ok();
    let timeline: serde_json::Value =
        serde_json::from_slice(&fs::read(&file).expect("it was written")).expect("JSON");
    let moments = timeline.as_array().expect("a list of moments");
    let names: Vec<&str> = moments
        .iter()
        .map(|moment| moment["name"].as_str().expect("a name"))
        .collect();
    let wanted = [
        "command start",
        "vmm start",
        "first guest instruction",
        "kernel to init",
        "agent ready",
        "container started",
        "container exited",
    ];
    let positions: Vec<_> = wanted
        .iter()
        .map(|name| names.iter().position(|have| have == name))
        .collect();
    assert!(positions.is_sorted() && positions[0].is_some(), "{names:?}");
    let times: Vec<u64> = moments
        .iter()
        .map(|moment| moment["at_ns"].as_u64().expect("a number"))
        .collect();
    assert!(times.is_sorted(), "{times:?}");
}

#[test]
fn a_volume_is_shared_with_the_host() {
    let volume = TempDir::new().expect("a temporary directory");
    fs::write(volume.path().join("in"), "from the host").expect("writable");
    let bundle = Bundle::busybox()
        .bind(volume.path(), "/data", &["rbind", "rw"])
        .script("cat /data/in; echo from inside > /data/out");
    assert_eq!(bundle.run().ok(), "from the host");
    assert_eq!(
        fs::read_to_string(volume.path().join("out")).expect("the container wrote it"),
        "from inside\n"
    );
    let read_only = Bundle::busybox()
        .bind(volume.path(), "/data", &["rbind", "ro"])
        .script("echo x > /data/in 2>/dev/null || echo refused");
    assert_eq!(read_only.run().ok(), "refused");
    assert_eq!(
        json!(fs::read_to_string(volume.path().join("in")).expect("readable")),
        json!("from the host")
    );
}

/// How far the guest's clock may be from the host's.
const CLOCK: Duration = Duration::from_millis(50);
/// How far a file's times may be from the guest's clock.
const FILE_TIMES: Duration = Duration::from_millis(20);

fn clock() -> Duration {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.expect("the host is past 1970")
}

/// The narrowest of several pairs of the host's clock, each around one of the guest's, has to hold the guest's.
#[track_caller]
fn assert_clock_between(guest: &Started, stdin: &mut ChildStdin, lines: std::ops::Range<usize>) {
    let asked = lines.map(|line| {
        let before = clock();
        stdin.write_all(b"\n").expect("the guest reads");
        let inside: u64 = guest.line(line).parse().expect("nanoseconds");
        (before, Duration::from_nanos(inside), clock())
    });
    let narrowest = asked.min_by_key(|(before, _, after)| after.saturating_sub(*before));
    let (before, inside, after) = narrowest.expect("lines");
    assert!(
        inside + CLOCK >= before && inside <= after + CLOCK,
        "the guest's clock says {inside:?}, the host's {before:?} before and {after:?} after"
    );
}

#[test]
fn the_clock_is_the_hosts_at_once_and_later() {
    let script = "import sys, time\nfor line in sys.stdin: print(time.time_ns(), flush=True)";
    let bundle = Bundle::debian().args(&["/usr/bin/python3", "-c", script]);
    let mut guest = bundle.start(Runtime::Bulkhead, &[]);
    let mut stdin = guest.stdin();
    assert_clock_between(&guest, &mut stdin, 0..10);
    std::thread::sleep(Duration::from_secs(10));
    assert_clock_between(&guest, &mut stdin, 10..20);
    drop(stdin);
    guest.finish().ok();
}

/// The host's kernel stamps files, the guest's tells the time: they agree for what is made, touched and written, in the root and in a
/// volume.
#[test]
fn a_files_times_are_those_of_the_clock() {
    let volume = TempDir::new().expect("a temporary directory");
    let script = r#"
import os, time
def make(path): open(path, "x").close()
def touch(path): os.utime(path)
def write(path):
    with open(path, "w") as file: file.write("x")
for directory in ("/tmp", "/volume"):
    for act in (make, touch, write):
        before = time.time_ns()
        act(directory + "/file")
        after = time.time_ns()
        time.sleep(0.05)
        print(act.__name__, before, os.stat(directory + "/file").st_mtime_ns, after)
"#;
    let ran = Bundle::debian()
        .args(&["/usr/bin/python3", "-c", script])
        .bind(volume.path(), "/volume", &["rbind", "rw"])
        .run();
    let text = ran.ok();
    assert_eq!(text.lines().count(), 6, "{ran}");
    for line in text.lines() {
        let mut words = line.split(' ').skip(1);
        let mut time = || -> Duration {
            let word = words.next().expect("three numbers");
            Duration::from_nanos(word.parse().expect("nanoseconds"))
        };
        let (before, stamp, after) = (time(), time(), time());
        assert!(
            stamp + FILE_TIMES >= before && stamp <= after + FILE_TIMES,
            "before, mtime, after: {line}"
        );
    }
}

/// Nothing of the host is in it: its processes are the guest's, its only interface is lo, and what it leaves behind ends with it.
#[test]
fn a_container_with_a_mount_namespace_alone_has_the_guest_to_itself() {
    let host = Host::now();
    let bundle = Bundle::busybox()
        .edit(|config| {
            config["linux"]["namespaces"] = json!([{"type": "mount"}]);
            config["hostname"] = json!("");
        })
        .script(
            "(sleep 1000 </dev/null >/dev/null 2>&1 &); cat /proc/1/comm; ls /sys/class/net; \
             ls /proc | grep -c '^[0-9]'; uname -r; exit 3",
        );
    let ran = bundle.run();
    let text = ran.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((ran.status, lines.len()), (3, 4), "{ran}");
    assert_eq!(lines[..2], ["init", "lo"], "{ran}");
    let processes: u32 = lines[2].parse().expect("a count");
    // The agent, the shell, sleep, ls, grep and threads of the kernel.
    assert!((5..100).contains(&processes), "{ran}");
    assert!(lines[3].ends_with("-bulkhead"), "{ran}");
    host.assert_nothing_left();
}
