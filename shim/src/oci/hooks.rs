//! `hooks`: which run where.
//!
//! | hook | where |
//! | --- | --- |
//! | prestart, createRuntime, poststart, poststop | on the host, by this shim |
//! | createContainer | refused: its program is on the host and its namespaces are in the guest |
//! | startContainer | in the container, by the agent |

use bulkhead_agent_protocol::agent;
use oci_spec::runtime as spec;

use super::{Error, invalid, unsupported};

/// Those that run, by their names in config.json.
pub(super) const NAMES: [&str; 5] = [
    "prestart",
    "createRuntime",
    "startContainer",
    "poststart",
    "poststop",
];

/// A program to run on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostHook {
    /// Absolute.
    pub path: String,
    /// argv, with the program's name first.
    pub args: Vec<String>,
    /// `NAME=value`; nothing else is in its environment.
    pub env: Vec<String>,
    /// Seconds.
    pub timeout_secs: Option<u32>,
}

/// The hooks of the host, each list in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// `prestart` and then `createRuntime`: after the machine is made, before the container is.
    pub create: Vec<HostHook>,
    /// `poststart`.
    pub started: Vec<HostHook>,
    /// `poststop`.
    pub stopped: Vec<HostHook>,
}

/// Whether there are hooks that may put interfaces into the pod's network namespace once it is made.
pub(super) fn may_add_interfaces(hooks: &spec::Hooks) -> bool {
    let is_listed = |list: &Option<Vec<spec::Hook>>| list.as_ref().is_some_and(|l| !l.is_empty());
    #[allow(deprecated)] // prestart: engines still send it
    let prestart = is_listed(hooks.prestart());
    prestart || is_listed(hooks.create_runtime())
}

pub(super) fn convert(hooks: &spec::Hooks) -> Result<(HostHooks, Vec<agent::Hook>), Error> {
    let is_listed = |list: &Option<Vec<spec::Hook>>| list.as_ref().is_some_and(|l| !l.is_empty());
    if is_listed(hooks.create_container()) {
        return Err(unsupported(
            "hooks.createContainer",
            "its program is on the host, and the container's namespaces are in the guest; use createRuntime or startContainer",
        ));
    }
    #[allow(deprecated)] // prestart: engines still send it
    let mut create = list("hooks.prestart", hooks.prestart())?;
    create.extend(list("hooks.createRuntime", hooks.create_runtime())?);
    let in_guest = list("hooks.startContainer", hooks.start_container())?;
    let in_guest = in_guest.into_iter().map(|hook| agent::Hook {
        path: hook.path,
        args: hook.args,
        env: hook.env,
        timeout_secs: hook.timeout_secs.unwrap_or(0),
        ..agent::Hook::default()
    });
    let on_host = HostHooks {
        create,
        started: list("hooks.poststart", hooks.poststart())?,
        stopped: list("hooks.poststop", hooks.poststop())?,
    };
    Ok((on_host, in_guest.collect()))
}

fn list(field: &str, hooks: &Option<Vec<spec::Hook>>) -> Result<Vec<HostHook>, Error> {
    let convert = |hook: &spec::Hook| {
        let path = hook.path().to_string_lossy().into_owned();
        if !path.starts_with('/') {
            return Err(invalid(
                field,
                format!("has the path {path:?}, which is not absolute"),
            ));
        }
        let timeout_secs = match hook.timeout() {
            None => None,
            Some(secs) => Some(
                u32::try_from(secs)
                    .ok()
                    .filter(|secs| *secs > 0)
                    .ok_or_else(|| {
                        invalid(
                            field,
                            format!("has the timeout {secs}, which is not positive"),
                        )
                    })?,
            ),
        };
        let args = hook.args().clone().unwrap_or_default();
        Ok(HostHook {
            args: if args.is_empty() {
                vec![path.clone()]
            } else {
                args
            },
            path,
            env: hook.env().clone().unwrap_or_default(),
            timeout_secs,
        })
    };
    hooks
        .as_deref()
        .unwrap_or_default()
        .iter()
        .map(convert)
        .collect()
}
