//! `linux.devices` and the device rules of `linux.resources`.

use bulkhead_agent_protocol::agent::{self, device::Kind};
use oci_spec::runtime::{self as spec, LinuxDeviceType as Type};

use super::{Error, invalid, unsupported};

pub(super) const HOST_DEVICE: &str = "it is a device of the host, and device numbers mean nothing in a guest; devices cannot be given to pods yet";

/// Devices without hardware, which every Linux kernel has: (major, minor, name in /dev).
const VIRTUAL: &[(u32, u32, &str)] = &[
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// The name of a device that the guest has too.
pub(super) fn guest_device(
    character: bool,
    major: impl TryInto<u32>,
    minor: impl TryInto<u32>,
) -> Option<&'static str> {
    let (major, minor) = (major.try_into().ok()?, minor.try_into().ok()?);
    let found = VIRTUAL
        .iter()
        .find(|device| (device.0, device.1) == (major, minor));
    found.filter(|_| character).map(|device| device.2)
}

pub(super) fn convert(list: &[spec::LinuxDevice]) -> Result<Vec<agent::Device>, Error> {
    list.iter().map(convert_one).collect()
}

fn convert_one(device: &spec::LinuxDevice) -> Result<agent::Device, Error> {
    let path = device.path().to_string_lossy().into_owned();
    let field = format!("linux.devices: {path}");
    if !path.starts_with('/') {
        return Err(invalid(field, "is not absolute"));
    }
    let kind = match device.typ() {
        Type::C | Type::U => Kind::CHAR,
        Type::B => Kind::BLOCK,
        Type::P => Kind::FIFO,
        Type::A => {
            return Err(invalid(
                field,
                "has the type \"a\", which is for rules only",
            ));
        }
    };
    if kind != Kind::FIFO
        && guest_device(kind == Kind::CHAR, device.major(), device.minor()).is_none()
    {
        let numbers = format!("{field} ({}:{})", device.major(), device.minor());
        return Err(unsupported(numbers, HOST_DEVICE));
    }
    let number = |number: i64| u32::try_from(number).unwrap_or(0);
    Ok(agent::Device {
        path,
        kind: kind.into(),
        major: number(device.major()),
        minor: number(device.minor()),
        // Engines send the whole st_mode of the host's node.
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        ..agent::Device::default()
    })
}

/// The rules in their order; the agent allows the default devices first.
pub(super) fn rules(list: &[spec::LinuxDeviceCgroup]) -> Result<Vec<agent::DeviceRule>, Error> {
    list.iter().map(rule).collect()
}

fn rule(rule: &spec::LinuxDeviceCgroup) -> Result<agent::DeviceRule, Error> {
    let kind = match rule.typ().unwrap_or(Type::A) {
        Type::A => b'a',
        Type::B => b'b',
        Type::C | Type::U => b'c',
        Type::P => {
            return Err(invalid(
                "linux.resources.devices",
                "has a rule of type \"p\"",
            ));
        }
    };
    let mut access = 0;
    // Absent or empty means every access, as runc and the kernel's v1 list have it.
    for letter in rule
        .access()
        .as_deref()
        .filter(|a| !a.is_empty())
        .unwrap_or("rwm")
        .chars()
    {
        access |= match letter {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            other => {
                let reason = format!("has the access {other:?}; r, w and m are allowed");
                return Err(invalid("linux.resources.devices", reason));
            }
        };
    }
    Ok(agent::DeviceRule {
        allow: rule.allow(),
        kind: kind.into(),
        major: rule.major().unwrap_or(-1),
        minor: rule.minor().unwrap_or(-1),
        access,
        ..agent::DeviceRule::default()
    })
}
