//! The machine's network devices, as sysfs shows them.

use std::fs::{self, DirEntry};
use std::io;
use std::path::Path;

use super::NetworkError;

/// Indices of the interfaces that are devices, in the order in which they came: that of the host.
///
/// `sysfs` shows the network namespace of who mounted it.
pub(super) fn present(sysfs: &Path) -> Result<Vec<u32>, NetworkError> {
    let mut indices = Vec::new();
    for entry in list(&sysfs.join("class/net"))? {
        // What is made in software has no device.
        if !entry.path().join("device").exists() {
            continue;
        }
        let path = entry.path().join("ifindex");
        let index = fs::read_to_string(&path)
            .and_then(|text| text.trim().parse().map_err(io::Error::other))
            .map_err(|source| NetworkError::System {
                what: format!("read {}", path.display()),
                source,
            })?;
        indices.push(index);
    }
    indices.sort_unstable();
    Ok(indices)
}

/// Has the driver look at the slots that were empty when it last did: the host may have plugged something in.
pub(super) fn look_again(sysfs: &Path) -> Result<(), NetworkError> {
    let bind = sysfs.join("bus/platform/drivers/virtio-mmio/bind");
    let mut slots = Vec::new();
    for entry in list(&sysfs.join("bus/platform/devices"))? {
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("virtio-mmio."));
        let number = number.and_then(|number| number.parse::<u32>().ok());
        if let Some(number) = number.filter(|_| !entry.path().join("driver").exists()) {
            slots.push(number);
        }
    }
    // A guest's devices have numbers in the order in which they are bound.
    slots.sort_unstable();
    for number in slots {
        let name = format!("virtio-mmio.{number}");
        match fs::write(&bind, &name) {
            Ok(()) => {}
            // Still empty.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(source) => {
                return Err(NetworkError::System {
                    what: format!("bind {name} to its driver"),
                    source,
                });
            }
        }
    }
    Ok(())
}

fn list(directory: &Path) -> Result<Vec<DirEntry>, NetworkError> {
    fs::read_dir(directory)
        .and_then(Iterator::collect)
        .map_err(|source| NetworkError::System {
            what: format!("list {}", directory.display()),
            source,
        })
}
