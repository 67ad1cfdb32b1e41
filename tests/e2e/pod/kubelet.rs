//! kubelet's volumes: what a container and its watchers see of an update, beside what runc's container sees.

use std::fs;
use std::io::Write;
use std::process::ChildStdin;
use std::time::{Duration, Instant};

use bulkhead_tests::{Bundle, Host, KubeletVolume, Runtime, Started, eventually, sha256};
use serde_json::{Value, json};

use crate::pod::{DRIVER, Driven, Pod};

const CONFIG: &str = "kubernetes.io~configmap";

/// `events` is what inotify(7) has told of /volume: word, whether it is a directory, name.
const WATCH: &str = r"
import ctypes, hashlib, os, struct, threading, time
WORDS = {0x40: 'moved_from', 0x80: 'moved_to', 0x100: 'create', 0x200: 'delete'}
libc = ctypes.CDLL(None)
watcher = libc.inotify_init1(0)
assert libc.inotify_add_watch(watcher, b'/volume', sum(WORDS)) > 0
events = []
def watch():
    while True:
        data, at = os.read(watcher, 1 << 16), 0
        while at < len(data):
            _, mask, _, length = struct.unpack_from('iIII', data, at)
            name = data[at + 16:at + 16 + length].rstrip(b'\0').decode()
            events.append([WORDS.get(mask & 0xfff, hex(mask)), bool(mask & 0x40000000), name])
            at += 16 + length
threading.Thread(target=watch, daemon=True).start()
def until(happened):
    end = time.monotonic() + 200
    while not happened():
        if time.monotonic() > end:
            raise Exception(f'in vain: {events}')
        time.sleep(0.001)
def text(name):
    try:
        return open('/volume/' + name).read()
    except FileNotFoundError:
        return None
def facts(name):
    found = os.stat('/volume/' + name)
    return [oct(found.st_mode), found.st_uid, found.st_gid, found.st_size, int(found.st_mtime)]
";

/// A container of either runtime that does as it is told.
struct Inside {
    started: Started,
    stdin: ChildStdin,
    asked: usize,
    _bundle: Bundle,
}

impl Inside {
    fn start(runtime: Runtime, volume: &KubeletVolume, options: &[&str]) -> Inside {
        let bundle = Bundle::debian()
            .bind(volume.path(), "/volume", options)
            .args(&["/usr/bin/python3", "-I", "-S", "-c", DRIVER]);
        let mut started = bundle.start(runtime, &[]);
        let stdin = started.stdin();
        let mut inside = Inside {
            started,
            stdin,
            asked: 0,
            _bundle: bundle,
        };
        assert_eq!(inside.ask(WATCH), Value::Null);
        inside
    }

    fn tell(&mut self, python: &str) {
        writeln!(self.stdin, "{}", json!(python)).expect("it listens");
    }

    #[track_caller]
    fn answer(&mut self) -> Value {
        self.asked += 1;
        let line = self.started.line(self.asked - 1);
        serde_json::from_str(&line).expect("JSON")
    }

    #[track_caller]
    fn ask(&mut self, python: &str) -> Value {
        self.tell(python);
        self.answer()
    }

    #[track_caller]
    fn end(self) {
        let Inside { started, stdin, .. } = self;
        drop(stdin);
        started.finish().ok();
    }
}

#[test]
fn an_update_raises_the_same_events_and_shows_the_same_files_as_under_runc() {
    let mut seen = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let host = Host::now();
        let first: [(&str, &[u8], u32); 4] = [
            ("key", b"1", 0o644),
            ("-gone", b"1", 0o644),
            ("secret", b"1", 0o400),
            ("run", b"#!/bin/sh\necho ran", 0o755),
        ];
        let mut volume = KubeletVolume::with_group(CONFIG, Some(1234), &first);
        let mut inside = Inside::start(runtime, &volume, &["rbind", "ro"]);
        let all = "answer = [sorted(os.listdir('/volume')), facts('key'), facts('secret'), facts('run'), facts('..data')[:3], facts('')[:3], os.readlink('/volume/key'), os.popen('/volume/run').read()]";
        let mut facts = vec![inside.ask(all)];
        facts.push(inside.ask("open('/volume/new', 'w')"));
        // New bytes, a key added, a key removed, a mode changed.
        let old = volume.version();
        inside.tell("until(lambda: text('key') == '2')");
        let second: [(&str, &[u8], u32); 4] = [
            ("key", b"2", 0o600),
            ("secret", b"1", 0o400),
            ("run", b"#!/bin/sh\necho again", 0o755),
            ("deep/er", b"nested", 0o644),
        ];
        volume.write(&second);
        let written = Instant::now();
        assert_eq!(inside.answer(), Value::Null, "{runtime:?}");
        let took = written.elapsed();
        println!("{runtime:?}: an update was seen after {took:?}");
        // All of it in emulation, the answer's way out too. Trust in names and attributes alone would make it a second or more
        // each time; a busy machine makes several of the usual tenth.
        assert!(took < Duration::from_secs(10), "{runtime:?}: {took:?}");
        let removed =
            format!("until(lambda: ['delete', True, '{old}'] in events); answer = events");
        let events = inside.ask(&removed);
        let new = volume.version();
        for event in [
            json!(["create", true, new]),
            json!(["moved_to", false, "..data"]),
            json!(["delete", true, old]),
        ] {
            let all = events.as_array().expect("a list");
            assert!(all.contains(&event), "{runtime:?}: {event} in {events}");
        }
        facts.push(events);
        facts.push(inside.ask(all));
        // As large as kubelet's largest object.
        let large: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
        volume.write(&[("large", &large, 0o644), ("deep/er", b"nested", 0o644)]);
        assert_eq!(
            inside.ask("until(lambda: os.path.exists('/volume/large'))"),
            Value::Null
        );
        let digest = inside.ask("answer = [hashlib.sha256(open('/volume/large', 'rb').read()).hexdigest(), text('deep/er')]");
        assert_eq!(digest, json!([sha256(&large), "nested"]), "{runtime:?}");
        // The volume is removed from the host.
        fs::remove_dir_all(volume.path()).expect("ours");
        facts.push(inside.ask("until(lambda: not os.listdir('/volume'))"));
        inside.end();
        drop(volume);
        host.assert_nothing_left();
        seen.push(facts);
    }
    // The times of files are of each run's own.
    let plain = |facts: &[Value]| {
        let mut text = json!(facts);
        forget_times(&mut text);
        text
    };
    assert_eq!(plain(&seen[0]), plain(&seen[1]));
}

/// Takes the times out of the facts of files, which are lists of five that begin with a mode.
fn forget_times(value: &mut Value) {
    if let Value::Array(list) = value {
        let is_facts = list.len() == 5 && list[0].as_str().is_some_and(|t| t.starts_with("0o"));
        if is_facts {
            list.truncate(4);
        }
        list.iter_mut().for_each(forget_times);
    }
}

#[test]
fn fifty_updates_are_never_torn() {
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let keys = |n: u32| {
            let bytes = format!("{n:04}").repeat(5000).into_bytes();
            [bytes.clone(), bytes]
        };
        let write = |volume: &mut KubeletVolume, n| {
            let [a, b] = keys(n);
            volume.write(&[("a", &a, 0o644), ("b", &b, 0o644)]);
        };
        let mut volume = KubeletVolume::new(CONFIG, &[]);
        write(&mut volume, 0);
        let mut inside = Inside::start(runtime, &volume, &["rbind", "ro"]);
        inside.ask(
            r"
torn, versions, going = [], set(), True
def version(*texts):
    number = texts[0][:4]
    if any(text != number * 5000 for text in texts):
        torn.append([[text[:4], text[-4:], len(text)] for text in texts])
    versions.add(number)
def read_all():
    while going:
        try:
            data = os.open('/volume/..data', os.O_DIRECTORY)
        except FileNotFoundError:
            # The host has removed the version between this walk's link and its directory.
            continue
        try:
            both = [open(os.open(name, os.O_RDONLY, dir_fd=data)).read() for name in 'ab']
            version(*both)
            version(text('a'))
        except FileNotFoundError:
            # The host has removed that version, and this directory with it.
            pass
        except TypeError:
            # Between two versions, for a link that is walked while one goes.
            pass
        finally:
            os.close(data)
reader = threading.Thread(target=read_all)
reader.start()
",
        );
        for n in 1..=50 {
            write(&mut volume, n);
            std::thread::sleep(Duration::from_millis(50));
        }
        let found = inside.ask("until(lambda: (text('a') or '')[:4] == '0050'); time.sleep(0.2); going = False; reader.join(); answer = [torn, len(versions), '0050' in versions]");
        println!("{runtime:?}: {} versions read", found[1]);
        assert_eq!(
            [&found[0], &found[2]],
            [&json!([]), &json!(true)],
            "{runtime:?}: {found}"
        );
        assert!(found[1].as_u64() > Some(3), "{runtime:?}: {found}");
        inside.end();
    }
}

#[test]
fn what_cannot_be_repeated_is_refused_or_told_and_never_silent() {
    let large = vec![0; 17 << 20];
    let host = Host::now();
    let volume = KubeletVolume::new(CONFIG, &[("large", &large, 0o644)]);
    let bundle = Bundle::busybox().bind(volume.path(), "/volume", &["rbind", "ro"]);
    bundle
        .args(&["/bin/true"])
        .run()
        .refused(&["the volume", "large", "more than 16 MiB"]);
    host.assert_nothing_left();
    drop(volume);

    let mut volume = KubeletVolume::new(CONFIG, &[("key", b"1", 0o644)]);
    let mut inside = Inside::start(Runtime::Bulkhead, &volume, &["rbind", "ro"]);
    volume.write(&[("key", b"2", 0o644), ("large", &large, 0o644)]);
    let told = || inside.started.errors().contains("more than 16 MiB");
    eventually("the size is told", told, || inside.started.errors());
    assert_eq!(inside.ask("answer = text('key')"), "1");
    volume.write(&[("key", b"3", 0o644)]);
    let names = json!([volume.version(), "..data", "key"]);
    let followed =
        format!("until(lambda: text('key') == '3' and sorted(os.listdir('/volume')) == {names})");
    assert_eq!(inside.ask(&followed), Value::Null);
    // Told once, however many events there were.
    let errors = inside.started.errors();
    assert_eq!(errors.matches("more than 16 MiB").count(), 1, "{errors}");
    inside.end();
}

/// Instances of inotify that this process has.
fn watchers() -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").expect("proc");
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets
        .filter(|target| target.ends_with("anon_inode:inotify"))
        .count()
}

#[test]
fn roots_own_instances_of_inotify_are_not_needed() {
    use nix::sys::inotify::{InitFlags, Inotify};
    let volume = KubeletVolume::new(CONFIG, &[("key", b"1", 0o644)]);
    let bundle = Bundle::busybox().bind(volume.path(), "/volume", &["rbind", "ro"]);
    let mut all = Vec::new();
    while let Ok(one) = Inotify::init(InitFlags::IN_CLOEXEC) {
        assert!(all.len() < 4096, "the test needs a limit");
        all.push(one);
    }
    let ran = bundle.args(&["/bin/cat", "/volume/key"]).run();
    drop(all);
    assert_eq!(ran.ok(), "1");
}

#[test]
fn containers_of_a_pod_share_a_volume_and_it_goes_with_the_last() {
    let before = watchers();
    let mut volume = KubeletVolume::new(CONFIG, &[("key", b"1", 0o644)]);
    let mut pod = Pod::start(512);
    let driven = |pod: &mut Pod, id: &str, options: &[&str]| -> Driven {
        let bundle = Bundle::debian().bind(volume.path(), "/volume", options);
        let mut container = pod.driven(id, bundle);
        assert_eq!(container.ask(WATCH), Value::Null);
        container
    };
    let mut reader = driven(&mut pod, "reader", &["rbind", "ro"]);
    let mut writer = driven(&mut pod, "writer", &["rbind", "rw"]);
    assert_eq!(pod.shared_mounts(), (2, 2), "two roots, and no volume");
    let place = "answer = [os.stat('/volume').st_dev, os.stat('/volume').st_ino]";
    assert_eq!(reader.ask(place), writer.ask(place), "one file system");
    // What a container writes stays in the guest, and does not stop what comes from the host.
    let spoilt = "os.remove('/volume/..data'); os.symlink('/etc', '/volume/..data'); os.mkdir('/volume/..data_tmp'); os.symlink('/none', '/volume/new'); open('/volume/own', 'w').close()";
    assert_eq!(writer.ask(spoilt), Value::Null);
    assert_eq!(reader.ask("answer = text('own')"), "");
    assert!(!volume.path().join("own").exists());
    volume.write(&[("key", b"2", 0o644), ("new", b"2", 0o644)]);
    let seen = "until(lambda: text('key') == '2' and text('new') == '2'); answer = os.readlink('/volume/..data')";
    for container in [&mut reader, &mut writer] {
        let version = pod.meanwhile(|| container.ask(seen));
        assert_eq!(version, volume.version());
    }
    assert_eq!(
        watchers(),
        before + 2,
        "one instance for the pod, and its copy"
    );
    // One goes, the other goes on.
    pod.kill("writer");
    pod.remove("writer").expect("it is removed");
    volume.write(&[("key", b"3", 0o644)]);
    pod.meanwhile(|| reader.ask("until(lambda: text('key') == '3')"));
    pod.kill("reader");
    pod.remove("reader").expect("it is removed");
    let bundle = Bundle::debian();
    let mut observer = pod.observer("observer", bundle);
    let mounted = observer.ask(
        "answer = [line for line in open('/proc/1/mounts') if '/run/bulkhead/volumes' in line]",
    );
    assert_eq!(mounted, json!([]), "the guest has forgotten the volume");
    pod.end();
    assert_eq!(watchers(), before);
}
