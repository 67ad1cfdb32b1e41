//! `bulkhead-vmm fs` as the shim starts it, and a driver that speaks vhost-user to it. Needs root.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use bulkhead_vmm::fs::wire::*;
use bulkhead_vmm::lending;
use bulkhead_vmm_config::{FsEvent, FsRequest};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vhost::VhostBackend;
use vm_memory::{ByteValued, Bytes, GuestAddress};

#[path = "fs_process/driver.rs"]
mod driver;
#[path = "fs_process/fallen.rs"]
mod fallen;
#[path = "fs_process/hostile.rs"]
mod hostile;

use driver::*;

#[test]
fn it_serves_from_a_jail_and_lets_go_of_trees() {
    let share = Share::new();
    fs::write(share.at("f"), "from the host").unwrap();
    let (mut process, mut driver) = started(&share);

    // What the process may still do.
    assert_eq!(process.status("NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(process.status(set), "00000000800000db", "{set}");
    }
    assert_eq!(process.status("CapInh"), "0000000000000000");
    // proc_pid_smaps(5): "dd", guest memory is in no core dump.
    let maps = fs::read_to_string(format!("/proc/{}/smaps", process.pid)).unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.contains("memfd:ram"));
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    let mut root: Vec<_> = fs::read_dir(format!("/proc/{}/root", process.pid))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    root.sort();
    assert_eq!(root, ["proc", "share"]);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).unwrap();
    assert_eq!(mounts.lines().count(), 3, "{mounts}");

    let entry = driver.lookup(ROOT_ID, "f").unwrap();
    let fh = driver.open(entry.nodeid, libc::O_RDWR);
    assert_eq!(driver.read(fh, 100).unwrap(), b"from the host");
    let write = WriteIn {
        fh,
        size: 4,
        ..Default::default()
    };
    driver
        .request(
            Opcode::Write as u32,
            entry.nodeid,
            &[write.as_slice()],
            b"FROM",
            64,
        )
        .unwrap();
    assert_eq!(fs::read(share.at("f")).unwrap(), b"FROM the host");

    // What the shim mounts later appears, and goes with a plain umount after a detach, 300 times.
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("hostname"), "guest").unwrap();
    fs::create_dir(share.at("rootfs")).unwrap();
    let point = share.at("rootfs");
    for cycle in 0..300 {
        mount(
            Some(source.path()),
            &point,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        let root = driver.lookup(ROOT_ID, "rootfs").unwrap();
        let file = driver.lookup(root.nodeid, "hostname").unwrap();
        assert_eq!(
            file.attr.ino,
            fs::metadata(source.path().join("hostname")).unwrap().ino()
        );
        let fh = driver.open(file.nodeid, libc::O_RDWR);
        assert_eq!(driver.read(fh, 10).unwrap(), b"guest");
        assert_eq!(process.detach("rootfs"), (2, 1), "cycle {cycle}");
        assert_eq!(driver.lookup(ROOT_ID, "rootfs").err(), Some(libc::ESTALE));
        umount2(&point, MntFlags::empty()).unwrap();
        assert_eq!(driver.read(fh, 10), Err(libc::ESTALE));
    }
    let refused = process.ask(&FsRequest::Detach {
        tree: "../etc".to_owned(),
    });
    assert!(matches!(refused, FsEvent::Refused { .. }));
    let FsEvent::Stats {
        handles, requests, ..
    } = process.ask(&FsRequest::Stats)
    else {
        panic!("no stats");
    };
    assert_eq!((handles, requests["read"]), (1, 601));
    assert_eq!(process.end(), 0);
    let mut log = String::new();
    process.log.read_to_string(&mut log).unwrap();
    assert!(log.lines().last().unwrap().contains("requests"), "{log}");
}

/// In its user namespace the process has no CAP_FSETID that the host's kernel asks for.
#[test]
fn set_id_bits_stay_or_go_as_the_guest_says() {
    let share = Share::new();
    let (mut process, mut driver) = started(&share);
    fs::write(share.at("source"), "source").unwrap();
    let source = driver.lookup(ROOT_ID, "source").unwrap().nodeid;
    let source = driver.open(source, libc::O_RDONLY);

    type Change = fn(&mut Driver, u64, u64, bool);
    let ways: [(&str, bool, Change); 6] = [
        ("write", true, |driver, node, _, clear| {
            let fh = driver.open(node, libc::O_RDWR);
            let write = WriteIn {
                fh,
                size: 1,
                fuse_flags: if clear { WRITE_KILL_SUIDGID } else { 0 },
                ..Default::default()
            };
            driver.ask(Opcode::Write as u32, node, write.as_slice(), b"x");
        }),
        ("open with O_TRUNC", true, |driver, node, _, clear| {
            let flag = if clear { OPEN_KILL_SUIDGID } else { 0 };
            driver.open_and(node, libc::O_RDWR | libc::O_TRUNC, flag);
        }),
        ("truncate", true, |driver, node, _, clear| {
            let clear = if clear {
                SetattrValid::KILL_SUIDGID.bits()
            } else {
                0
            };
            let change = SetattrIn {
                valid: SetattrValid::SIZE.bits() | clear,
                size: 3,
                ..Default::default()
            };
            driver.ask(Opcode::Setattr as u32, node, change.as_slice(), b"");
        }),
        ("fallocate", false, |driver, node, _, _| {
            let fh = driver.open(node, libc::O_RDWR);
            let change = FallocateIn {
                fh,
                length: 4096,
                ..Default::default()
            };
            driver.ask(Opcode::Fallocate as u32, node, change.as_slice(), b"");
        }),
        ("copy_file_range", false, |driver, node, source, _| {
            let change = CopyFileRangeIn {
                fh_in: source,
                fh_out: driver.open(node, libc::O_RDWR),
                nodeid_out: node,
                len: 6,
                ..Default::default()
            };
            driver.ask(Opcode::CopyFileRange as u32, node, change.as_slice(), b"");
        }),
        ("chown", false, |driver, node, _, _| {
            let change = SetattrIn {
                valid: SetattrValid::UID.bits(),
                ..Default::default()
            };
            driver.ask(Opcode::Setattr as u32, node, change.as_slice(), b"");
        }),
    ];
    for (way, has_flag, change) in ways {
        for clear in [false, true] {
            for (before, cleared) in [(0o6775, 0o775), (0o4755, 0o755), (0o2765, 0o2765)] {
                if clear && !has_flag {
                    continue;
                }
                fs::write(share.at("f"), "content").unwrap();
                fs::set_permissions(share.at("f"), Permissions::from_mode(before)).unwrap();
                std::os::unix::fs::chown(share.at("f"), None, Some(3000)).unwrap();
                fs::set_permissions(share.at("f"), Permissions::from_mode(before)).unwrap();
                let node = driver.lookup(ROOT_ID, "f").unwrap().nodeid;
                change(&mut driver, node, source, clear);
                let left = fs::metadata(share.at("f")).unwrap().mode() & 0o7777;
                let goes = clear || way == "chown";
                let expected = if goes { cleared } else { before };
                assert_eq!(
                    format!("{left:04o}"),
                    format!("{expected:04o}"),
                    "{before:04o}: {way}, clear: {clear}"
                );
                fs::remove_file(share.at("f")).unwrap();
            }
        }
    }
    // Bits that the guest sets are known at once, also of a file that had none a moment ago.
    fs::write(share.at("f"), "content").unwrap();
    let node = driver.lookup(ROOT_ID, "f").unwrap().nodeid;
    let write = ways[0].2;
    write(&mut driver, node, source, false);
    let mode = SetattrIn {
        valid: SetattrValid::MODE.bits(),
        mode: 0o6775,
        ..Default::default()
    };
    driver.ask(Opcode::Setattr as u32, node, mode.as_slice(), b"");
    write(&mut driver, node, source, false);
    let left = fs::metadata(share.at("f")).unwrap().mode() & 0o7777;
    assert_eq!(format!("{left:04o}"), "6775");
    assert_eq!(process.end(), 0);
}

#[test]
fn chains_that_are_no_requests_are_counted_and_the_ring_goes_on() {
    let share = Share::new();
    fs::write(share.at("f"), "x").unwrap();
    let (mut process, mut driver) = started(&share);
    // Past RAM, wrapping, readable behind writable, empty, without room, much too long.
    assert_eq!(
        driver.submit(&[(RAM as u64 - 10, 40, 0), (REPLY, 4096, 2)]),
        0
    );
    assert_eq!(
        driver.submit(&[(u64::MAX - 10, 40, 0), (REPLY, 4096, 2)]),
        0
    );
    assert_eq!(
        driver.submit(&[(REQUEST, 40, 0), (0xffff_ffff_0000, 16, 2)]),
        0
    );
    assert_eq!(driver.submit(&[(REPLY, 4096, 2), (REQUEST, 40, 0)]), 0);
    assert_eq!(driver.submit(&[(REQUEST, 0, 0)]), 0);
    assert_eq!(driver.submit(&[(REQUEST, 10, 0), (REPLY, 16, 2)]), 16);
    assert_eq!(driver.submit(&[(REQUEST, 40, 0), (REPLY, 8, 2)]), 0);
    assert_eq!(driver.submit(&[(0, 4 << 20, 0), (REPLY, 4096, 2)]), 16);
    // A whole request, and behind it what has the chain cut: a loop, and 4 GiB.
    let good = driver.message(Opcode::Lookup as u32, ROOT_ID, &[b"f\0"], b"", 4096);
    let [head, _, reply, room] = good;
    assert_eq!(driver.submit(&[head, reply, room, (0, u32::MAX, WRITE)]), 0);
    for (index, piece) in (0..).zip(good) {
        driver.descriptor(index, (piece.0, piece.1, piece.2 | NEXT), index + 1);
    }
    driver.descriptor(4, (REPLY, 16, WRITE | NEXT), 4);
    driver.publish(0);
    assert_eq!(driver.kick_and_hear(), 0);
    let entry = driver.lookup(ROOT_ID, "f").unwrap();
    assert_eq!(entry.attr.size, 1);
    let FsEvent::Stats { guest_faults, .. } = process.ask(&FsRequest::Stats) else {
        panic!("no stats");
    };
    assert_eq!(guest_faults["chain"], 6);
    assert!(guest_faults.values().sum::<u64>() >= 8, "{guest_faults:?}");

    // A ring index from nowhere stops the ring, not the process; a reset starts it again.
    driver
        .memory
        .store(
            12345_u16,
            GuestAddress(AVAILABLE + 2),
            std::sync::atomic::Ordering::SeqCst,
        )
        .unwrap();
    driver.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    driver.frontend.get_vring_base(1).unwrap();
    driver.start();
    driver.init();
    assert_eq!(driver.lookup(ROOT_ID, "f").unwrap().attr.size, 1);
    assert_eq!(process.end(), 0);
}

/// As far as its filters go. That it asks before it touches a page, the transport's own tests see.
#[test]
fn it_asks_for_each_page_that_a_template_lends() {
    let (vmm, lender) = seqpacket();
    let list = lending::encode_runs(&[(0, RAM as u64)]);
    nix::unistd::write(&vmm, &list).unwrap();
    let vmm = std::thread::spawn(move || {
        let mut asked = Vec::new();
        let mut packet = [0; 64];
        loop {
            let length = nix::unistd::read(&vmm, &mut packet).unwrap();
            if length == 0 {
                return asked;
            }
            asked.push(lending::decode_question(&packet[..length]).unwrap());
            nix::unistd::write(&vmm, &[lending::ANSWER]).unwrap();
        }
    });
    let share = Share::new();
    fs::write(share.at("f"), "from the host").unwrap();
    let (mut process, mut driver) = started_with(&share, Some(lender));
    let entry = driver.lookup(ROOT_ID, "f").unwrap();
    let fh = driver.open(entry.nodeid, libc::O_RDWR);
    for _ in 0..2 {
        assert_eq!(driver.read(fh, 100).unwrap(), b"from the host");
        // What it asked for once, it knows when the driver begins anew.
        driver.frontend.get_vring_base(1).unwrap();
        driver.start();
    }
    assert_eq!(process.end(), 0);
    let asked = vmm.join().unwrap();
    // The rings' block is needed first; each comes as a whole.
    assert_eq!(asked[0], (USED & !(lending::BLOCK - 1), lending::BLOCK));
    let whole =
        |&(start, length): &(u64, u64)| start % lending::BLOCK == 0 && length == lending::BLOCK;
    assert!(asked.iter().all(whole), "{asked:x?}");
    let mut blocks: Vec<u64> = asked.iter().map(|question| question.0).collect();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), asked.len(), "{asked:x?}");
}

#[test]
fn a_config_that_cannot_be_served_is_refused_with_the_reason() {
    let (_front, back) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let mut process = FsProcess::start(Path::new("/does/not/exist"), back, None);
    let FsEvent::Failed { reason } = process.event() else {
        panic!("it serves");
    };
    assert!(
        reason.contains("/does/not/exist") && reason.contains("No such file"),
        "{reason}"
    );
    assert_eq!(process.end(), 1);
    let _ = std::io::stdout().flush();
}
