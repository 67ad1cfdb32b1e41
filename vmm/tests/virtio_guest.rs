//! Linux's own virtio drivers against the devices: this program is the host's side and, as /init, the guest's.
//!
//! Each scenario is one line of the guest's console, "name ok" or "name FAILED why". Needs a host whose KVM runs kernels.

use std::time::Instant;

use bulkhead_vmm_config::{Event, GuestEnd, Phase, Request};

#[path = "virtio_guest/guest.rs"]
mod guest_side;
#[path = "virtio_guest/host.rs"]
mod host_side;
#[path = "virtio_guest/share.rs"]
mod share;
mod support;

/// Ports, and how much flows there.
mod plan {
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
    for vcpus in [1, 2] {
        boot(&kernel, vcpus);
    }
}

fn boot(kernel: &std::path::Path, vcpus: u32) {
    let program = std::fs::read("/proc/self/exe").expect("this program can be read");
    let initrd = support::guest::initramfs_with(&program);
    let mut setup = support::Setup::new(kernel, &initrd).with_serial();
    setup.config.vcpus = vcpus;
    setup.config.memory_mib = plan::MEMORY;
    setup.config.spare_memory_mib = plan::PLUGGED;
    setup.config.extra_cmdline.push("loglevel=4".into());
    let hosts = host_side::start(&mut setup);
    let share = share::Share::start(&mut setup);
    let start = Instant::now();
    let mut machine = setup.start();
    machine.reach(Phase::Init);
    let mib = plan::PLUGGED;
    assert_eq!(machine.ask(&Request::PlugMemory { mib }), Event::Done);
    let ended = machine.end();
    let console = String::from_utf8_lossy(&machine.read_serial()).into_owned();
    println!("{vcpus} vCPUs, {:?}:\n{console}", start.elapsed());
    println!(
        "kvm {:?}\nuser {:?}",
        ended.stats.kvm, ended.stats.user_exits
    );
    assert_eq!(ended.end, GuestEnd::PowerOff, "{:?}", ended.console);
    assert!(!console.contains("FAILED"));
    let plugged = ended.stats.plugged.expect("there is a device");
    assert_eq!((plugged.plugged_bytes >> 20, plugged.refused), (mib, 0));
    assert_eq!(console.matches(" ok").count(), guest_side::SCENARIOS.len());
    assert!(
        ended.stats.guest_faults.is_empty(),
        "{:?}",
        ended.stats.guest_faults
    );
    share.finish();
    for host in hosts {
        host.join().expect("each host side is content");
    }
}
