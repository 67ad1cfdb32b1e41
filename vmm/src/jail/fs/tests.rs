use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::OnceLock;

use super::*;
use crate::fs::tree::identity;
use crate::jail::tests::{ACCEPTED, isolated};

mod landlock;

/// `struct file_handle` of linux/fcntl.h with the most bytes that a file system may use.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; 128],
}

impl FileHandle {
    fn of(path: &CStr) -> io::Result<FileHandle> {
        let mut handle = FileHandle {
            bytes: 128,
            kind: 0,
            handle: [0; 128],
        };
        let mut mount = 0;
        // SAFETY: the path is NUL-terminated, and the handle has the room that it says.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                libc::AT_FDCWD,
                path.as_ptr(),
                &raw mut handle,
                &raw mut mount,
                0,
            )
        })?;
        Ok(handle)
    }

    /// Opens the file by any descriptor of its file system.
    fn open(&self, file_system: &File) -> io::Result<String> {
        // SAFETY: the handle lives over the call.
        let fd = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                file_system.as_raw_fd(),
                self,
                libc::O_RDONLY,
            )
        })?;
        // SAFETY: the kernel has just made this descriptor and nobody else knows it.
        io::read_to_string(unsafe { File::from_raw_fd(fd as i32) })
    }
}

/// A file system on `/mnt` that only this process sees.
fn disk() -> Result<(), String> {
    const NONE: Option<&str> = None;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(NONE, "/", NONE, private, NONE).map_err(|error| error.to_string())?;
    mount(Some("disk"), "/mnt", Some("tmpfs"), MsFlags::empty(), NONE)
        .map_err(|error| error.to_string())
}

/// The attack: code in the fs process opens a file that lies beside the share on the share's file
/// system.
#[test]
fn a_file_handle_leads_nowhere_from_the_jail() {
    isolated(|| {
        let text = |error: io::Error| error.to_string();
        disk()?;
        fs::create_dir("/mnt/share").map_err(text)?;
        fs::write("/mnt/shadow", "root:").map_err(text)?;
        let handle = FileHandle::of(c"/mnt/shadow").map_err(text)?;
        let before = handle.open(&File::open("/mnt/share").map_err(text)?);
        if before.map_err(text)? != "root:" {
            return Err("the handle does not lead to the file: a bad test".to_owned());
        }
        enter("/mnt/share", ACCEPTED).map_err(|error| format!("{error:?}"))?;
        let share = File::open(SHARE).map_err(text)?;
        match handle.open(&share).map_err(|error| error.raw_os_error()) {
            Err(Some(libc::EPERM)) => Ok(()),
            other => Err(format!("ESCAPED: {other:?}")),
        }
    });
}

/// KEYCTL_SEARCH of the user keyring (keyctl(2), keyrings(7)) for a key of the test's.
fn search_users_keyring() -> Result<i64, Errno> {
    const KEYCTL_SEARCH: libc::c_int = 10;
    const USER_KEYRING: libc::c_int = -4;
    // SAFETY: both strings are NUL-terminated.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_SEARCH,
            USER_KEYRING,
            c"user".as_ptr(),
            c"bulkhead-test".as_ptr(),
            0,
        )
    })
}

fn add_to_users_keyring() -> Result<i64, Errno> {
    const USER_KEYRING: libc::c_int = -4;
    let secret = b"hunter2";
    // SAFETY: the strings are NUL-terminated and the secret has its length.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            c"bulkhead-test".as_ptr(),
            secret.as_ptr(),
            secret.len(),
            USER_KEYRING,
        )
    })
}

/// The attacks: root's keyring (where a disk's passphrase may be), namespaces to get all
/// capabilities in, root's inotify instances for the whole node.
#[test]
fn the_process_is_root_of_a_user_namespace_of_its_own() {
    isolated(|| {
        let text = |error: io::Error| error.to_string();
        disk()?;
        let keyrings = match add_to_users_keyring() {
            Err(Errno::ENOSYS) => {
                eprintln!("SKIPPED: this kernel has no keyrings");
                false
            }
            added => {
                added
                    .and_then(|_| search_users_keyring())
                    .map_err(|error| error.to_string())?;
                true
            }
        };
        enter("/mnt", ACCEPTED).map_err(|error| format!("{error:?}"))?;
        let map = fs::read_to_string("/proc/self/uid_map").map_err(text)?;
        if map.split_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"] {
            return Err(format!("the users are {map:?}"));
        }
        if keyrings && search_users_keyring() != Err(Errno::ENOKEY) {
            return Err("a key of root's user keyring is found".to_owned());
        }
        let namespace = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER);
        if namespace != Err(Errno::ENOSPC) {
            return Err(format!("a user namespace: {namespace:?}"));
        }
        // SAFETY: takes a number only.
        let inotify = Errno::result(unsafe { libc::inotify_init1(0) });
        match inotify {
            Err(Errno::EMFILE) => Ok(()),
            other => Err(format!("inotify: {other:?}")),
        }
    });
}

/// A kernel with more than one thread in the process refuses a user namespace, also when the other
/// has done its work.
#[test]
fn a_thread_that_is_about_to_go_is_waited_for() {
    isolated(|| {
        disk()?;
        std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_millis(50)));
        enter("/mnt", ACCEPTED)
            .map(drop)
            .map_err(|error| format!("{error:?}"))
    });
}

/// linux/capability.h: VFS_CAP_REVISION_2 with the effective flag; CAP_NET_BIND_SERVICE is
/// permitted.
const CAPABILITY: [u8; 20] = {
    let mut bytes = [0; 20];
    bytes[0] = 1;
    bytes[3] = 2;
    bytes[5] = 4;
    bytes
};

fn capability_of(path: &CStr) -> Result<Vec<u8>, Errno> {
    let mut value = [0_u8; 64];
    let name = c"security.capability";
    // SAFETY: the strings are NUL-terminated, and the buffer has its length.
    let length = Errno::result(unsafe {
        let (path, name) = (path.as_ptr(), name.as_ptr());
        libc::getxattr(path, name, value.as_mut_ptr().cast(), value.len())
    })?;
    Ok(value[..length as usize].to_vec())
}

/// On the host, what the process writes is what root writes: capabilities of files are of the form
/// that every kernel takes for root's, whiteouts are made, owners are anybody.
#[test]
fn in_the_namespace_files_are_the_hosts() {
    static SHARE_ON_HOST: OnceLock<tempfile::TempDir> = OnceLock::new();
    let share = SHARE_ON_HOST.get_or_init(|| tempfile::tempdir().unwrap());
    let program = share.path().join("program");
    fs::write(&program, "x").unwrap();
    let ran = isolated(|| {
        let share = SHARE_ON_HOST.get().expect("made above").path();
        enter(share.to_str().expect("a plain path"), ACCEPTED)
            .map_err(|error| format!("{error:?}"))?;
        let (program, name) = (c"/share/program", c"security.capability");
        let value = CAPABILITY.as_ptr().cast();
        // SAFETY: the strings are NUL-terminated, and the value has its length.
        Errno::result(unsafe {
            libc::setxattr(program.as_ptr(), name.as_ptr(), value, CAPABILITY.len(), 0)
        })
        .map_err(|error| format!("setxattr: {error}"))?;
        if capability_of(program) != Ok(CAPABILITY.to_vec()) {
            return Err(format!("inside it reads {:?}", capability_of(program)));
        }
        // SAFETY: the path is NUL-terminated.
        Errno::result(unsafe { libc::mknod(c"/share/whiteout".as_ptr(), libc::S_IFCHR, 0) })
            .map_err(|error| format!("a whiteout: {error}"))?;
        fs::write("/share/owned", "").map_err(|error| error.to_string())?;
        std::os::unix::fs::chown("/share/owned", Some(54321), Some(4_294_967_294))
            .map_err(|error| format!("chown: {error}"))
    });
    if ran {
        let path = CString::new(program.to_str().unwrap()).unwrap();
        assert_eq!(capability_of(&path), Ok(CAPABILITY.to_vec()));
        let whiteout = fs::symlink_metadata(share.path().join("whiteout")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        let owned = fs::metadata(share.path().join("owned")).unwrap();
        assert_eq!((owned.uid(), owned.gid()), (54321, 4_294_967_294));
    }
    // A static is never dropped.
    fs::remove_dir_all(share.path()).unwrap();
}

/// What the guest has in memory is not for the host's disk: no crash of the process writes it
/// there.
#[test]
fn the_process_leaves_no_core_dump() {
    isolated(|| {
        disk()?;
        enter("/mnt", ACCEPTED).map_err(|error| format!("{error:?}"))?;
        let undumpable = |when: &str| match nix::sys::prctl::get_dumpable() {
            Ok(false) => Ok(()),
            other => Err(format!("{when}: dumpable is {other:?}")),
        };
        undumpable("after the jail")?;
        let limit = getrlimit(Resource::RLIMIT_CORE).map_err(|error| error.to_string())?;
        if limit != (1, 1) {
            return Err(format!("a piped core dump is written: {limit:?}"));
        }
        let mut worker = identity::Worker::new().map_err(|error| error.to_string())?;
        // As the kernel has it after a change of ids where fs.suid_dumpable is not 0.
        nix::sys::prctl::set_dumpable(true).map_err(|error| error.to_string())?;
        worker
            .become_caller(1000, 1000, 0)
            .map_err(|error| error.to_string())?;
        undumpable("after a change of ids")
    });
}

#[test]
fn outside_of_a_namespace_of_its_own_nothing_is_done() {
    assert!(matches!(
        enter("/tmp", ACCEPTED),
        Err(JailError::NotIsolated)
    ));
}

#[test]
fn inodes_and_handles_share_the_limit_of_open_files() {
    let (inodes, handles) = raise_file_limit(1000, 100).unwrap();
    assert_eq!((inodes, handles), (1000, 100));
    // More than any system allows: both get a part.
    let (inodes, handles) = raise_file_limit(u64::MAX, u64::MAX).unwrap();
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(inodes > 0 && handles > 0);
    assert!((inodes + 2 * handles) as u64 + OTHER_FILES <= soft);
}
