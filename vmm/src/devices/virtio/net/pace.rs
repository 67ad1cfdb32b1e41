//! How often a guest may have the host's taps changed.
//!
//! Each change takes a lock that all network configuration of the host waits for (the kernel's RTNL). No driver changes its queues or
//! offloads more than now and then.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const APART: Duration = Duration::from_millis(10);

/// Shared by all that change the taps of a device.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Mutex<Option<Instant>>>);

impl Pace {
    /// Waits until the last change is long enough ago: the guest's processor or its queues wait, and nobody else's.
    pub fn wait(&self) {
        let mut last = self.0.lock().expect("nothing in here panics");
        let now = Instant::now();
        let next = last.map_or(now, |last| last + APART);
        *last = Some(next.max(now));
        drop(last);
        thread::sleep(next.saturating_duration_since(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_change_is_made_at_once_and_others_apart() {
        // The quickest of ten first ones, for a busy machine may hold up any.
        let first = || {
            let began = Instant::now();
            Pace::default().wait();
            began.elapsed()
        };
        assert!((0..10).map(|_| first()).min() < Some(APART));
        let pace = Pace::default();
        let began = Instant::now();
        pace.wait();
        for _ in 0..4 {
            pace.clone().wait();
        }
        assert!(began.elapsed() >= 4 * APART);
    }
}
