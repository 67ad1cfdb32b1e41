//! Lines that the processes of a pod and its guest write: kept for the error that needs them, and passed on.
//!
//! Their writers are not trusted: a line is cut at [`MAX_LINE`], control characters are made visible, and a flood is
//! counted instead of passed on. A guest must not choose how much of this process' time goes into its log: [`BYTES`] a second
//! are read, and only lines that are passed on, or asked for later, are understood. Nobody ever waits for us: what is not read
//! in time is dropped by the writer.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    audit::{Audit, Event},
    text::brief,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
};

/// Longest line that is kept, in bytes.
const MAX_LINE: usize = 1024;
/// Lines kept of each source.
const KEPT: usize = 20;
/// Lines of one source that are passed on each second.
const RATE: u32 = 200;
/// Bytes of one source that are read each second, and at once after silence.
const BYTES: u64 = 1 << 20;
/// Bytes that are waited for when those are used up: what a pipe holds.
const PORTION: u64 = 64 << 10;

/// The last lines of one source, as they came.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl Tail {
    /// Oldest first.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().expect("no panic while it is held");
        lines.iter().map(|line| shown(line)).collect()
    }

    /// The last line that tells of trouble: an error, or what is no log line at all (a panic's text).
    pub fn trouble(&self) -> Option<String> {
        let mild = ["info: ", "debug: ", "warn: ", "trace: "];
        let mut last = self.lines().into_iter().rev();
        last.find(|line| !mild.iter().any(|mild| line.starts_with(mild)))
    }

    fn push(&self, line: &[u8]) {
        let mut lines = self.0.lock().expect("no panic while it is held");
        let mut place = match lines.len() {
            KEPT => lines.pop_front().unwrap_or_default(),
            _ => Vec::new(),
        };
        place.clear();
        place.extend_from_slice(line);
        lines.push_back(place);
    }
}

/// How much may be read.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    left: u64,
    filled: Instant,
}

impl Bucket {
    fn full(rate: u64, now: Instant) -> Bucket {
        Bucket {
            rate,
            left: rate,
            filled: now,
        }
    }

    /// Takes what was read: how long to wait before more is.
    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let nanos = now.saturating_duration_since(self.filled).as_nanos();
        let came = nanos.saturating_mul(self.rate.into()) / 1_000_000_000;
        if came > 0 {
            self.filled = now;
            let came = u64::try_from(came).unwrap_or(u64::MAX);
            self.left = self.left.saturating_add(came).min(self.rate);
        }
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Duration::ZERO
            }
            None => {
                let lacks = (bytes - self.left).saturating_add(PORTION);
                self.left = 0;
                Duration::from_nanos(lacks.saturating_mul(1_000_000_000) / self.rate.max(1))
            }
        }
    }
}

/// A pipe for a process to write lines into: its end, and ours.
pub fn pipe() -> io::Result<(OwnedFd, pipe::Receiver)> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((theirs, pipe::Receiver::from_owned_fd(ours)?))
}

/// Reads lines until the end, in a task of its own.
pub fn follow(
    sandbox: &str,
    source: &'static str,
    audit: &Audit,
    reader: impl AsyncRead + Send + Unpin + 'static,
) -> Tail {
    let follower = Follower::new(sandbox, source, audit);
    let tail = follower.tail.clone();
    tokio::spawn(follower.run(reader));
    tail
}

struct Follower {
    sandbox: String,
    source: &'static str,
    audit: Audit,
    tail: Tail,
    bucket: Bucket,
    second: Instant,
    passed: u32,
    dropped: u64,
    dropped_bytes: u64,
}

impl Follower {
    fn new(sandbox: &str, source: &'static str, audit: &Audit) -> Follower {
        let now = Instant::now();
        Follower {
            sandbox: sandbox.into(),
            source,
            audit: audit.clone(),
            tail: Tail::default(),
            bucket: Bucket::full(BYTES, now),
            second: now,
            passed: 0,
            dropped: 0,
            dropped_bytes: 0,
        }
    }

    async fn run(mut self, mut reader: impl AsyncRead + Unpin) {
        let mut chunk = vec![0; 4096];
        let mut line = Vec::new();
        while let Ok(count @ 1..) = reader.read(&mut chunk).await {
            let mut parts = chunk[..count].split(|byte| *byte == b'\n').peekable();
            while let Some(part) = parts.next() {
                let room = MAX_LINE.saturating_sub(line.len());
                line.extend_from_slice(&part[..part.len().min(room)]);
                if parts.peek().is_some() {
                    self.line(&line);
                    line.clear();
                }
            }
            let pause = self.bucket.take(count as u64, Instant::now());
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
        self.line(&line);
        self.tell_dropped();
    }

    fn line(&mut self, bytes: &[u8]) {
        // A second's beginning costs a system call on some hosts: not one for each of a million empty lines.
        if bytes.is_empty() || bytes == b"\r" {
            return;
        }
        if self.second.elapsed() >= Duration::from_secs(1) {
            self.tell_dropped();
            (self.second, self.passed) = (Instant::now(), 0);
        }
        if self.passed < RATE {
            self.passed += 1;
            tracing::debug!(sandbox = %self.sandbox, source = self.source, "{}", shown(bytes));
        } else {
            self.dropped += 1;
            self.dropped_bytes = self.dropped_bytes.saturating_add(bytes.len() as u64);
        }
        self.tail.push(bytes);
    }

    fn tell_dropped(&mut self) {
        if self.dropped > 0 {
            tracing::warn!(sandbox = %self.sandbox, source = self.source, lines = self.dropped, bytes = self.dropped_bytes, "too many log lines: not all of them are passed on");
            let detail = format!(
                "log lines, {} bytes, that were not passed on",
                self.dropped_bytes
            );
            self.audit
                .tell(Event::limit(self.source, "log", Some(self.dropped), detail));
        }
        (self.dropped, self.dropped_bytes) = (0, 0);
    }
}

/// A line for people.
fn shown(bytes: &[u8]) -> String {
    brief(&plain(bytes), MAX_LINE)
}

/// `level: message` of a log line in JSON; anything else as it is.
fn plain(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Line {
        level: String,
        message: String,
    }
    match serde_json::from_slice(bytes) {
        Ok(Line { level, message }) => format!("{level}: {message}"),
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_escaped_and_counted() {
        let mut input = Vec::new();
        input.extend(b"first\n\x1b[31mred\r\n");
        input.extend(vec![b'x'; 1 << 20]);
        input.extend(b"\nlast without a newline");
        let mut follower = Follower::new("s", "test", &Audit::default());
        follower.bucket.rate = u64::MAX;
        follower.passed = RATE - 1;
        let tail = follower.tail.clone();
        follower.run(&input[..]).await;
        let lines = tail.lines();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], "first");
        assert_eq!(lines[1], "\\u{1b}[31mred");
        assert_eq!(lines[2].len(), MAX_LINE);
        assert_eq!(lines[3], "last without a newline");
    }

    #[test]
    fn the_telling_line_is_an_error_or_no_log_line() {
        let tail = Tail::default();
        tail.push(br#"{"level":"error","message":"broken","time":1}"#);
        tail.push(br#"{"level":"info","message":"fine"}"#);
        assert_eq!(tail.trouble().unwrap(), "error: broken");
        tail.push(b"thread 'main' panicked");
        assert_eq!(tail.trouble().unwrap(), "thread 'main' panicked");
    }

    #[test]
    fn a_bucket_gives_its_rate_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket::full(BYTES, start);
        let (mut now, mut taken) = (start, 0);
        while now < start + Duration::from_secs(10) {
            now += bucket.take(4096, now);
            // Reading itself takes no time.
            taken += 4096;
        }
        assert!((10 * BYTES..12 * BYTES).contains(&taken), "{taken}");
        // Silence fills it, once.
        now += Duration::from_secs(1000);
        assert_eq!(bucket.take(BYTES, now), Duration::ZERO);
        assert!(!bucket.take(1, now).is_zero());
        assert!(bucket.take(u64::MAX, now) > Duration::from_secs(1000));
    }

    #[tokio::test]
    async fn a_flood_is_not_read_faster_than_the_limit() {
        /// A writer that always has a line more, for much longer than it is heard.
        struct Flood(Arc<std::sync::atomic::AtomicU64>);
        impl AsyncRead for Flood {
            fn poll_read(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                buffer: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                const END: u64 = 64 << 20;
                if self.0.load(std::sync::atomic::Ordering::Relaxed) >= END {
                    return std::task::Poll::Ready(Ok(()));
                }
                let room = buffer.remaining();
                buffer.put_slice(
                    &b"{\"level\":\"info\",\"message\":\"\\u001b\"}\n".repeat(1000)[..room],
                );
                self.0
                    .fetch_add(room as u64, std::sync::atomic::Ordering::Relaxed);
                std::task::Poll::Ready(Ok(()))
            }
        }
        let read = Arc::default();
        let tail = follow("s", "test", &Audit::default(), Flood(Arc::clone(&read)));
        let began = Instant::now();
        tokio::time::sleep(Duration::from_millis(300)).await;
        // The first second's worth at once, then what the time allows.
        let allowed = 2 * PORTION + BYTES + (began.elapsed().as_millis() as u64 + 1) * BYTES / 1000;
        let read = read.load(std::sync::atomic::Ordering::Relaxed);
        assert!((BYTES..=allowed).contains(&read), "{read} of {allowed}");
        assert_eq!(tail.lines()[0], "info: \\u{1b}");
    }
}
