//! A container whose root is nobody outside.
#![allow(unsafe_code)] // fork(2)

use super::*;

#[test]
fn a_container_with_a_user_namespace_gets_its_root_mounts_and_devices() {
    let image = image();
    // The way to the root belongs to the agent alone, as in the share.
    fs::set_permissions(
        image.root.parent().expect("a parent"),
        fs::Permissions::from_mode(0o700),
    )
    .expect("chmod");
    nix::unistd::chown(&image.root, Some(100_000.into()), Some(100_000.into())).expect("chown");
    let source = image.directory("source");
    fs::write(image.beside.join("source/file"), "contents").expect("write");
    let mapping = || IdMapping {
        container_id: 0,
        host_id: 100_000,
        size: 65_536,
        ..IdMapping::default()
    };
    let mut spec = image.spec(vec![
        proc(),
        new("tmpfs", "/dev", MS_NOSUID, "mode=755"),
        new(
            "devpts",
            "/dev/pts",
            MS_NOSUID | MS_NOEXEC,
            "newinstance,ptmxmode=0666",
        ),
        new("mqueue", "/dev/mqueue", MS_NOSUID, ""),
        new(
            "sysfs",
            "/sys",
            MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
            "",
        ),
        bind(&source, "/data", MS_RDONLY),
    ]);
    let namespaces = spec.namespaces.mut_or_insert_default();
    namespaces.user = Kind::NEW.into();
    namespaces.uid_mappings = vec![mapping()];
    namespaces.gid_mappings = vec![mapping()];
    spec.devices = vec![Device {
        path: "/dev/fuse".to_owned(),
        kind: device::Kind::CHAR.into(),
        major: 10,
        minor: 229,
        mode: 0o640,
        uid: 3,
        gid: 4,
        ..Device::default()
    }];
    spec.masked_paths = vec!["/proc/version".to_owned(), "/proc/acpi".to_owned()];
    spec.readonly_paths = vec!["/proc/sys".to_owned()];
    spec.root_readonly = true;
    in_mount_namespace(|| {
        let sources = Sources::open(&spec).unwrap_or_else(|e| panic!("{e}"));
        user_namespace_child(&spec, sources);
        String::new()
    });
}

/// The container of `spec` in namespaces of its own, all owned by a new user namespace.
fn user_namespace_child(spec: &Container, sources: Sources) {
    use nix::sched::{CloneFlags, unshare};
    use nix::unistd::{pipe, read, write};
    let (unshared, tell_unshared) = pipe().expect("pipe");
    let (mapped, tell_mapped) = pipe().expect("pipe");
    let parent = nix::unistd::getpid();
    let namespaces = spec.namespaces.get_or_default().clone();
    // A sibling with the agent's rights writes the maps of this process once it has unshared.
    // SAFETY: the child is a copy of this single-threaded process and leaves by _exit.
    let mapper = match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Child => {
            let mut byte = [0];
            let _ = read(&unshared, &mut byte);
            let result = crate::idmap::write_maps(
                parent.as_raw(),
                &namespaces.uid_mappings,
                &namespaces.gid_mappings,
            );
            let _ = write(&tell_mapped, b"m");
            // SAFETY: _exit ends the process.
            unsafe { nix::libc::_exit(i32::from(result.is_err())) }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET,
    )
    .expect("unshare");
    write(&tell_unshared, b"u").expect("write");
    let mut byte = [0];
    read(&mapped, &mut byte).expect("read");
    let status = nix::sys::wait::waitpid(mapper, None).expect("wait");
    assert!(
        matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)),
        "{status:?}"
    );
    nix::unistd::setgroups(&[]).expect("setgroups");
    nix::unistd::setresgid(0.into(), 0.into(), 0.into()).expect("setresgid");
    nix::unistd::setresuid(0.into(), 0.into(), 0.into()).expect("setresuid");
    // The first child is PID 1 of the new pid namespace, whose /proc it mounts.
    in_child(|| {
        let prepared = prepare(spec, sources).unwrap_or_else(|e| panic!("{e}"));
        let entered = prepared.enter_root().unwrap_or_else(|e| panic!("{e}"));
        entered.seal(spec).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(fs::read_to_string("/data/file").expect("read"), "contents");
        fs::write("/dev/null", "x").expect("the null device opens");
        assert!(fs::File::open("/dev/zero").is_ok());
        let fuse = fs::metadata("/dev/fuse").expect("stat");
        assert_eq!(
            (fuse.uid(), fuse.gid(), fuse.mode() & 0o7777),
            (3, 4, 0o640)
        );
        assert_eq!(fuse.rdev(), nix::sys::stat::makedev(10, 229));
        assert_eq!(fs::read("/proc/version").expect("masked"), b"");
        assert_eq!(
            fs::read_link("/proc/self").expect("own pid namespace"),
            Path::new("1")
        );
        assert!(fs::write("/proc/sys/kernel/domainname", "x").is_err());
        assert!(fs::write("/x", "").is_err(), "read-only root");
        String::new()
    });
}
