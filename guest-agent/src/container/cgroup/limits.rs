//! Limits of a cgroup, set all or none.
//!
//! ```text
//! resolve ──► apply: check (processors, memory in use) ──► remember ──► write ──► refused? what was remembered is written back
//! ```
//!
//! What the kernel would take without complaint although it cannot be is refused here: processors
//! that the machine does not have (the kernel waits for them to come), and memory that is in use
//! already, where whoever asks wants that refused.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path};

use bulkhead_agent_protocol::agent::{CgroupFile, Resources};
use nix::errno::Errno;

use super::{CgroupError, io_error};

/// `cpu.max` and `cpu.max.burst` bound one another.
const BURST: &str = "cpu.max.burst";
/// Largest number in a list of processors or of memory nodes (the kernel's own largest is 8191).
const MAX_NUMBER: u32 = 8191;

/// The files to write: those that are named, and those that depend on what the container has.
pub(super) fn resolve(
    directory: &Path,
    resources: &Resources,
) -> Result<Vec<CgroupFile>, CgroupError> {
    let mut files = resources.files.clone();
    files.iter().try_for_each(|file| plain(&file.name))?;
    if resources.cpu_period != 0 {
        let current = read(directory, "cpu.max")?;
        let quota = current.split_whitespace().next().unwrap_or("max");
        let value = format!("{quota} {}", resources.cpu_period);
        files.push(file("cpu.max", value, "linux.resources.cpu.period"));
    }
    if resources.memory_and_swap != 0 {
        let field = "linux.resources.memory.swap";
        let (sum, limit) = (resources.memory_and_swap, read(directory, "memory.max")?);
        let value = match limit.trim().parse::<u64>() {
            // "max": the sum limits swap alone, as runc has it.
            Err(_) => sum,
            Ok(limit) => sum.checked_sub(limit).ok_or_else(|| CgroupError::Limit {
                field: field.to_owned(),
                reason: format!(
                    "{sum} is the sum of memory and swap, and less than the memory limit {limit}"
                ),
            })?,
        };
        files.push(file("memory.swap.max", value.to_string(), field));
    }
    Ok(files)
}

fn file(name: &str, value: String, field: &str) -> CgroupFile {
    CgroupFile {
        name: name.to_owned(),
        value,
        field: field.to_owned(),
        ..CgroupFile::default()
    }
}

/// Writes the files in their order, or none of them. `check_memory`: a memory limit must be above
/// what is in use.
pub(super) fn apply(
    directory: &Path,
    root: &Path,
    files: &[CgroupFile],
    check_memory: bool,
) -> Result<(), CgroupError> {
    files.iter().try_for_each(|file| check_list(root, file))?;
    if check_memory {
        files
            .iter()
            .try_for_each(|file| check_in_use(directory, file))?;
    }
    let old: Vec<Old> = files.iter().flat_map(|file| old(directory, file)).collect();
    write_all(directory, files).inspect_err(|_| {
        // Twice: a value may be refused as long as one that it bounds is the new one.
        for _ in 0..2 {
            for Old { name, value } in old.iter().rev() {
                // The kernel has had each of them before.
                let _ = write_file(directory, name, value);
            }
        }
    })
}

fn write_all(directory: &Path, files: &[CgroupFile]) -> Result<(), CgroupError> {
    let mut later = Vec::new();
    for file in files {
        match write_limit(directory, file) {
            // It may be more than the old quota allows.
            Err(CgroupError::Write { source, .. })
                if file.name == BURST && source.raw_os_error() == Some(libc::EINVAL) =>
            {
                later.push(file);
            }
            other => other?,
        }
    }
    later
        .into_iter()
        .try_for_each(|file| write_limit(directory, file))
}

fn write_limit(directory: &Path, file: &CgroupFile) -> Result<(), CgroupError> {
    write_file(directory, &file.name, &file.value).map_err(|error| match error {
        CgroupError::Write {
            name,
            value,
            source,
            ..
        } => CgroupError::Write {
            hint: match source.kind() {
                io::ErrorKind::NotFound => missing(directory, &name),
                _ => String::new(),
            },
            field: file.field.clone(),
            name,
            value,
            source,
        },
        other => other,
    })
}

/// What there is instead of a file that is not there.
fn missing(directory: &Path, name: &str) -> String {
    let controllers = read(directory, "cgroup.controllers").unwrap_or_default();
    let controller = name.split('.').next().unwrap_or(name);
    match controllers
        .split_whitespace()
        .any(|there| there == controller)
    {
        true => format!(" (the guest's controller {controller:?} has no such file)"),
        false => format!(
            " (the guest has no controller {controller:?}; it has {})",
            controllers.trim()
        ),
    }
}

/// Writes a file of the cgroup, several lines each by itself: the kernel takes one at a time.
pub(super) fn write_file(directory: &Path, name: &str, value: &str) -> Result<(), CgroupError> {
    plain(name)?;
    let write = |text: &str| {
        let opened = OpenOptions::new().write(true).open(directory.join(name));
        opened.and_then(|mut file| file.write_all(text.as_bytes()))
    };
    let mut lines = value.lines().filter(|line| !line.is_empty()).peekable();
    let written = match lines.peek() {
        // An empty value is a value ("cpuset.cpus"), and an empty write would not reach the kernel.
        None => write("\n"),
        Some(_) => lines.try_for_each(write),
    };
    written.map_err(|source| CgroupError::Write {
        field: String::new(),
        name: name.to_owned(),
        value: value.to_owned(),
        hint: String::new(),
        source,
    })
}

fn plain(name: &str) -> Result<(), CgroupError> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(()),
        _ => Err(CgroupError::InvalidFile {
            name: name.to_owned(),
        }),
    }
}

fn read(directory: &Path, name: &str) -> Result<String, CgroupError> {
    let path = directory.join(name);
    fs::read_to_string(&path).map_err(|source| io_error(&path, "read", source))
}

/// A file and its value before.
struct Old {
    name: String,
    value: String,
}

/// What has to be written to undo a write of `file`, the last first.
fn old(directory: &Path, file: &CgroupFile) -> Vec<Old> {
    let names: &[&str] = match file.name.as_str() {
        // An idle group forgets its weight.
        "cpu.idle" => &["cpu.weight", "cpu.idle"],
        // The weight in coarser steps.
        "cpu.weight.nice" => &["cpu.weight"],
        name => &[name],
    };
    let remember = |name: &&str| {
        // A file that cannot be read is a command and has no value.
        let text = read(directory, name).ok()?;
        let mut value = text.trim_end().to_owned();
        for line in file.value.lines() {
            if let Some(line) = reset(&file.name, line, &text) {
                value = format!("{line}\n{value}");
            }
        }
        Some(Old {
            name: (*name).to_owned(),
            value,
        })
    };
    names.iter().filter_map(remember).collect()
}

/// In a file of lines by device: the line that takes back the first line for one.
fn reset(name: &str, line: &str, text: &str) -> Option<String> {
    let nothing = match name {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        "io.weight" => "default",
        "io.latency" => "target=0",
        "misc.max" => "max",
        _ => return None,
    };
    let (key, _) = line.split_once(' ')?;
    let known = text
        .lines()
        .any(|old| old.split(' ').next().is_some_and(|word| word == key));
    (!known && key != "default").then(|| format!("{key} {nothing}"))
}

/// Refuses processors and memory nodes that the machine does not have.
fn check_list(root: &Path, file: &CgroupFile) -> Result<(), CgroupError> {
    let (what, one) = match file.name.as_str() {
        "cpuset.cpus" => ("processors", "processor"),
        "cpuset.mems" => ("memory nodes", "memory node"),
        _ => return Ok(()),
    };
    // Without the controller the write says so.
    let Ok(machine) = read(root, &format!("{}.effective", file.name)) else {
        return Ok(());
    };
    let refuse = |reason: String| CgroupError::Limit {
        field: file.field.clone(),
        reason: format!("{:?} {reason}", file.value),
    };
    let wanted = numbers(&file.value)
        .ok_or_else(|| refuse(format!("is not a list of {what} (\"0-1,3\")")))?;
    let has = numbers(&machine).unwrap_or_default();
    match wanted.difference(&has).next() {
        None => Ok(()),
        Some(number) => Err(refuse(format!(
            "has {one} {number}; the virtual machine has {what} {}, and it is they that are meant",
            machine.trim()
        ))),
    }
}

/// "0-1,3" as numbers.
fn numbers(list: &str) -> Option<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for range in list.trim().split(',').map(str::trim) {
        if range.is_empty() {
            continue;
        }
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let [first, last] = [first, last].map(|number| number.parse::<u32>().ok());
        let (first, last) = (first?, last?);
        if first > last || last > MAX_NUMBER {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Refuses a memory limit that is not above what is in use (OCI config-linux.md#memory,
/// checkBeforeUpdate).
fn check_in_use(directory: &Path, file: &CgroupFile) -> Result<(), CgroupError> {
    let ("memory.max", Ok(limit)) = (file.name.as_str(), file.value.trim().parse::<u64>()) else {
        return Ok(());
    };
    let used: u64 = match read(directory, "memory.current") {
        Ok(text) => text.trim().parse().unwrap_or(0),
        // Without the controller the write says so.
        Err(CgroupError::Io { source, .. })
            if source.raw_os_error() == Some(Errno::ENOENT as i32) =>
        {
            0
        }
        Err(error) => return Err(error),
    };
    if limit > used {
        return Ok(());
    }
    Err(CgroupError::Limit {
        field: file.field.clone(),
        reason: format!(
            "{limit} bytes are not more than the {used} that the container uses (checkBeforeUpdate is set)"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (name, value) in files {
            fs::write(directory.path().join(name), value).expect("written");
        }
        directory
    }

    fn limit(name: &str, value: &str) -> CgroupFile {
        file(name, value.to_owned(), "linux.resources.x")
    }

    fn text(directory: &tempfile::TempDir, name: &str) -> String {
        fs::read_to_string(directory.path().join(name)).expect("readable")
    }

    #[test]
    fn lists_are_parsed_and_nothing_else_is() {
        let parsed = |list| numbers(list).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(parsed("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parsed(""), Some(vec![]));
        for list in [
            "a",
            "-1",
            "1-",
            "2-1",
            "0-4294967295",
            "99999999999",
            "0-3:1/2",
            "all",
        ] {
            assert_eq!(parsed(list), None, "{list:?}");
        }
    }

    #[test]
    fn processors_that_the_machine_lacks_are_refused() {
        let root = directory(&[("cpuset.cpus.effective", "0-1\n")]);
        let check = |list| check_list(root.path(), &limit("cpuset.cpus", list));
        for list in ["", "\n", "0", "1,0", "0-1"] {
            check(list).unwrap_or_else(|error| panic!("{list:?}: {error}"));
        }
        for (list, words) in [
            ("0-3", ["processor 2", "processors 0-1"]),
            ("7", ["processor 7", "linux.resources.x"]),
            ("0,x", ["is not a list", "\"0,x\""]),
        ] {
            let error = check(list).expect_err(list).to_string();
            for word in words {
                assert!(error.contains(word), "{list}: {error}");
            }
        }
    }

    #[test]
    fn one_refused_value_and_all_are_the_old_ones() {
        let here = directory(&[("pids.max", "7\n"), ("memory.max", "max\n")]);
        let files = [
            limit("pids.max", "9"),
            limit("memory.max", "5"),
            limit("nothing.max", "1"),
        ];
        let error = apply(here.path(), here.path(), &files, false).expect_err("no such file");
        assert!(error.to_string().contains("nothing.max"), "{error}");
        let values = [text(&here, "pids.max"), text(&here, "memory.max")];
        // A regular file keeps the rest of what was there.
        assert!(
            values[0].starts_with('7') && values[1].starts_with("max"),
            "{values:?}"
        );
    }

    #[test]
    fn a_limit_in_use_is_refused_when_asked() {
        let here = directory(&[("memory.current", "4096\n"), ("memory.max", "max\n")]);
        let set = |value, check| {
            apply(
                here.path(),
                here.path(),
                &[limit("memory.max", value)],
                check,
            )
        };
        for value in ["1", "4096"] {
            let error = set(value, true).expect_err(value).to_string();
            assert!(error.contains("uses") && error.contains("4096"), "{error}");
            assert_eq!(text(&here, "memory.max"), "max\n");
        }
        set("4097", true).expect("above");
        set("max", true).expect("no limit");
        set("1", false).expect("not asked");
    }

    #[test]
    fn what_depends_on_the_container_is_resolved() {
        let here = directory(&[("cpu.max", "5000 100000\n"), ("memory.max", "1000\n")]);
        let resolved = |cpu_period, memory_and_swap| {
            let resources = Resources {
                cpu_period,
                memory_and_swap,
                ..Resources::default()
            };
            let files = resolve(here.path(), &resources)?;
            let line = |file: &CgroupFile| format!("{}={}", file.name, file.value);
            Ok::<_, CgroupError>(files.iter().map(line).collect::<Vec<_>>())
        };
        assert_eq!(
            resolved(20_000, 1500).expect("resolved"),
            ["cpu.max=5000 20000", "memory.swap.max=500"]
        );
        let error = resolved(0, 999)
            .expect_err("less than memory alone")
            .to_string();
        assert!(error.contains("memory.swap"), "{error}");
        fs::write(here.path().join("memory.max"), "max\n").expect("written");
        assert_eq!(resolved(0, 999).expect("resolved"), ["memory.swap.max=999"]);
    }

    #[test]
    fn lines_by_device_are_taken_back() {
        let old = "8:0 rbps=1 wbps=max riops=max wiops=max\n";
        let reset = |line| reset("io.max", line, old);
        assert_eq!(reset("8:0 rbps=5"), None);
        assert_eq!(
            reset("8:16 rbps=5").as_deref(),
            Some("8:16 rbps=max wbps=max riops=max wiops=max")
        );
    }

    #[test]
    fn what_is_not_there_is_named_beside_what_is() {
        let here = directory(&[("cgroup.controllers", "cpu memory\n")]);
        let error = |name| {
            write_limit(here.path(), &limit(name, "1"))
                .expect_err(name)
                .to_string()
        };
        let text = error("rdma.max");
        assert!(
            text.contains("no controller \"rdma\"; it has cpu memory"),
            "{text}"
        );
        let text = error("memory.nothing");
        assert!(text.contains("\"memory\" has no such file"), "{text}");
        let text = error("../cgroup.procs");
        assert!(text.contains("plain file name"), "{text}");
    }
}
