//! Lines that the processes of a pod and its guest write: kept for the error that needs them, and passed on.
//!
//! Their writers are not trusted: a line is cut at [`MAX_LINE`], control characters are made visible, and a flood is
//! counted instead of passed on. Nobody ever waits for us: what cannot be read in time is dropped by the writer.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
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

/// The last lines of one source.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// Oldest first.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().expect("no panic while it is held");
        lines.iter().cloned().collect()
    }

    /// The last line that tells of trouble: an error, or what is no log line at all (a panic's text).
    pub fn trouble(&self) -> Option<String> {
        let lines = self.0.lock().expect("no panic while it is held");
        lines
            .iter()
            .rev()
            .find(|line| {
                !["info: ", "debug: ", "warn: ", "trace: "]
                    .iter()
                    .any(|mild| line.starts_with(mild))
            })
            .cloned()
    }

    fn push(&self, line: String) {
        let mut lines = self.0.lock().expect("no panic while it is held");
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
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
    reader: impl AsyncRead + Send + Unpin + 'static,
) -> Tail {
    let tail = Tail::default();
    let follower = Follower {
        sandbox: sandbox.into(),
        source,
        tail: tail.clone(),
        second: Instant::now(),
        passed: 0,
        dropped: 0,
    };
    tokio::spawn(follower.run(reader));
    tail
}

struct Follower {
    sandbox: String,
    source: &'static str,
    tail: Tail,
    second: Instant,
    passed: u32,
    dropped: u64,
}

impl Follower {
    async fn run(mut self, mut reader: impl AsyncRead + Unpin) {
        let mut chunk = vec![0; 4096];
        let mut line = Vec::new();
        while let Ok(count @ 1..) = reader.read(&mut chunk).await {
            for byte in &chunk[..count] {
                if *byte == b'\n' {
                    self.line(&line);
                    line.clear();
                } else if line.len() < MAX_LINE {
                    line.push(*byte);
                }
            }
        }
        if !line.is_empty() {
            self.line(&line);
        }
    }

    fn line(&mut self, bytes: &[u8]) {
        let text = printable(&plain(bytes));
        if self.second.elapsed() >= Duration::from_secs(1) {
            if self.dropped > 0 {
                tracing::warn!(sandbox = %self.sandbox, source = self.source, dropped = self.dropped, "log lines dropped");
            }
            (self.second, self.passed, self.dropped) = (Instant::now(), 0, 0);
        }
        if self.passed < RATE {
            self.passed += 1;
            tracing::debug!(sandbox = %self.sandbox, source = self.source, "{text}");
        } else {
            self.dropped += 1;
        }
        self.tail.push(text);
    }
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

/// Makes control characters visible, so that untrusted text cannot command a terminal.
pub fn printable(text: &str) -> String {
    let escape = |c: char| match c {
        '\t' => vec![' '],
        c if c.is_control() => c.escape_default().collect(),
        c => vec![c],
    };
    text.trim_end_matches('\r')
        .chars()
        .flat_map(escape)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_escaped_and_counted() {
        let mut input = Vec::new();
        input.extend(b"first\n\x1b[31mred\r\n");
        input.extend(vec![b'x'; 1 << 20]);
        input.extend(b"\nlast without a newline");
        let mut follower = Follower {
            sandbox: "s".into(),
            source: "test",
            tail: Tail::default(),
            second: Instant::now(),
            passed: 0,
            dropped: 0,
        };
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
        tail.push(plain(br#"{"level":"error","message":"broken","time":1}"#));
        tail.push(plain(br#"{"level":"info","message":"fine"}"#));
        assert_eq!(tail.trouble().unwrap(), "error: broken");
        tail.push(plain(b"thread 'main' panicked"));
        assert_eq!(tail.trouble().unwrap(), "thread 'main' panicked");
    }
}
