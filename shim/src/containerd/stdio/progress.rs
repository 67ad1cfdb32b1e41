//! How far output has come on its way to whoever reads it.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::relay::Passed;

/// How long a client may read nothing before it is not waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// How soon, and then how often, is looked: a FIFO says when there is room, not when it is empty.
const SOON: Duration = Duration::from_millis(1);
const OFTEN: Duration = Duration::from_millis(16);

/// How far one stream has come; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    passed: Arc<Passed>,
    /// A reader of the FIFO that never reads; `None` where what was passed on is out of our hands.
    fifo: Option<Arc<OwnedFd>>,
}

impl Progress {
    /// Of a relay that has not begun.
    pub(super) fn new(fifo: Option<OwnedFd>) -> Progress {
        Progress {
            passed: Arc::default(),
            fifo: fifo.map(Arc::new),
        }
    }

    /// Where the relay counts.
    pub(super) fn passed(&self) -> Arc<Passed> {
        self.passed.clone()
    }

    /// Bytes that the client has read.
    fn read(&self) -> u64 {
        // A FIFO has no reason to refuse.
        let unread = |fifo: &Arc<OwnedFd>| linux::descriptor::unread(fifo.as_fd()).unwrap_or(0);
        let unread = self.fifo.as_ref().map_or(0, unread);
        self.passed.bytes().saturating_sub(unread.into())
    }

    /// Whether the client has read so many, or all there will ever be.
    fn is_heard(&self, written: u64) -> bool {
        // In this order: what is passed on last is counted before the end.
        let ended = self.passed.ended();
        let all = self.passed.bytes();
        self.read() >= if ended { written.min(all) } else { written }
    }
}

/// See [`super::Streams::heard`].
pub(super) async fn heard(outputs: [Option<Progress>; 2], written: [u64; 2], limit: Duration) {
    let waiting = || {
        outputs
            .iter()
            .zip(written)
            .filter_map(|(output, written)| Some((output.as_ref()?, written)))
    };
    let end = Instant::now() + limit;
    let mut read = u64::MAX;
    let mut patient_until = end;
    let mut pause = SOON;
    while !waiting().all(|(output, written)| output.is_heard(written)) {
        let now = Instant::now();
        let reads = waiting().map(|(output, _)| output.read()).sum();
        if reads != read {
            read = reads;
            patient_until = end.min(now + PATIENCE);
        }
        if now >= patient_until {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = OFTEN.min(pause * 2);
    }
}
