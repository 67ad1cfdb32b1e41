//! Limits of a container that is alone in its pod which the host keeps: files of the pod's cgroup.

use bulkhead_agent_protocol::agent;

use super::{
    Plan,
    limits::{Field, Source, cpu_list},
};

/// All limits of a container that is alone in its pod which are the pod's cgroup's.
pub fn of_host(plan: &mut Plan, vcpus: u32) -> Vec<(String, String)> {
    let resources = plan.container.resources.mut_or_insert_default();
    let mut files = host_files(resources, vcpus);
    files.append(&mut plan.host_limits);
    files
}

/// What the host keeps of the limits of a container that is alone in a machine with so many vCPUs,
/// as files of the pod's cgroup. Processors and memory nodes are the host's, and in the guest the
/// first ones stand for them; a weight means something beside other pods only.
pub fn host_files(resources: &mut agent::Resources, vcpus: u32) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for file in &mut resources.files {
        let in_guest = match file.name.as_str() {
            "cpu.weight" | "cpu.idle" => None,
            "cpuset.mems" => Some("0".into()),
            // What is no list is refused by the guest's kernel, in its words.
            "cpuset.cpus" => match cpu_list(&file.value) {
                Ok(cpus) => Some(match cpus.len().min(vcpus as usize) {
                    0 | 1 => "0".into(),
                    count => format!("0-{}", count - 1),
                }),
                Err(_) => continue,
            },
            _ => continue,
        };
        files.push((file.name.clone(), file.value.clone()));
        if let Some(in_guest) = in_guest {
            file.value = in_guest;
        }
    }
    files
}

/// Adds a list of processors to the limits that a container is given, if they have none.
pub fn name_processors(resources: &mut agent::Resources, list: String) {
    let name = "cpuset.cpus";
    if resources.files.iter().all(|file| file.name != name) {
        resources.files.push(agent::CgroupFile {
            name: name.into(),
            value: list,
            field: Source::Config.name(Field::Cpus),
            ..Default::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_processors_are_the_guests_first_ones() {
        let file = |(name, value): (&str, &str)| agent::CgroupFile {
            name: name.into(),
            value: value.into(),
            ..Default::default()
        };
        let split = |pairs: &[(&str, &str)], vcpus| {
            let mut resources = agent::Resources {
                files: pairs.iter().copied().map(file).collect(),
                ..Default::default()
            };
            let host = host_files(&mut resources, vcpus);
            let join = |(name, value): (&String, &String)| format!("{name}={value}");
            let host: Vec<_> = host
                .iter()
                .map(|(name, value)| join((name, value)))
                .collect();
            let guest = resources.files.iter();
            let guest: Vec<_> = guest.map(|file| join((&file.name, &file.value))).collect();
            (host.join(" "), guest.join(" "))
        };
        let asked = [
            ("cpu.weight", "50"),
            ("cpuset.cpus", "4-5,7"),
            ("cpuset.mems", "1"),
            ("memory.max", "9"),
        ];
        let (host, guest) = split(&asked, 3);
        assert_eq!(host, "cpu.weight=50 cpuset.cpus=4-5,7 cpuset.mems=1");
        assert_eq!(
            guest,
            "cpu.weight=50 cpuset.cpus=0-2 cpuset.mems=0 memory.max=9"
        );
        assert_eq!(split(&[("cpuset.cpus", "4-5,7")], 2).1, "cpuset.cpus=0-1");
        assert_eq!(split(&[("cpuset.cpus", "6")], 2).1, "cpuset.cpus=0");
        let (host, guest) = split(&[("cpuset.cpus", "x")], 2);
        assert_eq!((host.as_str(), guest.as_str()), ("", "cpuset.cpus=x"));
    }
}
