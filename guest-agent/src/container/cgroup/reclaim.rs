//! Page cache of a container that nobody uses goes, so that its pages are free and the balloon
//! gives them to the host.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;

/// Bytes that one write asks for: the clock is looked at in between.
const PART: u64 = 16 << 20;
/// Less than this is not worth a walk of the kernel's lists.
const LEAST: u64 = 256 << 10;

/// Has the kernel reclaim page cache of the cgroup at `path` and beneath, at most `most` bytes and
/// not past `end`. What processes have mapped stays: it is the programs that will run next. Returns
/// how many bytes less there are; a cgroup that goes meanwhile, or a kernel that cannot, is no
/// error.
pub fn reclaim(path: &Path, most: u64, end: Instant) -> u64 {
    let Some(before) = cached(path) else { return 0 };
    let mut now = before;
    while Instant::now() < end {
        let part = now
            .min(most.saturating_sub(before.saturating_sub(now)))
            .min(PART);
        if part < LEAST {
            break;
        }
        // Less than asked for is an error to the kernel; what has gone is looked at.
        let _ = ask(path, part);
        let Some(left) = cached(path) else { break };
        let gone = now.saturating_sub(left);
        now = left;
        // Of dirty pages, or of pages that are used right now, nothing goes however often it is
        // tried.
        if gone < LEAST {
            break;
        }
    }
    before.saturating_sub(now)
}

/// Page cache that no process has mapped, in bytes.
fn cached(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path.join("memory.stat")).ok()?;
    let field = |name: &str| -> u64 {
        let mut words = text.lines().filter_map(|line| line.split_once(' '));
        let found = words.find(|(found, _)| *found == name);
        found.and_then(|(_, count)| count.parse().ok()).unwrap_or(0)
    };
    let files = field("active_file").saturating_add(field("inactive_file"));
    Some(files.saturating_sub(field("file_mapped")))
}

/// Documentation/admin-guide/cgroup-v2.rst, memory.reclaim: no anonymous memory, where the kernel
/// can be told so.
fn ask(path: &Path, bytes: u64) -> io::Result<()> {
    let file = path.join("memory.reclaim");
    match fs::write(&file, format!("{bytes} swappiness=0")) {
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
            fs::write(&file, bytes.to_string())
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn what_processes_have_mapped_is_not_counted() {
        let dir = tempfile::TempDir::new().unwrap();
        let stat = "anon 5\nactive_file 4096\ninactive_file 8192\nfile_mapped 1024\n";
        fs::write(dir.path().join("memory.stat"), stat).unwrap();
        assert_eq!(cached(dir.path()), Some(11264));
        fs::write(
            dir.path().join("memory.stat"),
            "active_file x\nfile_mapped 9",
        )
        .unwrap();
        assert_eq!(cached(dir.path()), Some(0));
        assert_eq!(cached(&dir.path().join("none")), None);
    }

    #[test]
    fn a_kernel_that_reclaims_nothing_is_asked_once() {
        let dir = tempfile::TempDir::new().unwrap();
        let cache = 64 << 20;
        let stat = format!("active_file {cache}\n");
        fs::write(dir.path().join("memory.stat"), stat).unwrap();
        // A plain file takes every write.
        assert_eq!(reclaim(dir.path(), u64::MAX, soon()), 0);
        let asked = fs::read_to_string(dir.path().join("memory.reclaim")).unwrap();
        assert_eq!(asked, format!("{PART} swappiness=0"));
        // One that refuses: a directory.
        fs::remove_file(dir.path().join("memory.reclaim")).unwrap();
        fs::create_dir(dir.path().join("memory.reclaim")).unwrap();
        assert_eq!(reclaim(dir.path(), u64::MAX, soon()), 0);
        assert_eq!(reclaim(&dir.path().join("none"), u64::MAX, soon()), 0);
    }

    #[test]
    fn little_is_not_asked_for() {
        let dir = tempfile::TempDir::new().unwrap();
        for (cache, most) in [(LEAST - 1, u64::MAX), (1 << 30, LEAST - 1), (1 << 30, 0)] {
            let stat = format!("inactive_file {cache}\n");
            fs::write(dir.path().join("memory.stat"), stat).unwrap();
            assert_eq!(reclaim(dir.path(), most, soon()), 0);
            assert!(!dir.path().join("memory.reclaim").exists());
        }
    }
}
