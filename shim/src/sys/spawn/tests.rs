//! What a program that fell to an attacker can do with what it was started with. Each script is the attack.

use std::os::fd::AsRawFd;

use super::{
    super::{device_filter, mount},
    *,
};

/// keyctl(2): with no name, a new keyring that belongs to nobody else.
const JOIN_SESSION_KEYRING: libc::c_int = 1;

/// A cgroup v2 of the test's own.
pub(crate) struct OwnCgroup(PathBuf);

impl OwnCgroup {
    /// `None`, and a word about it, where none can be made.
    pub(crate) fn new(name: &str) -> Option<OwnCgroup> {
        let mounts = mount::mounts().unwrap();
        let top = mounts.iter().find(|line| line.kind == "cgroup2");
        let path = top?
            .point
            .join(format!("bulkhead-{name}-{}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => Some(OwnCgroup(path)),
            Err(error) => {
                eprintln!("NOT RUN: no cgroup {} can be made: {error}", path.display());
                None
            }
        }
    }

    pub(crate) fn open(&self) -> File {
        File::open(&self.0).unwrap()
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Runs a copy of the shell, started as the VMM is: what it wrote to its standard error.
fn run(executable: &Executable, cgroup: &OwnCgroup, script: &str) -> String {
    let (mut said, stderr) = pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let child = spawn(&Program {
        executable,
        arguments: &["-c", script],
        control: null.as_fd(),
        null: null.as_fd(),
        stderr: stderr.as_fd(),
        cgroup: cgroup.open().as_fd(),
    });
    let child = child.unwrap();
    drop(stderr);
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    let limit = std::time::Duration::from_secs(30);
    assert!(process::wait_gone(child.pidfd.as_fd(), limit).unwrap());
    process::collect(child.pidfd.as_fd());
    text
}

fn shell() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shell");
    // By another process: a test that forks in another thread would keep our descriptor for writing, and the exec find
    // the file busy.
    let copied = std::process::Command::new("cp")
        .arg("/bin/sh")
        .arg(&path)
        .status();
    assert!(copied.unwrap().success());
    (dir, path)
}

#[test]
fn the_hosts_file_cannot_be_written_through_the_running_program() {
    let Some(cgroup) = OwnCgroup::new("exe") else {
        return;
    };
    let (_dir, path) = shell();
    let before = std::fs::read(&path).unwrap();
    let executable = Executable::at(&path).unwrap();
    // CVE-2019-5736: keep a descriptor of the own program, run another one so that it is not busy, and write.
    let ways = [
        "exec 9</proc/self/exe; exec /bin/sh -c 'echo overwritten >> /proc/self/fd/9'",
        // Not by the way that the exec left open, and not by a file mapped in memory.
        "for fd in /proc/self/fd/*; do echo overwritten >> $fd; done",
        "exec 9</proc/self/exe; exec /bin/sh -c 'mount -o remount,rw /proc/self/fd/9; echo overwritten >> /proc/self/fd/9'",
    ];
    for way in ways {
        let said = run(&executable, &cgroup, way);
        assert!(
            std::fs::read(&path).unwrap() == before,
            "{way}: the file has changed; {said}"
        );
    }
    let said = run(&executable, &cgroup, ways[0]);
    assert!(said.contains("Read-only file system"), "{said}");
}

#[test]
fn a_file_that_is_handed_over_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    std::fs::write(&path, "kernel").unwrap();
    let Ok(file) = mount::ReadOnlyFile::at(&path) else {
        return eprintln!("NOT RUN: mounts need root");
    };
    let open = file.open().unwrap();
    drop(file);
    assert_eq!(io::read_to_string(&open).unwrap(), "kernel");
    let again = format!("/proc/self/fd/{}", open.as_raw_fd());
    let error = File::options().write(true).open(again).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    // The file itself is as it was.
    std::fs::write(&path, "new").unwrap();
}

#[test]
fn no_keys_are_inherited() {
    let Some(cgroup) = OwnCgroup::new("keys") else {
        return;
    };
    const SESSION: libc::c_int = -3;
    const SETPERM: libc::c_int = 5;
    /// All rights for whoever possesses the key, by a keyring of its own; none for its user.
    const POSSESSOR_ALL: libc::c_ulong = 0x3f00_0000;
    let (kind, name, secret) = (c"user", c"bulkhead-secret", b"hunter2");
    // SAFETY: strings are NUL-terminated, the payload has the length that is passed, and all outlive the calls. The keyring is
    // this thread's own.
    let status = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            std::ptr::null::<u8>(),
        );
        let key = libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            name.as_ptr(),
            secret.as_ptr(),
            secret.len(),
            SESSION,
        );
        libc::syscall(libc::SYS_keyctl, SETPERM, key, POSSESSOR_ALL)
    };
    if status < 0 {
        return eprintln!("NOT RUN: this host lets nobody have keys");
    }
    let own = std::fs::read_to_string("/proc/keys").unwrap();
    assert!(own.contains("bulkhead-secret"), "{own}");
    let (_dir, path) = shell();
    let executable = Executable::at(&path).unwrap();
    let said = run(&executable, &cgroup, "cat /proc/keys >&2");
    assert!(!said.contains("bulkhead-secret"), "{said}");
}

#[test]
fn no_device_node_opens_in_a_pods_cgroup() {
    let Some(cgroup) = OwnCgroup::new("devices") else {
        return;
    };
    device_filter::allow_only_null(cgroup.open().as_fd()).unwrap();
    let (dir, path) = shell();
    let executable = Executable::at(&path).unwrap();
    let node = dir.path().join("disk");
    let (mode, device) = (nix::sys::stat::Mode::S_IRWXU, nix::sys::stat::makedev(7, 0));
    nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFBLK, mode, device).unwrap();
    let script = format!(
        "for device in {} /dev/zero /dev/full; do true < $device; done; true < /dev/null && echo null opens >&2",
        node.display()
    );
    let said = run(&executable, &cgroup, &script);
    assert_eq!(said.matches("Operation not permitted").count(), 3, "{said}");
    assert!(said.contains("null opens"), "{said}");
}
