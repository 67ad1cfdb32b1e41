//! Hooks that run on the host (OCI config.md#posix-platform-hooks).

use std::{collections::HashMap, path::Path, process::Stdio, time::Duration};

use serde::Serialize;
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, process::Command};

use crate::{oci::HostHook, text::printable};

/// Most of a hook's standard error that an error quotes, in bytes.
const QUOTED: u64 = 1024;

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("{kind} hook {path} {reason}")]
pub struct Error {
    kind: &'static str,
    path: String,
    reason: String,
}

/// What a hook reads from its standard input (OCI runtime.md#state).
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// `ociVersion` of config.json.
    pub oci_version: &'a str,
    /// The container.
    pub id: &'a str,
    /// creating, created, running or stopped.
    pub status: &'a str,
    /// Of the process that stands for the pod in its cgroup and network namespace (`sys/stub.rs`); in the guest 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Absolute.
    pub bundle: &'a Path,
    /// Of config.json.
    pub annotations: &'a HashMap<String, String>,
}

/// Runs hooks in order; stops at the first that fails.
pub async fn run(kind: &'static str, hooks: &[HostHook], state: &State<'_>) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let input = serde_json::to_vec(state).expect("a state is made of strings and numbers");
    for hook in hooks {
        run_one(hook, state.bundle, &input)
            .await
            .map_err(|reason| Error {
                kind,
                path: hook.path.clone(),
                reason,
            })?;
    }
    Ok(())
}

async fn run_one(hook: &HostHook, bundle: &Path, input: &[u8]) -> Result<(), String> {
    let mut command = Command::new(&hook.path);
    command
        .arg0(&hook.args[0])
        .args(&hook.args[1..])
        .env_clear()
        .envs(hook.env.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let mut stdin = child.stdin.take().expect("it is piped");
    let mut stderr = child.stderr.take().expect("it is piped");
    let work = async {
        // A hook need not read its input.
        let feed = async {
            let _ = stdin.write_all(input).await;
            drop(stdin);
        };
        let quote = async {
            let mut text = Vec::new();
            let _ = (&mut stderr).take(QUOTED).read_to_end(&mut text).await;
            // The rest is drained, so that a talkative hook does not block.
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            text
        };
        let ((), text, status) = tokio::join!(feed, quote, child.wait());
        (text, status)
    };
    let finished = match hook.timeout_secs {
        Some(secs) => tokio::time::timeout(Duration::from_secs(secs.into()), work)
            .await
            .map_err(|_| format!("did not end within {secs} s and was killed"))?,
        None => work.await,
    };
    match finished {
        (_, Ok(status)) if status.success() => Ok(()),
        (text, Ok(status)) => {
            let text = String::from_utf8_lossy(&text);
            Err(format!("failed with {status}: {}", printable(text.trim())))
        }
        (_, Err(error)) => Err(format!("cannot be waited for: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout_secs: Option<u32>) -> HostHook {
        HostHook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["NAME=value".into()],
            timeout_secs,
        }
    }

    async fn run_script(script: &str, timeout: Option<u32>) -> Result<(), String> {
        let annotations = HashMap::new();
        let state = State {
            oci_version: "1.2.0",
            id: "c",
            status: "creating",
            pid: Some(42),
            bundle: Path::new("/"),
            annotations: &annotations,
        };
        let hooks = [hook(script, timeout)];
        run("createRuntime", &hooks, &state)
            .await
            .map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_its_environment_and_nothing_else() {
        run_script(
            r#"grep -q '"pid":42' && test "$NAME" = value && test -z "$HOME""#,
            None,
        )
        .await
        .unwrap();
        run_script("exit 0", None).await.unwrap();
    }

    #[tokio::test]
    async fn failures_quote_the_hook() {
        let error = run_script("echo broken >&2; exit 3", None)
            .await
            .unwrap_err();
        assert!(
            error.contains("createRuntime hook /bin/sh") && error.contains("broken"),
            "{error}"
        );
        let error = run_script("sleep 60", Some(1)).await.unwrap_err();
        assert!(error.contains("did not end within 1 s"), "{error}");
    }
}
