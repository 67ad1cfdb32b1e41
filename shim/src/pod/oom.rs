//! What the host's kernel is to think of a pod when memory runs out.
//!
//! A container's processes are inside of the machine, so its `process.oomScoreAdj` has to be that of the machine: of the scores
//! of all containers of the pod the highest counts, as the container that may be taken first takes the others along.

use std::collections::BTreeMap;

/// The scores of a pod's containers.
#[derive(Debug)]
pub(super) struct OomScores {
    /// Of the pod's own container, if it has one.
    own: Option<i32>,
    members: BTreeMap<String, i32>,
    /// What the processes have.
    set: i32,
}

impl OomScores {
    /// No containers yet; the processes were started with this score.
    pub(super) fn of_pod(own: Option<i32>) -> OomScores {
        OomScores {
            own,
            members: BTreeMap::new(),
            set: own.unwrap_or(0),
        }
    }

    pub(super) fn enter(&mut self, container: &str, score: i32) {
        self.members.insert(container.into(), score);
    }

    pub(super) fn leave(&mut self, container: &str) {
        self.members.remove(container);
    }

    /// The score that the processes should have and do not have yet.
    pub(super) fn change(&mut self) -> Option<i32> {
        let all = self.members.values().copied().chain(self.own);
        let score = all.max().unwrap_or(0);
        let changed = score != self.set;
        self.set = score;
        changed.then_some(score)
    }

    /// The score of the processes.
    pub(super) fn now(&self) -> i32 {
        self.set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readiest_container_counts_as_long_as_it_is_there() {
        // CRI's pause container has -998, a burstable one something above 2, one of `ctr run` says nothing.
        let mut scores = OomScores::of_pod(Some(-998));
        assert_eq!(scores.change(), None);
        scores.enter("guaranteed", -997);
        assert_eq!(scores.change(), Some(-997));
        scores.enter("burstable", 900);
        scores.enter("silent", 0);
        assert_eq!((scores.change(), scores.change()), (Some(900), None));
        scores.leave("burstable");
        assert_eq!(scores.change(), Some(0));
        scores.leave("never there");
        assert_eq!((scores.change(), scores.now()), (None, 0));
    }

    #[test]
    fn a_pod_without_a_container_of_its_own_has_its_members_score() {
        let mut scores = OomScores::of_pod(None);
        assert_eq!((scores.change(), scores.now()), (None, 0));
        scores.enter("guaranteed", -997);
        assert_eq!(scores.change(), Some(-997));
        scores.leave("guaranteed");
        assert_eq!(scores.change(), Some(0));
    }
}
