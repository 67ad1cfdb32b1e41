//! The fs process's engine behind `/dev/fuse`: a real kernel as its client, without a virtual machine.

#![allow(dead_code)] // Each test file uses a part.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_vmm::fs::guard::{self, HEADER};
use bulkhead_vmm::fs::tree::identity::Worker;
use bulkhead_vmm::fs::tree::sys;
use bulkhead_vmm::fs::tree::{Engine, Limits, Outcome, Payload};
use bulkhead_vmm::fs::wire::MAX_DATA;
use bulkhead_vmm_config::CachePolicy;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A payload in a vector.
#[derive(Default)]
pub struct Buffer {
    pub input: Vec<u8>,
    pub output: Vec<u8>,
}

impl Payload for Buffer {
    fn read_from(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Result<usize, Errno> {
        self.output.resize(length, 0);
        let part = libc::iovec {
            iov_base: self.output.as_mut_ptr().cast(),
            iov_len: length,
        };
        // SAFETY: the part is all of `output`, which nothing else refers to now.
        let count = unsafe { sys::read_parts(file, offset, &[part]) }?;
        self.output.truncate(count);
        Ok(count)
    }

    fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        append: bool,
    ) -> Result<usize, Errno> {
        let part = libc::iovec {
            iov_base: self.input.as_mut_ptr().cast(),
            iov_len: length.min(self.input.len()),
        };
        // SAFETY: the part is within `input`.
        unsafe { sys::write_parts(file, offset, &[part], append) }
    }
}

pub const NO_CACHE: CachePolicy = CachePolicy {
    entry_ms: 0,
    attr_ms: 0,
    keep_data: false,
};
pub const CACHED: CachePolicy = CachePolicy {
    entry_ms: 1000,
    attr_ms: 1000,
    keep_data: true,
};

/// A share and a mount of it.
pub struct Mounted {
    pub engine: Arc<Engine>,
    pub share: tempfile::TempDir,
    pub point: tempfile::TempDir,
}

impl Mounted {
    pub fn new(cache: CachePolicy) -> Mounted {
        Mounted::with_limits(
            cache,
            Limits {
                inodes: 500_000,
                handles: 100_000,
            },
        )
    }

    pub fn with_limits(cache: CachePolicy, limits: Limits) -> Mounted {
        // SAFETY: no memory is passed but the limit.
        unsafe {
            let limit = libc::rlimit {
                rlim_cur: 524_288,
                rlim_max: 524_288,
            };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) < 0 {
                eprintln!("RLIMIT_NOFILE cannot be raised");
            }
        }
        let share = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            share.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o777),
        )
        .unwrap();
        let point = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            point.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let root = OwnedFd::from(File::open(share.path()).unwrap());
        let engine = Arc::new(Engine::new(root, cache, limits).unwrap());
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .expect("/dev/fuse is needed");
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        mount(
            Some("bulkhead"),
            point.path(),
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("mounting needs root");
        for _ in 0..2 {
            let device = device.try_clone().unwrap();
            let engine = engine.clone();
            std::thread::spawn(move || serve(device, &engine));
        }
        Mounted {
            engine,
            share,
            point,
        }
    }

    /// A path in the mount.
    pub fn at(&self, name: &str) -> PathBuf {
        self.point.path().join(name)
    }

    /// The same on the host.
    pub fn host(&self, name: &str) -> PathBuf {
        self.share.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(self.point.path(), MntFlags::MNT_DETACH);
    }
}

fn serve(mut device: File, engine: &Engine) {
    let mut worker = Worker::new().unwrap();
    let mut bytes = vec![0; MAX_DATA as usize + 8192];
    let mut out = Vec::new();
    let mut payload = Buffer::default();
    loop {
        let total = match device.read(&mut bytes) {
            Ok(total) => total,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => panic!("reading /dev/fuse: {error}"),
        };
        let header = guard::header(&bytes[..HEADER]).unwrap();
        let head = guard::head_length(&header, total).unwrap();
        payload.input.clear();
        payload.input.extend_from_slice(&bytes[head..total]);
        payload.output.clear();
        let room = MAX_DATA as usize + 4096;
        let outcome = engine.serve(
            &mut worker,
            &bytes[..head],
            (total - head, room),
            &mut payload,
            &mut out,
        );
        if let Outcome::Reply { data } = outcome {
            out.extend_from_slice(&payload.output[..data]);
            // The caller may have been killed meanwhile.
            let _ = device.write(&out);
        }
    }
}

/// Runs a shell script as a user in a directory; its output.
pub fn shell_as(uid: u32, gid: u32, dir: &Path, script: &str) -> String {
    use std::os::unix::process::CommandExt;
    let output = std::process::Command::new("/bin/sh")
        .args(["-ec", script])
        .current_dir(dir)
        .uid(uid)
        .gid(gid)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// What a program of tests/e2e/posix prints when it is run with `words` and a directory.
pub fn program(name: &str, words: &[&str], dir: &Path) -> String {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/e2e/posix");
    // A mount namespace of its own: some mount.
    let output = std::process::Command::new("unshare")
        .args(["-m", "python3"])
        .arg(programs.join(name))
        .args(words)
        .arg(dir)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("unshare (util-linux) is needed");
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{name}: {errors}\n{text}");
    text
}

/// Checks that two outputs are the same, line by line.
pub fn assert_same(bare: &str, ours: &str) {
    let differ: Vec<String> = bare
        .lines()
        .zip(ours.lines())
        .filter(|(bare, ours)| bare != ours)
        .map(|(bare, ours)| format!("bare: {bare}\nours: {ours}"))
        .collect();
    assert!(differ.is_empty(), "{}", differ.join("\n"));
    assert_eq!(bare.lines().count(), ours.lines().count());
}
