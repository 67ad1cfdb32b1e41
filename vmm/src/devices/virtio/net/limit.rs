//! Rate limits: a token bucket for bytes and one for packets.

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

/// The limits of one direction of one pair of queues.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
    filled: Instant,
}

impl Limiter {
    /// Full buckets at `now`, for one of `shares` equal parts of the limit: each pair of queues has a part of the device's, so
    /// that no lock is shared between their threads.
    pub fn new(limit: RateLimit, shares: usize, now: Instant) -> Limiter {
        let burst = match limit.burst_ms {
            0 => BURST,
            ms => Duration::from_millis(ms.into()),
        };
        Limiter {
            bytes: Bucket::new(limit.bytes.div_ceil(shares as u64), burst),
            packets: Bucket::new(limit.packets.div_ceil(shares as u64), burst),
            filled: now,
        }
    }

    /// Whether there is any limit.
    pub fn is_active(&self) -> bool {
        self.bytes.is_some() || self.packets.is_some()
    }

    /// How long the next packet has to wait, now.
    ///
    /// # Errors
    /// It has to.
    pub fn check_now(&mut self) -> Result<(), Duration> {
        // The clock is not looked at for nothing: this is once for each packet.
        match self.is_active() {
            true => self.check(Instant::now()),
            false => Ok(()),
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

    /// Takes a packet that went.
    pub fn take(&mut self, bytes: usize) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.packets, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }
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
    fn run(limiter: &mut Limiter, start: Instant, size: usize, time: Duration) -> u64 {
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
        let mut limiter = Limiter::new(RateLimit::default(), 1, now);
        assert!(!limiter.is_active());
        limiter.take(usize::MAX);
        assert_eq!(limiter.check(now), Ok(()));
    }

    #[test]
    fn the_rate_is_kept_over_time_and_a_burst_goes_at_once() {
        let start = Instant::now();
        let second = Duration::from_secs(10);
        let sent = run(
            &mut Limiter::new(limit(0, 1000, 50), 1, start),
            start,
            9,
            second,
        );
        assert!((10_000..=10_051).contains(&sent), "{sent}");
        let sent = run(
            &mut Limiter::new(limit(1 << 20, 0, 100), 1, start),
            start,
            64 << 10,
            second,
        );
        assert!((159..=163).contains(&sent), "{sent}");
        let sent = run(
            &mut Limiter::new(limit(1 << 20, 10, 100), 1, start),
            start,
            64 << 10,
            second,
        );
        assert!((99..=102).contains(&sent), "the lower one decides: {sent}");
    }

    #[test]
    fn the_smallest_rate_lets_a_packet_through() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limit(1, 1, 1), 1, start);
        assert_eq!(limiter.check(start), Ok(()));
        limiter.take(65550);
        let wait = limiter.check(start).unwrap_err();
        assert_eq!(limiter.check(start + wait), Ok(()));
    }

    #[test]
    fn the_largest_rate_and_silence_do_not_overflow() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limit(u64::MAX, u64::MAX, u32::MAX), 1, start);
        limiter.take(65550);
        assert_eq!(limiter.check(start + Duration::from_secs(1 << 32)), Ok(()));
    }
}
