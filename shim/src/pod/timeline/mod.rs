//! When a boot reached what: the moments that the VMM reports and those that happen here, on one clock.

mod svg;

use bulkhead_vmm_config::{Phase, Stamp};
use serde::Serialize;

/// One moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// What happened.
    pub name: &'static str,
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// VM exits until then, less those that host interrupts caused; only the VMM knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exits: Option<u64>,
}

/// The moments of one run.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    moments: Vec<Moment>,
}

/// `CLOCK_MONOTONIC` now, in ns.
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = now.expect("every Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

impl Timeline {
    /// Begins with the start of the command.
    pub fn started_at(at_ns: u64) -> Timeline {
        let moments = vec![Moment {
            name: "command start",
            at_ns,
            exits: None,
        }];
        Timeline { moments }
    }

    /// Notes that something happens now.
    pub fn mark(&mut self, name: &'static str) {
        self.moments.push(Moment {
            name,
            at_ns: now_ns(),
            exits: None,
        });
    }

    /// Adds what the VMM has seen.
    pub fn add(&mut self, stamps: &[Stamp]) {
        self.moments.extend(stamps.iter().map(|stamp| Moment {
            name: match stamp.phase {
                Phase::VmmStart => "vmm start",
                Phase::FirstInstruction => "first guest instruction",
                Phase::Init => "kernel to init",
                Phase::AgentDialled => "agent dialled",
            },
            at_ns: stamp.at_ns,
            exits: Some(stamp.exits.saturating_sub(stamp.irq_exits)),
        }));
    }

    /// In the order of time.
    pub fn moments(&self) -> Vec<Moment> {
        let mut moments = self.moments.clone();
        moments.sort_by_key(|moment| moment.at_ns);
        moments
    }

    /// A picture for people, of which `title` is the headline.
    pub fn svg(&self, title: &str) -> String {
        svg::draw(&self.moments(), title)
    }

    /// A table for people: ms since the first moment, ms since the one before, exits.
    pub fn table(&self) -> String {
        let moments = self.moments();
        let mut text = format!(
            "{:<26}{:>10}{:>10}{:>10}\n",
            "boot timeline", "at ms", "took ms", "vm exits"
        );
        let first = moments.first().map_or(0, |moment| moment.at_ns);
        let mut before = first;
        for moment in &moments {
            let exits = moment
                .exits
                .map_or("-".to_string(), |exits| exits.to_string());
            text += &format!(
                "{:<26}{:>10.1}{:>10.1}{:>10}\n",
                moment.name,
                milliseconds(moment.at_ns - first),
                milliseconds(moment.at_ns - before),
                exits
            );
            before = moment.at_ns;
        }
        text
    }
}

fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_sorted_and_counted_from_the_first() {
        let mut timeline = Timeline::default();
        timeline.mark("ready");
        let start = timeline.moments()[0].at_ns - 5_000_000;
        timeline.add(&[Stamp {
            phase: Phase::VmmStart,
            at_ns: start,
            exits: 7,
            irq_exits: 2,
        }]);
        let table = timeline.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(
            lines[1].starts_with("vmm start") && lines[1].ends_with('5'),
            "{table}"
        );
        assert!(
            lines[2].starts_with("ready") && lines[2].contains("5.0"),
            "{table}"
        );
    }
}
