//! A caller of a runtime's command line as conmon and containerd's shim are: it collects the
//! process of the pid file.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_tests::{Bundle, eventually, fresh_id};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// What a command has said.
#[derive(Debug)]
pub struct Said {
    pub status: i32,
    pub output: String,
    pub errors: String,
}

impl Said {
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{self:?}");
        self.output
    }

    /// It has failed with runc's exit code, and with one of these words.
    #[track_caller]
    pub fn refused(self, words: &[&str]) {
        self.refused_with(1, words);
    }

    /// The same with the code of `exec`.
    #[track_caller]
    pub fn refused_with(self, code: i32, words: &[&str]) {
        assert_eq!(self.status, code, "{self:?}");
        let found = words.iter().any(|word| self.errors.contains(word));
        assert!(found || words.is_empty(), "{words:?} expected: {self:?}");
    }
}

/// A runtime with a root of its own.
pub struct Caller {
    program: &'static str,
    dir: TempDir,
}

impl Caller {
    pub fn new(program: &'static str) -> Caller {
        nix::sys::prctl::set_child_subreaper(true).expect("Linux 3.4");
        let dir = TempDir::with_prefix("engine-").expect("a temporary directory");
        Caller { program, dir }
    }

    /// A file of the caller's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn root(&self) -> PathBuf {
        self.file("root")
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command.arg("--root").arg(self.root()).args(words);
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    /// Calls it. Its output goes to files: who reads a pipe would wait for the container.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Said {
        self.finish(self.start(words))
    }

    pub fn start(&self, words: &[&str]) -> Child {
        let (out, err) = (self.file("stdout"), self.file("stderr"));
        let mut command = self.command(words);
        command
            .stdout(File::create(out).expect("writable"))
            .stderr(File::create(err).expect("writable"));
        command.spawn().expect("it is installed")
    }

    pub fn finish(&self, mut child: Child) -> Said {
        let status = child.wait().expect("our own child");
        let text = |name| {
            let bytes = fs::read(self.file(name)).expect("made above");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Said {
            status: status.code().unwrap_or(-1),
            output: text("stdout"),
            errors: text("stderr"),
        }
    }

    /// `create` with output to files that belong to the container.
    #[track_caller]
    pub fn create<'a>(&'a self, bundle: &'a Bundle) -> Container<'a> {
        let container = self.name(bundle);
        container.create().ok();
        container
    }

    /// A container that is not made yet.
    pub fn name<'a>(&'a self, bundle: &'a Bundle) -> Container<'a> {
        bundle.write();
        let (caller, id) = (self, fresh_id());
        Container { caller, bundle, id }
    }

    /// Collects what has become ours: a monitor that has ended.
    pub fn collect(&self) {
        while let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) =
            waitpid(None, Some(WaitPidFlag::WNOHANG))
        {}
    }
}

/// Orphans of the tests after it are the first process' again, which collects them.
impl Drop for Caller {
    fn drop(&mut self) {
        self.collect();
        nix::sys::prctl::set_child_subreaper(false).expect("Linux 3.4");
    }
}

/// A container, or the place for one.
pub struct Container<'a> {
    pub caller: &'a Caller,
    pub bundle: &'a Bundle,
    pub id: String,
}

impl Container<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.caller.file(&format!("{}.{name}", self.id))
    }

    pub fn create_command(&self) -> Command {
        let mut command = self.caller.command(&["create", "--bundle"]);
        command
            .arg(self.bundle.path())
            .arg("--pid-file")
            .arg(self.path("pid"))
            .arg(&self.id)
            .stdout(File::create(self.path("out")).expect("writable"))
            .stderr(File::create(self.path("err")).expect("writable"));
        command
    }

    pub fn create(&self) -> Said {
        let status = self.create_command().status().expect("it is installed");
        Said {
            status: status.code().unwrap_or(-1),
            output: String::new(),
            errors: self.text("err"),
        }
    }

    /// What the container has written: `out` or `err`.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("text")
    }

    #[track_caller]
    pub fn verb(&self, verb: &str) -> Said {
        self.caller.call(&[verb, &self.id])
    }

    /// A verb with words after the id.
    #[track_caller]
    pub fn verb_with(&self, verb: &str, after: &[&str]) -> Said {
        let words = [&[verb, &self.id][..], after].concat();
        self.caller.call(&words)
    }

    /// The pid of the pid file.
    pub fn pid(&self) -> i32 {
        pid_of(&self.path("pid"))
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.verb("state").ok()).expect("JSON")
    }

    #[track_caller]
    pub fn is(&self, status: &str) {
        assert_eq!(self.state()["status"], status);
    }

    /// Waits for the end of the pid file's process, as its parent: its exit status, or 128 and the
    /// signal.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        wait(self.pid())
    }

    /// Waits until it has stopped, and forgets it.
    #[track_caller]
    pub fn delete(&self) {
        eventually(
            "it stops",
            || self.state()["status"] == "stopped",
            || self.state().to_string(),
        );
        self.verb("delete").ok();
    }
}

pub fn pid_of(path: &Path) -> i32 {
    let text = fs::read_to_string(path).expect("a pid file");
    text.parse().expect("a pid")
}

#[track_caller]
pub fn wait(pid: i32) -> i32 {
    match waitpid(Pid::from_raw(pid), None).expect("it is our child") {
        WaitStatus::Exited(_, status) => status,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}
