//! Huge pages of the guest, reserved for the containers whose limits allow them.
//!
//! On a host somebody reserves huge pages before containers are made. A guest has nobody: what
//! `hugetlb.SIZE.max` allows a container is added to the kernel's pool when the limit is set, and
//! taken out of it when the limit falls or the container goes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use bulkhead_agent_protocol::agent::CgroupFile;

use super::CgroupError;

/// A directory for each size, with the pool's counters
/// (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOLS: &str = "/sys/kernel/mm/hugepages";
/// What the guest itself keeps of its memory, in KiB.
const SPARE_KIB: u64 = 16 << 10;

/// The pools are changed by one thread at a time: each change is a read and a write.
static CHANGE: Mutex<()> = Mutex::new(());

/// How many pages of each size, in KiB, and which field of config.json wants them.
pub(super) type Wanted = BTreeMap<u64, (u64, String)>;

/// What a container's limits allow. Limits of 0 on a size that the guest does not have are kept
/// already, and dropped: Kubernetes writes one for each size that the host has.
pub(super) fn wanted(files: &mut Vec<CgroupFile>) -> Result<Wanted, CgroupError> {
    let mut wanted = Wanted::new();
    let mut refused = None;
    files.retain(|file| {
        let Some(size) = size_of(&file.name) else {
            return true;
        };
        let limit = file.value.trim();
        let Some(kib) = kib(size).filter(|kib| pool(*kib).is_dir()) else {
            if limit != "0" {
                refused.get_or_insert_with(|| no_such_size(file, size));
            }
            return limit != "0";
        };
        if !file.name.contains(".rsvd.") {
            // "max" takes what others leave; nonsense is the kernel's to refuse.
            let bytes: u64 = limit.parse().unwrap_or(0);
            wanted.insert(kib, (bytes / (kib << 10), file.field.clone()));
        }
        true
    });
    match refused {
        Some(error) => Err(error),
        None => Ok(wanted),
    }
}

/// "2MB" of `hugetlb.2MB.max` and `hugetlb.2MB.rsvd.max`.
fn size_of(name: &str) -> Option<&str> {
    let size = name.strip_prefix("hugetlb.")?.strip_suffix(".max")?;
    Some(size.strip_suffix(".rsvd").unwrap_or(size))
}

/// A size as the kernel writes it in the names of hugetlb's files.
fn kib(size: &str) -> Option<u64> {
    let (number, unit) = [("KB", 1u64), ("MB", 1 << 10), ("GB", 1 << 20)]
        .into_iter()
        .find_map(|(unit, kib)| Some((size.strip_suffix(unit)?, kib)))?;
    // Not "+2": the name is a path's.
    let number = number
        .bytes()
        .all(|digit| digit.is_ascii_digit())
        .then_some(number)?;
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn pool(kib: u64) -> PathBuf {
    PathBuf::from(format!("{POOLS}/hugepages-{kib}kB"))
}

fn no_such_size(file: &CgroupFile, size: &str) -> CgroupError {
    let pools = fs::read_dir(POOLS).into_iter().flatten().flatten();
    let names = pools.map(|pool| pool.file_name().to_string_lossy().into_owned());
    let names: Vec<String> = names.collect();
    CgroupError::Limit {
        field: file.field.clone(),
        reason: format!(
            "the guest has no huge pages of {size}; it has {}",
            match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            }
        ),
    }
}

/// What is reserved for a container: pages by their size in KiB.
#[derive(Debug, Default)]
pub(super) struct HugePages(Mutex<BTreeMap<u64, u64>>);

impl HugePages {
    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Reserves what is wanted and not yet held, all or nothing; answers with what was held before
    /// of these sizes.
    pub(super) fn grow(&self, wanted: &Wanted) -> Result<Wanted, CgroupError> {
        let mut before = Wanted::new();
        for (kib, (pages, field)) in wanted {
            let held = self.held().get(kib).copied().unwrap_or(0);
            before.insert(*kib, (held, field.clone()));
            if let Some(more) = pages.checked_sub(held).filter(|more| *more > 0) {
                if let Err(error) = reserve(*kib, more, field) {
                    self.shrink(&before);
                    return Err(error);
                }
                self.held().insert(*kib, *pages);
            }
        }
        Ok(before)
    }

    /// Gives back what is held above `to`, of its sizes.
    pub(super) fn shrink(&self, to: &Wanted) {
        for (kib, (pages, _)) in to {
            let mut held = self.held();
            if let Some(held) = held.get_mut(kib)
                && let Some(less) = held.checked_sub(*pages)
            {
                release(*kib, less);
                *held = *pages;
            }
        }
    }

    /// Gives everything back.
    pub(super) fn release(&self) {
        for (kib, pages) in std::mem::take(&mut *self.held()) {
            release(kib, pages);
        }
    }
}

fn count(kib: u64) -> Option<u64> {
    let text = fs::read_to_string(pool(kib).join("nr_hugepages")).ok()?;
    text.trim().parse().ok()
}

fn set_count(kib: u64, pages: u64) {
    // The pool's size afterwards says whether there were as many.
    let _ = fs::write(pool(kib).join("nr_hugepages"), pages.to_string());
}

fn reserve(kib: u64, more: u64, field: &str) -> Result<(), CgroupError> {
    let _alone = CHANGE
        .lock()
        .expect("no code panics while it holds this lock");
    let refuse = |there: String| CgroupError::Limit {
        field: field.to_owned(),
        reason: format!(
            "{more} huge pages of {kib} KiB cannot be reserved: {there}; give the machine more memory"
        ),
    };
    // The kernel would take all that is left, and others would be killed for it, before it said
    // that it is not enough.
    let free = available_kib().saturating_sub(SPARE_KIB);
    let wanted = more.checked_mul(kib).filter(|wanted| *wanted <= free);
    if wanted.is_none() {
        return Err(refuse(format!("the guest has {free} KiB to spare")));
    }
    let before = count(kib).unwrap_or(0);
    set_count(kib, before.saturating_add(more));
    let got = count(kib).unwrap_or(0).saturating_sub(before);
    if got < more {
        set_count(kib, before);
        return Err(refuse(format!("only {got} are free as a whole")));
    }
    Ok(())
}

/// Pages that are in use leave the pool when they are given back.
fn release(kib: u64, pages: u64) {
    if pages == 0 {
        return;
    }
    let _alone = CHANGE
        .lock()
        .expect("no code panics while it holds this lock");
    if let Some(count) = count(kib) {
        set_count(kib, count.saturating_sub(pages));
    }
}

/// What can be allocated without swapping (proc_meminfo(5), MemAvailable).
fn available_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(name: &str, value: &str) -> CgroupFile {
        CgroupFile {
            name: name.to_owned(),
            value: value.to_owned(),
            field: "linux.resources.hugepageLimits".to_owned(),
            ..CgroupFile::default()
        }
    }

    #[test]
    fn sizes_are_those_of_the_kernels_names() {
        assert_eq!(size_of("hugetlb.2MB.max"), Some("2MB"));
        assert_eq!(size_of("hugetlb.2MB.rsvd.max"), Some("2MB"));
        assert_eq!(size_of("hugetlb.2MB.current"), None);
        assert_eq!(size_of("memory.max"), None);
        for (size, expected) in [
            ("2MB", Some(2048)),
            ("1GB", Some(1 << 20)),
            ("64KB", Some(64)),
            ("2M", None),
            ("+2MB", None),
            ("../MB", None),
            ("99999999999999999999GB", None),
            ("18446744073709551615GB", None),
        ] {
            assert_eq!(kib(size), expected, "{size}");
        }
    }

    #[test]
    fn a_size_that_is_not_there_may_be_limited_to_nothing_only() {
        let mut files = vec![
            limit("hugetlb.3MB.max", "0"),
            limit("hugetlb.3MB.rsvd.max", "0"),
            limit("pids.max", "3"),
        ];
        assert!(wanted(&mut files).expect("nothing is wanted").is_empty());
        assert_eq!(files, [limit("pids.max", "3")]);
        for value in ["4096", "max"] {
            let mut files = vec![limit("hugetlb.3MB.max", value)];
            let error = wanted(&mut files).expect_err(value).to_string();
            assert!(
                error.contains("hugepageLimits") && error.contains("3MB"),
                "{error}"
            );
        }
    }

    #[test]
    fn more_than_the_machine_has_is_refused_at_once() {
        let error = reserve(2048, u64::MAX / 2048, "f").expect_err("too much");
        assert!(error.to_string().contains("to spare"), "{error}");
        let error = reserve(2048, u64::MAX, "f").expect_err("too much");
        assert!(error.to_string().contains("to spare"), "{error}");
    }
}
