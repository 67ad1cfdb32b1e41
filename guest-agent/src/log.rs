//! The agent's log: one JSON object a line to the host's log port, or lines to the kernel's log while there is none.
//!
//! Logging never blocks: a host that does not read loses lines, and is told how many when it reads again.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::stream::Host;

/// vsock port of the host for log lines.
pub(crate) const LOG_PORT: u32 = 1025;
/// Lines that wait for a slow host.
const QUEUE: usize = 256;

static SINK: OnceLock<mpsc::Sender<String>> = OnceLock::new();
static TO_KERNEL: AtomicBool = AtomicBool::new(false);
static LOST: AtomicU64 = AtomicU64::new(0);

/// Sends lines to the kernel's log while there is no host to take them. Only for PID 1 of a guest.
pub fn use_kernel_log() {
    TO_KERNEL.store(true, Ordering::Relaxed);
}

/// Something worth knowing.
pub fn info(message: &str) {
    write("info", 6, message);
}

/// Something that went wrong and was survived.
pub fn warn(message: &str) {
    write("warn", 4, message);
}

/// Connects to the host's log port; where nothing listens there, lines go on to the kernel's log.
pub async fn connect(host: &Host) {
    let Ok(mut stream) = host.dial(LOG_PORT).await else {
        return;
    };
    let (sender, mut receiver) = mpsc::channel::<String>(QUEUE);
    if SINK.set(sender).is_err() {
        return;
    }
    tokio::spawn(async move {
        while let Some(mut line) = receiver.recv().await {
            let lost = LOST.swap(0, Ordering::Relaxed);
            if lost > 0 {
                line.push_str(&json(
                    "warn",
                    &format!("{lost} log lines were lost because the host read too slowly"),
                ));
            }
            if stream.write_all(line.as_bytes()).await.is_err() {
                return;
            }
        }
    });
}

fn write(level: &str, priority: u8, message: &str) {
    match SINK.get() {
        None => to_kernel(priority, message),
        Some(sink) => match sink.try_send(json(level, message)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                LOST.fetch_add(1, Ordering::Relaxed);
            }
            Err(mpsc::error::TrySendError::Closed(_)) => to_kernel(priority, message),
        },
    }
}

/// A line of the kernel's log (printk.rst), which reaches the console and the crash record; on a machine that is not
/// ours, where the agent is being tested, a line of standard error.
fn to_kernel(priority: u8, message: &str) {
    let line = format!("<{priority}>bulkhead-agent: {message}\n");
    let kmsg = TO_KERNEL
        .load(Ordering::Relaxed)
        .then(|| std::fs::File::options().write(true).open("/dev/kmsg"));
    match kmsg {
        // One write is one record.
        Some(Ok(mut file)) => drop(file.write_all(line.as_bytes())),
        _ => eprint!("{}", &line[3..]),
    }
}

fn json(level: &str, message: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut line = format!(
        "{{\"time_ns\":{},\"level\":\"{level}\",\"source\":\"agent\",\"message\":\"",
        now.as_nanos()
    );
    for character in message.chars() {
        match character {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            control if u32::from(control) < 0x20 => {
                // Writing to a String cannot fail.
                let _ = write!(line, "\\u{:04x}", u32::from(control));
            }
            other => line.push(other),
        }
    }
    line.push_str("\"}\n");
    line
}

/// Makes a panic end the process at once, with its text in the kernel's log: PID 1's end is the kernel's panic, whose
/// record the VMM reads.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        to_kernel(0, &format!("{panic}"));
        // Nothing may run after a panic, destructors and other threads least of all.
        linux::process::exit_now(134)
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_one_json_object_each() {
        let line = json("info", "a \"b\" \\ c\nd");
        assert!(
            line.ends_with("\"message\":\"a \\\"b\\\" \\\\ c\\u000ad\"}\n"),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
    }
}
