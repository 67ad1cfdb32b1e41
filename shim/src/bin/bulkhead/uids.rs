//! Whether the uids of the VMMs are anybody else's, who could then signal them.

use std::{collections::BTreeSet, fs, ops::Range, process::Command};

use bulkhead_shim::config::Config;

use crate::check::Item;

/// How many uids of the range a directory service is asked for.
const ASKED: u32 = 64;

/// Looks at the accounts of the host, at ranges that are handed out to users' containers, and asks the name services.
pub fn item(config: &Config) -> Item {
    let range = config.uid_base..config.uid_base.saturating_add(config.uid_count);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let mut found = accounts(&read("/etc/passwd"), &range);
    found.extend(subordinate(&read("/etc/subuid"), &range));
    found.extend(accounts(&known(&range), &range));
    let text = format!("{} to {}", range.start, range.end - 1);
    match found.into_iter().next() {
        None => Item {
            name: "uids",
            ok: true,
            found: text,
            remedy: None,
        },
        Some(whose) => Item {
            name: "uids",
            ok: true,
            found: format!("{text}, of which {whose}"),
            remedy: Some(
                "set uid_base in the configuration to a range that is nobody's: whoever has a VMM's uid may kill it".into(),
            ),
        },
    }
}

/// `name:password:uid:...`
fn accounts(passwd: &str, range: &Range<u32>) -> BTreeSet<String> {
    let account = |line: &str| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        let name = bulkhead_shim::text::brief(name, 64);
        range
            .contains(&uid)
            .then(|| format!("{uid} is the account {name:?}"))
    };
    passwd.lines().filter_map(account).collect()
}

/// `name:first:count`, subuid(5).
fn subordinate(subuid: &str, range: &Range<u32>) -> BTreeSet<String> {
    let owner = |line: &str| {
        let mut fields = line.split(':');
        let name = bulkhead_shim::text::brief(fields.next()?, 64);
        let first: u64 = fields.next()?.parse().ok()?;
        let count: u64 = fields.next()?.trim().parse().ok()?;
        let overlaps = first < range.end.into() && first.saturating_add(count) > range.start.into();
        let last = first.saturating_add(count).saturating_sub(1);
        (overlaps && count > 0)
            .then(|| format!("some are handed out to {name:?} by /etc/subuid ({first} to {last})"))
    };
    subuid.lines().filter_map(owner).collect()
}

/// What the host's own name services (SSSD, LDAP, systemd) say about some of the range, in passwd's form: this program is static and
/// cannot load their modules, getent can. A service that hands out this range knows others of it, too, that are not asked for.
fn known(range: &Range<u32>) -> String {
    let step = (range.len() as u32 / ASKED).max(1);
    let uids = range.clone().step_by(step as usize).chain([range.end - 1]);
    let uids = uids.map(|uid| uid.to_string());
    // It ends with 2 where it does not know one of them. Without it there are no such services.
    let output = Command::new("getent").arg("passwd").args(uids).output();
    output.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_uid_is_is_found() {
        let range = 1000..2000;
        let passwd = "root:x:0:0::/:/bin/sh\nann:x:1999:1:::\nbob:x:2000:1:::\nnonsense\n::x:";
        let found = accounts(passwd, &range);
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["1999 is the account \"ann\""]
        );
        for (line, overlaps) in [
            ("ann:0:1000", false),
            ("ann:0:1001", true),
            ("ann:1500:10\n", true),
            ("ann:2000:65536", false),
            ("ann:1500:0", false),
            ("ann:0:18446744073709551615", true),
            ("ann:x:y", false),
        ] {
            assert_eq!(!subordinate(line, &range).is_empty(), overlaps, "{line}");
        }
    }

    #[test]
    fn the_default_range_is_nobodys_here() {
        let item = item(&Config::default());
        assert!(item.ok && item.remedy.is_none(), "{item:?}");
    }
}
