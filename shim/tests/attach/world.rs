//! Namespaces of the test's own, in a mount namespace of its own: all of it goes with the process.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    panic,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use bulkhead_shim::{
    ledger::{Ledger, Resource},
    netns::Redirect,
    network::{Device, Error, Network},
};
use nix::{
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

/// `struct virtio_net_hdr_v1`
const HEADER: usize = 12;
/// How long a frame may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a whole test may take there.
const WHOLE: Duration = Duration::from_secs(300);
/// How long nothing must come.
const QUIET: Duration = Duration::from_millis(300);

/// Runs a test in a process of its own.
pub fn with_world(test: impl FnOnce(&World)) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: network namespaces need root");
        return;
    }
    // SAFETY: the child runs the test and leaves by _exit; glibc keeps its allocator usable in a fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let result = panic::catch_unwind(panic::AssertUnwindSafe(|| test(&World::new())));
            // SAFETY: ends the fork without running the test harness' own end.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(reap(child), WaitStatus::Exited(child, 0));
        }
    }
}

/// Waits for the end of a child; one that goes on is killed, and the test has failed.
pub fn reap(child: Pid) -> WaitStatus {
    let end = Instant::now() + WHOLE;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive => {}
            status => return status,
        }
        if Instant::now() >= end {
            kill(child, Signal::SIGKILL).unwrap();
            panic!("waited {WHOLE:?} in vain for the end of process {child}");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Two network namespaces, `pod` and `peer`.
pub struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
        let world = World {
            dir: tempfile::tempdir().unwrap(),
        };
        world.add("pod");
        world.add("peer");
        world
    }

    /// Makes a namespace.
    pub fn add(&self, name: &str) {
        let path = self.path(name);
        File::create(&path).unwrap();
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let own = "/proc/thread-self/ns/net";
            mount(
                Some(own),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        };
        thread::spawn(make).join().unwrap();
    }

    /// Unmounts it, which ends it unless somebody is in it.
    pub fn remove(&self, name: &str) {
        nix::mount::umount(&self.path(name)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join("state")
    }

    pub fn ledger(&self, sandbox: &str) -> Ledger {
        Ledger::create(&self.state(), "default", sandbox).unwrap()
    }

    /// Runs a command in a namespace; what it prints.
    pub fn run(&self, namespace: &str, command: &str) -> String {
        let path = self.path(namespace);
        let done = Command::new("timeout")
            .args([&WHOLE.as_secs().to_string(), "nsenter"])
            .arg(format!("--net={}", path.display()))
            .args(command.split_whitespace())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            done.status.success(),
            "{command}: {}: {}{}",
            done.status,
            text(&done.stderr),
            text(&done.stdout)
        );
        text(&done.stdout)
    }

    /// Runs commands, a line each, each in the namespace that it begins with.
    pub fn setup(&self, commands: &str) {
        for line in commands
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let (namespace, command) = line.split_once(' ').unwrap();
            self.run(
                namespace,
                &command.replace("PEER", &self.path("peer").display().to_string()),
            );
        }
    }

    /// Joins the namespaces by a veth pair, `eth0` in both, with static Ethernet addresses.
    pub fn join(&self) {
        self.veth("eth0", 0);
    }

    /// Another pair.
    pub fn veth(&self, name: &str, number: u8) {
        let veth = format!("pod ip link add {name} address 02:00:00:00:{number:02x}:02 type veth");
        self.setup(&format!(
            "{veth} peer name {name} address 02:00:00:00:{number:02x}:01 netns PEER
             pod ip link set {name} up
             peer ip link set {name} up"
        ));
        // The kernel takes its time to say that a link is up.
        let end = Instant::now() + PATIENCE;
        while !self
            .run("pod", &format!("ip link show {name}"))
            .contains("state UP")
        {
            assert!(Instant::now() < end, "{name} does not come up");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Does something in a namespace.
    pub fn inside<T: Send + 'static>(
        &self,
        namespace: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let namespace = File::open(self.path(namespace)).unwrap();
        let inside = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::spawn(inside).join().unwrap()
    }

    pub fn attach(&self, namespace: &str, ledger: &mut Ledger) -> Result<Network, Error> {
        Network::attach(&self.path(namespace), 1, usize::MAX, ledger)
    }

    /// What the pod's namespace has in links, their flags and qdiscs.
    pub fn state_of_pod(&self) -> String {
        self.run("pod", "ip link") + &self.run("pod", "tc qdisc")
    }
}

/// The guest's end of a device.
pub struct Guest(File);

impl Guest {
    pub fn of(device: &mut Device) -> Guest {
        Guest(File::from(device.taps.remove(0)))
    }

    pub fn send(&mut self, frame: &[u8]) {
        let sent = [&[0; HEADER], frame].concat();
        assert_eq!(self.0.write(&sent).unwrap(), sent.len());
    }

    /// The next frame that `wanted` accepts, without its header.
    pub fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        self.receive_within(PATIENCE, wanted)
            .expect("no frame came")
    }

    /// Asserts that no such frame comes.
    pub fn hears_nothing(&mut self, unwanted: impl Fn(&[u8]) -> bool) {
        if let Some(frame) = self.receive_within(QUIET, unwanted) {
            panic!("a frame came: {frame:02x?}");
        }
    }

    fn receive_within(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::try_from(left).unwrap()).unwrap() == 0 {
                return None;
            }
            let mut buffer = vec![0; 70_000];
            let length = self.0.read(&mut buffer).unwrap();
            buffer.truncate(length);
            let frame = buffer.split_off(HEADER);
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }
}

/// The redirects that a ledger holds.
pub fn redirects(ledger: &Ledger) -> Vec<Redirect> {
    let redirect = |resource: &Resource| match resource {
        Resource::Redirect(redirect) => Some(redirect.clone()),
        _ => None,
    };
    ledger.held().filter_map(redirect).collect()
}

/// An Ethernet frame.
pub fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// Whether a frame has this EtherType.
pub fn is(kind: u16) -> impl Fn(&[u8]) -> bool {
    move |frame| frame.get(12..14) == Some(&kind.to_be_bytes())
}
