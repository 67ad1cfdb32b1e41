//! A run of a runtime's command, and what came of it.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

/// How long a test waits for what must come: many times what it takes in the lab on a quiet machine, since a busy one is several
/// times slower, and still an end to a hang.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// How long a command may take from start to end; the long versions of the suites move sixteen times as much.
fn life() -> Duration {
    PATIENCE * if crate::soak() { 16 } else { 2 }
}

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
    /// What was called, for whoever waits in vain.
    name: String,
    child: Child,
    stdout: Output,
    stderr: Output,
    since: Instant,
    end: EndOnPanic,
}

/// Ends a process group when a test fails that has not waited for it: what it left would disturb
/// the tests after it.
struct EndOnPanic(Option<Pid>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if let Some(group) = self.0.filter(|_| thread::panicking()) {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Started {
    /// Starts it in a process group of its own, with pipes.
    pub fn spawn(mut command: Command) -> Started {
        Started::of(&mut command)
    }

    fn of(command: &mut Command) -> Started {
        let since = Instant::now();
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Output::read(child.stdout.take().expect("piped"));
        let stderr = Output::read(child.stderr.take().expect("piped"));
        let group = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        Started {
            name,
            child,
            stdout,
            stderr,
            since,
            end: EndOnPanic(Some(group)),
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
    ///
    /// # Panics
    /// When it does not come: the command is killed then, and what it has said is told.
    #[track_caller]
    pub fn finish(mut self) -> Ran {
        drop(self.child.stdin.take());
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        let (sender, ended) = mpsc::channel();
        let mut child = self.child;
        thread::spawn(move || sender.send(child.wait()));
        let status = match ended.recv_timeout(life()) {
            Ok(status) => {
                self.end.0 = None;
                status.expect("our own child")
            }
            Err(_) => {
                // Its own group, see `spawn`.
                let _ = killpg(pid, Signal::SIGKILL);
                let (stdout, stderr) = (self.stdout.so_far(), self.stderr.so_far());
                let ran = Ran::new(-9, stdout, stderr, self.since);
                panic!("{} has not ended in {:?}: {ran}", self.name, life());
            }
        };
        let status = status
            .code()
            .unwrap_or_else(|| -status.signal().expect("ended by exit or signal"));
        // Whoever has a copy of the streams keeps them from ending.
        let all = [self.stdout, self.stderr].map(|output| {
            let (bytes, ended) = output.finish();
            assert!(
                ended,
                "{} has ended, but somebody held its output open for {PATIENCE:?} after that: {}",
                self.name,
                String::from_utf8_lossy(&bytes)
            );
            bytes
        });
        let [stdout, stderr] = all;
        Ran::new(status, stdout, stderr, self.since)
    }
}

/// Runs a command to its end, which must come.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    Started::of(command).finish()
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
    fn new(status: i32, stdout: Vec<u8>, stderr: Vec<u8>, since: Instant) -> Ran {
        Ran {
            status,
            stdout,
            stderr,
            took: since.elapsed(),
        }
    }

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
struct Output(Arc<(Mutex<Seen>, Condvar)>);

/// What has come of a stream.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    fn read(mut from: impl Read + Send + 'static) -> Output {
        let shared = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let output = Output(shared.clone());
        thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            loop {
                let count = from.read(&mut chunk).expect("a pipe is readable");
                let mut seen = shared.0.lock().expect("not poisoned");
                seen.bytes.extend_from_slice(&chunk[..count]);
                seen.ended = count == 0;
                shared.1.notify_all();
                if seen.ended {
                    break;
                }
            }
        });
        output
    }

    /// Waits until the stream has ended or what has come is enough, at most [`PATIENCE`].
    fn wait(&self, is_enough: impl Fn(&[u8]) -> bool) -> MutexGuard<'_, Seen> {
        let (seen, news) = &*self.0;
        let goes_on = |seen: &mut Seen| !seen.ended && !is_enough(&seen.bytes);
        let seen = seen.lock().expect("not poisoned");
        let waited = news.wait_timeout_while(seen, PATIENCE, goes_on);
        waited.expect("not poisoned").0
    }

    fn wait_for(&self, text: &str) -> bool {
        let has = |bytes: &[u8]| {
            bytes
                .windows(text.len())
                .any(|window| window == text.as_bytes())
        };
        has(&self.wait(has).bytes)
    }

    fn line(&self, index: usize) -> Option<String> {
        let line = |bytes: &[u8]| {
            let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').skip(index);
            let line = lines.next()?.strip_suffix(b"\n")?;
            Some(String::from_utf8_lossy(line).into_owned())
        };
        line(&self.wait(|bytes| line(bytes).is_some()).bytes)
    }

    fn so_far(&self) -> Vec<u8> {
        self.0.0.lock().expect("not poisoned").bytes.clone()
    }

    /// All of it, and whether it has ended.
    fn finish(self) -> (Vec<u8>, bool) {
        let mut seen = self.wait(|_| false);
        (std::mem::take(&mut seen.bytes), seen.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Started {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Started::spawn(command)
    }

    #[test]
    fn output_is_waited_for_and_read_to_its_end() {
        let mut started = shell("echo one; read word; echo $word; echo last >&2; exit 3");
        started.wait_for_output("one");
        assert_eq!(started.line(0), "one");
        writeln!(started.stdin(), "two").expect("it reads");
        assert_eq!(started.line(1), "two");
        let ran = started.finish();
        assert_eq!((ran.status, ran.text().as_str()), (3, "one\ntwo"), "{ran}");
        assert_eq!(ran.errors(), "last\n");
    }

    #[test]
    #[should_panic(expected = "the output ended")]
    fn output_that_ends_before_is_told_at_once() {
        shell("echo one").wait_for_output("two");
    }

    #[test]
    fn a_command_that_a_signal_ends_has_its_negative_number() {
        assert_eq!(shell("kill -9 $$").finish().status, -9);
    }
}
