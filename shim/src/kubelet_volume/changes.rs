//! From what the guest has to what the host shows, in kubelet's order: the new version, the rename of `..data`, new links, stale
//! links, the old version. A reader in the guest never sees half of a version, and a watcher sees what one on the host sees.

use super::host::{Attributes, DATA, Directory, NEW_DATA, Node, Stamp};

/// One step. Paths are beneath the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Makes an empty directory.
    Directory(String),
    /// Makes a file with the bytes of the host's.
    File(String, Stamp),
    /// Makes a symbolic link.
    Link(String, String),
    /// Gives a new name.
    Rename(String, String),
    /// Removes it and what is in it.
    Remove(String),
    /// Sets owner and mode; of a file its time too.
    Attributes(String, Attributes, u64),
}

impl Step {
    /// The name at the top of the volume that it concerns; none: the volume itself.
    pub fn top(&self) -> Option<&str> {
        let path = match self {
            Step::Rename(_, to) => to,
            Step::Directory(path)
            | Step::File(path, _)
            | Step::Link(path, _)
            | Step::Remove(path)
            | Step::Attributes(path, ..) => path,
        };
        path.split('/').next().filter(|name| !name.is_empty())
    }
}

/// The steps from one to the other.
pub fn steps(has: &Directory, wants: &Directory) -> Vec<Step> {
    let mut steps = Vec::new();
    if has.attributes != wants.attributes {
        steps.push(Step::Attributes(String::new(), wants.attributes, 0));
    }
    for (name, node) in &wants.entries {
        if let Node::Directory(directory) = node {
            directory_steps(name, has.entries.get(name), directory, &mut steps);
        }
    }
    // The version is shown before the links to its new files.
    let (data, keys): (Vec<_>, Vec<_>) = wants.entries.iter().partition(|(name, _)| *name == DATA);
    for (name, node) in data.into_iter().chain(keys) {
        if let Node::Link(target, attributes) = node {
            link_steps(
                name,
                has.entries.get(name),
                (target, *attributes),
                &mut steps,
            );
        }
    }
    let gone = has
        .entries
        .iter()
        .filter(|(name, _)| !wants.entries.contains_key(*name));
    let (versions, others): (Vec<_>, Vec<_>) =
        gone.partition(|(_, node)| matches!(node, Node::Directory(_)));
    for (name, _) in others.into_iter().chain(versions) {
        steps.push(Step::Remove(name.clone()));
    }
    steps
}

fn link_steps(
    name: &str,
    has: Option<&Node>,
    (target, attributes): (&String, Attributes),
    steps: &mut Vec<Step>,
) {
    let owner = match has {
        Some(Node::Link(old, owner)) if old == target => *owner,
        _ => {
            if name == DATA {
                steps.push(Step::Link(NEW_DATA.into(), target.clone()));
                steps.push(Step::Rename(NEW_DATA.into(), DATA.into()));
            } else {
                steps.push(Step::Link(name.into(), target.clone()));
            }
            Attributes::default()
        }
    };
    if owner != attributes {
        steps.push(Step::Attributes(name.into(), attributes, 0));
    }
}

fn directory_steps(path: &str, has: Option<&Node>, wants: &Directory, steps: &mut Vec<Step>) {
    let new = Directory::default();
    let old = match has {
        Some(Node::Directory(old)) => old,
        _ => {
            steps.push(Step::Directory(path.into()));
            &new
        }
    };
    for name in old.entries.keys() {
        if !wants.entries.contains_key(name) {
            steps.push(Step::Remove(format!("{path}/{name}")));
        }
    }
    for (name, node) in &wants.entries {
        let (path, has) = (format!("{path}/{name}"), old.entries.get(name));
        match (has, node) {
            (has, Node::Directory(directory)) => directory_steps(&path, has, directory, steps),
            (has, Node::File(attributes, stamp)) => {
                let kept = match has {
                    Some(Node::File(kept, old)) if old == stamp => Some(kept),
                    _ => None,
                };
                if kept.is_none() {
                    steps.push(Step::File(path.clone(), *stamp));
                }
                if kept != Some(attributes) {
                    steps.push(Step::Attributes(path, *attributes, stamp.modified_ns));
                }
            }
            // `host::look` finds neither beneath the top.
            (_, Node::Link(..) | Node::Unsure) => {}
        }
    }
    if !matches!(has, Some(Node::Directory(_))) || old.attributes != wants.attributes {
        steps.push(Step::Attributes(path.into(), wants.attributes, 0));
    }
}
