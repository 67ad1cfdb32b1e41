//! The file system's process and the directory that it serves.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bulkhead_vmm_config::{CachePolicy, Fd, FsConfig, FsDevice, FsEvent, WIRE_VERSION};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::support::{Process, Setup, vmm};
use super::{pattern, plan};

/// A served directory; the process and the mount end when it is dropped.
pub struct Share {
    directory: TempDir,
    process: Process,
    _log: OwnedFd,
}

impl Share {
    /// Starts a process for a new directory and gives the machine its device.
    pub fn start(setup: &mut Setup) -> Share {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let no = None::<&Path>;
        mount(Some(path), path, no, MsFlags::MS_BIND, no).unwrap();
        mount(no, path, no, MsFlags::MS_SHARED, no).unwrap();
        fs::write(path.join("from-host"), pattern(1, plan::FILE)).unwrap();

        let (front, back) = UnixStream::pair().unwrap();
        let (lender, borrower) = linux::packet::pair().unwrap();
        let (log, log_end) = nix::unistd::pipe().unwrap();
        let process = Process::start(&vmm(), "fs");
        let queues = 2;
        let config = FsConfig {
            version: WIRE_VERSION,
            sandbox_id: "test".into(),
            share: path.to_str().unwrap().into(),
            socket: Fd(0),
            queues,
            cache: CachePolicy {
                entry_ms: 1000,
                attr_ms: 1000,
                keep_data: true,
            },
            max_inodes: 1000,
            max_handles: 1000,
            log: Fd(1),
            accept_missing: Vec::new(),
            lender: Some(Fd(2)),
        };
        let fds = [back.as_fd(), log_end.as_fd(), borrower.as_fd()];
        process.control().send_with(&config, &fds).unwrap();
        drop((back, log_end, borrower));
        match process.control().receive::<FsEvent>().unwrap().0 {
            FsEvent::Serving { .. } => {}
            other => panic!("{other:?}"),
        }
        setup.config.lender = Some(setup.add(lender));
        let socket = setup.add(front.into());
        setup.config.fs.push(FsDevice {
            tag: plan::TAG.into(),
            socket,
            queues,
        });
        Share {
            directory,
            process,
            _log: log,
        }
    }

    /// Ends the process and checks what the guest left.
    pub fn finish(mut self) {
        let written = fs::read(self.directory.path().join("from-guest")).unwrap();
        assert!(
            written == pattern(2, plan::FILE),
            "other bytes in the guest's file"
        );
        self.process.hang_up();
        self.process.wait();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}
