//! `state`: OCI runtime.md#state, with runc's further fields.

use bulkhead_shim::command_line::Record;
use serde_json::{Value, json};

use super::{Engine, print_json, status, wait_for};
use crate::failure::Failure;

pub fn print(engine: &Engine<'_>, id: &str) -> Result<u8, Failure> {
    let (room, record) = engine.made(id)?;
    let status = wait_for(status(&room))?;
    print_json(&document(&record, status))
}

/// What is told of a container. One that has stopped has no process.
pub fn document(record: &Record, status: &str) -> Value {
    let pid = match status {
        "stopped" => 0,
        _ => record.keeper.pid,
    };
    let mut state = json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": pid,
        "status": status,
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "owner": "",
    });
    if !record.annotations.is_empty() {
        state["annotations"] = json!(record.annotations);
    }
    state
}
