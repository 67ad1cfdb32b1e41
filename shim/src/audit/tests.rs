//! The log under everything that may happen to it.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use super::*;

fn log(path: &Path, max_bytes: u64, keep: u32) -> Log {
    let settings = crate::config::Audit {
        path: path.join("audit/log"),
        max_bytes,
        keep,
    };
    Log::of(&settings).unwrap()
}

/// A pod whose lines go there, whoever runs the test.
fn pod(log: &Log, id: &str) -> Audit {
    Audit(Some(Told::new(log.clone(), "ns", id)))
}

/// All lines that are there, oldest first.
fn lines(log: &Log) -> Vec<Vec<u8>> {
    let mut follower = Follower::new(log.clone());
    let next = || follower.line().unwrap();
    let lines = std::iter::from_fn(next).collect();
    assert!(!follower.missed());
    lines
}

fn parsed(log: &Log) -> Vec<Line> {
    let all = lines(log);
    let read = |line: &Vec<u8>| serde_json::from_slice(line).unwrap();
    all.iter().map(read).collect()
}

fn withdrawn(port: u32) -> Event {
    Event::OfferWithdrawn { port }
}

#[test]
fn a_line_has_its_schemas_fields() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    let audit = pod(&log, "p");
    audit.tell_of(
        Some("c"),
        Event::limit("container", "memory", Some(2), "text"),
    );
    audit.tell_end("panic", "why", [("net.ring".into(), 3)].into());
    audit.tell_end("destroyed", "told already", BTreeMap::new());
    audit.finish();
    let all = lines(&log);
    assert_eq!(all.len(), 2, "an end is told once");
    let line: serde_json::Value = serde_json::from_slice(&all[0]).unwrap();
    let time = line["time"].as_str().unwrap();
    assert_eq!(time.len(), "2026-11-30T01:31:29.123456Z".len());
    let expected = serde_json::json!({
        "v": 1, "time": time, "namespace": "ns", "pod": "p", "container": "c",
        "kind": "limit", "of": "container", "limit": "memory", "count": 2, "detail": "text",
    });
    assert_eq!(line, expected);
    assert!(all[0].starts_with(br#"{"v":1,"time":"#));
    let line: serde_json::Value = serde_json::from_slice(&all[1]).unwrap();
    assert_eq!(
        (&line["kind"], &line["how"]),
        (&"guest_end".into(), &"panic".into())
    );
    assert_eq!(line["faults"]["net.ring"], 3);
    assert!(line.get("container").is_none());
    for (path, mode) in [(log.path(), 0o600), (log.path().parent().unwrap(), 0o700)] {
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            mode
        );
    }
}

#[test]
fn a_guest_chooses_a_short_printable_part_of_a_line_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    let audit = pod(&log, &"p".repeat(crate::ids::MAX_ID));
    let forged = "\"}\n{\"v\":1,\"kind\":\"guest_end\"}\u{2028}\u{1b}[2J\\".repeat(10_000);
    let faults = (0..10_000).map(|n| (format!("{n}{forged}"), u64::MAX));
    let events = [
        Event::NeedsReset {
            device: forged.clone(),
            reason: forged.clone(),
        },
        Event::Refused {
            field: Some(forged.clone()),
            reason: forged.clone(),
        },
        Event::limit("agent", "frame", Some(u64::MAX), forged.clone()),
        Event::GuestEnd {
            how: "panic".into(),
            reason: forged.clone(),
            faults: faults.collect(),
        },
        Event::Switch {
            name: forged.clone(),
            value: forged.clone(),
        },
    ];
    for event in &events {
        audit.tell_of(Some(&forged), event.clone());
    }
    audit.finish();
    let text = fs::read_to_string(log.path()).unwrap();
    assert_eq!(text.lines().count(), events.len());
    for line in text.lines() {
        assert!(line.len() < MAX_LINE, "{} bytes", line.len());
        assert!(!line.contains(['\u{2028}', '\u{1b}']), "{line}");
        serde_json::from_str::<Line>(line).unwrap();
    }
}

#[test]
fn a_guest_floods_neither_the_log_nor_what_others_tell() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    let (flooding, quiet) = (pod(&log, "flooding"), pod(&log, "quiet"));
    for port in 0..100_000 {
        flooding.tell(withdrawn(port));
    }
    // What it cannot repeat is told all the same, with what was left out before it.
    flooding.tell_end("panic", "", BTreeMap::new());
    quiet.tell(withdrawn(7));
    flooding.finish();
    quiet.finish();
    let lines = parsed(&log);
    let of = |pod: &str| lines.iter().filter(|line| line.pod == pod).count();
    assert_eq!((of("flooding"), of("quiet")), (BURST as usize + 2, 1));
    let left_out = 100_000 - u64::from(BURST);
    let flooding: Vec<&Line> = lines.iter().filter(|line| line.pod == "flooding").collect();
    assert_eq!(
        flooding[BURST as usize].event,
        Event::left_out(left_out, "rate")
    );
}

#[test]
fn what_a_guest_may_cause_comes_back_slowly() {
    let log = log(Path::new("/nowhere"), 1 << 20, 1);
    let told = Told::new(log, "ns", "p");
    let mut state = told.state();
    let (mut now, mut allowed) = (Instant::now(), 0);
    // A day of an event each second.
    for _ in 0..86_400 {
        allowed += u32::from(state.may_repeat(now));
        now += Duration::from_secs(1);
    }
    assert!((8_640..8_640 + BURST + 1).contains(&allowed), "{allowed}");
    assert!(state.may_repeat(now + Duration::from_secs(u64::MAX >> 20)));
    assert!(state.left < BURST);
}

#[test]
fn many_writers_lose_and_tear_nothing_across_rotations() {
    const WRITERS: usize = 8;
    const EACH: usize = 500;
    let dir = tempfile::tempdir().unwrap();
    // Small files, so that they are rotated all the time, and enough of them to keep all.
    let log = log(dir.path(), 8 << 10, 1000);
    let mut follower = Follower::new(log.clone());
    let mut followed = Vec::new();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let log = &log;
            scope.spawn(move || {
                for number in 0..EACH {
                    let length = 1 + (writer * 131 + number * 37) % 300;
                    let text = "x".repeat(length);
                    let line = format!("{{\"w\":{writer},\"n\":{number},\"x\":\"{text}\"}}\n");
                    log.append(line.as_bytes()).unwrap();
                }
            });
        }
        // And one that reads meanwhile.
        while followed.len() < WRITERS * EACH {
            match follower.line().unwrap() {
                Some(line) => followed.push(line),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    });
    assert!(!follower.missed());
    let afterwards = lines(&log);
    assert_eq!(afterwards, followed);
    let mut next = [0; WRITERS];
    for line in &followed {
        let line: serde_json::Value = serde_json::from_slice(line).unwrap();
        let writer = line["w"].as_u64().unwrap() as usize;
        assert_eq!(
            line["n"], next[writer],
            "each writer's lines keep their order"
        );
        next[writer] += 1;
    }
    assert_eq!(next, [EACH; WRITERS]);
    assert!(log.older().filter(|path| path.exists()).count() > 50);
}

#[test]
fn the_log_takes_no_more_than_its_share_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 8 << 10, 2);
    for number in 0..2000 {
        let line = format!("{{\"n\":{number},\"x\":\"{}\"}}\n", "x".repeat(100));
        log.append(line.as_bytes()).unwrap();
    }
    let files = fs::read_dir(log.path().parent().unwrap()).unwrap();
    let sizes: Vec<u64> = files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), 3);
    assert!(sizes.iter().all(|size| *size <= 8 << 10), "{sizes:?}");
    let all = lines(&log);
    let last: serde_json::Value = serde_json::from_slice(all.last().unwrap()).unwrap();
    assert_eq!(last["n"], 1999);
}

#[test]
fn what_was_torn_by_a_kill_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    let tear = |bytes: &[u8]| {
        let mut file = File::options().append(true).open(log.path()).unwrap();
        file.write_all(bytes).unwrap();
    };
    log.append(b"{\"n\":1}\n").unwrap();
    tear(b"{\"n\":2,\"x");
    // A reader that comes before the next writer does not take it for a line.
    assert_eq!(lines(&log), [b"{\"n\":1}"]);
    log.append(b"{\"n\":3}\n").unwrap();
    assert_eq!(fs::read(log.path()).unwrap(), b"{\"n\":1}\n{\"n\":3}\n");
    // Text that is not ours stays, on a line of its own.
    tear(b"a note by the operator");
    log.append(b"{\"n\":4}\n").unwrap();
    let text = fs::read_to_string(log.path()).unwrap();
    assert!(
        text.ends_with("a note by the operator\n{\"n\":4}\n"),
        "{text}"
    );
    tear(&vec![b'x'; 2 * MAX_LINE]);
    log.append(b"{\"n\":5}\n").unwrap();
    let text = fs::read_to_string(log.path()).unwrap();
    assert!(text.ends_with("xx\n{\"n\":5}\n"));
    // The very first one.
    fs::write(log.path(), b"{\"n\":6,").unwrap();
    log.append(b"{\"n\":7}\n").unwrap();
    assert_eq!(lines(&log), [b"{\"n\":7}"]);
}

/// Writes until it is killed; [`writers_that_are_killed_tear_nothing`] runs it as a program.
#[test]
#[ignore = "the body of another test's process"]
fn a_writer_that_is_killed() {
    let Some(dir) = std::env::var_os("BULKHEAD_AUDIT_DIR") else {
        return;
    };
    let log = log(Path::new(&dir), 16 << 10, 1000);
    for number in 0.. {
        let text = "x".repeat(number % 3000);
        let line = format!("{{\"n\":{number},\"x\":\"{text}\"}}\n");
        log.append(line.as_bytes()).unwrap();
    }
}

#[test]
fn writers_that_are_killed_tear_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 16 << 10, 1000);
    for round in 0..20 {
        let start = |_| {
            Command::new(std::env::current_exe().unwrap())
                .args([
                    "--ignored",
                    "--exact",
                    "audit::tests::a_writer_that_is_killed",
                ])
                .env("BULKHEAD_AUDIT_DIR", dir.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut writers: Vec<_> = (0..2).map(start).collect();
        std::thread::sleep(Duration::from_millis(30 + 7 * round));
        for writer in &mut writers {
            writer.kill().unwrap();
            writer.wait().unwrap();
        }
    }
    // The lock went with its holders, and every line is whole.
    log.append(b"{\"n\":\"last\"}\n").unwrap();
    let all = lines(&log);
    for line in &all {
        serde_json::from_slice::<serde_json::Value>(line)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(line)));
    }
    assert_eq!(all.last().unwrap(), b"{\"n\":\"last\"}");
    assert!(all.len() > 100, "{} lines", all.len());
}

#[test]
fn a_rotation_that_was_killed_halfway_is_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 100, 4);
    let line = |number: u32| format!("{{\"n\":{number},\"x\":\"{}\"}}\n", "x".repeat(60));
    for number in 0..4 {
        log.append(line(number).as_bytes()).unwrap();
    }
    // Killed after the older ones had moved: the number 1 is free.
    for number in (1..4).rev() {
        fs::rename(log.numbered(number), log.numbered(number + 1)).unwrap();
    }
    log.append(line(4).as_bytes()).unwrap();
    let all = lines(&log);
    let expected: Vec<Vec<u8>> = (0..5).map(|n| line(n).trim_end().into()).collect();
    assert_eq!(all, expected);
}

#[test]
fn a_file_that_cannot_be_written_costs_lines_and_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    // Nobody waits for a FIFO, and nobody writes through a link.
    fs::create_dir(log.path().parent().unwrap()).unwrap();
    nix::unistd::mkfifo(log.path(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let audit = pod(&log, "p");
    audit.tell(withdrawn(1));
    audit.finish();
    assert!(!audit.0.as_ref().unwrap().state().writing, "it waits");
    fs::remove_file(log.path()).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), log.path()).unwrap();
    audit.tell(withdrawn(2));
    audit.finish();
    assert!(!dir.path().join("elsewhere").exists());
    fs::remove_file(log.path()).unwrap();
    // It can be written again: what is not there is counted.
    audit.tell(withdrawn(3));
    audit.finish();
    let events: Vec<Event> = parsed(&log).into_iter().map(|line| line.event).collect();
    assert_eq!(events, [withdrawn(3), Event::left_out(2, "file")]);
}

#[test]
fn a_full_disk_leaves_no_piece_of_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("audit");
    fs::create_dir(&full).unwrap();
    let options = Some("size=4k,nr_inodes=4");
    let tmpfs = nix::mount::MsFlags::empty();
    if let Err(error) = nix::mount::mount(Some("x"), &full, Some("tmpfs"), tmpfs, options) {
        println!("NOT RUN: cannot mount a tmpfs: {error}");
        return;
    }
    let log = log(dir.path(), 1 << 20, 1);
    let line = format!("{{\"x\":\"{}\"}}\n", "x".repeat(1500));
    log.append(line.as_bytes()).unwrap();
    log.append(line.as_bytes()).unwrap();
    // There is room for a piece of it.
    let third = log.append(line.as_bytes());
    let left = fs::read(log.path()).unwrap();
    nix::mount::umount(&full).unwrap();
    third.unwrap_err();
    assert_eq!(left, line.repeat(2).as_bytes());
}

#[test]
fn who_holds_the_lock_holds_up_no_pod() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 1 << 20, 1);
    log.append(b"{}\n").unwrap();
    let held = File::open(log.path()).unwrap();
    linux::descriptor::lock(std::os::fd::AsFd::as_fd(&held), libc::LOCK_EX).unwrap();
    let audit = pod(&log, "p");
    let since = Instant::now();
    for _ in 0..1000 {
        audit.tell_end("panic", "", BTreeMap::new());
        audit.tell(Event::left_out(1, "x"));
    }
    assert!(since.elapsed() < FAREWELL, "{:?}", since.elapsed());
    audit.finish();
    let waited = since.elapsed();
    assert!(waited >= FAREWELL && waited < 20 * FAREWELL, "{waited:?}");
    assert!(audit.0.as_ref().unwrap().state().queue.len() <= MAX_QUEUE);
    drop(held);
    while audit.0.as_ref().unwrap().state().writing {
        std::thread::sleep(Duration::from_millis(1));
    }
    let all = parsed(&log_without_first(&log));
    assert!(all.len() > MAX_QUEUE, "{}", all.len());
    assert!(matches!(all[1].event, Event::LeftOut { lines, .. } if lines > 700));
}

/// The same log without its first line, which is none of the schema.
fn log_without_first(log: &Log) -> Log {
    let text = fs::read_to_string(log.path()).unwrap();
    let rest = text.split_once('\n').unwrap().1;
    fs::write(log.path(), rest).unwrap();
    log.clone()
}

#[test]
fn a_reader_that_comes_too_late_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path(), 100, 1);
    let mut follower = Follower::new(log.clone());
    assert_eq!(follower.line().unwrap(), None, "there is no log yet");
    let line = |number: u32| format!("{{\"n\":{number},\"x\":\"{}\"}}\n", "x".repeat(60));
    log.append(line(0).as_bytes()).unwrap();
    assert!(follower.line().unwrap().is_some());
    for number in 1..10 {
        log.append(line(number).as_bytes()).unwrap();
    }
    let next = follower.line().unwrap().unwrap();
    assert!(
        next.starts_with(b"{\"n\":8"),
        "{:?}",
        String::from_utf8_lossy(&next)
    );
    assert!(follower.missed() && !follower.missed());
}
