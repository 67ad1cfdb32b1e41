//! kill -9 at every system call of taking a pod's share: whatever the moment, gc leaves nothing, and loses nothing.
//!
//! The victim is a fork of the test, traced; the tracer counts its system calls from a marker on and kills it at the n-th,
//! for every n. Each round then replays the ledger and looks at what is left. It needs root, for mounts; without, it says so.

use std::{
    collections::HashSet,
    fs, panic,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use bulkhead_shim::{
    ledger::{Ledger, Resource, collect},
    oci::{HostBind, HostPropagation, HostRoot},
    share::Share,
    sys::{mount::mounts_beneath, process::ProcessId},
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

/// The marker: a system call that nothing else here makes.
const MARKER: i64 = libc::SYS_getpgid;

/// Runs a test in a process of its own, so that it may change what a process has.
fn forked(test: impl FnOnce()) {
    // SAFETY: the child runs the test and leaves by _exit; glibc keeps its allocator usable in a fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let result = panic::catch_unwind(panic::AssertUnwindSafe(test));
            // SAFETY: ends the fork without running the test harness' own end.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(next_of(child), WaitStatus::Exited(child, 0));
        }
    }
}

/// The next that happens to a child; one to which nothing happens is killed, and the test has failed.
fn next_of(child: Pid) -> WaitStatus {
    const PATIENCE: Duration = Duration::from_secs(300);
    let end = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(10);
    loop {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        match waitpid(child, Some(flags)).unwrap() {
            WaitStatus::StillAlive => {}
            status => return status,
        }
        if Instant::now() >= end {
            let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
            panic!("waited {PATIENCE:?} in vain for process {child}");
        }
        std::thread::sleep(pause);
        // A traced child stops thousands of times.
        pause = (2 * pause).min(Duration::from_millis(5));
    }
}

/// A new mount namespace whose mounts nobody else sees.
fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC,
        None::<&str>,
    )
    .unwrap();
}

/// A host with a root file system, a volume that has another mount in it, and canaries in all of them.
struct Host {
    _dir: tempfile::TempDir,
    state: PathBuf,
    root: PathBuf,
    volume: PathBuf,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (root, volume) = (top.join("rootfs"), top.join("volume"));
        let inner = volume.join("inner");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(&inner).unwrap();
        nix::mount::mount(
            Some("canary"),
            &inner,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        // Shared with itself: were a copy in this peer group, its unmount would take the original with it.
        nix::mount::mount(
            None::<&str>,
            &inner,
            None::<&str>,
            nix::mount::MsFlags::MS_SHARED,
            None::<&str>,
        )
        .unwrap();
        for canary in Host::canaries(&root, &volume) {
            fs::write(canary, "alive").unwrap();
        }
        Host {
            state: top.join("state"),
            root,
            volume,
            _dir: dir,
        }
    }

    fn canaries(root: &Path, volume: &Path) -> [PathBuf; 3] {
        [
            root.join("etc/canary"),
            volume.join("canary"),
            volume.join("inner/canary"),
        ]
    }

    fn bind(&self, mount: usize, source: PathBuf, recursive: bool) -> HostBind {
        HostBind {
            mount,
            directory: source.is_dir(),
            source,
            recursive,
            read_only: mount == 0,
            read_only_whole: false,
            propagation: match recursive {
                true => HostPropagation::Slave,
                false => HostPropagation::Private,
            },
        }
    }

    /// What the victim does.
    fn take_all(&self) -> Result<(Ledger, Share), Box<dyn std::error::Error>> {
        let mut ledger = Ledger::create(&self.state, "default", "pod")?;
        ledger.claim("uid-1", "default/pod")?;
        let mut share = Share::create(&mut ledger)?;
        let root = HostRoot {
            path: self.root.clone(),
            read_only: true,
        };
        let binds = [
            self.bind(0, self.volume.clone(), true),
            self.bind(1, self.volume.join("canary"), false),
        ];
        share.add(&mut ledger, "c", &root, &binds)?;
        let child = Command::new("sleep").arg("1000").spawn()?;
        if let Some(id) = ProcessId::of(child.id() as i32) {
            let role = "sleeper".into();
            ledger.take(Resource::Process { id, role })?;
        }
        Ok((ledger, share))
    }

    fn assert_clean(&self, mounts: &HashSet<PathBuf>, moment: &str) {
        for canary in Host::canaries(&self.root, &self.volume) {
            let found = fs::read_to_string(&canary).unwrap_or_default();
            assert_eq!(found, "alive", "{moment}: {}", canary.display());
        }
        let now: HashSet<PathBuf> = mounts_beneath(Path::new("/"))
            .unwrap()
            .into_iter()
            .collect();
        let more: Vec<_> = now.symmetric_difference(mounts).collect();
        assert!(more.is_empty(), "{moment}: mounts {more:?}");
        assert!(
            !self.state.exists(),
            "{moment}: the state directory is left"
        );
    }
}

#[test]
fn whatever_is_taken_is_given_back_in_order() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: mounts need root");
        return;
    }
    forked(|| {
        private_mounts();
        let host = Host::new();
        let mounts = mounts_beneath(Path::new("/"))
            .unwrap()
            .into_iter()
            .collect();
        let (ledger, share) = host.take_all().unwrap();
        let rootfs = share.path().join("1");
        assert_eq!(
            fs::read_to_string(rootfs.join("etc/canary")).unwrap(),
            "alive"
        );
        let volume = share.path().join("2");
        assert_eq!(
            fs::read_to_string(volume.join("inner/canary")).unwrap(),
            "alive"
        );
        for read_only in [
            rootfs.join("etc/x"),
            volume.join("x"),
            share.path().join("x"),
        ] {
            let error = fs::write(&read_only, "").unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(libc::EROFS),
                "{}",
                read_only.display()
            );
        }
        // "ro" without "rro" leaves the mount beneath writable.
        fs::write(volume.join("inner/x"), "").unwrap();
        fs::remove_file(volume.join("inner/x")).unwrap();
        assert!(ledger.teardown().is_empty());
        host.assert_clean(&mounts, "orderly");
    });
}

#[test]
fn files_of_the_share_are_mere_data_on_the_host() {
    use std::os::unix::fs::PermissionsExt;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: mounts need root");
        return;
    }
    forked(|| {
        private_mounts();
        let host = Host::new();
        // A block device, a set-id program and a link, as an image's layer can have them: in the root, and in a mount beneath a
        // volume.
        for place in [host.root.clone(), host.volume.join("inner")] {
            let (kind, mode) = (
                nix::sys::stat::SFlag::S_IFBLK,
                nix::sys::stat::Mode::S_IRWXU,
            );
            let device = nix::sys::stat::makedev(7, 0);
            nix::sys::stat::mknod(&place.join("disk"), kind, mode, device).unwrap();
            fs::copy("/bin/true", place.join("program")).unwrap();
            let mode = fs::Permissions::from_mode(0o4755);
            fs::set_permissions(place.join("program"), mode).unwrap();
            std::os::unix::fs::symlink("program", place.join("link")).unwrap();
        }
        let (ledger, share) = host.take_all().unwrap();
        let errno = |error: std::io::Error| error.raw_os_error();
        for place in ["1", "2/inner"] {
            let place = share.path().join(place);
            let opened = fs::File::open(place.join("disk"));
            assert_eq!(opened.map_err(errno).unwrap_err(), Some(libc::EACCES));
            let run = Command::new(place.join("program")).status();
            assert_eq!(run.map_err(errno).unwrap_err(), Some(libc::EACCES));
            let followed = fs::File::open(place.join("link"));
            assert_eq!(followed.map_err(errno).unwrap_err(), Some(libc::ELOOP));
            // What the fs process does with them goes on.
            assert_eq!(
                fs::read_link(place.join("link")).unwrap(),
                Path::new("program")
            );
            assert!(fs::File::open(place.join("program")).is_ok());
        }
        let options: Vec<String> = bulkhead_shim::sys::mount::mounts()
            .unwrap()
            .into_iter()
            .filter(|line| line.point.starts_with(share.path()) && line.point != share.path())
            .map(|line| line.options)
            .collect();
        assert_eq!(options.len(), 4, "{options:?}");
        for options in options {
            for word in ["nosuid", "nodev", "noexec", "nosymfollow"] {
                assert!(options.split(',').any(|o| o == word), "{word}: {options}");
            }
        }
        // The host's own mounts are as they were.
        assert!(fs::File::open(host.volume.join("inner/link")).is_ok());
        assert!(
            Command::new(host.volume.join("inner/program"))
                .status()
                .unwrap()
                .success()
        );
        assert!(ledger.teardown().is_empty());
    });
}

#[test]
fn the_hosts_kernel_does_not_come_into_the_share_by_a_swapped_path_or_beneath_one() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: mounts need root");
        return;
    }
    forked(|| {
        private_mounts();
        let host = Host::new();
        let top = host.state.parent().unwrap().to_path_buf();
        let mut ledger = Ledger::create(&host.state, "default", "pod").unwrap();
        let mut share = Share::create(&mut ledger).unwrap();
        let root = HostRoot {
            path: host.root.clone(),
            read_only: false,
        };
        // What config.json named was a directory when it was checked; now it is a link.
        let swapped = top.join("swapped");
        std::os::unix::fs::symlink("/proc/sys", &swapped).unwrap();
        let device = top.join("device");
        std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
        let nested = top.join("nested");
        fs::create_dir_all(nested.join("a/proc")).unwrap();
        let flags = nix::mount::MsFlags::empty();
        let point = nested.join("a/proc");
        nix::mount::mount(Some("proc"), &point, Some("proc"), flags, None::<&str>).unwrap();
        for (number, (bind, text)) in [
            (host.bind(1, swapped, false), "host's proc"),
            (host.bind(1, device, false), "has become a device"),
            (
                host.bind(1, nested.clone(), true),
                "nested/a/proc would come along",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let refused = share.add(&mut ledger, &format!("c{number}"), &root, [&bind]);
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        // A root is a source like others.
        let proc = HostRoot {
            path: nested.clone(),
            read_only: false,
        };
        let refused = share.add(&mut ledger, "root", &proc, []);
        refused.unwrap_err();
        let seen: Vec<_> = mounts_beneath(share.path()).unwrap();
        assert!(seen.iter().all(|path| !path.ends_with("proc")), "{seen:?}");
        // Without what is mounted in it, it is a directory like others.
        let bind = host.bind(1, nested.clone(), false);
        share.add(&mut ledger, "alone", &root, [&bind]).unwrap();
        assert!(ledger.teardown().is_empty());
        nix::mount::umount(&point).unwrap();
    });
}

#[test]
fn a_later_mount_of_the_host_appears_and_is_given_back() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: mounts need root");
        return;
    }
    forked(|| {
        private_mounts();
        let host = Host::new();
        let mounts = mounts_beneath(Path::new("/"))
            .unwrap()
            .into_iter()
            .collect();
        let (ledger, share) = host.take_all().unwrap();
        let later = host.volume.join("inner/later");
        fs::create_dir(&later).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("later"), &later, Some("tmpfs"), flags, None::<&str>).unwrap();
        fs::write(later.join("file"), "x").unwrap();
        let seen = share.path().join("2/inner/later/file");
        assert!(seen.exists(), "rslave shows what the host mounts later");
        assert!(ledger.teardown().is_empty());
        assert!(
            later.join("file").exists(),
            "and unmounting the copy leaves the original"
        );
        nix::mount::umount(&later).unwrap();
        host.assert_clean(&mounts, "with a later mount");
    });
}

#[test]
fn killed_at_every_system_call_gc_leaves_nothing_and_loses_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: mounts need root");
        return;
    }
    forked(|| {
        private_mounts();
        let host = Host::new();
        let mounts: HashSet<PathBuf> = mounts_beneath(Path::new("/"))
            .unwrap()
            .into_iter()
            .collect();
        let mut calls = 0;
        loop {
            let finished = kill_at(&host, calls);
            let moment = format!("killed at system call {calls}");
            for collected in collect(&host.state, false).unwrap() {
                assert!(collected.left.is_empty(), "{moment}: {:?}", collected.left);
            }
            // A directory made and not yet locked is all that a first kill can leave.
            let _ = fs::remove_dir(&host.state);
            host.assert_clean(&mounts, &moment);
            if finished {
                break;
            }
            calls += 1;
        }
        assert!(calls > 80, "only {calls} system calls were seen");
    });
}

/// Kills a victim at its `nth` system call after the marker; `true` when it had come to its end before.
fn kill_at(host: &Host, nth: usize) -> bool {
    // SAFETY: as in `forked`; the child only works on the host's directories and is killed or leaves by _exit.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: asks to be traced by the parent, takes no pointers that matter.
            unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            nix::sys::signal::raise(Signal::SIGSTOP).unwrap();
            // SAFETY: the marker; any pid will do.
            unsafe { libc::syscall(MARKER, 0) };
            let taken = host.take_all();
            // SAFETY: the end, at which the lock goes and nothing is given back.
            unsafe { libc::_exit(i32::from(taken.is_err())) }
        }
        ForkResult::Parent { child } => trace(child, nth),
    }
}

fn trace(child: Pid, nth: usize) -> bool {
    assert!(matches!(next_of(child), WaitStatus::Stopped(..)));
    // SAFETY: the child is stopped and traced by us; PTRACE_O_TRACESYSGOOD and _EXITKILL take no pointers.
    unsafe {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        libc::ptrace(libc::PTRACE_SETOPTIONS, child.as_raw(), 0, options);
    }
    let mut seen = None;
    let mut entering = false;
    let mut signal = 0;
    loop {
        // SAFETY: the child is stopped and traced by us.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, child.as_raw(), 0, signal) };
        signal = 0;
        // Only this child: the sleeper that it started is not traced.
        match next_of(child) {
            WaitStatus::PtraceSyscall(_) => {
                entering = !entering;
                if !entering {
                    continue;
                }
                let number = call_number(child);
                match seen {
                    None if number == MARKER => seen = Some(0),
                    None => {}
                    Some(count) if count == nth => {
                        nix::sys::signal::kill(child, Signal::SIGKILL).unwrap();
                        assert!(matches!(next_of(child), WaitStatus::Signaled(..)));
                        kill_sleepers(child);
                        return false;
                    }
                    Some(count) => seen = Some(count + 1),
                }
            }
            WaitStatus::Stopped(_, stopped) => signal = stopped as i32,
            WaitStatus::Exited(_, code) => {
                assert_eq!(code, 0, "the victim failed by itself");
                return true;
            }
            other => panic!("{other:?}"),
        }
    }
}

fn call_number(child: Pid) -> i64 {
    // SAFETY: an all-zero user_regs_struct is a valid value, which the kernel fills for a stopped, traced child.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        libc::ptrace(libc::PTRACE_GETREGS, child.as_raw(), 0, &raw mut registers);
        registers.orig_rax as i64
    }
}

/// In a pod the cgroup, recorded before, stands for a process that is started and not yet recorded. There is none here.
fn kill_sleepers(_victim: Pid) {
    for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let own_namespace = fs::read_link("/proc/self/ns/mnt").unwrap();
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let namespace = fs::read_link(entry.path().join("ns/mnt")).unwrap_or_default();
        if command.starts_with(b"sleep\x001000\0") && namespace == own_namespace {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[test]
fn a_full_disk_leaves_the_id_free() {
    use nix::sys::resource::{Resource as Limit, getrlimit, setrlimit};
    forked(|| {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().canonicalize().unwrap().join("state");
        // SAFETY: this process is a fork with one thread.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let (_, hard) = getrlimit(Limit::RLIMIT_FSIZE).unwrap();
        setrlimit(Limit::RLIMIT_FSIZE, 10, hard).unwrap();
        let error = Ledger::create(&state, "default", "a").unwrap_err();
        assert!(error.to_string().contains("write to"), "{error}");
        assert!(!state.exists());
        setrlimit(Limit::RLIMIT_FSIZE, hard, hard).unwrap();
        assert!(
            Ledger::create(&state, "default", "a")
                .unwrap()
                .teardown()
                .is_empty()
        );
    });
}
