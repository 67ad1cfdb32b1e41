//! `--log FILE --log-format json`: engines read there why a command has failed, in the last line
//! whose level is "error".

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::SystemTime,
};

use bulkhead_shim::audit::time;
use serde_json::json;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time="..." level=error msg="..."`
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// An open log.
pub struct Log {
    file: File,
    format: Format,
}

impl Log {
    /// Opens it, private to its owner when it is not there.
    pub fn open(path: &Path, format: Format) -> Result<Log, String> {
        let opened = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path);
        let file = opened.map_err(|error| format!("cannot open --log {}: {error}", path.display()));
        Ok(Log {
            file: file?,
            format,
        })
    }

    /// Writes why a command has failed.
    pub fn write(mut self, message: &str) {
        let now = time::written(SystemTime::now());
        let line = match self.format {
            Format::Json => json!({"level": "error", "msg": message, "time": now}).to_string(),
            Format::Text => format!("time={now:?} level=error msg={message:?}"),
        };
        // The message is told on standard error too.
        let _ = writeln!(self.file, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use serde_json::Value;

    use super::*;

    #[test]
    fn an_engine_finds_the_message_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let message = "exec: \"x\": executable file not found in $PATH\nforged";
        Log::open(&path, Format::Json).unwrap().write(message);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (line["level"].as_str(), line["msg"].as_str()),
            (Some("error"), Some(message))
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = Log::open(Path::new("/no/such/dir/log"), Format::Text).err();
        assert!(error.unwrap().contains("/no/such/dir/log"));
    }
}
