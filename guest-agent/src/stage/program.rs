//! The end of a stage: finds the program in the container's PATH and becomes it.
#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_agent_protocol::agent;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::stat;
use nix::unistd::{AccessFlags, faccessat};

use super::message::{Failure, FailureKind};

/// Searched when the container's environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How much of a container's /etc/passwd is read for HOME, in bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// A program with all that execve(2) takes, made before the last privileges go.
#[derive(Debug)]
pub struct Program {
    name: String,
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Prepares the program of a process. Reads the container's /etc/passwd when HOME is not set, so only inside its root.
    pub fn new(process: &agent::Process) -> Result<Self, Failure> {
        let name = process.args.first().cloned().unwrap_or_default();
        if name.is_empty() {
            return Err(Failure::invalid(
                "the process has no program: args is empty",
            ));
        }
        let args = process
            .args
            .iter()
            .map(|arg| c_string("argument", arg))
            .collect::<Result<_, _>>()?;
        let mut env: Vec<CString> = process
            .env
            .iter()
            .map(|pair| c_string("variable", pair))
            .collect::<Result<_, _>>()?;
        if variable(&process.env, "HOME").is_none_or(str::is_empty) {
            env.retain(|pair| !pair.as_bytes().starts_with(b"HOME="));
            env.push(c_string(
                "variable",
                &format!("HOME={}", home_of(process.uid)),
            )?);
        }
        let candidates = candidates(
            &name,
            variable(&process.env, "PATH").unwrap_or(DEFAULT_PATH),
        )
        .iter()
        .map(|path| c_string("path", path))
        .collect::<Result<_, _>>()?;
        Ok(Self {
            name,
            candidates,
            args,
            env,
        })
    }

    /// Looks for the program where [`Program::execute`] will, as the user that it will have: one
    /// that is not there is told before anybody waits for a start.
    pub fn look(&self) -> Result<(), Failure> {
        let mut errno = nix::Error::ENOENT;
        for path in &self.candidates {
            let path = path.as_c_str();
            match faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
                Ok(()) if is_directory(path) => errno = nix::Error::EACCES,
                Err(nix::Error::EACCES) => errno = nix::Error::EACCES,
                // What else there is, execve knows best.
                Ok(()) | Err(_) => return Ok(()),
            }
        }
        Err(failure(&self.name, errno))
    }

    /// Executes the program; returns only when that failed.
    pub fn execute(&self) -> Failure {
        let mut errno = nix::Error::ENOENT;
        for path in &self.candidates {
            match nix::unistd::execve(path, &pointers(&self.args), &pointers(&self.env)) {
                Ok(never) => match never {},
                // Not here: perhaps in the next directory of PATH.
                Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
                // Remembered, but a later directory may have an executable one (execvp(3)).
                Err(nix::Error::EACCES) => errno = nix::Error::EACCES,
                Err(other) => {
                    errno = other;
                    break;
                }
            }
        }
        failure(&self.name, errno)
    }
}

/// What a failed execve means to the one who asked for it.
fn failure(name: &str, errno: nix::Error) -> Failure {
    let (kind, reason) = match errno {
        nix::Error::ENOENT if !name.contains('/') => (
            FailureKind::ProgramNotFound,
            "executable file not found in $PATH".to_owned(),
        ),
        nix::Error::ENOENT => (
            FailureKind::ProgramNotFound,
            "no such file or directory".to_owned(),
        ),
        nix::Error::EACCES => (
            FailureKind::ProgramNotExecutable,
            "permission denied".to_owned(),
        ),
        nix::Error::ENOEXEC => (
            FailureKind::ProgramNotExecutable,
            "exec format error".to_owned(),
        ),
        other => (
            FailureKind::ProgramNotExecutable,
            std::io::Error::from(other).to_string(),
        ),
    };
    Failure {
        kind,
        text: format!("exec: \"{name}\": {reason}"),
    }
}

fn is_directory(path: &CStr) -> bool {
    stat(path).is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn pointers(strings: &[CString]) -> Vec<&CStr> {
    strings.iter().map(CString::as_c_str).collect()
}

fn c_string(what: &str, text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::invalid(format!("{what} with a zero byte: {text:?}")))
}

/// The last setting of a variable, as the program itself would see it.
fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter()
        .rev()
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// A name with a slash is a path already; an empty directory of PATH is the current one.
fn candidates(name: &str, path: &str) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    path.split(':')
        .map(|directory| {
            if directory.is_empty() {
                format!("./{name}")
            } else {
                format!("{directory}/{name}")
            }
        })
        .collect()
}

/// The home directory of a user by the container's own /etc/passwd, "/" when it does not say.
fn home_of(uid: u32) -> String {
    let passwd = std::fs::OpenOptions::new()
        .read(true)
        // The image decides what is there: no FIFO may stop us, no terminal become ours.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open("/etc/passwd");
    let mut text = Vec::new();
    if let Ok(file) = passwd
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        // Half a file still has the entries of its first half.
        let _ = file.take(MAX_PASSWD).read_to_end(&mut text);
    }
    home_in(&String::from_utf8_lossy(&text), uid)
        .unwrap_or("/")
        .to_owned()
}

/// passwd(5): name:password:uid:gid:comment:home:shell.
fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)?.parse() == Ok(uid))
            .then(|| fields.nth(2))
            .flatten()
            .filter(|home| !home.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_searched_in_order() {
        assert_eq!(candidates("sh", "/a::/b"), ["/a/sh", "./sh", "/b/sh"]);
        assert_eq!(candidates("./sh", "/a"), ["./sh"]);
    }

    #[test]
    fn the_last_setting_of_a_variable_counts() {
        let env = [
            "PATH=/a".to_owned(),
            "PATHS=/b".to_owned(),
            "PATH=/c".to_owned(),
        ];
        assert_eq!(variable(&env, "PATH"), Some("/c"));
        assert_eq!(variable(&env, "HOME"), None);
    }

    #[test]
    fn home_comes_from_the_sixth_field() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nnone:x:5:5:::\n";
        assert_eq!(home_in(passwd, 0), Some("/root"));
        assert_eq!(home_in(passwd, 33), Some("/var/www"));
        assert_eq!(home_in(passwd, 5), None);
        assert_eq!(home_in(passwd, 7), None);
    }

    #[test]
    fn failures_read_as_users_of_other_runtimes_know_them() {
        let missing = failure("foo", nix::Error::ENOENT);
        assert_eq!(
            missing.text,
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(missing.exit_code(), 127);
        assert_eq!(failure("/etc", nix::Error::EACCES).exit_code(), 126);
    }

    #[test]
    fn a_program_is_found_before_it_is_executed() {
        let look = |name: &str| {
            let process = agent::Process {
                args: vec![name.to_owned()],
                env: vec!["PATH=/no/such:/bin".to_owned()],
                ..Default::default()
            };
            Program::new(&process).unwrap().look()
        };
        for there in ["sh", "/bin/sh"] {
            look(there).unwrap();
        }
        for (name, code) in [
            ("no-such-program", 127),
            ("/no/such", 127),
            ("/bin/sh/x", 127),
            ("/etc", 126),
            ("/etc/passwd", 126),
        ] {
            assert_eq!(look(name).unwrap_err().exit_code(), code, "{name}");
        }
    }

    #[test]
    fn a_zero_byte_in_an_argument_is_refused() {
        let process = agent::Process {
            args: vec!["/bin/true".to_owned(), "a\0b".to_owned()],
            ..Default::default()
        };
        assert_eq!(
            Program::new(&process).unwrap_err().kind,
            FailureKind::Invalid
        );
    }
}
