//! Which layers of the jails are in force, as the processes of a pod have them.

use bulkhead_shim::pod::Jailed;

use crate::check::Item;

/// A line for each layer.
pub fn items(jailed: &[Jailed]) -> Vec<Item> {
    vec![landlock(jailed), seccomp(jailed), user_namespaces(jailed)]
}

fn landlock(jailed: &[Jailed]) -> Item {
    let missing = jailed.iter().any(|process| process.landlock.is_none());
    let words = jailed.iter().map(|process| match process.landlock {
        Some(version) => format!("{}: version {version}, {}", process.role, covered(version)),
        None => format!("{}: missing, accepted by configuration", process.role),
    });
    Item {
        name: "landlock",
        ok: true,
        found: words.collect::<Vec<_>>().join("; "),
        remedy: missing
            .then(|| "boot with lsm=landlock,… and take \"landlock\" out of accept_missing".into()),
    }
}

/// What the kernels since 5.13, 6.7 and 6.12 restrict.
fn covered(version: u32) -> &'static str {
    match version {
        ..4 => "files",
        4 | 5 => "files and TCP",
        6.. => "files, TCP, abstract sockets, signals",
    }
}

fn seccomp(jailed: &[Jailed]) -> Item {
    let counts = jailed.iter().map(|process| {
        let (threads, filtered) = process.threads();
        (process.role, filtered, threads)
    });
    let counts: Vec<_> = counts.collect();
    let text = counts
        .iter()
        .map(|(role, filtered, all)| format!("{role}: {filtered} of {all} threads have a filter"));
    Item {
        name: "seccomp",
        ok: counts
            .iter()
            .all(|(_, filtered, all)| *all > 0 && filtered == all),
        found: text.collect::<Vec<_>>().join("; "),
        remedy: None,
    }
}

fn user_namespaces(jailed: &[Jailed]) -> Item {
    let words = jailed.iter().map(|process| {
        let whose = match process.has_user_namespace() {
            true => "its own",
            false => "the host's",
        };
        format!("{}: {whose}", process.role)
    });
    Item {
        name: "user ns",
        ok: true,
        found: words.collect::<Vec<_>>().join("; "),
        remedy: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(vmm: Option<u32>, fs: Option<u32>) -> [Jailed; 2] {
        let pid = std::process::id() as i32;
        [("vmm", vmm), ("fs", fs)].map(|(role, landlock)| Jailed {
            role,
            pid,
            landlock,
        })
    }

    #[test]
    fn a_missing_layer_is_told_with_its_remedy() {
        let both = landlock(&pair(Some(7), Some(3)));
        assert_eq!(
            both.found,
            "vmm: version 7, files, TCP, abstract sockets, signals; fs: version 3, files"
        );
        assert!(both.ok && both.remedy.is_none());
        let none = landlock(&pair(None, None));
        assert!(
            none.found
                .contains("vmm: missing, accepted by configuration")
        );
        assert!(none.remedy.is_some());
    }

    #[test]
    fn a_thread_without_a_filter_is_found() {
        let item = seccomp(&pair(None, None));
        assert!(!item.ok, "{item:?}");
    }
}
