//! The installed files that a machine is made from.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use super::error::Error;
use crate::{
    config::Config,
    sys::{mount::ReadOnlyFile, spawn::Executable},
    template::{Basis, Host, Identity, Shape},
};

/// What a machine is made from, opened before anything is taken. The files are on read-only mounts of their own: neither the
/// program's own `/proc/self/exe` nor a descriptor that the VMM is handed leads to a file of the host that can be written.
#[derive(Debug)]
pub struct Parts {
    pub(super) executable: Executable,
    pub(super) kvm: File,
    pub(super) kernel: File,
    pub(super) initrd: File,
}

impl Parts {
    /// Opens the device and the installed files.
    pub fn open(config: &Config) -> Result<Parts, Error> {
        const REINSTALL: &str =
            "install all parts of bulkhead again, or name it in the configuration";
        let installed = config.installed()?;
        const VMM: &str = "virtual machine monitor";
        regular(VMM, &installed.vmm, REINSTALL)?;
        let executable = Executable::at(&installed.vmm);
        let kvm = File::options()
            .read(true)
            .write(true)
            .open(&config.kvm_device);
        Ok(Parts {
            kvm: kvm.map_err(|source| Error::File {
                what: "KVM device",
                path: config.kvm_device.clone(),
                remedy: "load kvm_intel or kvm_amd, turn on virtualisation in the firmware, or on a cloud machine choose a type with nested virtualisation",
                source,
            })?,
            kernel: kernel("guest kernel", &installed.kernel, REINSTALL)?,
            initrd: regular("guest image", &installed.initramfs, REINSTALL)?,
            executable: executable.map_err(|source| Error::File {
                what: VMM,
                path: installed.vmm.clone(),
                remedy: remedy(&source, REINSTALL),
                source,
            })?,
        })
    }
}

impl Parts {
    /// What decides whether a machine made of them is like a saved one.
    pub fn basis(&self, config: &Config, shape: Shape) -> Result<Basis, Error> {
        let installed = config.installed()?;
        let of = |path: &Path, file: io::Result<Metadata>| {
            let identity = file.map(|file| Identity::of(path, &file));
            identity.map_err(|source| Error::File {
                what: "part",
                path: path.into(),
                remedy: "look at the file system that it is on",
                source,
            })
        };
        let files = [
            of(&installed.vmm, self.executable.metadata())?,
            of(&installed.kernel, self.kernel.metadata())?,
            of(&installed.initramfs, self.initrd.metadata())?,
        ];
        let host = Host::here().map_err(Error::Host)?;
        Ok(Basis::new(files, host, shape))
    }
}

/// The VMM checks the rest; it has a descriptor and cannot name the file.
fn kernel(what: &'static str, path: &Path, remedy: &'static str) -> Result<File, Error> {
    let file = regular(what, path, remedy)?;
    let mut magic = [0; 4];
    let read = file.read_exact_at(&mut magic, 0);
    let checked = read.and_then(|()| match &magic == b"\x7fELF" {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not an ELF executable",
        )),
    });
    checked.map_err(|source| Error::File {
        what,
        path: path.into(),
        remedy: "give the uncompressed vmlinux",
        source,
    })
}

fn regular(what: &'static str, path: &Path, remedy: &'static str) -> Result<File, Error> {
    let opened = ReadOnlyFile::at(path).and_then(|file| file.open());
    let opened = opened.and_then(|file| match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )),
    });
    opened.map_err(|source| Error::File {
        what,
        path: path.into(),
        remedy: self::remedy(&source, remedy),
        source,
    })
}

/// Mounts are root's; anything else has to do with the file.
fn remedy(error: &io::Error, otherwise: &'static str) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "run it as root",
        _ => otherwise,
    }
}
