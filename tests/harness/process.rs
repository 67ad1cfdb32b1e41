//! A run of a runtime's command, and what came of it.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

/// How long a test waits for output that must come.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which runtime runs the bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// Ours.
    Bulkhead,
    /// The control: a case that runc fails is a bad test.
    Runc,
    /// The control for what runc 1.1 does not know: time namespaces, scheduler, I/O priority, domain name.
    Crun,
}

impl Runtime {
    /// The command `run`, to the end of the container.
    pub fn run_command(self, bundle: &Path, words: &[&str], id: &str) -> Command {
        let program = match self {
            Runtime::Bulkhead => "bulkhead",
            Runtime::Runc => "runc",
            Runtime::Crun => "crun",
        };
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg("--bundle")
            .arg(bundle)
            .args(words)
            .arg(id);
        command
    }
}

/// A command that runs.
pub struct Started {
    child: Child,
    stdout: Output,
    stderr: Output,
    since: Instant,
}

impl Started {
    /// Starts it in a process group of its own, with pipes.
    pub fn spawn(mut command: Command) -> Started {
        let since = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Output::read(child.stdout.take().expect("piped"));
        let stderr = Output::read(child.stderr.take().expect("piped"));
        Started {
            child,
            stdout,
            stderr,
            since,
        }
    }

    /// Its standard input; dropping it is the end of the file.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("taken once")
    }

    /// Writes all of `bytes` to its standard input from a thread and closes it.
    pub fn feed(&mut self, bytes: Vec<u8>) -> JoinHandle<std::io::Result<()>> {
        let mut stdin = self.stdin();
        thread::spawn(move || stdin.write_all(&bytes))
    }

    /// Waits until its standard output has `text`.
    ///
    /// # Panics
    /// When the output ends without it, or does not come.
    #[track_caller]
    pub fn wait_for_output(&self, text: &str) {
        let found = self.stdout.wait_for(text);
        assert!(
            found,
            "the output ended, or {PATIENCE:?} passed, without {text:?}: {}",
            String::from_utf8_lossy(&self.stderr.so_far())
        );
    }

    /// Waits for a line of its standard output, counted from 0.
    ///
    /// # Panics
    /// When the output ends without it.
    #[track_caller]
    pub fn line(&self, index: usize) -> String {
        let line = self.stdout.line(index);
        line.unwrap_or_else(|| {
            let errors = self.stderr.so_far();
            let errors = String::from_utf8_lossy(&errors);
            panic!("the output ended, or {PATIENCE:?} passed, before line {index}: {errors}")
        })
    }

    /// What it has written to its standard output so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.stdout.so_far()).into_owned()
    }

    /// What it has written to its standard error so far.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr.so_far()).into_owned()
    }

    /// Its pid on the host.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it runs");
    }

    /// Waits for its end, and only then closes its standard input.
    pub fn finish_with(self, stdin: ChildStdin) -> Ran {
        let ran = self.finish();
        drop(stdin);
        ran
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Ran {
        drop(self.child.stdin.take());
        let status = self.child.wait().expect("our own child");
        Ran {
            status: status
                .code()
                .unwrap_or_else(|| -status.signal().expect("ended by exit or signal")),
            stdout: self.stdout.finish(),
            stderr: self.stderr.finish(),
            took: self.since.elapsed(),
        }
    }
}

/// What came of a command.
pub struct Ran {
    /// Its exit code; the negative number of the signal that killed the command itself.
    pub status: i32,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

impl Ran {
    /// Its output as text without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }

    /// Its errors as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Asserts success and returns the output.
    #[track_caller]
    pub fn ok(&self) -> String {
        assert_eq!(self.status, 0, "{self}");
        self.text()
    }

    /// Asserts one of Bulkhead's own failures: code 125, nothing on stdout, one line on stderr that has `words`.
    #[track_caller]
    pub fn refused(&self, words: &[&str]) {
        assert_eq!(self.status, 125, "{self}");
        assert!(self.stdout.is_empty(), "{self}");
        let errors = self.errors();
        // The guest's last lines may follow, set off.
        let own = errors.lines().filter(|line| !line.starts_with("  | "));
        assert_eq!(own.count(), 1, "one line expected: {self}");
        assert!(errors.starts_with("bulkhead: "), "{self}");
        for word in words {
            assert!(errors.contains(word), "{word:?} expected in: {self}");
        }
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned();
        write!(
            f,
            "status {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status,
            cut(&self.stdout),
            cut(&self.stderr)
        )
    }
}

/// The digest of `bytes` as sha256sum prints it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A stream that a thread reads to its end.
struct Output {
    read: Arc<(Mutex<Vec<u8>>, Condvar)>,
    thread: JoinHandle<()>,
}

impl Output {
    fn read(mut from: impl Read + Send + 'static) -> Output {
        let read = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let shared = read.clone();
        let thread = thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            loop {
                let count = from.read(&mut chunk).expect("a pipe is readable");
                if count == 0 {
                    break;
                }
                shared
                    .0
                    .lock()
                    .expect("not poisoned")
                    .extend_from_slice(&chunk[..count]);
                shared.1.notify_all();
            }
        });
        Output { read, thread }
    }

    fn wait_for(&self, text: &str) -> bool {
        let has = |bytes: &[u8]| {
            bytes
                .windows(text.len())
                .any(|window| window == text.as_bytes())
        };
        let mut bytes = self.read.0.lock().expect("not poisoned");
        let deadline = Instant::now() + PATIENCE;
        // The time-out only notices the end of the stream, which nobody announces.
        while !has(&bytes) && !self.thread.is_finished() && Instant::now() < deadline {
            bytes = self
                .read
                .1
                .wait_timeout(bytes, Duration::from_millis(100))
                .expect("not poisoned")
                .0;
        }
        has(&bytes)
    }

    fn line(&self, index: usize) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = self.read.0.lock().expect("not poisoned");
        loop {
            let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').skip(index);
            if let Some(line) = lines.next().and_then(|line| line.strip_suffix(b"\n")) {
                return Some(String::from_utf8_lossy(line).into_owned());
            }
            if self.thread.is_finished() || Instant::now() >= deadline {
                return None;
            }
            // As above.
            bytes = self
                .read
                .1
                .wait_timeout(bytes, Duration::from_millis(100))
                .expect("not poisoned")
                .0;
        }
    }

    fn so_far(&self) -> Vec<u8> {
        self.read.0.lock().expect("not poisoned").clone()
    }

    fn finish(self) -> Vec<u8> {
        self.thread.join().expect("a reader");
        std::mem::take(&mut *self.read.0.lock().expect("not poisoned"))
    }
}
