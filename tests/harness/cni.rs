//! CNI plugins, called as an engine calls them (CNI specification 1.0), in a namespace that stands for the node.

use std::process::Command;

use serde_json::{Value, json};

use crate::bundle::fresh_id;
use crate::netns::Netns;
use crate::process::Started;

const PLUGINS: &str = "/usr/lib/cni";

/// An interface of a pod that a list of plugins has made; they take it back when this is dropped.
pub struct Attachment<'a> {
    node: &'a Netns,
    pod: &'a Netns,
    interface: &'static str,
    id: String,
    list: Value,
    runtime: Value,
    /// What the last plugin answered.
    result: Value,
}

impl<'a> Attachment<'a> {
    /// Calls the plugins of a network's list with ADD. `runtime` is what an engine adds for the pod (`portMappings`, `bandwidth`).
    #[track_caller]
    pub fn add(
        node: &'a Netns,
        pod: &'a Netns,
        interface: &'static str,
        list: Value,
        runtime: Value,
    ) -> Attachment<'a> {
        let mut made = Attachment {
            node,
            pod,
            interface,
            id: fresh_id(),
            list,
            runtime,
            result: Value::Null,
        };
        for plugin in made.plugins() {
            made.result = made
                .call("ADD", &plugin)
                .unwrap_or_else(|error| panic!("{plugin}: {error}"));
        }
        made
    }

    /// The pod's addresses without their masks.
    pub fn addresses(&self) -> Vec<String> {
        let all = self.of_each_address("address").into_iter();
        all.map(|cidr| cidr.split('/').next().expect("one part").to_owned())
            .collect()
    }

    /// The gateway of each address.
    pub fn gateways(&self) -> Vec<String> {
        self.of_each_address("gateway")
    }

    fn of_each_address(&self, key: &str) -> Vec<String> {
        let listed = self.result["ips"].as_array().expect("a result lists them");
        let text = |ip: &Value| ip[key].as_str().expect("it has one").to_owned();
        listed.iter().map(text).collect()
    }

    fn plugins(&self) -> Vec<Value> {
        self.list["plugins"].as_array().expect("a list").clone()
    }

    fn call(&self, verb: &str, plugin: &Value) -> Result<Value, String> {
        let mut config = plugin.clone();
        config["cniVersion"] = json!("1.0.0");
        config["name"] = self.list["name"].clone();
        config["runtimeConfig"] = self.runtime.clone();
        if !self.result.is_null() {
            config["prevResult"] = self.result.clone();
        }
        let program = format!("{PLUGINS}/{}", plugin["type"].as_str().expect("a type"));
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec"])
            .arg(self.node.name())
            .arg(program)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", self.pod.path())
            .env("CNI_IFNAME", self.interface)
            .env("CNI_PATH", PLUGINS);
        let mut plugin = Started::spawn(command);
        serde_json::to_writer(plugin.stdin(), &config).expect("a plugin reads its configuration");
        let ran = plugin.finish();
        let text = ran.text();
        match ran.status {
            0 if text.trim().is_empty() => Ok(Value::Null),
            0 => serde_json::from_str(&text).map_err(|error| format!("{error}: {text}")),
            _ => Err(format!("{text}{}", ran.errors())),
        }
    }
}

impl Drop for Attachment<'_> {
    fn drop(&mut self) {
        // What a plugin leaves is in namespaces that go, too.
        for plugin in self.plugins().iter().rev() {
            let _ = self.call("DEL", plugin);
        }
    }
}
