//! New limits for a container that runs, and its freezer.

use std::io::{Read, stdin};

use bulkhead_shim::command_line::Client;
use serde_json::{Map, Value, json};

use super::{Engine, status, wait_for};
use crate::failure::Failure;

/// Largest `--resources`, in bytes.
const MOST: u64 = 1 << 20;

#[derive(clap::Args)]
pub struct Update {
    /// LinuxResources as JSON; - is the standard input
    #[arg(short, long, value_name = "FILE")]
    resources: Option<String>,
    /// Bytes
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    memory: Option<i64>,
    /// Bytes
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    memory_reservation: Option<i64>,
    /// Bytes
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// Microseconds
    #[arg(long, value_name = "N")]
    cpu_period: Option<u64>,
    /// Microseconds
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// A weight against others
    #[arg(long, value_name = "N")]
    cpu_share: Option<u64>,
    /// Processors
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Processes and threads
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// The container
    id: String,
}

pub fn update(engine: &Engine<'_>, words: &Update) -> Result<u8, Failure> {
    let resources = words.read()?;
    let (room, _) = engine.made(&words.id)?;
    wait_for(async {
        if status(&room).await? == "stopped" {
            return Err(Failure::new("container not running"));
        }
        let bytes = serde_json::to_vec(&resources)?;
        Client::connect(&room)?.update(bytes).await?;
        Ok(0)
    })
}

impl Update {
    /// The limits: of the file, or of the words.
    fn read(&self) -> Result<Value, Failure> {
        let Some(path) = &self.resources else {
            return Ok(self.of_words());
        };
        let mut text = String::new();
        let read = match path.as_str() {
            "-" => stdin().take(MOST).read_to_string(&mut text),
            path => {
                std::fs::File::open(path).and_then(|file| file.take(MOST).read_to_string(&mut text))
            }
        };
        let failed =
            |error: String| Failure::new(format!("cannot read --resources {path}: {error}"));
        read.map_err(|error| failed(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| failed(error.to_string()))
    }

    fn of_words(&self) -> Value {
        fn section<const N: usize>(pairs: [(&str, Value); N]) -> Option<Value> {
            let given = pairs.into_iter().filter(|(_, value)| !value.is_null());
            let map: Map<String, Value> = given.map(|(name, value)| (name.into(), value)).collect();
            (!map.is_empty()).then_some(Value::Object(map))
        }
        let memory = section([
            ("limit", json!(self.memory)),
            ("reservation", json!(self.memory_reservation)),
            ("swap", json!(self.memory_swap)),
        ]);
        let cpu = section([
            ("period", json!(self.cpu_period)),
            ("quota", json!(self.cpu_quota)),
            ("shares", json!(self.cpu_share)),
            ("cpus", json!(self.cpuset_cpus)),
            ("mems", json!(self.cpuset_mems)),
        ]);
        let pids = section([("limit", json!(self.pids_limit))]);
        let all = section([
            ("memory", json!(memory)),
            ("cpu", json!(cpu)),
            ("pids", json!(pids)),
        ]);
        all.unwrap_or(json!({}))
    }
}

pub fn set_paused(engine: &Engine<'_>, id: &str, paused: bool) -> Result<u8, Failure> {
    let (room, _) = engine.made(id)?;
    wait_for(async {
        match (paused, status(&room).await?) {
            (true, "running" | "created") | (false, "paused") => {}
            (true, _) => return Err(Failure::new("container not running")),
            (false, _) => return Err(Failure::new("container not paused")),
        }
        let client = Client::connect(&room)?;
        match paused {
            true => client.pause().await?,
            false => client.resume().await?,
        }
        Ok(0)
    })
}
