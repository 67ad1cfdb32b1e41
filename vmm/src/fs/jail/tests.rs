use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd};

use super::*;
use crate::jail::tests::isolated;

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
    let outcome = isolated(|| {
        let text = |error: io::Error| error.to_string();
        disk()?;
        fs::create_dir("/mnt/share").map_err(text)?;
        fs::write("/mnt/shadow", "root:").map_err(text)?;
        let handle = FileHandle::of(c"/mnt/shadow").map_err(text)?;
        let before = handle.open(&File::open("/mnt/share").map_err(text)?);
        if before.map_err(text)? != "root:" {
            return Err("the handle does not lead to the file: a bad test".to_owned());
        }
        enter("/mnt/share").map_err(|error| format!("{error:?}"))?;
        let share = File::open(SHARE).map_err(text)?;
        match handle.open(&share).map_err(|error| error.raw_os_error()) {
            Err(Some(libc::EPERM)) => Ok(()),
            other => Err(format!("ESCAPED: {other:?}")),
        }
    });
    if let Some(outcome) = outcome {
        outcome.unwrap();
    }
}

/// What the guest has in memory is not for the host's disk: no crash of the process writes it
/// there.
#[test]
fn the_process_leaves_no_core_dump() {
    let outcome = isolated(|| {
        disk()?;
        enter("/mnt").map_err(|error| format!("{error:?}"))?;
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
    if let Some(outcome) = outcome {
        outcome.unwrap();
    }
}

#[test]
fn outside_of_a_namespace_of_its_own_nothing_is_done() {
    assert!(matches!(enter("/tmp"), Err(JailError::NotIsolated)));
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
