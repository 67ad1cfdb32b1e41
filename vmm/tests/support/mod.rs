//! Starts the built `bulkhead-vmm run` as the shim does: new namespaces, a control socket as descriptor 3.
#![allow(dead_code, reason = "each test program uses a part")]

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_vmm::control::{ControlError, ControlSocket};
use bulkhead_vmm_config::{
    Event, Fd, GuestEnd, Phase, Request, SerialConsole, Stamp, VmConfig, VmStats, WIRE_VERSION,
};
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

pub mod driver;
pub mod guest;

/// No guest takes longer to boot, not even an emulated one.
pub const LONG: Duration = Duration::from_secs(200);

/// Where the parts are in a host that has Bulkhead installed, the lab for instance.
const INSTALLED: &str = "/usr/local/libexec/bulkhead";

/// The VMM under test: `BULKHEAD_VMM`, the one installed, or cargo's.
pub fn vmm() -> PathBuf {
    let installed = Path::new(INSTALLED).join("bulkhead-vmm");
    match std::env::var_os("BULKHEAD_VMM") {
        Some(path) => path.into(),
        None if installed.exists() => installed,
        None => env!("CARGO_BIN_EXE_bulkhead-vmm").into(),
    }
}

/// The kernel to boot: `BULKHEAD_KERNEL`, or the one installed. `None` skips the test, which it says; with
/// `BULKHEAD_REQUIRE_KVM` set it fails instead.
pub fn kernel() -> Option<PathBuf> {
    let installed = Path::new(INSTALLED).join("vmlinux");
    let missing = match std::env::var_os("BULKHEAD_KERNEL") {
        Some(path) => return Some(path.into()),
        None if !installed.exists() => {
            "no guest kernel: set BULKHEAD_KERNEL on a host whose KVM runs kernels"
        }
        None if !Path::new("/dev/kvm").exists() => "no /dev/kvm",
        None => return Some(installed),
    };
    assert!(
        std::env::var_os("BULKHEAD_REQUIRE_KVM").is_none(),
        "{missing}"
    );
    eprintln!("SKIPPED: {missing}");
    None
}

/// A configuration and its descriptors.
pub struct Setup {
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
    /// Our ends of the log and the console.
    pub log: File,
    pub serial: Option<File>,
}

impl Setup {
    /// A machine that boots `kernel` with `initrd`.
    pub fn new(kernel: &Path, initrd: &[u8]) -> Setup {
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(initrd).unwrap();
        image.rewind().unwrap();
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let (log, log_end) = nix::unistd::pipe().unwrap();
        Setup {
            config: VmConfig {
                version: WIRE_VERSION,
                sandbox_id: "test".into(),
                vcpus: 1,
                spare_vcpus: 0,
                memory_mib: 128,
                spare_memory_mib: 0,
                kvm: Fd(0),
                kernel: Fd(1),
                initrd: Fd(2),
                extra_cmdline: Vec::new(),
                ports: Vec::new(),
                fs: Vec::new(),
                net: Vec::new(),
                net_slots: 0,
                balloon: true,
                serial: None,
                log: Fd(3),
                uid: 64123,
                gid: 64123,
                accept_missing: Vec::new(),
                template: None,
                lender: None,
                learn: None,
                save: None,
            },
            fds: vec![
                kvm.into(),
                File::open(kernel).unwrap().into(),
                image.into(),
                log_end,
            ],
            log: log.into(),
            serial: None,
        }
    }

    /// Adds a descriptor to the packet.
    pub fn add(&mut self, fd: OwnedFd) -> Fd {
        self.fds.push(fd);
        Fd(self.fds.len() as u32 - 1)
    }

    /// Adds a serial console.
    pub fn with_serial(mut self) -> Setup {
        let (output, input) = nix::unistd::pipe().unwrap();
        let output = File::from(output);
        // The largest that an unprivileged user gets: a boot's messages fit.
        // SAFETY: the call takes plain numbers.
        unsafe { libc::fcntl(output.as_raw_fd(), libc::F_SETPIPE_SZ, 1 << 20) };
        self.config.serial = Some(SerialConsole {
            output: self.add(input),
        });
        self.serial = Some(output);
        self
    }

    /// Adds a vsock port. Returns our end.
    pub fn offer(&mut self, port: u32) -> std::os::unix::net::UnixStream {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = self.add(theirs.into());
        self.config
            .ports
            .push(bulkhead_vmm_config::PortOffer { port, fd });
        ours
    }

    /// Starts the process and sends it the configuration.
    pub fn start(self) -> Machine {
        let process = Process::start(&vmm(), "run");
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        process.control().send_with(&self.config, &fds).unwrap();
        Machine {
            process,
            log: self.log,
            serial: self.serial,
            stamps: Vec::new(),
            resets: Vec::new(),
        }
    }
}

/// The started process; killed when dropped.
pub struct Process {
    pub pid: Pid,
    control: Option<ControlSocket>,
    reaped: bool,
}

impl Process {
    /// Starts `program word` as PID 1 of new namespaces with the other end of a control socket.
    pub fn start(program: &Path, word: &str) -> Process {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let program = CString::new(program.as_os_str().as_encoded_bytes()).unwrap();
        let word = CString::new(word).unwrap();
        let arguments = [program.as_ptr(), word.as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null()];
        let control = theirs.as_raw_fd();
        let child = || {
            // SAFETY: only system calls, with pointers prepared before; on failure the child ends at once.
            unsafe {
                let placed = if control == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0)
                } else {
                    libc::dup2(control, 3)
                };
                if placed >= 0 {
                    libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                }
                libc::_exit(127)
            }
        };
        let namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP;
        let mut stack = vec![0; 256 << 10];
        // SAFETY: the child has a copy of the address space and a stack of its own, and only makes system calls.
        let pid = unsafe { clone(Box::new(child), &mut stack, namespaces, Some(libc::SIGCHLD)) };
        Process {
            pid: pid.expect("namespaces can be made"),
            control: Some(ControlSocket::new(ours)),
            reaped: false,
        }
    }

    pub fn control(&self) -> &ControlSocket {
        self.control.as_ref().expect("it was not closed")
    }

    /// Closes our end.
    pub fn hang_up(&mut self) {
        self.control = None;
    }

    /// Waits for the end. Returns the exit code. Fails the test after [`LONG`].
    pub fn wait(&mut self) -> i32 {
        let end = Instant::now() + LONG;
        let status = loop {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)).unwrap() {
                WaitStatus::StillAlive => {}
                status => break status,
            }
            assert!(
                Instant::now() < end,
                "waited {LONG:?} in vain for the end of process {}",
                self.pid
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        self.reaped = true;
        match status {
            WaitStatus::Exited(_, code) => code,
            other => panic!("the process ended as {other:?}"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// A running machine.
pub struct Machine {
    pub process: Process,
    pub log: File,
    pub serial: Option<File>,
    pub stamps: Vec<Stamp>,
    /// Devices that needed a reset, and why.
    pub resets: Vec<(String, String)>,
}

/// How it ended.
pub struct Ended {
    pub end: GuestEnd,
    pub console: Vec<String>,
    pub stats: VmStats,
    pub code: i32,
}

impl Machine {
    /// The next event but stamps and resets, which are kept. Fails the test after [`LONG`].
    pub fn event(&mut self) -> Event {
        loop {
            match self.next() {
                Event::Reached(stamp) => self.stamps.push(stamp),
                Event::NeedsReset { device, reason } => self.resets.push((device, reason)),
                other => return other,
            }
        }
    }

    fn next(&mut self) -> Event {
        let control = self.process.control();
        let mut poll = [nix::poll::PollFd::new(
            control.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        let timeout = nix::poll::PollTimeout::try_from(LONG).unwrap();
        if nix::poll::poll(&mut poll, timeout).unwrap() == 0 {
            panic!("no event in {LONG:?}\n{}", self.report());
        }
        match self.process.control().receive::<Event>() {
            Ok((event, _)) => event,
            Err(ControlError::Closed) => {
                panic!("it ended without a word\n{}", self.report())
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until the guest has reached `phase`.
    pub fn reach(&mut self, phase: Phase) -> Stamp {
        loop {
            if let Some(stamp) = self.stamps.iter().find(|stamp| stamp.phase == phase) {
                return *stamp;
            }
            match self.next() {
                Event::Reached(stamp) => self.stamps.push(stamp),
                Event::Running { .. } => {}
                other => panic!("{other:?} instead of {phase:?}\n{}", self.report()),
            }
        }
    }

    /// Waits until the guest does nothing but what its timers want, some 50 exits a second.
    pub fn rest(&mut self) {
        let exits = |machine: &mut Machine| match machine.ask(&Request::Stats) {
            Event::Stats(stats) => stats.kvm["exits"] - stats.kvm["irq_exits"],
            other => panic!("{other:?}"),
        };
        let start = Instant::now();
        let mut before = exits(self);
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = exits(self);
            if now - before < 100 {
                return;
            }
            assert!(start.elapsed() < LONG, "{}", self.report());
            before = now;
        }
    }

    /// Sends a request and returns the answer.
    pub fn ask(&mut self, request: &Request) -> Event {
        self.process.control().send(request).unwrap();
        self.event()
    }

    /// Waits for the guest's end and the process's.
    pub fn end(&mut self) -> Ended {
        loop {
            match self.event() {
                Event::Running { .. } => {}
                Event::Ended {
                    end,
                    console,
                    stats,
                } => {
                    let code = self.process.wait();
                    return Ended {
                        end,
                        console,
                        stats,
                        code,
                    };
                }
                other => panic!("{other:?} instead of an end\n{}", self.report()),
            }
        }
    }

    /// What the log has until now.
    pub fn read_log(&mut self) -> String {
        String::from_utf8_lossy(&read_available(&mut self.log)).into_owned()
    }

    /// What the console has until now.
    pub fn read_serial(&mut self) -> Vec<u8> {
        self.serial.as_mut().map_or_else(Vec::new, read_available)
    }

    /// Everything that helps to understand a failure.
    pub fn report(&mut self) -> String {
        let serial = self.read_serial();
        let log = self.read_log();
        format!(
            "log:\n{log}\nconsole:\n{}",
            String::from_utf8_lossy(&serial)
        )
    }
}

fn read_available(file: &mut File) -> Vec<u8> {
    bulkhead_vmm::log::set_nonblocking(file);
    let mut bytes = Vec::new();
    // Ends with "would block", or with the writer's end.
    let _ = file.read_to_end(&mut bytes);
    bytes
}
