//! Images that an engine keeps: it exports them as an archive.

use std::{
    fs::File,
    io::Read,
    process::{Command, Stdio},
};

use super::{
    Error,
    reference::{Engine, EngineImage},
};

/// Longest of an engine's words that is told, in bytes.
const MAX_WORDS: u64 = 4 << 10;

impl EngineImage {
    fn program(&self) -> &'static str {
        match self.engine {
            Engine::Podman => "podman",
            Engine::Docker => "docker",
            Engine::Containerd => "ctr",
        }
    }

    fn failed(&self, reason: impl Into<String>) -> Error {
        Error::Engine {
            engine: self.program(),
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    /// What the engine tells of the image at once: SHA-256 of its configuration, and the format in
    /// which an archive has the same one. Not Docker: its ids are digests of manifests where it
    /// keeps images by containerd.
    pub(crate) fn kept(&self) -> Option<(String, &'static str)> {
        if self.engine != Engine::Podman {
            return None;
        }
        let mut command = Command::new(self.program());
        command.args(["image", "inspect", "--format", "{{.Id}} {{.ManifestType}}"]);
        let done = command.arg(&self.name).stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8(done.stdout).ok()?;
        let (key, kind) = text.trim().split_once(' ')?;
        let format = match kind.contains("docker") {
            true => "docker-archive",
            false => "oci-archive",
        };
        let key = key.trim_start_matches("sha256:").to_owned();
        done.status.success().then_some((key, format))
    }

    /// As engines mean a name without a tag, where all tags of it would be exported.
    fn tagged(&self) -> String {
        let last = self.name.rsplit('/').next().unwrap_or_default();
        let is_id = last.len() >= 12 && last.bytes().all(|byte| byte.is_ascii_hexdigit());
        match last.contains([':', '@']) || is_id {
            true => self.name.clone(),
            false => format!("{}:latest", self.name),
        }
    }

    /// Has it written to a file as an archive.
    pub(crate) fn export(&self, format: &str, to: &File) -> Result<(), Error> {
        let mut command = Command::new(self.program());
        match self.engine {
            Engine::Podman => command
                .args(["image", "save", "--quiet", "--format", format])
                .arg(&self.name),
            Engine::Docker => command.args(["image", "save"]).arg(self.tagged()),
            Engine::Containerd => command
                .args(["images", "export", "--platform", "linux/amd64", "-"])
                .arg(&self.name),
        };
        let to = to.try_clone();
        let to = to.map_err(|error| self.failed(error.to_string()))?;
        command
            .stdin(Stdio::null())
            .stdout(to)
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            self.failed(format!(
                "its command does not start ({error}); is it installed?"
            ))
        })?;
        let mut words = String::new();
        if let Some(stderr) = child.stderr.take() {
            let mut stderr = stderr.take(MAX_WORDS);
            let mut bytes = Vec::new();
            // Its status says more than a pipe that fails.
            let _ = stderr.read_to_end(&mut bytes);
            let _ = std::io::copy(stderr.get_mut(), &mut std::io::sink());
            words = String::from_utf8_lossy(&bytes).into_owned();
        }
        let status = child.wait();
        let status = status.map_err(|error| self.failed(error.to_string()))?;
        match status.success() {
            true => Ok(()),
            false => Err(self.failed(match words.trim().lines().last() {
                Some(line) => line.to_owned(),
                None => status.to_string(),
            })),
        }
    }
}
