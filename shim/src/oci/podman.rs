//! What Podman asks for that no container in a machine can have, refused by its own flags: config.json,
//! where it is something missing, or a device of many, is nothing that its users have written.

use std::collections::HashMap;

use oci_spec::runtime::{self as spec, LinuxNamespaceType as Type};

use super::{Error, HOST_NAMESPACES};

/// By this annotation Podman names itself.
const MANAGER: (&str, &str) = ("io.container.manager", "libpod");

/// By this one it says that a container is to have all of the host.
const PRIVILEGED: (&str, &str) = ("io.podman.annotations.privileged", "TRUE");

/// Flags that take a namespace out of config.json.
const FLAGS: [(Type, &str); 4] = [
    (Type::Network, "--network=host"),
    (Type::Pid, "--pid=host"),
    (Type::Ipc, "--ipc=host"),
    (Type::Uts, "--uts=host"),
];

/// Whether these are of a container that Podman has configured.
pub fn is_podmans(annotations: &HashMap<String, String>) -> bool {
    says(annotations, MANAGER)
}

fn says(annotations: &HashMap<String, String>, (name, value): (&str, &str)) -> bool {
    annotations.get(name).map(String::as_str) == Some(value)
}

/// Refuses it.
pub(super) fn refuse(spec: &spec::Spec) -> Result<(), Error> {
    let annotations = spec.annotations().as_ref();
    let Some(annotations) = annotations.filter(|all| is_podmans(all)) else {
        return Ok(());
    };
    if says(annotations, PRIVILEGED) {
        let reason = "the host's devices mean nothing in a guest; `--cap-add=all --security-opt seccomp=unconfined \
            --security-opt unmask=all` gives a container all of its own machine";
        return Err(flag("--privileged", reason));
    }
    let linux = spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.namespaces().as_deref());
    let listed = listed.unwrap_or_default();
    let missing = |(kind, _): &&(Type, _)| !listed.iter().any(|found| found.typ() == *kind);
    let Some((kind, name)) = FLAGS.iter().find(missing) else {
        return Ok(());
    };
    let known = HOST_NAMESPACES.iter().find(|(found, _, _)| found == kind);
    let reason = known.map_or("a guest has a name of its own", |(_, _, reason)| reason);
    let instead = match kind {
        Type::Network => "publish ports with -p, or use another runtime",
        _ => "leave it out, or use another runtime",
    };
    Err(flag(name, &format!("{reason}; {instead}")))
}

fn flag(name: &'static str, reason: &str) -> Error {
    Error::Flag {
        name,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(annotations: &[(&str, &str)], without: &str) -> Option<String> {
        let kinds = ["network", "pid", "ipc", "uts", "mount"];
        let kinds = kinds.iter().filter(|kind| **kind != without);
        let listed: Vec<_> = kinds.map(|kind| json!({"type": kind})).collect();
        let config = json!({
            "ociVersion": "1.2.0",
            "annotations": annotations.iter().copied().collect::<HashMap<_, _>>(),
            "linux": {"namespaces": listed},
        });
        let spec = serde_json::from_value(config).unwrap();
        refuse(&spec).err().map(|error| error.to_string())
    }

    #[test]
    fn the_flag_is_named_that_podmans_user_has_written() {
        for (kind, name) in [
            ("network", "--network=host"),
            ("pid", "--pid=host"),
            ("ipc", "--ipc=host"),
            ("uts", "--uts=host"),
        ] {
            let error = error(&[MANAGER], kind).unwrap();
            assert!(error.starts_with(name), "{error}");
        }
        let privileged = error(&[MANAGER, PRIVILEGED], "").unwrap();
        assert!(privileged.starts_with("--privileged"), "{privileged}");
        assert_eq!(error(&[MANAGER], ""), None);
        // Of somebody else: it is the guest's own.
        assert_eq!(error(&[PRIVILEGED], "network"), None);
    }
}
