//! Linux's own virtio drivers against the devices: this program is the host's side and, as /init, the guest's.
//!
//! The guest dials [`plan::START`] and waits for a byte. Then it runs the scenarios, each of which is
//! a line of its report, "name ok" or "name FAILED why". A machine that is saved while the guest waits goes
//! on in others, to which all of that must come as to the first. Needs a host whose KVM runs
//! kernels.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use bulkhead_vmm_config::{Event, GuestEnd, Phase, Request, Stamp, TemplateFiles};

#[path = "virtio_guest/guest.rs"]
mod guest_side;
#[path = "virtio_guest/host.rs"]
mod host_side;
#[path = "virtio_guest/share.rs"]
mod share;
mod support;

use support::Setup;

/// Ports, and how much flows there.
mod plan {
    /// The guest waits there for a byte.
    pub const START: u32 = bulkhead_vmm_config::port::AGENT;
    /// The guest's last word.
    pub const REPORT: u32 = 2009;
    /// The host sends, the guest echoes, both end each direction by itself.
    pub const ECHO: u32 = 2000;
    /// The guest sends and closes at once.
    pub const SINK: u32 = 2001;
    /// The host sends and closes at once.
    pub const SOURCE: u32 = 2002;
    /// Not offered.
    pub const CLOSED: u32 = 2003;
    /// Its host end is closed before the dial.
    pub const GONE: u32 = 2004;
    /// The host never reads, and then closes.
    pub const DEAF: u32 = 2005;
    /// After the driver was unbound and bound again.
    pub const AGAIN: u32 = 2006;
    /// One small message there and back, many times.
    pub const PING: u32 = 2007;
    /// The host waits with its reading.
    pub const SLOW: u32 = 2008;
    /// The guest's age when that host must have read.
    pub const SLOW_SECONDS: f64 = 14.0;
    /// First of [`MANY`] at once, each an echo.
    pub const FIRST_OF_MANY: u32 = 3000;
    // All offers travel in one packet, which has 64 descriptors at most.
    pub const MANY: u32 = 40;

    pub const BULK: usize = 4 << 20;
    /// The file system's tag, and the size of a file there.
    pub const TAG: &str = "share";
    pub const FILE: usize = 3_000_001;
    pub const SMALL: usize = 300_000;
    pub const PINGS: usize = 100;
    /// MiB at the start, and plugged while the guest runs.
    pub const MEMORY: u64 = 256;
    pub const PLUGGED: u64 = 128;
}

/// Bytes that tell a lost, doubled or moved one.
fn pattern(seed: u32, count: usize) -> Vec<u8> {
    let byte = |nth: u32| (nth.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 13) as u8;
    (0..count as u32).map(byte).collect()
}

fn main() {
    if std::process::id() == 1 {
        guest_side::run();
    }
    let Some(kernel) = support::kernel() else {
        return;
    };
    let cold = machine(&kernel, 1);
    finish(cold);
    // Two of two processors, from one that has said nothing yet.
    let files = Files::default();
    let (setup, start) = configured(&kernel, 2);
    saved(setup, start, &files);
    for _ in 0..2 {
        let mut clone = machine(&kernel, 2);
        files.give(&mut clone.setup, Way::GoOn);
        let stamps = finish(clone);
        assert!(stamps.iter().all(|stamp| stamp.phase != Phase::Init));
    }
    another_processor(&kernel, &files);
    a_damaged_template(&kernel, &files);
}

/// The files of a template.
struct Files {
    state: File,
    memory: File,
}

impl Default for Files {
    fn default() -> Files {
        Files {
            state: tempfile::tempfile().unwrap(),
            memory: tempfile::tempfile().unwrap(),
        }
    }
}

enum Way {
    Save,
    GoOn,
}

impl Files {
    fn give(&self, setup: &mut Setup, way: Way) {
        // Each machine reads from the start.
        let mut open = |file: &File| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let writable = matches!(way, Way::Save);
            let file = File::options().read(true).write(writable).open(path);
            setup.add(file.unwrap().into())
        };
        let (state, memory) = (open(&self.state), open(&self.memory));
        let files = Some(TemplateFiles {
            state,
            memory,
            touched: None,
        });
        match way {
            Way::Save => setup.config.save = files,
            Way::GoOn => setup.config.template = files,
        }
    }
}

/// A machine before its start, with all that is at the other ends of its devices.
struct Prepared {
    setup: Setup,
    start: UnixStream,
    report: UnixStream,
    hosts: Vec<std::thread::JoinHandle<()>>,
    share: share::Share,
}

fn configured(kernel: &Path, vcpus: u32) -> (Setup, UnixStream) {
    let program = std::fs::read("/proc/self/exe").expect("this program can be read");
    let initrd = support::guest::initramfs_with(&program);
    let mut setup = Setup::new(kernel, &initrd);
    setup.config.vcpus = vcpus;
    setup.config.memory_mib = plan::MEMORY;
    setup.config.spare_memory_mib = plan::PLUGGED;
    setup.config.extra_cmdline.push("loglevel=4".into());
    let start = setup.offer(plan::START);
    (setup, start)
}

fn machine(kernel: &Path, vcpus: u32) -> Prepared {
    let (mut setup, start) = configured(kernel, vcpus);
    let hosts = host_side::start(&mut setup);
    let share = share::Share::start(&mut setup);
    let report = setup.offer(plan::REPORT);
    report.set_read_timeout(Some(support::LONG)).unwrap();
    Prepared {
        setup,
        start,
        report,
        hosts,
        share,
    }
}

/// Boots until the guest waits, and saves it.
fn saved(mut setup: Setup, _start: UnixStream, files: &Files) {
    let share = share::Share::start(&mut setup);
    files.give(&mut setup, Way::Save);
    let mut machine = setup.start();
    machine.reach(Phase::AgentDialled);
    machine.rest();
    machine.process.control().send(&Request::Save).unwrap();
    let ended = machine.end();
    assert_eq!((ended.end, ended.code), (GuestEnd::Saved, 0));
    drop(share);
    let [state, memory] = [&files.state, &files.memory].map(|file| file.metadata().unwrap());
    println!(
        "template: state {} bytes, memory {} KiB",
        state.len(),
        memory.blocks() / 2
    );
}

/// A template of two processors is nothing to a machine of one: that one boots.
fn another_processor(kernel: &Path, files: &Files) {
    let (mut setup, _start) = configured(kernel, 1);
    let _share = share::Share::start(&mut setup);
    files.give(&mut setup, Way::GoOn);
    refused(setup, "it has 2 vCPUs and this machine 1");
}

/// Nor is one that has changed, at whatever place, or that has lost its end.
fn a_damaged_template(kernel: &Path, files: &Files) {
    let damaged = Files::default();
    let mut state = Vec::new();
    let mut whole = &files.state;
    whole.rewind().unwrap();
    whole.read_to_end(&mut state).unwrap();
    let middle = state.len() / 2;
    state[middle] ^= 1;
    (&damaged.state).write_all(&state).unwrap();
    let (mut setup, _start) = configured(kernel, 2);
    let _share = share::Share::start(&mut setup);
    damaged.give(&mut setup, Way::GoOn);
    refused(setup, "is damaged");

    state[middle] ^= 1;
    let short = Files::default();
    (&short.state).write_all(&state).unwrap();
    let (mut setup, _start) = configured(kernel, 2);
    let _share = share::Share::start(&mut setup);
    short.give(&mut setup, Way::GoOn);
    refused(setup, "not in its file");
}

/// The machine says why, and boots all the same.
fn refused(setup: Setup, why: &str) {
    let mut machine = setup.start();
    match machine.event() {
        Event::TemplateRefused { reason } => assert!(reason.contains(why), "{reason}"),
        other => panic!("{other:?}\n{}", machine.report()),
    }
    machine.reach(Phase::Init);
    machine.process.control().send(&Request::Stop).unwrap();
    assert_eq!(machine.end().end, GuestEnd::Stopped);
}

/// Runs the guest to its end.
fn finish(prepared: Prepared) -> Vec<Stamp> {
    let Prepared {
        setup,
        start: mut waiting,
        mut report,
        hosts,
        share,
    } = prepared;
    let vcpus = setup.config.vcpus;
    let start = Instant::now();
    let mut machine = setup.start();
    let running = machine.event();
    assert!(matches!(running, Event::Running { .. }), "{running:?}");
    let dialled = machine.reach(Phase::AgentDialled);
    let mib = plan::PLUGGED;
    assert_eq!(machine.ask(&Request::PlugMemory { mib }), Event::Done);
    waiting.write_all(b"!").unwrap();
    let mut told = String::new();
    let read = report.read_to_string(&mut told);
    read.unwrap_or_else(|error| panic!("{error}: {told}\n{}", machine.report()));
    let ended = machine.end();
    let first = machine.stamps[0].at_ns.min(dialled.at_ns);
    println!(
        "{vcpus} vCPUs, {:?}, dialled {} ms after its first moment:\n{told}",
        start.elapsed(),
        (dialled.at_ns - first) / 1_000_000
    );
    println!(
        "kvm {:?}\nuser {:?}",
        ended.stats.kvm, ended.stats.user_exits
    );
    assert_eq!(ended.end, GuestEnd::PowerOff, "{:?}", ended.console);
    assert!(!told.contains("FAILED"));
    let plugged = ended.stats.plugged.expect("there is a device");
    assert_eq!((plugged.plugged_bytes >> 20, plugged.refused), (mib, 0));
    assert_eq!(told.matches(" ok").count(), guest_side::SCENARIOS.len());
    assert!(
        ended.stats.guest_faults.is_empty(),
        "{:?}",
        ended.stats.guest_faults
    );
    share.finish();
    for host in hosts {
        host.join().expect("each host side is content");
    }
    machine.stamps
}
