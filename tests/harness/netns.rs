//! Network namespaces of the tests' own, wired with each other; nothing of the host's is touched.

use std::path::PathBuf;
use std::process::Command;

use crate::bundle::{fresh_id, must};
use crate::process::{Ran, Started, run};

/// A namespace; it goes, with its interfaces, when this is dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    /// An empty one whose lo is up.
    pub fn new() -> Netns {
        let name = fresh_id();
        must(Command::new("ip").args(["netns", "add", &name]));
        let made = Netns { name };
        made.ip("link set lo up");
        made
    }

    /// As `ip` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where engines find it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// `ip` in it, which must succeed.
    #[track_caller]
    pub fn ip(&self, words: &str) {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name]);
        must(command.args(words.split_whitespace()));
    }

    /// A shell script in it, to its end.
    pub fn run(&self, script: &str) -> Ran {
        self.start(script).finish()
    }

    /// A shell script in it.
    pub fn start(&self, script: &str) -> Started {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "sh", "-c", script]);
        Started::spawn(command)
    }

    /// A pair of interfaces, one here and one there, both up.
    pub fn wire(&self, name: &str, other: &Netns, there: &str) {
        self.ip(&format!(
            "link add {name} type veth peer name {there} netns {}",
            other.name
        ));
        self.ip(&format!("link set {name} up"));
        other.ip(&format!("link set {there} up"));
    }

    /// Addresses for an interface, in use at once.
    pub fn address(&self, name: &str, addresses: &[&str]) {
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {address} dev {name} {nodad}"));
        }
    }
}

impl Default for Netns {
    fn default() -> Netns {
        Netns::new()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What still holds it open shows in the next look at the host.
        run(Command::new("ip").args(["netns", "del", &self.name]));
    }
}
