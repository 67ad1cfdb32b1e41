//! Boots real kernels in the built VMM; for a host whose KVM runs them, the lab for instance.

use bulkhead_vmm::spec::MAX_VCPUS;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use bulkhead_vmm_config::{Event, GuestEnd, Phase, PluggedStats, Request, VmStats};

#[path = "vm_boot/hostile.rs"]
mod hostile;
mod support;
#[allow(dead_code, reason = "the device's own tests use the rest")]
#[path = "../src/devices/virtio/net/tests/wire.rs"]
mod wire;

use support::guest::{Act, TOUCHED, Told, initramfs};
use support::{Ended, LONG, Machine, Setup, kernel};

fn machine(act: Act, change: impl FnOnce(&mut Setup)) -> Option<Machine> {
    let mut setup = Setup::new(&kernel()?, &initramfs(act));
    change(&mut setup);
    Some(setup.start())
}

fn boot(act: Act) -> Option<Ended> {
    Some(machine(act, |_| {})?.end())
}

#[test]
fn a_guest_boots_and_powers_off() {
    let Some(mut machine) = machine(Act::PowerOff, |_| {}) else {
        return;
    };
    let ended = machine.end();
    assert_eq!(
        (ended.end, ended.code),
        (GuestEnd::PowerOff, 0),
        "{:?}",
        ended.console
    );
    let phases: Vec<Phase> = machine.stamps.iter().map(|stamp| stamp.phase).collect();
    assert_eq!(
        phases,
        [Phase::VmmStart, Phase::FirstInstruction, Phase::Init]
    );
    assert!(machine.stamps.is_sorted_by_key(|stamp| stamp.at_ns));
    let [start, first, init] = machine.stamps[..] else {
        unreachable!("three, as above")
    };
    println!(
        "vmm {} ms, guest {} ms, exits {} less {} by interrupts",
        (first.at_ns - start.at_ns) / 1_000_000,
        (init.at_ns - first.at_ns) / 1_000_000,
        init.exits,
        init.irq_exits
    );
    println!("kvm {:?}", ended.stats.kvm);
    println!("user {:?}", ended.stats.user_exits);
}

/// What a boot costs at its best of three: exits until init, without those that the host's own
/// interrupts cause, and those to user space among all until the end.
fn exits_of_a_boot(change: impl Fn(&mut Setup)) -> Option<(u64, u64)> {
    let exits = |_| {
        let mut machine = machine(Act::PowerOff, &change)?;
        let ended = machine.end();
        assert_eq!(ended.end, GuestEnd::PowerOff, "{}", machine.report());
        let init = machine
            .stamps
            .iter()
            .find(|stamp| stamp.phase == Phase::Init);
        let init = init.expect("it has reached init");
        let user = &ended.stats.user_exits;
        let registers = user["mmio_read"] + user["mmio_write"];
        Some((init.exits - init.irq_exits, registers))
    };
    let boots = (0..3).filter_map(exits);
    boots.reduce(|one, other| (one.0.min(other.0), one.1.min(other.1)))
}

/// A start pays for the balloon's handshake: each register that is written is an exit, nine for
/// each of four queues, and pages of rings are touched. Its first report comes later.
#[test]
fn a_balloon_costs_a_boot_its_handshake_alone() {
    const HANDSHAKE: u64 = 150;
    let exits = |balloon| exits_of_a_boot(|setup| setup.config.balloon = balloon);
    let (Some((without, _)), Some((with, _))) = (exits(false), exits(true)) else {
        return;
    };
    println!("exits until init: {without} without a balloon, {with} with one");
    assert!(with < without + HANDSHAKE, "{without} without, {with} with");
}

/// The same for a device of one queue, whatever may be plugged one day. Only what goes to user
/// space is compared: timers of a slow guest's kernel come to more than that.
#[test]
fn room_for_memory_costs_a_boot_a_handshake_alone() {
    const HANDSHAKE: u64 = 60;
    let exits = |mib| exits_of_a_boot(|setup| setup.config.spare_memory_mib = mib);
    let (Some(without), Some(with)) = (exits(0), exits(16 << 10)) else {
        return;
    };
    println!("exits: {without:?} without room for memory, {with:?} with 16 GiB of it");
    assert!(with.1 > without.1, "{without:?} without, {with:?} with");
    assert!(
        with.1 < without.1 + HANDSHAKE,
        "{without:?} without, {with:?} with"
    );
}

/// Linux plugs what it is asked to, uses it, and gives it back: what it has used is the host's
/// again.
#[test]
fn memory_that_is_plugged_is_used_and_comes_back() {
    const MIB: u64 = 1 << 20;
    let Some(mut machine) = machine(Act::Grow, |setup| {
        setup.config.spare_memory_mib = 300;
        // What the guest frees stays until it is unplugged.
        setup.config.balloon = false;
    }) else {
        return;
    };
    machine.reach(Phase::Init);
    let before = resident(&machine);
    let Event::Refused { reason } = machine.ask(&Request::PlugMemory { mib: 385 }) else {
        panic!("more than the region")
    };
    assert!(reason.contains("up to 384 MiB can"), "{reason}");
    assert_eq!(machine.ask(&Request::PlugMemory { mib: 255 }), Event::Done);
    let whole = wait_for(&mut machine, |machine| plugged(machine) == 256 * MIB);
    // Linux looks for blocks to unplug again after 50 s, if it finds too few.
    let used = wait_for(&mut machine, |machine| {
        stats(machine).guest_faults.contains_key("announce.unknown")
    });
    let full = resident(&machine);
    assert!(full > before + u64::from(TOUCHED), "{before}, {full}");
    // Half of it, then nothing.
    assert_eq!(machine.ask(&Request::PlugMemory { mib: 128 }), Event::Done);
    wait_for(&mut machine, |machine| plugged(machine) == 128 * MIB);
    assert_eq!(machine.ask(&Request::PlugMemory { mib: 0 }), Event::Done);
    let gone = wait_for(&mut machine, |machine| plugged(machine) == 0);
    let after = resident(&machine);
    println!(
        "plugged in {whole:?}, used in {used:?}, unplugged in {gone:?}; resident: {} MiB, {} MiB, {} MiB",
        before / MIB,
        full / MIB,
        after / MIB
    );
    // The struct pages of what was plugged, and what the kernel has taken meanwhile.
    assert!(after < before + 32 * MIB, "{before}, {full}, {after}");
    machine.process.control().send(&Request::Stop).unwrap();
    let ended = machine.end();
    assert_eq!(ended.end, GuestEnd::Stopped, "{}", machine.report());
    assert_eq!(ended.stats.guest_faults.len(), 1, "{:?}", ended.stats);
    let plugged = PluggedStats::default();
    assert_eq!(ended.stats.plugged, Some(plugged), "nothing was refused");
}

#[test]
fn a_machine_without_room_for_memory_refuses_it() {
    let Some(mut machine) = machine(Act::Idle, |_| {}) else {
        return;
    };
    machine.reach(Phase::Init);
    let refused = machine.ask(&Request::PlugMemory { mib: 2 });
    assert!(matches!(refused, Event::Refused { .. }), "{refused:?}");
    assert_eq!(stats(&mut machine).plugged, None);
}

fn stats(machine: &mut Machine) -> VmStats {
    match machine.ask(&Request::Stats) {
        Event::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

fn plugged(machine: &mut Machine) -> u64 {
    let plugged = stats(machine).plugged.expect("the machine has a device");
    assert_eq!(plugged.refused, 0);
    plugged.plugged_bytes
}

/// Bytes of guest memory that the host has pages for.
fn resident(machine: &Machine) -> u64 {
    let fds = format!("/proc/{}/fd", machine.process.pid);
    let is_memory = |path: &std::path::PathBuf| {
        let target = std::fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:RAM")
    };
    let paths = std::fs::read_dir(fds).unwrap();
    let memory = paths.map(|entry| entry.unwrap().path()).find(is_memory);
    let memory = std::fs::metadata(memory.expect("it has its memory")).unwrap();
    memory.blocks() * 512
}

/// How long it took.
fn wait_for(machine: &mut Machine, is_so: impl Fn(&mut Machine) -> bool) -> Duration {
    let start = Instant::now();
    while !is_so(machine) {
        assert!(start.elapsed() < LONG, "{}", machine.report());
        std::thread::sleep(Duration::from_millis(20));
    }
    start.elapsed()
}

#[test]
fn each_way_to_end_is_told_apart() {
    for (act, end, code) in [
        (Act::Reboot, GuestEnd::Reboot, 10),
        (Act::Panic, GuestEnd::Panic, 11),
        (Act::AnnounceThenPanic, GuestEnd::Panic, 11),
        (Act::Reset, GuestEnd::TripleFault, 12),
    ] {
        let Some(ended) = boot(act) else { return };
        assert_eq!(
            (ended.end, ended.code),
            (end, code),
            "{act:?}: {:?}",
            ended.console
        );
        let text = ended.console.join("\n");
        let says = text.contains("Kernel panic - not syncing: Attempted to kill init!");
        assert_eq!(says, end == GuestEnd::Panic, "{act:?}: {text}");
    }
}

#[test]
fn processors_and_memory_are_as_configured() {
    const MIB: u64 = 1 << 20;
    for (vcpus, memory) in [
        (1, 64),
        (2, 128),
        (4, 256),
        (1, 512),
        (1, 1024),
        (1, 3072),
        (2, 4096),
        (1, 6144),
        (MAX_VCPUS, 512),
    ] {
        let Some(kernel) = kernel() else { return };
        let mut setup = Setup::new(&kernel, &initramfs(Act::Tell)).with_serial();
        setup.config.vcpus = vcpus;
        setup.config.memory_mib = memory;
        let mut machine = setup.start();
        let ended = machine.end();
        assert_eq!(ended.end, GuestEnd::PowerOff, "{}", machine.report());
        let told = Told::read(&machine.read_serial()).unwrap();
        println!("{vcpus} vCPUs, {memory} MiB: {told:?}");
        assert_eq!(told.processors, vcpus);
        // All but the kernel and what it needs for each page and each processor.
        let needed = 32 * MIB + memory * MIB / 32 + u64::from(vcpus) * MIB / 4;
        let expected = memory * MIB - needed..memory * MIB;
        assert!(expected.contains(&told.memory), "{expected:?}");
    }
}

#[test]
fn requests_are_answered_in_order() {
    let Some(mut machine) = machine(Act::Spin, |_| {}) else {
        return;
    };
    assert!(matches!(machine.event(), Event::Running { .. }));
    machine.reach(Phase::Init);
    for _ in 0..5 {
        assert_eq!(machine.ask(&Request::Pause), Event::Done);
        assert_eq!(machine.ask(&Request::Resume), Event::Done);
    }
    assert!(stats(&mut machine).user_exits["io_out"] > 0);
    let refused = machine.ask(&Request::WithdrawPort { port: 5 });
    assert!(matches!(refused, Event::Refused { .. }), "{refused:?}");
    machine.process.control().send(&Request::Stop).unwrap();
    let ended = machine.end();
    assert_eq!((ended.end, ended.code), (GuestEnd::Stopped, 0));
}

#[test]
fn a_vmm_whose_shim_has_gone_ends() {
    for act in [Act::Idle, Act::Spin] {
        let Some(mut machine) = machine(act, |_| {}) else {
            return;
        };
        machine.reach(Phase::Init);
        machine.process.hang_up();
        assert_eq!(machine.process.wait(), 0);
    }
}

#[test]
fn announcements_without_end_cost_the_guest_only() {
    let Some(mut machine) = machine(Act::Chatter, |_| {}) else {
        return;
    };
    let ended = machine.end();
    assert_eq!(ended.end, GuestEnd::PowerOff);
    let inits = machine
        .stamps
        .iter()
        .filter(|stamp| stamp.phase == Phase::Init);
    assert_eq!(inits.count(), 1);
    assert_eq!(ended.stats.guest_faults["announce.unknown"], 1000);
}

#[test]
fn the_running_process_is_jailed() {
    let Some(mut machine) = machine(Act::Idle, |_| {}) else {
        return;
    };
    machine.reach(Phase::Init);
    let pid = machine.process.pid;
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = read("status");
    let field = |name: &str| -> Vec<String> {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(name), ["0000000000000000"], "{name}");
    }
    assert_eq!(field("Uid"), ["64123"; 4]);
    assert_eq!(field("Gid"), ["64123"; 4]);
    assert!(field("Groups").is_empty());
    assert_eq!(field("NoNewPrivs"), ["1"]);
    let mounts = read("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,"), "{mounts}");
    let root: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/root"))
        .unwrap()
        .collect();
    assert!(root.is_empty());
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        let target = std::fs::read_link(entry.path()).unwrap();
        let target = target.to_string_lossy();
        let known = [
            "anon_inode:",
            "socket:[",
            "pipe:[",
            "/memfd:RAM",
            "/memfd:ramoops",
        ];
        // Standard streams; /dev is no longer mounted.
        let standard = target == "/null";
        assert!(
            standard || known.iter().any(|known| target.starts_with(known)),
            "{target} is open"
        );
    }
}

#[test]
fn what_cannot_boot_is_refused_in_one_line() {
    let Some(kernel) = kernel() else { return };
    let refused = |change: &dyn Fn(&mut Setup)| -> String {
        let mut setup = Setup::new(&kernel, &initramfs(Act::PowerOff));
        change(&mut setup);
        let mut machine = setup.start();
        let event = machine.event();
        let Event::Failed { reason } = event else {
            panic!("{event:?}")
        };
        assert_eq!(machine.process.wait(), 1);
        assert!(!reason.contains('\n'), "{reason}");
        println!("{reason}");
        reason
    };
    assert!(refused(&|setup| setup.config.memory_mib = 1).contains("1 MiB of memory"));
    assert!(refused(&|setup| setup.config.vcpus = 33).contains("33 vCPUs"));
    assert!(refused(&|setup| setup.config.uid = 0).contains("uid 0"));
    let text = refused(&|setup| {
        setup.fds[1] = std::fs::File::open("/proc/self/exe").unwrap().into();
    });
    assert!(text.contains("kernel"), "{text}");
    let text = refused(&|setup| {
        let large = tempfile::tempfile().unwrap();
        large.set_len(120 << 20).unwrap();
        setup.fds[2] = large.into();
    });
    assert!(text.contains("more memory"), "{text}");
    let text = refused(&|setup| {
        setup.fds[0] = std::fs::File::open("/dev/null").unwrap().into();
    });
    assert!(text.contains("/dev/kvm"), "{text}");
}
