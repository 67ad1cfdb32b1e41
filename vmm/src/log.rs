//! Log lines: one JSON object a line to a descriptor of the shim's, never waiting for it.
//!
//! A line that finds no room is dropped and counted; the next line that does says how many were lost.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::Serialize;

/// Longest line. No more than PIPE_BUF, so that a pipe takes a line whole or not at all.
const MAX_LINE: usize = 4096;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Somebody has to do something.
    Error,
    /// Somebody may want to know.
    Warn,
    /// A step of a process's life.
    Info,
}

#[derive(Serialize)]
struct Line<'a> {
    /// Seconds since the epoch.
    time: f64,
    level: Level,
    source: &'static str,
    sandbox: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    dropped: u64,
    message: &'a str,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

struct Output {
    file: File,
    dropped: u64,
    /// The end of the last line was cut off (a socket may take a part): begin the next one on a new line.
    torn: bool,
}

/// A process's log; cheap to clone.
#[derive(Clone)]
pub struct Log {
    output: Arc<Mutex<Output>>,
    source: &'static str,
    sandbox: Arc<str>,
}

impl Log {
    /// A log of the process `source` of a sandbox. Makes `fd` non-blocking.
    pub fn new(fd: OwnedFd, source: &'static str, sandbox: &str) -> Log {
        set_nonblocking(&fd);
        Log {
            output: Arc::new(Mutex::new(Output {
                file: fd.into(),
                dropped: 0,
                torn: false,
            })),
            source,
            sandbox: sandbox.into(),
        }
    }

    /// Writes a line.
    pub fn write(&self, level: Level, message: &str) {
        // A thread that panicked while it held the lock leaves nothing half done but a line.
        let mut output = match self.output.lock() {
            Ok(output) => output,
            Err(poisoned) => poisoned.into_inner(),
        };
        let line = self.line(level, message, output.dropped);
        let text = if output.torn {
            [b"\n", line.as_slice()].concat()
        } else {
            line
        };
        match output.file.write(&text) {
            Ok(count) if count == text.len() => {
                output.dropped = 0;
                output.torn = false;
            }
            Ok(_) => {
                output.dropped += 1;
                output.torn = true;
            }
            Err(_) => output.dropped += 1,
        }
    }

    /// Writes a line at [`Level::Info`].
    pub fn info(&self, message: &str) {
        self.write(Level::Info, message);
    }

    /// Writes a line at [`Level::Warn`].
    pub fn warn(&self, message: &str) {
        self.write(Level::Warn, message);
    }

    /// Writes a line at [`Level::Error`].
    pub fn error(&self, message: &str) {
        self.write(Level::Error, message);
    }

    fn line(&self, level: Level, message: &str, dropped: u64) -> Vec<u8> {
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |time| time.as_secs_f64());
        // JSON escapes make a byte six at most.
        let room = (MAX_LINE - 512) / 6;
        let cut = (0..=room.min(message.len()))
            .rev()
            .find(|&at| message.is_char_boundary(at))
            .unwrap_or(0);
        let mut line = serde_json::to_vec(&Line {
            time,
            level,
            source: self.source,
            sandbox: &self.sandbox,
            dropped,
            message: if message.len() <= room {
                message
            } else {
                &message[..cut]
            },
        })
        .expect("strings and numbers are JSON");
        line.push(b'\n');
        line
    }
}

/// Makes writes fail instead of wait. Regular files do not wait anyway.
pub fn set_nonblocking(fd: &impl AsFd) {
    if let Ok(flags) = fcntl(fd, FcntlArg::F_GETFL) {
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        // A descriptor that cannot be made so is the giver's wish.
        let _ = fcntl(fd, FcntlArg::F_SETFL(flags));
    }
}

/// An error and what caused it, on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read};

    #[test]
    fn a_line_is_one_json_object() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let log = Log::new(writer, "vmm", "pod-1");
        log.warn("a \"quoted\"\nmessage");
        log.info(&"ü".repeat(MAX_LINE));
        drop(log);
        let lines: Vec<String> = BufReader::new(File::from(reader))
            .lines()
            .map(Result::unwrap)
            .collect();
        assert_eq!(lines.len(), 2);
        let value: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(value["message"], "a \"quoted\"\nmessage");
        assert_eq!(
            (&value["level"], &value["source"]),
            (&"warn".into(), &"vmm".into())
        );
        assert_eq!(value["sandbox"], "pod-1");
        assert!(lines[1].len() < MAX_LINE);
        serde_json::from_str::<serde_json::Value>(&lines[1]).unwrap();
    }

    #[test]
    fn a_full_pipe_drops_lines_and_says_so() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut reader = File::from(reader);
        let log = Log::new(writer, "vmm", "pod-1");
        for _ in 0..2000 {
            log.info("filling the pipe");
        }
        let mut buffer = vec![0; 1 << 20];
        let count = reader.read(&mut buffer).unwrap();
        assert_eq!(buffer[count - 1], b'\n', "whole lines only");
        log.info("there is room again");
        let count = reader.read(&mut buffer).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&buffer[..count]).unwrap();
        assert!(value["dropped"].as_u64().unwrap() > 0);
    }
}
