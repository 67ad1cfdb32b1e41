//! The command line as containerd writes it: flags of Go's kind (`-id x`, `--id=x`), then a verb.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `-v`
    Version,
    /// `-info`
    Info,
    /// `start`
    Start,
    /// `delete`
    Delete,
    /// No verb: the daemon that `start` leaves behind.
    Daemon,
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's own socket.
    pub address: String,
    /// The container's bundle; for `delete`.
    pub bundle: PathBuf,
    /// Log more.
    pub debug: bool,
    /// What to do.
    pub verb: Verb,
}

impl Flags {
    /// Parses the words after the program's name.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Flags> {
        let mut flags = Flags {
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: PathBuf::new(),
            debug: false,
            verb: Verb::Daemon,
        };
        let mut words = words;
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--").or(word.strip_prefix('-')) else {
                flags.verb = match word.as_str() {
                    "start" => Verb::Start,
                    "delete" => Verb::Delete,
                    other => bail!("unknown command {other:?}: start and delete are"),
                };
                break;
            };
            let (name, given) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (name, None),
            };
            let is_true = given.as_deref() != Some("false");
            match name {
                "debug" => flags.debug = is_true,
                "v" if is_true => flags.verb = Verb::Version,
                "info" if is_true => flags.verb = Verb::Info,
                "v" | "info" => {}
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" => {
                    let value = given.or_else(|| words.next());
                    let Some(value) = value else {
                        bail!("the flag -{name} needs a value");
                    };
                    match name {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "bundle" => flags.bundle = value.into(),
                        // Events go over TTRPC_ADDRESS; the socket's place is not ours to choose.
                        _ => {}
                    }
                }
                _ => bail!("unknown flag {word:?}"),
            }
            if matches!(flags.verb, Verb::Version | Verb::Info) {
                break;
            }
        }
        if matches!(flags.verb, Verb::Start | Verb::Delete | Verb::Daemon) {
            bulkhead_shim::ids::check("id", &flags.id)?;
            bulkhead_shim::ids::check("namespace", &flags.namespace)?;
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words, one a line: what is taken can be a path's component.
    fn words(data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        let Ok(flags) = Flags::parse(text.split('\n').map(String::from)) else {
            return;
        };
        if !matches!(flags.verb, Verb::Version | Verb::Info) {
            for name in [&flags.id, &flags.namespace] {
                assert!(!name.is_empty() && !name.contains('/') && !name.starts_with('.'));
            }
        }
    }

    #[test]
    fn fuzz_shim_words() {
        bulkhead_fuzz::run("shim_words", words);
    }

    fn parse(text: &str) -> Result<Flags> {
        Flags::parse(text.split_whitespace().map(String::from))
    }

    #[test]
    fn containerds_words_are_understood() {
        let start = parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id a -debug start").unwrap();
        assert_eq!(
            (
                start.namespace.as_str(),
                start.id.as_str(),
                start.address.as_str()
            ),
            ("k8s.io", "a", "/run/c.sock")
        );
        assert!(start.debug && start.verb == Verb::Start);
        let delete = parse("--namespace=default -id a --bundle=/b -address= delete").unwrap();
        assert_eq!(
            (delete.bundle.to_str().unwrap(), delete.verb),
            ("/b", Verb::Delete)
        );
        // CRI-O gives empty words.
        let cri_o = Flags::parse(
            ["-namespace", "default", "-address", "", "-id", "a", "start"]
                .map(String::from)
                .into_iter(),
        )
        .unwrap();
        assert_eq!((cri_o.address.as_str(), cri_o.verb), ("", Verb::Start));
        assert_eq!(parse("-v").unwrap().verb, Verb::Version);
        assert_eq!(parse("-info").unwrap().verb, Verb::Info);
        assert_eq!(parse("-namespace n -id a").unwrap().verb, Verb::Daemon);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "-id",
            "-frobnicate",
            "-namespace n -id a restart",
            "-id a/b -namespace n start",
            "start",
        ] {
            parse(bad).unwrap_err();
        }
    }
}
