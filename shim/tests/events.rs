//! `bulkhead events` on logs as shims leave them.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// How long what must come may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let config = format!("[audit]\npath = {:?}\nkeep = 3\n", place.log());
        fs::write(place.0.path().join("config.toml"), config).unwrap();
        place
    }

    fn log(&self) -> PathBuf {
        self.0.path().join("audit.jsonl")
    }

    fn append(&self, line: &str) {
        let mut options = File::options();
        let mut log = options.append(true).create(true).open(self.log()).unwrap();
        log.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// As the next shim does when the file is full.
    fn rotate(&self) {
        let numbered = |number: u32| format!("{}.{number}", self.log().display());
        for number in [2, 1] {
            let _ = fs::rename(numbered(number), numbered(number + 1));
        }
        fs::rename(self.log(), numbered(1)).unwrap();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .arg("--config")
            .arg(self.0.path().join("config.toml"))
            .arg("events")
            .args(words)
            .stdin(Stdio::null());
        command
    }

    /// What it prints of what is there, its words, and its status.
    fn shown(&self, words: &[&str]) -> (String, String, Option<i32>) {
        let words = [words, &["--no-follow"]].concat();
        let output = self.command(&words).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let code = output.status.code();
        (text(output.stdout), text(output.stderr), code)
    }

    fn follow(&self, words: &[&str]) -> Following {
        let mut child = self
            .command(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || read(output, &sender));
        Following { child, lines }
    }
}

fn read(output: BufReader<ChildStdout>, sender: &mpsc::Sender<String>) {
    for line in output.lines() {
        if sender.send(line.unwrap()).is_err() {
            return;
        }
    }
}

struct Following {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Following {
    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line comes")
    }

    fn end(mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.wait().unwrap().code()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn blocked(day: u32, pod: &str) -> String {
    format!(
        r#"{{"v":1,"time":"2026-11-{day:02}T01:00:00.000000Z","namespace":"k8s.io","pod":"{pod}","kind":"blocked","role":"vcpu","call":"execve","number":59}}"#
    )
}

#[test]
fn people_read_words_and_programs_read_the_lines_themselves() {
    let place = Place::new();
    let of_container = r#"{"v":1,"time":"2026-11-02T00:00:00.000000Z","namespace":"default","pod":"b","container":"c","kind":"refused","field":"linux.intelRdt","reason":"is the host's"}"#;
    // What a later version may add, and what is no line at all.
    let newer = r#"{"v":1,"time":"2026-11-03T00:00:00.000000Z","namespace":"n","pod":"b","kind":"new","x":[1,"\u001b[2J"]}"#;
    for line in [&blocked(1, "a"), of_container, "{\"v\":1,", newer] {
        place.append(line);
    }
    let (text, said, code) = place.shown(&[]);
    assert_eq!((said.as_str(), code), ("", Some(0)));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[0],
        "2026-11-01T01:00:00.000000Z k8s.io/a blocked: the vcpu thread made the system call execve (59), which its filter does not allow"
    );
    assert_eq!(
        lines[1],
        "2026-11-02T00:00:00.000000Z default/b container c refused: linux.intelRdt: is the host's"
    );
    assert!(lines[2].contains("n/b new: ") && lines.len() == 3, "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    let (json, ..) = place.shown(&["--json"]);
    assert_eq!(
        json,
        format!("{}\n{of_container}\n{newer}\n", blocked(1, "a"))
    );
}

#[test]
fn what_is_asked_for_is_shown() {
    let place = Place::new();
    for (day, pod) in [(1, "aa"), (2, "ab"), (3, "b")] {
        place.append(&blocked(day, pod));
    }
    let count = |words: &[&str]| place.shown(words).0.lines().count();
    assert_eq!(count(&[]), 3);
    assert_eq!(count(&["--pod", "a"]), 2);
    assert_eq!(count(&["--pod", "ab", "--json"]), 1);
    assert_eq!(count(&["--since", "2026-11-02T01:00:00Z"]), 2);
    assert_eq!(
        count(&["--since", "2026-11-02T01:00:00.1Z", "--pod", "a"]),
        0
    );
    assert_eq!(count(&["--since", "2026-11-03"]), 1);
    assert_eq!(count(&["--since", "1s"]), 0);
    let (_, said, code) = place.shown(&["--since", "yesterday"]);
    assert!(said.contains("--since \"yesterday\" is no time"), "{said}");
    assert_eq!(code, Some(125));
}

#[test]
fn what_comes_is_followed_across_rotations() {
    let place = Place::new();
    let mut following = place.follow(&["--json"]);
    let stderr = following.child.stderr.take().unwrap();
    let mut stderr = BufReader::new(stderr);
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    assert!(
        said.contains("no events in") && said.contains("waiting"),
        "{said}"
    );
    let mut expected = Vec::new();
    for number in 1..20 {
        let line = blocked(number, &format!("pod{number}"));
        place.append(&line);
        expected.push(line);
        if number % 3 == 0 {
            // Lines that come right before it are not lost, nor shown twice.
            place.rotate();
        }
        if number % 4 == 0 {
            for line in expected.drain(..) {
                assert_eq!(following.line(), line);
            }
        }
    }
    for line in expected {
        assert_eq!(following.line(), line);
    }
    let pid = nix::unistd::Pid::from_raw(following.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let nothing = following.lines.recv_timeout(PATIENCE);
    nothing.unwrap_err();
    following.lines = mpsc::channel().1;
    assert_eq!(following.end(), Some(0));
}

#[test]
fn it_ends_when_nobody_reads_it_any_more() {
    let place = Place::new();
    place.append(&blocked(1, "a"));
    let mut child = place
        .command(&[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    // As `head -1` does. No further line comes.
    drop(output);
    let lines = mpsc::channel().1;
    let mut stderr = child.stderr.take().unwrap();
    assert_eq!(Following { child, lines }.end(), Some(0));
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn without_a_log_there_are_words() {
    let place = Place::new();
    let (text, said, code) = place.shown(&[]);
    assert!(
        text.is_empty() && said.contains("there are no events in"),
        "{said}"
    );
    assert_eq!(code, Some(0));
    fs::write(place.0.path().join("config.toml"), "[audit]\npath = \"\"\n").unwrap();
    let (_, said, code) = place.shown(&[]);
    assert!(said.contains("no audit log is kept"), "{said}");
    assert_eq!(code, Some(125));
}

/// What `bulkhead run` refuses is there.
#[test]
fn a_refusal_is_told() {
    if !nix::unistd::geteuid().is_root() {
        println!("NOT RUN: only root keeps an audit log");
        return;
    }
    let place = Place::new();
    let bundle = place.0.path().join("bundle");
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    fs::write(
        bundle.join("config.json"),
        r#"{"ociVersion": "1.2.0", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "apparmorProfile": "forged\n{}"}, "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}}"#,
    )
    .unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
    run.arg("--config").arg(place.0.path().join("config.toml"));
    let output = run
        .args(["run", "--bundle", bundle.to_str().unwrap(), "refused"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let (json, ..) = place.shown(&["--json"]);
    assert_eq!(json.lines().count(), 1, "{json}");
    let line: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&line["kind"], &line["pod"], &line["container"]),
        (&"refused".into(), &"refused".into(), &"refused".into())
    );
    let field = line["field"].as_str().unwrap();
    assert!(field.contains("apparmorProfile"), "{field}");
}
