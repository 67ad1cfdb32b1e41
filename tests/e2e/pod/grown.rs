//! Hundreds of containers come and go in a live pod while another process of the guest holds their files open: nothing is busy, and
//! nothing has grown.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::agent as wire;
use bulkhead_shim::oci::Plan;
use bulkhead_shim::pod::Sandbox;
use bulkhead_tests::{Bundle, soak};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::pod::{Driven, Output, Pod, create};

/// Before anything is compared, so that caches and allocators have what they keep.
const WARM: usize = 20;
/// What the observer keeps open of the containers before, which are gone.
const KEPT: usize = 8;

/// Keeps a file, a directory and a mapping of each container, by way of its init's root.
const HOLD: &str = r"
import errno, mmap, os, time
held = []
def own(pid, container):
    try:
        return open(f'/proc/{pid}/cgroup').read().rstrip().endswith('/' + container)
    except OSError:
        return False
def hold(container, keep):
    pid = max(int(name) for name in os.listdir('/proc') if name.isdigit() and own(name, container))
    root = f'/proc/{pid}/root'
    file = os.open(root + '/etc/passwd', os.O_RDONLY)
    map = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    own_volume = os.open(root + '/own', os.O_RDONLY)
    log = os.open(root + '/own/log', os.O_RDWR | os.O_CREAT)
    os.write(log, b'held')
    written = mmap.mmap(log, 4)
    written[:2] = b'HE'
    written.flush()
    held.append((file, map, os.open(root, os.O_PATH), own_volume, log, written))
    while len(held) > keep:
        let_go(held.pop(0))
    return [map[:4].decode(), written[:].decode()]
def let_go(entry):
    for what in entry:
        if not isinstance(what, int):
            what.close()
            continue
        try:
            os.close(what)
        except OSError as error:
            # The file is gone; what had been written is on the host.
            if error.errno != errno.ESTALE:
                raise
def after():
    # What the container before left: its pages are there still, its files are not.
    file, map, root, own_volume, log, written = held[-1]
    try:
        os.fstat(os.open('etc', os.O_RDONLY, dir_fd=root))
        return 'there'
    except OSError as error:
        return [map[:4].decode(), error.strerror]
def free():
    # A killed file system and a removed cgroup are freed by workers a little later.
    open('/proc/sys/vm/drop_caches', 'w').write('3')
    time.sleep(0.5)
    # MemFree leaves out what the processors have in their lists of free pages, which is megabytes after much was freed.
    listed = sum(int(line.split()[1]) for line in open('/proc/zoneinfo') if line.split()[0] == 'count:')
    return meminfo()['MemFree'] + listed * mmap.PAGESIZE // 1024
def meminfo():
    return {name: int(rest.split()[0]) for name, rest in (line.split(':') for line in open('/proc/meminfo'))}
def memory():
    free_kib = max(free() for _ in range(6))
    used = {name: kib for name, kib in meminfo().items() if kib and name not in ('MemTotal', 'MemAvailable')}
    return [free_kib, len(open('/proc/1/mountinfo').readlines()), len(os.listdir('/proc/1/fd')), used]
";

/// What must not grow.
#[derive(Debug)]
struct Sizes {
    host_mounts: usize,
    fs_files: usize,
    /// Not its whole resident set, which has what it touched of the guest's memory.
    fs_anon_kib: u64,
    fs_mounts: usize,
    own_files: usize,
    guest_free_kib: u64,
    guest_mounts: u64,
    agent_files: u64,
    ledger: u64,
    /// Of the guest's, what its memory is used for: to read where it went.
    guest_kib: Value,
}

impl Sizes {
    fn now(pod: &Pod, observer: &mut Driven) -> Sizes {
        let fs = pod.fs_pid();
        let count = |dir: String| fs::read_dir(dir).expect("a process").count();
        let lines = |file: String| fs::read_to_string(file).expect("a process").lines().count();
        let status = fs::read_to_string(format!("/proc/{fs}/status")).expect("a process");
        let anon = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next())
            .expect("a line RssAnon");
        let guest = observer.ask("answer = memory()");
        let number = |index: usize| guest[index].as_u64().expect("a number");
        Sizes {
            host_mounts: lines("/proc/self/mountinfo".into()),
            fs_files: count(format!("/proc/{fs}/fd")),
            fs_anon_kib: anon.parse().expect("a number"),
            fs_mounts: lines(format!("/proc/{fs}/mountinfo")),
            own_files: count("/proc/self/fd".into()),
            guest_free_kib: number(0),
            guest_mounts: number(1),
            agent_files: number(2),
            ledger: pod.ledger_size(),
            guest_kib: guest[3].clone(),
        }
    }
}

/// The steps of a cycle, and the observer's part, which is none of ours.
const STEPS: [&str; 6] = ["place", "create", "start", "(held)", "exit", "remove"];
const HELD: usize = 3;

/// One container from its place to its removal, with its files held by the observer: how long each step took.
fn cycle(pod: &mut Pod, observer: &mut Driven, plan: &Plan) -> [Duration; STEPS.len()] {
    let mut began = Instant::now();
    let mut lap = || {
        let took = began.elapsed();
        began = Instant::now();
        took
    };
    let place = async |sandbox: &mut Sandbox| sandbox.place_container("cycle", plan).await;
    pod.block_on(place).expect("placed");
    let placed = lap();
    let (stdin, output) = pod.block_on(async |sandbox| {
        let (stdin_port, stdin) = sandbox.stream().await.expect("a stream");
        let (stdout_port, stdout) = sandbox.stream().await.expect("a stream");
        let stdio = wire::Stdio {
            stdin_port,
            stdout_port,
            ..wire::Stdio::default()
        };
        let made = sandbox.create_container("cycle", plan.container.clone(), stdio);
        made.await.expect("made");
        (stdin, Output::read(stdout))
    });
    let created = lap();
    pod.block_on(async |sandbox| sandbox.agent().start("cycle").await)
        .expect("it starts");
    let started = lap();
    let held = observer.ask(&format!("answer = hold('cycle', {KEPT})"));
    assert_eq!(held, json!(["root", "HEld"]));
    let holding = lap();
    // The end of its input is the end of the container.
    drop(stdin);
    assert_eq!(pod.wait("cycle").exit_status, 0);
    assert_eq!(output.text(), "");
    let exited = lap();
    pod.remove("cycle").expect("nothing is busy");
    [placed, created, started, holding, exited, lap()]
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn mounts_and_unmounts_leave_nothing_grown() {
    let cycles = if soak() { 300 } else { 100 };
    let (common, own) = (
        TempDir::new().expect("a directory"),
        TempDir::new().expect("a directory"),
    );
    let mut pod = Pod::start(256);
    let bind = |bundle: Bundle| bundle.bind(common.path(), "/common", &["rbind"]);
    let mut observer = pod.observer("observer", bind(Bundle::debian()));
    assert_eq!(observer.ask(HOLD), Value::Null);
    let bundle = bind(Bundle::busybox())
        .bind(own.path(), "/own", &["rbind"])
        .args(&["/bin/cat"]);
    let plan = Pod::plan(&bundle, "cycle");
    for _ in 0..WARM {
        cycle(&mut pod, &mut observer, &plan);
    }
    assert_eq!(
        observer.ask("answer = after()"),
        json!(["root", "Stale file handle"])
    );
    let before = Sizes::now(&pod, &mut observer);
    let times: Vec<_> = (0..cycles)
        .map(|number| {
            if number % 20 == 19 {
                println!("{} cycles", number + 1);
            }
            cycle(&mut pod, &mut observer, &plan)
        })
        .collect();
    let after = Sizes::now(&pod, &mut observer);
    for (index, step) in STEPS.iter().enumerate() {
        let of_step = times.iter().map(|cycle| cycle[index]).collect();
        println!("{step}: median {:?}", median(of_step));
    }
    let ours = |cycle: &[Duration; STEPS.len()]| cycle.iter().sum::<Duration>() - cycle[HELD];
    let whole = median(times.iter().map(ours).collect());
    println!("{cycles} cycles: median {whole:?}\nbefore {before:?}\nafter  {after:?}");
    assert_eq!(
        (before.host_mounts, before.fs_mounts, before.guest_mounts),
        (after.host_mounts, after.fs_mounts, after.guest_mounts)
    );
    assert_eq!(
        (before.fs_files, before.own_files, before.agent_files),
        (after.fs_files, after.own_files, after.agent_files)
    );
    assert!(
        after.fs_anon_kib <= before.fs_anon_kib + 256,
        "the fs process"
    );
    assert!(
        after.guest_free_kib + 1024 >= before.guest_free_kib,
        "the guest: {} became {}",
        before.guest_kib,
        after.guest_kib
    );
    assert!(after.ledger <= before.ledger.max(64 << 10), "the ledger");
    assert_eq!(fs::read(own.path().join("log")).expect("written"), b"HEld");
    pod.kill("observer");
    pod.remove("observer").expect("it has exited");
    assert_eq!(pod.shared_mounts(), (0, 0));
    let last = create_after_all(&mut pod);
    assert_eq!(last, "alive\n");
    pod.end();
}

fn create_after_all(pod: &mut Pod) -> String {
    let bundle = Bundle::busybox().script("echo alive");
    let plan = Pod::plan(&bundle, "last");
    let output = pod.block_on(async |sandbox| {
        sandbox
            .place_container("last", &plan)
            .await
            .expect("placed");
        let output = create(sandbox, "last", &plan).await;
        sandbox.agent().start("last").await.expect("it starts");
        output
    });
    pod.wait("last");
    pod.remove("last").expect("it has exited");
    output.text()
}
