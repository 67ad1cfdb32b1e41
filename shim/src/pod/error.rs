//! Why a pod could not be made, or cannot go on.

use std::{io, path::PathBuf};

use super::{layers, size};
use crate::{
    audit::{Audit, Event},
    cgroup, config,
    error::line,
    hooks, host_sockets, kubelet_volume, ledger,
    machine::{agent, fs, vmm},
    network,
    share::{self, mount_points},
};

/// Why there is no pod, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a regular file, or not there.
    #[error("cannot use the {what} {path}; {remedy}")]
    File {
        /// What it is for.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// A record.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// A machine of such a size cannot be.
    #[error(transparent)]
    Size(#[from] size::Error),
    /// The guest has not taken the memory that it was offered.
    #[error(
        "the guest has plugged {plugged_mib} of the {wanted_mib} MiB that its containers need beside what it was booted with, within {secs} s"
    )]
    Growth {
        /// What was asked for.
        wanted_mib: u64,
        /// What it has.
        plugged_mib: u64,
        /// The limit.
        secs: u64,
    },
    /// A limit that the host's cgroup does not take.
    #[error("cannot set {name} = {value:?} on the pod's cgroup")]
    Limit {
        /// The control file.
        name: String,
        /// The value.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The share.
    #[error(transparent)]
    Share(#[from] share::Error),
    /// A read-only root that lacks what its mounts need.
    #[error(transparent)]
    MountPoint(#[from] mount_points::Error),
    /// The fs process.
    #[error(transparent)]
    Fs(#[from] fs::Error),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] vmm::Error),
    /// A volume of kubelet's.
    #[error(transparent)]
    Volume(#[from] kubelet_volume::Error),
    /// A socket of the host.
    #[error(transparent)]
    Socket(#[from] host_sockets::Error),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] agent::Error),
    /// A socketpair.
    #[error("cannot make a stream")]
    Stream(#[source] io::Error),
    /// The process that stands for the pod.
    #[error("cannot start the process that stands for the pod")]
    Stub(#[source] io::Error),
    /// No uid is free.
    #[error(
        "all {count} uids from {base} on are in use by pods; raise uid_count in the configuration, or run `bulkhead gc`"
    )]
    NoUid {
        /// `uid_base`.
        base: u32,
        /// `uid_count`.
        count: u32,
    },
    /// The root file system.
    #[error(transparent)]
    Layers(#[from] layers::Error),
    /// A hook of config.json.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The guest does not answer.
    #[error("the guest did not answer within {0} s")]
    Hung(u64),
    /// Everything has been given back.
    #[error("the pod {0:?} has ended")]
    Ended(String),
    /// A container has the guest to itself.
    #[error(
        "container {0:?} has the guest's own pid or network namespace, and nothing else can run beside it: list both in its linux.namespaces"
    )]
    GuestTaken(String),
    /// A member wants another member's processes.
    #[error(
        "config.json: linux.namespaces: pid with a path is not supported in a pod whose containers have pid namespaces of their own: a container cannot join another one's"
    )]
    PrivatePids,
    /// The host does not tell what it is.
    #[error("cannot find out which kernel and processor this host has")]
    Host(#[source] io::Error),
    /// It may not boot, and there is nothing else that it can go on from.
    #[error(
        "the pod has no template to go on from: {0}; make one by `bulkhead template build`, or allow pods to boot by template = \"auto\" in the configuration"
    )]
    NoTemplate(String),
    /// The place of the templates.
    #[error("cannot {action} a template in {path}; see whether there is room on its file system")]
    Store {
        /// The verb.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A guest that always has something to do.
    #[error(
        "the guest was not idle within {0} s after its agent had dialled: it cannot become a template"
    )]
    Restless(u64),
    /// A container in the machine that was to show that a template works.
    #[error("a container in the first machine that went on from the template did not run: {0}")]
    Trial(String),
    /// The builder's machine has gone, and something of it stays.
    #[error("the machine was saved, but left {0}; run `bulkhead gc`")]
    Left(String),
    /// The guest ended instead of becoming ready.
    #[error("{end}; it {reached}")]
    Boot {
        /// How it ended.
        end: vmm::End,
        /// How far the boot got.
        reached: &'static str,
    },
    /// The guest took too long.
    #[error(
        "the guest was not ready within {secs} s: it {reached}{last}; boot_timeout_secs in the configuration is the limit"
    )]
    Timeout {
        /// The limit.
        secs: u64,
        /// How far the boot got.
        reached: &'static str,
        /// `: ` and the last line, or nothing.
        last: String,
        /// The last lines of the console.
        console: Vec<String>,
    },
}

impl Error {
    /// The guest's last words, where the error comes from its end.
    pub fn last_lines(&self) -> &[String] {
        match self {
            Error::Vm(vmm::Error::Gone(end)) | Error::Boot { end, .. } => end.last_lines(),
            Error::Timeout { console, .. } => console,
            _ => &[],
        }
    }
    /// Tells that the pod has ended by this.
    pub(super) fn tell_end(&self, audit: &Audit) {
        let end = match self {
            Error::Vm(vmm::Error::Gone(end)) | Error::Boot { end, .. } => Some(end),
            _ => None,
        };
        let how = match (self, end) {
            (_, Some(end)) => end.how(),
            (Error::Timeout { .. }, _) => "boot_timeout",
            (Error::Fs(fs::Error::Died { .. }), _) => "fs_died",
            (Error::Fs(_), _) => "fs_failed",
            (Error::Agent(_), _) => "agent_lost",
            _ => "not_started",
        };
        let faults = end.map(vmm::End::faults).unwrap_or_default();
        audit.tell_end(how, &line(self), faults);
    }

    /// What the audit log has of it, if it refuses what a container in a machine is not given.
    pub fn refusal(&self) -> Option<Event> {
        let refused = match self {
            Error::Share(error) => error.is_refusal(),
            Error::Socket(error) => error.is_refusal(),
            Error::GuestTaken(_) | Error::PrivatePids => true,
            _ => false,
        };
        refused.then(|| Event::Refused {
            field: None,
            reason: line(self),
        })
    }

    /// One line, with the guest's last words where they explain it.
    pub fn text(&self) -> String {
        let text = line(self);
        match self.last_lines() {
            [] => text,
            lines => format!("{text} (the last lines: {})", lines.join(" | ")),
        }
    }
}
