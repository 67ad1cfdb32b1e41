//! Rate limits: a token bucket for bytes and one for packets.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bulkhead_vmm_config::RateLimit;

/// What may come at once after silence, where the limit does not say.
const BURST: Duration = Duration::from_millis(100);

/// One bucket. It may be overdrawn by one packet, whose size is known only when it is there; the next one waits for that.
#[derive(Debug)]
struct Bucket {
    /// Tokens a second.
    rate: u64,
    most: i128,
    /// Tokens times a second in nanoseconds, so that no part of one is lost however often it is filled.
    level: i128,
}

const SECOND: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: u64, burst: Duration) -> Option<Bucket> {
        // A bucket that never holds a whole token would never give one.
        let most = (i128::from(rate) * burst.as_nanos() as i128).max(SECOND);
        (rate > 0).then_some(Bucket {
            rate,
            most,
            level: most,
        })
    }

    fn fill(&mut self, passed: Duration) {
        let new = i128::from(self.rate) * passed.as_nanos() as i128;
        self.level = self.most.min(self.level + new);
    }

    /// How long until something may be taken.
    fn wait(&self) -> Duration {
        let missing = (SECOND - self.level).max(0) as u128;
        let nanos = missing.div_ceil(self.rate.into());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: usize) {
        self.level -= tokens as i128 * SECOND;
    }
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
    filled: Instant,
}

impl Buckets {
    fn new(limit: RateLimit, now: Instant) -> Buckets {
        let burst = match limit.burst_ms {
            0 => BURST,
            ms => Duration::from_millis(ms.into()),
        };
        Buckets {
            bytes: Bucket::new(limit.bytes, burst),
            packets: Bucket::new(limit.packets, burst),
            filled: now,
        }
    }

    fn check(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = now;
        let buckets = [&mut self.bytes, &mut self.packets];
        let waits = buckets.into_iter().flatten().map(|bucket| {
            bucket.fill(passed);
            bucket.wait()
        });
        match waits.max() {
            None | Some(Duration::ZERO) => Ok(()),
            Some(wait) => Err(wait),
        }
    }

    fn take(&mut self, bytes: usize) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.packets, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }
}

/// The limits of one direction of a device: all its pairs of queues share them, and a reset does not fill them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Limiter(Option<Arc<Mutex<Buckets>>>);

impl Limiter {
    /// Full buckets.
    pub fn new(limit: RateLimit) -> Limiter {
        let limited = limit.bytes > 0 || limit.packets > 0;
        let buckets = || Arc::new(Mutex::new(Buckets::new(limit, Instant::now())));
        Limiter(limited.then(buckets))
    }

    /// Whether there is any limit.
    pub fn is_active(&self) -> bool {
        self.0.is_some()
    }

    /// How long the next packet has to wait. Without a limit the clock is not looked at: this is once for each packet.
    ///
    /// # Errors
    /// It has to.
    pub fn check(&self) -> Result<(), Duration> {
        match &self.0 {
            Some(buckets) => lock(buckets).check(Instant::now()),
            None => Ok(()),
        }
    }

    /// Takes a packet that went.
    pub fn take(&self, bytes: usize) {
        if let Some(buckets) = &self.0 {
            lock(buckets).take(bytes);
        }
    }
}

fn lock(buckets: &Mutex<Buckets>) -> MutexGuard<'_, Buckets> {
    buckets.lock().expect("arithmetic that does not panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: u64, packets: u64, burst_ms: u32) -> RateLimit {
        RateLimit {
            bytes,
            packets,
            burst_ms,
        }
    }

    /// Sends packets of `size` bytes for a time, waiting as told; returns how many went.
    fn run(limiter: &mut Buckets, start: Instant, size: usize, time: Duration) -> u64 {
        let mut now = start;
        let mut sent = 0;
        while now <= start + time {
            match limiter.check(now) {
                Ok(()) => {
                    limiter.take(size);
                    sent += 1;
                }
                Err(wait) => {
                    assert!(!wait.is_zero());
                    now += wait;
                }
            }
        }
        sent
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = Instant::now();
        let mut limiter = Buckets::new(RateLimit::default(), now);
        assert!(!Limiter::new(RateLimit::default()).is_active());
        limiter.take(usize::MAX);
        assert_eq!(limiter.check(now), Ok(()));
    }

    #[test]
    fn the_rate_is_kept_over_time_and_a_burst_goes_at_once() {
        let start = Instant::now();
        let second = Duration::from_secs(10);
        let sent = run(
            &mut Buckets::new(limit(0, 1000, 50), start),
            start,
            9,
            second,
        );
        assert!((10_000..=10_051).contains(&sent), "{sent}");
        let sent = run(
            &mut Buckets::new(limit(1 << 20, 0, 100), start),
            start,
            64 << 10,
            second,
        );
        assert!((159..=163).contains(&sent), "{sent}");
        let sent = run(
            &mut Buckets::new(limit(1 << 20, 10, 100), start),
            start,
            64 << 10,
            second,
        );
        assert!((99..=102).contains(&sent), "the lower one decides: {sent}");
    }

    #[test]
    fn the_smallest_rate_lets_a_packet_through() {
        let start = Instant::now();
        let mut limiter = Buckets::new(limit(1, 1, 1), start);
        assert_eq!(limiter.check(start), Ok(()));
        limiter.take(65550);
        let wait = limiter.check(start).unwrap_err();
        assert_eq!(limiter.check(start + wait), Ok(()));
    }

    #[test]
    fn the_largest_rate_and_silence_do_not_overflow() {
        let start = Instant::now();
        let mut limiter = Buckets::new(limit(u64::MAX, u64::MAX, u32::MAX), start);
        limiter.take(65550);
        assert_eq!(limiter.check(start + Duration::from_secs(1 << 32)), Ok(()));
    }
}
