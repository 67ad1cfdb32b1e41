//! POSIX behaviour of the share as a real kernel sees it: the engine behind `/dev/fuse`. Needs root
//! and /dev/fuse.

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

#[path = "fs_kernel/data.rs"]
mod data;
#[path = "fs_kernel/freshness.rs"]
mod freshness;
mod fs_support;
#[path = "fs_kernel/permissions.rs"]
mod permissions;

use fs_support::{CACHED, Mounted, NO_CACHE, assert_same, program, shell_as};

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn map(file: &File, flags: libc::c_int) -> &'static mut [u8] {
    // SAFETY: the mapping is new, 8192 bytes long, and never unmapped; the test does not grow or
    // shrink the file.
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
        // By another name of the inode too, and no more by this one when the host has another
        // socket there.
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
    // SAFETY: the stream is checked, used by this thread only, and closed once; names are copied
    // before the next call.
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
            // A look-up is refused only after it has found the mount, which is busy for that
            // moment.
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
