//! `bulkhead network`.

use bulkhead_shim::{
    config::Config,
    ledger::{self, Resource},
    netns::{self, Counters},
};
use serde::Serialize;

use crate::failure::Failure;

#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only this pod; default: all
    id: Option<String>,
}

#[derive(Serialize)]
struct Pod {
    namespace: String,
    id: String,
    interfaces: Vec<Counters>,
}

pub fn network(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let pods = pods(arguments, config)?;
    if let (Some(id), true) = (&arguments.id, pods.is_empty()) {
        return Err(Failure::new(format!(
            "there is no pod {id:?} on this host; `bulkhead network` shows all"
        )));
    }
    if arguments.json {
        let text = serde_json::to_string_pretty(&pods).expect("made of strings and numbers");
        println!("{text}");
    } else {
        print(&pods);
    }
    Ok(0)
}

fn pods(arguments: &Arguments, config: &Config) -> Result<Vec<Pod>, Failure> {
    let mut pods = Vec::new();
    for listed in ledger::list(&config.state_dir)? {
        if arguments
            .id
            .as_ref()
            .is_some_and(|id| *id != listed.sandbox)
        {
            continue;
        }
        let redirects = listed.held.iter().filter_map(|resource| match resource {
            Resource::Redirect(redirect) => Some(redirect),
            _ => None,
        });
        pods.push(Pod {
            interfaces: netns::counters(redirects)?,
            namespace: listed.namespace,
            id: listed.sandbox,
        });
    }
    Ok(pods)
}

/// From the pod's point of view: what its interface on the host took in, it received.
fn print(pods: &[Pod]) {
    println!(
        "{:40} {:12} {:>12} {:>14} {:>9} {:>12} {:>14} {:>9}",
        "POD",
        "INTERFACE",
        "RX PACKETS",
        "RX BYTES",
        "RX DROPS",
        "TX PACKETS",
        "TX BYTES",
        "TX DROPS"
    );
    for pod in pods {
        for interface in &pod.interfaces {
            let outside = interface.outside.unwrap_or_default();
            let inside = interface.inside.unwrap_or_default();
            println!(
                "{:40} {:12} {:>12} {:>14} {:>9} {:>12} {:>14} {:>9}",
                format!("{}/{}", pod.namespace, pod.id),
                interface.interface,
                outside.rx_packets,
                outside.rx_bytes,
                // What the guest did not take, and what the interface could not.
                outside.rx_dropped + inside.tx_dropped,
                outside.tx_packets,
                outside.tx_bytes,
                outside.tx_dropped + inside.rx_dropped + inside.rx_errors,
            );
        }
    }
}
