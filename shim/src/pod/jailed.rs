//! The layers of the jails that are in force, as the processes of a pod have them.

use std::{fs, path::Path};

use bulkhead_vmm_config::Layer;

use crate::audit::Event;

/// `PF_USER_WORKER` of linux/sched.h: a thread that the kernel has started in the process' name
/// (vhost, KVM), which runs nothing but the kernel's own code and has no use for a filter.
const USER_WORKER: u64 = 0x4000;

/// A process of the pod in its jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jailed {
    /// `vmm` or `fs`.
    pub role: &'static str,
    /// In the host's pid namespace.
    pub pid: i32,
    /// The version of Landlock's interface by which it says that it is restricted.
    pub landlock: Option<u32>,
}

impl Jailed {
    /// How many threads it has that run a program's code, and how many of them have a filter of
    /// system calls.
    pub fn threads(&self) -> (usize, usize) {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid));
        let paths = tasks
            .into_iter()
            .flatten()
            .flatten()
            .map(|task| task.path());
        let own = paths.filter(|task| !is_user_worker(&read(&task.join("stat"))));
        own.fold((0, 0), |(all, filtered), task| {
            let is_filtered = is_filtered(&read(&task.join("status")));
            (all + 1, filtered + usize::from(is_filtered))
        })
    }

    /// Whether it is in a user namespace of its own.
    pub fn has_user_namespace(&self) -> bool {
        let ours = fs::read_link("/proc/self/ns/user").ok();
        let theirs = fs::read_link(format!("/proc/{}/ns/user", self.pid)).ok();
        theirs.is_some() && theirs != ours
    }

    /// All of it for the audit log.
    pub fn event(&self) -> Event {
        let (threads, filtered) = self.threads();
        Event::Layers {
            process: self.role.into(),
            landlock: self.landlock,
            threads,
            filtered,
            user_namespace: self.has_user_namespace(),
            // It would have refused to start.
            accepted_missing: match self.landlock {
                Some(_) => Vec::new(),
                None => vec![Layer::Landlock],
            },
        }
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// proc_pid_stat(5): the flags are field 9; the name, field 2, may hold blanks and parentheses.
fn is_user_worker(stat: &str) -> bool {
    let after = stat.rsplit(')').next().unwrap_or_default();
    let flags = after.split_ascii_whitespace().nth(9 - 3);
    flags
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_some_and(|flags| flags & USER_WORKER != 0)
}

/// proc_pid_status(5): 2 is a filter.
fn is_filtered(status: &str) -> bool {
    let mode = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_a_filter_is_found() {
        let pid = std::process::id() as i32;
        let own = Jailed {
            role: "vmm",
            pid,
            landlock: None,
        };
        let (threads, filtered) = own.threads();
        assert!(threads > 0 && filtered < threads, "{filtered} of {threads}");
        assert!(is_filtered("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!is_filtered("Name:\tx\nSeccomp:\t0\n"));
    }

    #[test]
    fn a_thread_of_the_kernel_is_known_by_its_flags() {
        assert!(is_user_worker("7 (kvm) nx (x) S 1 1 1 0 -1 4210752 0 0"));
        assert!(!is_user_worker("7 (vcpu-0) S 1 1 1 0 -1 4194368 0 0"));
    }
}
