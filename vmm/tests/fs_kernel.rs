//! POSIX behaviour of the share as a real kernel sees it: the engine behind `/dev/fuse`. Needs root and /dev/fuse.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use bulkhead_vmm_config::LISTEN_SUFFIX;
use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, AtFlags, FallocateFlags, OFlag, RenameFlags, fallocate, open, renameat2,
};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Whence, linkat, lseek64};

mod fs_support;
use fs_support::{CACHED, Mounted, NO_CACHE, assert_same, program, shell_as};

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

#[test]
fn files_directories_and_links() {
    for cache in [NO_CACHE, CACHED] {
        let m = Mounted::new(cache);
        fs::create_dir(m.at("d")).unwrap();
        fs::write(m.at("d/f"), b"hello").unwrap();
        assert_eq!(fs::read(m.host("d/f")).unwrap(), b"hello");
        fs::hard_link(m.at("d/f"), m.at("g")).unwrap();
        let (f, g) = (
            fs::metadata(m.at("d/f")).unwrap(),
            fs::metadata(m.at("g")).unwrap(),
        );
        assert_eq!((f.ino(), f.nlink()), (g.ino(), 2));
        std::os::unix::fs::symlink("/etc/hostname", m.at("s")).unwrap();
        assert_eq!(
            fs::read_link(m.at("s")).unwrap(),
            Path::new("/etc/hostname")
        );
        fs::rename(m.at("g"), m.at("h")).unwrap();
        assert!(!m.host("g").exists());
        assert_eq!(
            fs::remove_dir(m.at("d")).unwrap_err().raw_os_error(),
            Some(libc::ENOTEMPTY)
        );
        fs::remove_file(m.at("d/f")).unwrap();
        fs::remove_dir(m.at("d")).unwrap();
        fs::set_permissions(m.at("h"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(m.at("h"), Some(12), Some(34)).unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH
            + std::time::Duration::new(1_234_567_890, 123_456_789);
        File::options()
            .write(true)
            .open(m.at("h"))
            .unwrap()
            .set_modified(time)
            .unwrap();
        let host = fs::metadata(m.host("h")).unwrap();
        assert_eq!(
            (host.mode() & 0o7777, host.uid(), host.gid()),
            (0o640, 12, 34)
        );
        assert_eq!(
            (host.mtime(), host.mtime_nsec()),
            (1_234_567_890, 123_456_789)
        );
        assert_eq!(fs::read(m.at("h")).unwrap(), b"hello");
        assert_eq!(
            fs::read(m.at("nothing")).unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
    }
}

#[test]
fn rename_flags() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("a"), b"a").unwrap();
    fs::write(m.at("b"), b"b").unwrap();
    let rename =
        |from: &str, to: &str, flags| renameat2(AT_FDCWD, &m.at(from), AT_FDCWD, &m.at(to), flags);
    assert_eq!(
        rename("a", "b", RenameFlags::RENAME_NOREPLACE),
        Err(Errno::EEXIST)
    );
    rename("a", "b", RenameFlags::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(m.at("a")).unwrap(), b"b");
    assert_eq!(fs::read(m.host("b")).unwrap(), b"a");
    rename("a", "c", RenameFlags::RENAME_NOREPLACE).unwrap();
    rename("b", "d", RenameFlags::RENAME_WHITEOUT).unwrap();
    let whiteout = fs::metadata(m.host("b")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

#[test]
fn who_listens_at_a_socket_of_the_host_is_reached_by_its_name() {
    use std::os::unix::net::{UnixListener, UnixStream};
    let reached = |listener: &UnixListener, path: &Path| {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(b"hi").unwrap();
        let mut heard = [0; 2];
        listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hi");
    };
    let refused = |path: &Path| UnixStream::connect(path).unwrap_err().kind();
    for cache in [NO_CACHE, CACHED] {
        let m = Mounted::new(cache);
        let at_suffix = |name: &str| m.at(&format!("{name}{LISTEN_SUFFIX}"));
        let host = UnixListener::bind(m.host("s")).unwrap();
        fs::set_permissions(m.host("s"), fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(refused(&m.at("s")), ErrorKind::ConnectionRefused);
        let agent = UnixListener::bind(at_suffix("s")).unwrap();
        reached(&agent, &m.at("s"));
        assert_eq!(fs::metadata(m.at("s")).unwrap().mode() & 0o777, 0o640);
        let stranger = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('s')\nexcept OSError as e: print(e.errno)";
        let stranger = format!("python3 -c \"{stranger}\"");
        let told = shell_as(1000, 1000, m.point.path(), &stranger);
        assert_eq!(told.trim(), libc::EACCES.to_string(), "the mode counts");
        // Nothing was made, and the host's server has heard nothing.
        let names: Vec<_> = fs::read_dir(m.share.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["s"]);
        host.set_nonblocking(true).unwrap();
        assert_eq!(host.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        // By another name of the inode too, and no more by this one when the host has another socket there.
        fs::hard_link(m.host("s"), m.host("link")).unwrap();
        reached(&agent, &m.at("link"));
        fs::remove_file(m.host("s")).unwrap();
        let _again = UnixListener::bind(m.host("s")).unwrap();
        std::thread::sleep(Duration::from_millis(cache.entry_ms + 50));
        assert_eq!(refused(&m.at("s")), ErrorKind::ConnectionRefused);
        let again = UnixListener::bind(at_suffix("s")).unwrap();
        reached(&again, &m.at("s"));
        reached(&agent, &m.at("link"));
        drop(again);
        assert_eq!(refused(&m.at("s")), ErrorKind::ConnectionRefused);
        assert!(m.host("s").exists());
        // Only a socket that is there.
        fs::write(m.host("f"), b"").unwrap();
        let error = |name| {
            UnixListener::bind(at_suffix(name))
                .unwrap_err()
                .raw_os_error()
        };
        assert_eq!(error("f"), Some(libc::ENOTSOCK));
        assert_eq!(error("none"), Some(libc::ENOENT));
    }
}

#[test]
fn a_file_without_a_name_gets_one() {
    let m = Mounted::new(CACHED);
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    let fd = open(m.point.path(), flags, Mode::from_bits_truncate(0o600)).unwrap();
    let mut file = File::from(fd);
    file.write_all(b"tmp").unwrap();
    assert_eq!(fs::read_dir(m.share.path()).unwrap().count(), 0);
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(
        AT_FDCWD,
        name.as_str(),
        AT_FDCWD,
        &m.at("named"),
        AtFlags::AT_SYMLINK_FOLLOW,
    )
    .unwrap();
    drop(file);
    assert_eq!(fs::read(m.at("named")).unwrap(), b"tmp");
    assert_eq!(fs::metadata(m.host("named")).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_directory_of_100_000_entries_is_read_whole() {
    const COUNT: usize = 100_000;
    let m = Mounted::new(CACHED);
    for number in 0..COUNT {
        File::create(m.host(&format!("entry-{number:06}"))).unwrap();
    }
    let names = |dir: &Path| -> Vec<_> {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    };
    let seen = names(m.point.path());
    let unique: HashSet<_> = seen.iter().collect();
    assert_eq!((seen.len(), unique.len()), (COUNT, COUNT));
    // Removing while reading misses nothing that stays, and ends.
    for entry in fs::read_dir(m.point.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(names(m.share.path()).len(), 0);
}

#[test]
fn seeking_in_a_directory_goes_back_to_the_same_place() {
    let m = Mounted::new(NO_CACHE);
    for number in 0..3000 {
        File::create(m.host(&format!("a-rather-long-name-for-an-entry-{number}"))).unwrap();
    }
    let path = c_path(m.point.path());
    // SAFETY: the stream is checked, used by this thread only, and closed once; names are copied before the next call.
    unsafe {
        let dir = libc::opendir(path.as_ptr());
        assert!(!dir.is_null());
        let next = || {
            let entry = libc::readdir64(dir);
            (!entry.is_null())
                .then(|| std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()).to_owned())
        };
        for _ in 0..1500 {
            next().unwrap();
        }
        let cookie = libc::telldir(dir);
        let after: Vec<_> = std::iter::from_fn(next).collect();
        libc::seekdir(dir, cookie);
        let again: Vec<_> = std::iter::from_fn(next).collect();
        assert_eq!(after, again);
        assert_eq!(after.len(), 3002 - 1500);
        libc::rewinddir(dir);
        assert_eq!(std::iter::from_fn(next).count(), 3002);
        libc::closedir(dir);
    }
}

#[test]
fn a_file_deleted_while_open_lives_on() {
    let m = Mounted::new(CACHED);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(m.at("f"))
        .unwrap();
    fs::remove_file(m.at("f")).unwrap();
    file.write_all(b"still here").unwrap();
    file.set_len(5).unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_permissions(fs::Permissions::from_mode(0o600))
        .unwrap();
}

#[test]
fn sparse_files_and_fallocate() {
    let m = Mounted::new(CACHED);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(m.at("f"))
        .unwrap();
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    assert_eq!(lseek64(file.as_fd(), 0, Whence::SeekData), Ok(1 << 20));
    assert_eq!(
        lseek64(file.as_fd(), 1 << 20, Whence::SeekHole),
        Ok((1 << 20) + 4096)
    );
    assert_eq!(
        lseek64(file.as_fd(), 2 << 20, Whence::SeekData),
        Err(Errno::ENXIO)
    );
    fallocate(
        file.as_fd(),
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        8 << 20,
    )
    .unwrap();
    assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 4096);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), punch, 1 << 20, 4096).unwrap();
    let mut page = [1; 4096];
    file.read_exact_at(&mut page, 1 << 20).unwrap();
    assert_eq!(page, [0; 4096]);
    file.set_len(0).unwrap();
    assert_eq!(fs::metadata(m.host("f")).unwrap().len(), 0);
}

#[test]
fn ranges_are_copied_by_the_host() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("a"), vec![7; 3 << 20]).unwrap();
    fs::copy(m.at("a"), m.at("b")).unwrap();
    assert_eq!(fs::read(m.host("b")).unwrap(), vec![7; 3 << 20]);
    let asked = m
        .engine
        .stats()
        .requests
        .iter()
        .any(|(name, _)| *name == "copy_file_range");
    assert!(asked, "the kernel had copy_file_range do it");
}

fn map(file: &File, flags: libc::c_int) -> &'static mut [u8] {
    // SAFETY: the mapping is new, 8192 bytes long, and never unmapped; the test does not grow or shrink the file.
    unsafe {
        let start = libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(
            start,
            libc::MAP_FAILED,
            "{}",
            std::io::Error::last_os_error()
        );
        std::slice::from_raw_parts_mut(start.cast(), 8192)
    }
}

#[test]
fn mappings_shared_and_private() {
    for cache in [NO_CACHE, CACHED] {
        let m = Mounted::new(cache);
        fs::write(m.at("f"), vec![b'a'; 8192]).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(m.at("f"))
            .unwrap();
        // An append handle must not turn the write-back of a mapping into an append.
        let _append = File::options().append(true).open(m.at("f")).unwrap();
        let shared = map(&file, libc::MAP_SHARED);
        let private = map(&file, libc::MAP_PRIVATE);
        private[0] = b'p';
        shared[5000] = b's';
        // SAFETY: the range is that of the mapping.
        let synced = unsafe { libc::msync(shared.as_mut_ptr().cast(), 8192, libc::MS_SYNC) };
        assert_eq!(synced, 0);
        let host = fs::read(m.host("f")).unwrap();
        assert_eq!((host.len(), host[0], host[5000]), (8192, b'a', b's'));
    }
}

#[test]
fn appends_land_at_the_end_that_the_host_knows() {
    let m = Mounted::new(CACHED);
    let mut guest = File::options()
        .append(true)
        .create(true)
        .open(m.at("log"))
        .unwrap();
    let mut host = File::options().append(true).open(m.host("log")).unwrap();
    for _ in 0..100 {
        guest.write_all(b"guest\n").unwrap();
        host.write_all(b"host\n").unwrap();
    }
    assert_eq!(fs::metadata(m.host("log")).unwrap().len(), 1100);
}

#[test]
fn names_of_255_bytes_and_more_than_1024_open_files() {
    let m = Mounted::new(CACHED);
    let longest = "n".repeat(255);
    fs::write(m.at(&longest), b"").unwrap();
    assert!(m.host(&longest).exists());
    let longer = fs::write(m.at(&"n".repeat(256)), b"").unwrap_err();
    assert_eq!(longer.raw_os_error(), Some(libc::ENAMETOOLONG));
    let files: Vec<File> = (0..5000)
        .map(|number| File::create(m.at(&format!("f{number}"))).unwrap())
        .collect();
    assert!(m.engine.stats().handles >= 5000);
    for (number, file) in files.iter().enumerate() {
        file.write_all_at(number.to_string().as_bytes(), 0).unwrap();
    }
    assert_eq!(fs::read(m.host("f4999")).unwrap(), b"4999");
}

#[test]
fn attributes_acls_and_capabilities() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("f"), b"").unwrap();
    let path = c_path(&m.at("f"));
    let set = |name: &str, value: &[u8]| {
        let name = CString::new(name).unwrap();
        // SAFETY: the strings are NUL-terminated and value is readable for its length.
        Errno::result(unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        })
    };
    set("user.colour", b"blue").unwrap();
    assert_eq!(set("security.selinux", b"1"), Err(Errno::EOPNOTSUPP));
    // cap_net_bind_service+ep, revision 2.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("security.capability", &capability).unwrap();
    let mut names = [0_u8; 256];
    // SAFETY: names is writable for its length.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let listed = String::from_utf8_lossy(&names[..length as usize]).into_owned();
    assert!(
        listed.contains("user.colour\0") && listed.contains("security.capability\0"),
        "{listed:?}"
    );
    let host = c_path(&m.host("f"));
    // SAFETY: names is writable for its length.
    let length = unsafe {
        libc::getxattr(
            host.as_ptr(),
            c"user.colour".as_ptr(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    };
    assert_eq!(&names[..length as usize], b"blue");
    // A write drops the capability.
    File::options()
        .append(true)
        .open(m.at("f"))
        .unwrap()
        .write_all(b"x")
        .unwrap();
    // SAFETY: names is writable for its length.
    let gone = unsafe {
        libc::getxattr(
            host.as_ptr(),
            c"security.capability".as_ptr(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    };
    assert_eq!(gone, -1);
}

/// One ACL entry: tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn access_control_lists_decide_and_are_inherited() {
    let m = Mounted::new(CACHED);
    fs::create_dir(m.at("d")).unwrap();
    fs::set_permissions(m.at("d"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = c_path(&m.at("d"));
    // user::rwx user:1000:rwx group::r-x mask::rwx other::r-x
    let list = acl(&[
        (1, 7, u32::MAX),
        (2, 7, 1000),
        (4, 5, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 5, u32::MAX),
    ]);
    for name in [c"system.posix_acl_access", c"system.posix_acl_default"] {
        // SAFETY: the strings are NUL-terminated and the list is readable for its length.
        let result = unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                list.as_ptr().cast(),
                list.len(),
                0,
            )
        };
        Errno::result(result).unwrap();
    }
    shell_as(1000, 1000, &m.at("d"), "umask 077; echo x > by-acl");
    let denied = std::panic::catch_unwind(|| shell_as(1001, 1001, &m.at("d"), "echo x > denied"));
    assert!(denied.is_err());
    // A default ACL takes the umask's place: the mask is what open's 0666 leaves of it.
    assert_eq!(
        fs::metadata(m.host("d/by-acl")).unwrap().mode() & 0o777,
        0o664
    );
}

/// The same calls on the bare file system and on the share.
#[test]
fn access_control_lists_are_those_of_the_bare_file_system() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o777)).unwrap();
    program("acl.py", &["outside"], bare.path());
    let control = program("acl.py", &["inside"], bare.path());
    let m = Mounted::new(CACHED);
    program("acl.py", &["outside"], m.share.path());
    assert_same(&control, &program("acl.py", &["inside"], m.point.path()));
}

#[test]
fn set_id_bits_and_capabilities_go_as_on_the_bare_file_system() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let control = program("set_id.py", &[], bare.path());
    let m = Mounted::new(CACHED);
    assert_same(&control, &program("set_id.py", &[], m.point.path()));
}

#[test]
fn overlays_mount_and_leave_nothing_trusted_on_the_host() {
    let bare = tempfile::tempdir().unwrap();
    fs::set_permissions(bare.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let control = program("overlay.py", &[], bare.path());
    let m = Mounted::new(CACHED);
    assert_same(&control, &program("overlay.py", &[], m.point.path()));
    let names = |path: &Path| {
        let mut names = [0_u8; 1024];
        let path = c_path(path);
        // SAFETY: the path is NUL-terminated and names is writable for its length.
        let length =
            unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
        String::from_utf8_lossy(&names[..length as usize]).into_owned()
    };
    let ours = "user.bulkhead.trusted.overlay.opaque\0";
    assert!(names(&m.host("defaults/u/d")).contains(ours));
    for path in ["f", "dir", "defaults/u/d", "redirect_dir=on/u/there"] {
        let names = names(&m.host(path));
        assert!(
            !names.contains("\0trusted.") && !names.starts_with("trusted."),
            "{names:?}"
        );
    }
    // The name on the host is none in the guest.
    let path = c_path(&m.at("dir"));
    let raw = c"user.bulkhead.trusted.d";
    let mut value = [0_u8; 16];
    // SAFETY: the strings are NUL-terminated and the value is writable for its length.
    let (got, set) = unsafe {
        let value = value.as_mut_ptr().cast();
        (
            Errno::result(libc::getxattr(path.as_ptr(), raw.as_ptr(), value, 16)),
            Errno::result(libc::setxattr(path.as_ptr(), raw.as_ptr(), value, 1, 0)),
        )
    };
    assert_eq!((got, set), (Err(Errno::ENODATA), Err(Errno::EPERM)));
    assert_eq!(names(&m.at("dir")), "trusted.d\0");
}

/// A user namespace that maps `inside` and the nine ids behind it to `outside`.
fn user_namespace(inside: u32, outside: u32) -> File {
    use std::os::unix::process::CommandExt;

    let mut command = std::process::Command::new("sleep");
    // SAFETY: the child calls nothing but unshare(2) before it executes.
    unsafe {
        command.arg("60").pre_exec(|| {
            Errno::result(libc::unshare(libc::CLONE_NEWUSER))?;
            Ok(())
        });
    }
    let mut holder = command.spawn().unwrap();
    let proc = format!("/proc/{}", holder.id());
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("{proc}/{map}"), format!("{inside} {outside} 10")).unwrap();
    }
    let namespace = File::open(format!("{proc}/ns/user")).unwrap();
    holder.kill().unwrap();
    holder.wait().unwrap();
    namespace
}

#[test]
fn a_mount_of_other_ids_shows_and_makes_mapped_owners() {
    use nix::mount::{MntFlags, umount2};
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }

    let m = Mounted::new(CACHED);
    fs::set_permissions(m.at("."), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(m.at("of root"), "").unwrap();
    let mapped = tempfile::tempdir().unwrap();
    fs::set_permissions(mapped.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // What belongs to 0 on the share belongs to 1000 on the mount.
    let namespace = user_namespace(0, 1000);
    let attributes = MountAttr {
        set: 0x10_0000, // MOUNT_ATTR_IDMAP
        clear: 0,
        propagation: 0,
        user_namespace: namespace.as_raw_fd() as u64,
    };
    let (from, to) = (c_path(m.point.path()), c_path(mapped.path()));
    // SAFETY: the paths are NUL-terminated, the attributes have the size that is passed, and the
    // descriptor is closed once.
    unsafe {
        let open_tree_clone = 1;
        let tree = libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            from.as_ptr(),
            open_tree_clone,
        );
        Errno::result(tree).unwrap();
        Errno::result(libc::syscall(
            libc::SYS_mount_setattr,
            tree,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttr>(),
        ))
        .expect("the share can be mapped");
        let empty_from = 4; // MOVE_MOUNT_F_EMPTY_PATH
        let moved = libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            empty_from,
        );
        Errno::result(moved).unwrap();
        libc::close(tree as i32);
    }
    let owner = |path: &Path| {
        let status = fs::symlink_metadata(path).unwrap();
        (status.uid(), status.gid())
    };
    assert_eq!(owner(&mapped.path().join("of root")), (1000, 1000));
    let script =
        "echo x > f; mkdir d; ln -s f s; mkfifo p; mv f g; chmod 600 g; echo y >> g; cat g";
    shell_as(1000, 1000, mapped.path(), script);
    for name in ["g", "d", "s", "p"] {
        assert_eq!(owner(&m.host(name)), (0, 0), "{name}");
        assert_eq!(owner(&mapped.path().join(name)), (1000, 1000), "{name}");
    }
    std::os::unix::fs::chown(mapped.path().join("g"), Some(1003), Some(1004)).unwrap();
    assert_eq!(owner(&m.host("g")), (3, 4));
    umount2(mapped.path(), MntFlags::MNT_DETACH).unwrap();
}

/// How often the kernel has asked for something.
fn asked(m: &Mounted, what: &str) -> u64 {
    let requests = m.engine.stats().requests;
    let of = |(name, count): &(&str, u64)| (*name == what).then_some(*count);
    requests.iter().find_map(of).unwrap_or(0)
}

/// Opens, reads and asks for no attributes, which would show the kernel a change by themselves.
fn read_only(path: &Path) -> String {
    let mut text = [0; 64];
    let length = File::open(path).unwrap().read(&mut text).unwrap();
    String::from_utf8_lossy(&text[..length]).into_owned()
}

#[test]
fn what_the_host_wrote_is_read_by_the_next_open() {
    let m = Mounted::new(CACHED);
    let path = |name: &str| m.host(name);
    let write_at_start = |name: &str, text: &str| {
        let file = File::options().write(true).open(path(name)).unwrap();
        file.write_all_at(text.as_bytes(), 0).unwrap();
    };
    let stamps = |name: &str| fs::metadata(path(name)).unwrap().modified().unwrap();
    type Change<'a> = Box<dyn Fn(&str) + 'a>;
    let ways: [(&str, &str, Change); 9] = [
        (
            "rewritten",
            "NEW",
            Box::new(|name| write_at_start(name, "NEW")),
        ),
        (
            "grown",
            "old and more",
            Box::new(|name| {
                let mut file = File::options().append(true).open(path(name)).unwrap();
                file.write_all(b" and more").unwrap();
            }),
        ),
        (
            "shrunk",
            "o",
            Box::new(|name| {
                File::options()
                    .write(true)
                    .open(path(name))
                    .unwrap()
                    .set_len(1)
                    .unwrap();
            }),
        ),
        (
            "truncated and written",
            "NEW",
            Box::new(|name| fs::write(path(name), "NEW").unwrap()),
        ),
        (
            "rewritten with the old time",
            "NEW",
            Box::new(|name| {
                let before = stamps(name);
                let file = File::options().write(true).open(path(name)).unwrap();
                file.write_all_at(b"NEW", 0).unwrap();
                file.set_modified(before).unwrap();
            }),
        ),
        (
            "replaced",
            "NEW",
            Box::new(|name| {
                fs::write(path("new"), "NEW").unwrap();
                fs::rename(path("new"), path(name)).unwrap();
            }),
        ),
        (
            "replaced with the old time",
            "NEW",
            Box::new(|name| {
                let before = stamps(name);
                fs::write(path("new"), "NEW").unwrap();
                let file = File::options().write(true).open(path("new")).unwrap();
                file.set_modified(before).unwrap();
                fs::rename(path("new"), path(name)).unwrap();
            }),
        ),
        (
            "moved away and replaced",
            "NEW",
            Box::new(|name| {
                fs::rename(path(name), path("old")).unwrap();
                fs::write(path(name), "NEW").unwrap();
            }),
        ),
        (
            "removed and made again",
            "NEW",
            Box::new(|name| {
                fs::remove_file(path(name)).unwrap();
                fs::write(path(name), "NEW").unwrap();
            }),
        ),
    ];
    for (name, new, change) in &ways {
        fs::create_dir_all(m.host("dir")).unwrap();
        let name = format!("dir/{name}");
        fs::write(m.host(&name), "old").unwrap();
        assert_eq!(read_only(&m.at(&name)), "old");
        // Time stamps of the host are as coarse as its clock's tick.
        std::thread::sleep(std::time::Duration::from_millis(20));
        change(&name);
        assert_eq!(read_only(&m.at(&name)), *new, "{name}");
    }
    // By a mapping: the host's kernel stamps the file when the page is written to first.
    fs::write(m.host("mapped"), vec![b'a'; 8192]).unwrap();
    assert_eq!(fs::read(m.at("mapped")).unwrap()[0], b'a');
    std::thread::sleep(std::time::Duration::from_millis(20));
    let file = File::options()
        .read(true)
        .write(true)
        .open(m.host("mapped"))
        .unwrap();
    map(&file, libc::MAP_SHARED)[0] = b'm';
    assert_eq!(fs::read(m.at("mapped")).unwrap()[0], b'm');
    // And a mapping inside, made by a new open.
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(m.host("plain"), vec![b'a'; 8192]).unwrap();
    assert_eq!(fs::read(m.at("plain")).unwrap()[0], b'a');
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(m.host("plain"), vec![b'b'; 8192]).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(m.at("plain"))
        .unwrap();
    assert_eq!(map(&file, libc::MAP_SHARED)[0], b'b');
}

/// open(2) walks its path again once only: what goes on changing opens all the same.
#[test]
fn a_file_that_the_host_writes_all_the_time_can_be_opened() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let m = Mounted::new(CACHED);
    fs::write(m.host("log"), "").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut log = File::options().append(true).open(m.host("log")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                log.write_all(b"x").unwrap();
            }
        });
        let opened = std::panic::catch_unwind(|| {
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for _ in 0..1000 {
                            File::open(m.at("log")).unwrap();
                        }
                    });
                }
            });
        });
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        opened.unwrap();
    });
}

#[test]
fn what_the_guest_changes_itself_costs_it_no_cache_at_each_open() {
    let m = Mounted::new(CACHED);
    let content = vec![7; 1 << 20];
    fs::write(m.at("f"), &content).unwrap();
    let read = || assert!(fs::read(m.at("f")).unwrap() == content);
    // The kernel drops the pages that it has written itself when it learns their modification time.
    read();
    let cached = |what: &str, change: &dyn Fn()| {
        change();
        let (reads, opens) = (asked(&m, "read"), asked(&m, "open"));
        read();
        assert_eq!(asked(&m, "read"), reads, "{what}");
        assert_eq!(asked(&m, "open"), opens + 1, "{what}: opened again");
    };
    cached("nothing", &|| {});
    let mode = |mode| fs::set_permissions(m.at("f"), fs::Permissions::from_mode(mode)).unwrap();
    cached("chmod", &|| mode(0o600));
    cached("chown", &|| {
        std::os::unix::fs::chown(m.at("f"), Some(5), None).unwrap()
    });
    cached("link", &|| fs::hard_link(m.at("f"), m.at("g")).unwrap());
    cached("rename", &|| {
        fs::rename(m.at("f"), m.at("h")).unwrap();
        fs::rename(m.at("h"), m.at("f")).unwrap();
    });
    cached("attribute", &|| {
        let path = c_path(&m.at("f"));
        // SAFETY: the strings are NUL-terminated and the value is readable for its length.
        let set = unsafe {
            libc::setxattr(
                path.as_ptr(),
                c"user.a".as_ptr(),
                c"v".as_ptr().cast(),
                1,
                0,
            )
        };
        Errno::result(set).unwrap();
    });
    // A write is read back once, however often the file is opened.
    File::options()
        .write(true)
        .open(m.at("f"))
        .unwrap()
        .write_all_at(&[7; 10], 0)
        .unwrap();
    read();
    for _ in 0..3 {
        cached("after a write", &|| {});
    }
    // Removed and open: the kernel opens it again through /proc.
    let file = File::open(m.at("f")).unwrap();
    fs::remove_file(m.at("f")).unwrap();
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
}

#[test]
fn what_a_user_makes_is_that_users() {
    let m = Mounted::new(CACHED);
    fs::set_permissions(m.at("."), fs::Permissions::from_mode(0o777)).unwrap();
    shell_as(
        1000,
        1001,
        m.point.path(),
        "umask 027; echo x > f; mkdir d; ln -s x s; mkfifo p; touch d/g",
    );
    for (name, mode) in [("f", 0o640), ("d", 0o750), ("p", 0o640)] {
        let host = fs::metadata(m.host(name)).unwrap();
        assert_eq!(
            (host.uid(), host.gid(), host.mode() & 0o777),
            (1000, 1001, mode),
            "{name}"
        );
    }
    let link = fs::symlink_metadata(m.host("s")).unwrap();
    assert_eq!((link.uid(), link.gid()), (1000, 1001));
    fs::write(m.at("root"), b"").unwrap();
    assert_eq!(fs::metadata(m.host("root")).unwrap().uid(), 0);
    shell_as(
        1000,
        1001,
        m.point.path(),
        "! echo y 2>/dev/null > root; chmod 600 f; ! chown 0 f 2>/dev/null",
    );
    shell_as(
        2000,
        2000,
        m.point.path(),
        "! cat f 2>/dev/null; ! rm -f d/g 2>/dev/null",
    );
    assert!(m.host("d/g").exists());
}

#[test]
fn set_id_bits_go_when_others_write_and_cannot_be_smuggled_in() {
    let m = Mounted::new(CACHED);
    fs::write(m.at("suid"), b"x").unwrap();
    let mode = |name: &str| fs::metadata(m.host(name)).unwrap().mode() & 0o7777;
    fs::set_permissions(m.at("suid"), fs::Permissions::from_mode(0o6777)).unwrap();
    assert_eq!(mode("suid"), 0o6777);
    // Root keeps them, others do not.
    File::options()
        .append(true)
        .open(m.at("suid"))
        .unwrap()
        .write_all(b"y")
        .unwrap();
    assert_eq!(mode("suid"), 0o6777);
    shell_as(1000, 1000, m.point.path(), "echo z >> suid");
    assert_eq!(mode("suid"), 0o777);
    fs::set_permissions(m.at("suid"), fs::Permissions::from_mode(0o6777)).unwrap();
    shell_as(1000, 1000, m.point.path(), ": > suid");
    assert_eq!(mode("suid"), 0o777);
    // CVE-2022-0358: a file made in a set-group-id directory of a foreign group keeps no executable set-group-id bit.
    fs::create_dir(m.at("shared")).unwrap();
    std::os::unix::fs::chown(m.at("shared"), Some(0), Some(42)).unwrap();
    fs::set_permissions(m.at("shared"), fs::Permissions::from_mode(0o2777)).unwrap();
    shell_as(
        1000,
        1000,
        &m.at("shared"),
        "python3 -c 'import os; os.umask(0); os.close(os.open(\"f\", os.O_CREAT | os.O_WRONLY, 0o2777))'",
    );
    let made = fs::metadata(m.host("shared/f")).unwrap();
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o7777),
        (1000, 42, 0o777)
    );
}

#[test]
fn pipes_and_sockets_are_the_guests_own() {
    let m = Mounted::new(CACHED);
    shell_as(
        0,
        0,
        m.point.path(),
        "mkfifo p; (echo through > p) & cat p > out; wait",
    );
    assert_eq!(fs::read(m.host("out")).unwrap(), b"through\n");
    let _listener = std::os::unix::net::UnixListener::bind(m.at("socket")).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(m.at("socket")).unwrap();
    stream.write_all(b"x").unwrap();
    assert!(
        fs::metadata(m.host("socket"))
            .unwrap()
            .file_type()
            .is_socket()
    );
    let device = nix::sys::stat::makedev(1, 3);
    let made = mknod(
        &m.at("null"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        device,
    );
    assert_eq!(made, Err(Errno::EPERM));
    mknod(&m.at("whiteout"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
}

#[test]
fn direct_io_needs_no_alignment_of_the_host() {
    let m = Mounted::new(CACHED);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(m.at("f"))
        .unwrap();
    file.write_all_at(&[9; 1000], 3).unwrap();
    let mut back = [0; 1000];
    file.read_exact_at(&mut back, 3).unwrap();
    assert_eq!(back, [9; 1000]);
}

#[test]
fn large_files_arrive_intact() {
    let m = Mounted::new(CACHED);
    let mut seed = 1_u64;
    let data: Vec<u8> = (0..(33 << 20) + 17)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        })
        .collect();
    fs::write(m.at("big"), &data).unwrap();
    assert!(fs::read(m.host("big")).unwrap() == data);
    let mut file = File::open(m.at("big")).unwrap();
    file.seek(SeekFrom::Start((20 << 20) + 5)).unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).unwrap();
    assert!(tail == data[(20 << 20) + 5..]);
    let size = nix::sys::statvfs::statvfs(m.point.path()).unwrap();
    assert!(size.blocks() > 0 && size.name_max() == 255);
}

#[test]
fn a_tree_is_let_go_while_it_is_used() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    let m = Mounted::new(NO_CACHE);
    fs::create_dir_all(m.host("c/rootfs")).unwrap();
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("hostname"), "guest").unwrap();
    let (stop, seen) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (stop, seen) = (stop.clone(), seen.clone());
            let (dir, file) = (m.at("c/rootfs"), m.at("c/rootfs/hostname"));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Detached or not mounted: any error, never another content.
                    if let Ok(text) = fs::read(&file) {
                        assert_eq!(text, b"guest");
                        seen.fetch_add(1, Ordering::Relaxed);
                    }
                    let _ = fs::read_dir(&dir).map(Iterator::count);
                }
            })
        })
        .collect();
    let detacher = std::thread::spawn(move || {
        let worker = bulkhead_vmm::fs::tree::identity::Worker::new().unwrap();
        let point = m.host("c/rootfs");
        for cycle in 0..100 {
            let none = None::<&str>;
            mount(Some(source.path()), &point, none, MsFlags::MS_BIND, none).unwrap();
            let before = seen.load(Ordering::Relaxed);
            let since = std::time::Instant::now();
            while seen.load(Ordering::Relaxed) < before + 3 {
                assert!(since.elapsed().as_secs() < 60, "{cycle}: nobody reads");
                std::thread::yield_now();
            }
            m.engine.detach(&worker, "c/rootfs").unwrap();
            // A look-up is refused only after it has found the mount, which is busy for that moment.
            let refused = std::time::Instant::now();
            while let Err(error) = umount2(&point, MntFlags::empty()) {
                assert_eq!(error, nix::errno::Errno::EBUSY, "{cycle}");
                assert!(refused.elapsed().as_secs() < 60, "{cycle}: stays busy");
            }
        }
        m
    });
    let _m = detacher.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}
