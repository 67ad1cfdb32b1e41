//! What a container says that it may use, and what several of a pod come to together: a machine that
//! runs follows it (`pod/resize.rs`).

use oci_spec::runtime::LinuxResources;

use super::{
    Bundle, Error,
    limits::{DEFAULT_PERIOD, Field, Limits, Quota, Raw, Source, Wrong},
    parse_resources,
};

/// Limits of a container: as it says them, so that an update can change some, and as they are meant.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    raw: Raw,
    limits: Limits,
}

impl Asked {
    /// In config.json.
    pub fn of(bundle: &Bundle) -> Result<Asked, Error> {
        let linux = bundle.spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        Ok(Asked::read(resources.map_or(Ok(Raw::default()), raw)?)?)
    }

    /// In the resources of an update, which name what changes.
    pub fn anew(json: &[u8]) -> Result<Asked, Error> {
        Ok(Asked::read(raw(&parse_resources(json)?)?)?)
    }

    fn read(raw: Raw) -> Result<Asked, Wrong> {
        let limits = raw.read(Source::Config)?;
        Ok(Asked { raw, limits })
    }

    /// What is meant.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The list of processors as it was written, where there is one.
    pub fn processors(&self) -> Option<String> {
        let list = &self.raw.cpus;
        (!list.trim().is_empty()).then(|| list.clone())
    }

    /// What stands after an update.
    ///
    /// # Errors
    /// The numbers do not go together.
    pub fn updated(&self, new: &Asked) -> Result<Asked, Wrong> {
        let (old, new) = (&self.raw, &new.raw);
        let or = |new, old| if new == 0 { old } else { new };
        Asked::read(Raw {
            quota: or(new.quota, old.quota),
            period: or(new.period, old.period),
            shares: or(new.shares, old.shares),
            memory: or(new.memory, old.memory),
            cpus: match new.cpus.is_empty() {
                true => old.cpus.clone(),
                false => new.cpus.clone(),
            },
        })
    }
}

/// Bytes of memory, and microseconds of processors' time in [`DEFAULT_PERIOD`]; 0 where there is no
/// limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    memory: i128,
    time: i128,
}

impl Amounts {
    fn of(Asked { limits, .. }: &Asked) -> Amounts {
        Amounts {
            memory: limits.memory.unwrap_or(0).into(),
            time: limits.quota.map_or(0, Quota::in_default_period).into(),
        }
    }

    /// With the difference of a container's limits.
    pub fn changed(self, old: &Asked, new: &Asked) -> Amounts {
        let (old, new) = (Amounts::of(old), Amounts::of(new));
        Amounts {
            memory: self.memory + new.memory - old.memory,
            time: self.time + new.time - old.time,
        }
    }
}

impl Quota {
    /// Microseconds.
    fn in_default_period(self) -> u64 {
        let us = u128::from(self.quota_us) * u128::from(DEFAULT_PERIOD);
        u64::try_from(us.div_ceil(self.period_us.into())).unwrap_or(u64::MAX)
    }
}

/// So much time in each default period.
fn quota(us: u64) -> Quota {
    Quota {
        quota_us: us,
        period_us: DEFAULT_PERIOD,
    }
}

impl Limits {
    /// Those of a pod whose containers have these: what was announced and then changed by updates,
    /// where anything was announced.
    pub fn announced(self, announced: &Limits, updates: Amounts) -> Limits {
        let with = |announced: u64, change: i128| {
            u64::try_from((i128::from(announced) + change).max(0)).unwrap_or(u64::MAX)
        };
        let time = announced.quota.map(Quota::in_default_period);
        Limits {
            memory: announced
                .memory
                .map_or(self.memory, |memory| Some(with(memory, updates.memory))),
            quota: time.map_or(self.quota, |time| Some(quota(with(time, updates.time)))),
            ..self
        }
    }
}

/// What several containers of a pod may use together. The list of processors of a container that
/// has the machine `alone` counts, which is the host's; another one's is the machine's.
pub fn together(all: &[&Asked], alone: bool) -> Limits {
    let mut total = Limits::default();
    for Asked { limits, .. } in all {
        let sum = |total: Option<u64>, one: Option<u64>| match (total, one) {
            (Some(total), Some(one)) => Some(total.saturating_add(one)),
            (total, one) => total.or(one),
        };
        let time = [total.quota, limits.quota].map(|quota| quota.map(Quota::in_default_period));
        total.quota = sum(time[0], time[1]).map(quota);
        total.memory = sum(total.memory, limits.memory);
        total.cpus = limits.cpus.clone().filter(|_| alone);
    }
    total
}

fn raw(resources: &LinuxResources) -> Result<Raw, Wrong> {
    let mut raw = Raw::default();
    if let Some(memory) = resources.memory() {
        raw.memory = memory.limit().unwrap_or(0);
    }
    if let Some(cpu) = resources.cpu() {
        raw.quota = cpu.quota().unwrap_or(0);
        raw.period = signed(Field::Period, cpu.period())?;
        raw.shares = signed(Field::Shares, cpu.shares())?;
        raw.cpus = cpu.cpus().clone().unwrap_or_default();
    }
    // They are written last, and win. What is no number is refused by the guest's kernel.
    let unified = |name: &str| resources.unified().as_ref()?.get(name);
    let number = |word: Option<&str>| match word {
        Some("max") => -1,
        word => word.and_then(|word| word.parse().ok()).unwrap_or(0),
    };
    if let Some(text) = unified("memory.max") {
        raw.memory = number(Some(text.trim()));
    }
    if let Some(text) = unified("cpu.max") {
        let mut words = text.split_ascii_whitespace();
        (raw.quota, raw.period) = (number(words.next()), number(words.next()));
    }
    Ok(raw)
}

fn signed(field: Field, number: Option<u64>) -> Result<i64, Wrong> {
    let number = number.unwrap_or(0);
    i64::try_from(number).map_err(|_| Wrong {
        field: Source::Config.name(field),
        reason: format!("is {number}, which is too much"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn container(resources: &str) -> Result<Limits, String> {
        let resources = serde_json::from_str(resources).unwrap();
        let read = raw(&resources).and_then(|raw| raw.read(Source::Config));
        read.map_err(|wrong| format!("{} {}", wrong.field, wrong.reason))
    }

    #[test]
    fn a_container_alone_says_it_in_config_json() {
        assert_eq!(container("{}").unwrap(), Limits::default());
        let limits = container(
            r#"{"cpu": {"quota": 150000, "period": 100000, "shares": 4096, "cpus": "0,2-3"},
                "memory": {"limit": 104857600}}"#,
        )
        .unwrap();
        assert_eq!(limits.quota.unwrap().processors(), 2);
        assert_eq!(limits.cpus, Some([0, 2, 3].into()));
        assert_eq!(limits.requested, None, "shares are a weight here");
        assert_eq!(limits.memory, Some(100 * MIB));
        // Without a period the kernel's own.
        let quota = container(r#"{"cpu": {"quota": 100001}}"#).unwrap().quota;
        assert_eq!(quota.unwrap().processors(), 2);
    }

    #[test]
    fn containers_of_a_pod_add_up_and_an_update_changes_what_it_names() {
        let asked = |json: &str| Asked::anew(json.as_bytes()).unwrap();
        let sum = |all: &[&Asked]| together(all, all.len() == 1);
        let one = asked(
            r#"{"cpu": {"quota": 50000, "period": 100000, "cpus": "3"}, "memory": {"limit": 10}}"#,
        );
        let two = asked(r#"{"cpu": {"quota": 7500, "period": 10000}}"#);
        let none = asked("{}");
        let of = |all: &[&Asked]| {
            let total = sum(all);
            let time = total.quota.map(|quota| (quota.quota_us, quota.period_us));
            (time, total.memory, total.cpus.map(|cpus| cpus.len()))
        };
        assert_eq!(of(&[]), (None, None, None));
        assert_eq!(of(&[&none]), (None, None, None));
        assert_eq!(of(&[&one]), (Some((50_000, 100_000)), Some(10), Some(1)));
        let both = (Some((125_000, 100_000)), Some(10), None);
        assert_eq!(of(&[&one, &none, &two]), both);
        let more = one.updated(&asked(r#"{"memory": {"limit": 30}}"#)).unwrap();
        assert_eq!(of(&[&more]), (Some((50_000, 100_000)), Some(30), Some(1)));
        let lifted = r#"{"cpu": {"quota": -1, "cpus": "0-3"}, "memory": {"limit": -1}}"#;
        assert_eq!(
            of(&[&more.updated(&asked(lifted)).unwrap()]),
            (None, None, Some(4))
        );
        // Files by their names win.
        let unified =
            r#"{"memory": {"limit": 7}, "unified": {"memory.max": "9", "cpu.max": "max 10000"}}"#;
        assert_eq!(
            of(&[&one.updated(&asked(unified)).unwrap()]),
            (None, Some(9), Some(1))
        );
        // Of what an engine has announced only updates change anything.
        let announced = Limits {
            memory: Some(12),
            quota: Some(quota(100_000)),
            ..Limits::default()
        };
        let with = |updates| {
            let limits = sum(&[&one, &two]).announced(&announced, updates);
            (limits.memory, limits.quota.map(|quota| quota.quota_us))
        };
        assert_eq!(with(Amounts::default()), (Some(12), Some(100_000)));
        let updates = Amounts::default().changed(&one, &more).changed(&two, &none);
        assert_eq!(with(updates), (Some(32), Some(25_000)));
        assert!(Asked::anew(br#"{"memory": {"limit": -5}}"#).is_err());
        assert!(Asked::anew(b"{").is_err());
    }

    #[test]
    fn none_is_written_in_several_ways() {
        for text in [
            r#"{"cpu": {"quota": -1, "period": 100000, "cpus": ""}, "memory": {"limit": -1}}"#,
            r#"{"cpu": {"quota": 0, "period": 0, "shares": 0}, "memory": {"limit": 0}}"#,
            r#"{"memory": {"limit": 9223372036854771712}}"#,
            r#"{"memory": {"limit": 9223372036854775807}}"#,
        ] {
            assert_eq!(container(text).unwrap(), Limits::default(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_name() {
        for (text, name) in [
            (r#"{"cpu": {"quota": -2}}"#, "cpu.quota is -2"),
            (r#"{"cpu": {"quota": 999}}"#, "cpu.quota is 999"),
            (
                r#"{"cpu": {"quota": 9223372036854775807}}"#,
                "which no machine has",
            ),
            (r#"{"cpu": {"period": 999}}"#, "cpu.period is 999"),
            (r#"{"cpu": {"period": 1000001}}"#, "cpu.period is 1000001"),
            (
                r#"{"cpu": {"period": 18446744073709551615}}"#,
                "cpu.period is 18446744073709551615",
            ),
            (r#"{"cpu": {"shares": 18446744073709551615}}"#, "cpu.shares"),
            (r#"{"cpu": {"cpus": "1-"}}"#, "cpu.cpus is \"1-\""),
            (r#"{"cpu": {"cpus": "3-1"}}"#, "cpu.cpus"),
            (r#"{"cpu": {"cpus": "0-4294967295"}}"#, "cpu.cpus"),
            (r#"{"cpu": {"cpus": "0,,1"}}"#, "cpu.cpus"),
            (r#"{"memory": {"limit": -5}}"#, "memory.limit is -5"),
        ] {
            let error = container(text).unwrap_err();
            assert!(error.contains(name), "{text}: {error}");
        }
    }
}
