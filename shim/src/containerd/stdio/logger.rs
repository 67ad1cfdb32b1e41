//! `binary://`: a program of the operator that reads a container's output (containerd's runtime-v2.md, "Logging").
//!
//! It gets stdout as descriptor 3, stderr as 4, and 5 to say that it is ready: by a byte, or by closing it. The container's id and
//! namespace are in its environment, the pairs of the query are its arguments.

use std::{io, path::Path, time::Duration};

use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
};

use super::{
    Error, Owner,
    relay::{Sink, child_pipe},
};

/// How long a logger may take to get ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end after its input has, and again after SIGTERM.
const FAREWELL: Duration = Duration::from_secs(6);

/// A running logger.
#[derive(Debug)]
pub(super) struct Logger(Child);

/// A logger and the pipes to it.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) logger: Logger,
    pub(super) stdout: Sink,
    pub(super) stderr: Option<Sink>,
}

/// `key=value&other` as arguments: `key value other`.
pub(super) fn arguments(query: &str) -> Vec<String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .flat_map(|pair| match pair.split_once('=') {
            Some((key, "")) => vec![key],
            Some((key, value)) => vec![key, value],
            None => vec![pair],
        })
        .map(decode)
        .collect()
}

/// Percent-encoding of URLs (RFC 3986 §2.1), and `+` for a blank in queries.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match (
            byte,
            digits.and_then(|two| u8::from_str_radix(two, 16).ok()),
        ) {
            (b'%', Some(decoded)) => {
                bytes.push(decoded);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Logger {
    /// Starts it and waits until it is ready.
    pub(super) async fn start(
        path: &Path,
        arguments: &[String],
        owner: Owner<'_>,
        terminal: bool,
    ) -> Result<Started, Error> {
        let error = |reason: String| Error::Logger {
            path: path.into(),
            reason,
        };
        let failed = |source: io::Error| error(source.to_string());
        let (out_read, stdout) = child_pipe().map_err(failed)?;
        let (err_read, stderr) = child_pipe().map_err(failed)?;
        let (ready, says_ready) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let mut command = Command::new(path);
        command
            .args(arguments)
            .env("CONTAINER_ID", owner.container)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true);
        let fds = vec![out_read, err_read, says_ready];
        linux::process::hand_over(command.as_std_mut(), 3, fds, false);
        let child = command.spawn().map_err(failed)?;
        let logger = Logger(child);
        // With it go our copies.
        drop(command);
        let mut ready = tokio::net::unix::pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
        let mut byte = [0];
        match tokio::time::timeout(READY, ready.read(&mut byte)).await {
            Ok(Ok(_)) => {}
            Ok(Err(source)) => return Err(failed(source)),
            Err(_) => return Err(error("it was not ready in time".into())),
        }
        Ok(Started {
            logger,
            stdout,
            stderr: (!terminal).then_some(stderr),
        })
    }

    /// Waits for its end, after its pipes have been closed.
    pub(super) async fn finish(mut self) {
        if tokio::time::timeout(FAREWELL, self.0.wait()).await.is_ok() {
            return;
        }
        if let Some(pid) = self.0.id() {
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            // A child of ours that was not collected: the pid is still its own.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        if tokio::time::timeout(FAREWELL, self.0.wait()).await.is_err() {
            tracing::warn!("a logger does not end and is killed");
            let _ = self.0.kill().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::arguments;

    #[test]
    fn the_query_becomes_arguments() {
        assert_eq!(arguments(""), Vec::<String>::new());
        assert_eq!(
            arguments("--file=%2Fvar%2Flog&-v&a=b+c"),
            ["--file", "/var/log", "-v", "a", "b c"]
        );
        assert_eq!(arguments("x=100%"), ["x", "100%"]);
    }
}
