//! Which containers a root has, and which processes on the host stand for theirs.

use bulkhead_shim::command_line::Room;
use serde_json::json;

use super::{Engine, print_json, state::document, status, wait_for};
use crate::failure::Failure;

/// How a list looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

#[derive(clap::Args)]
pub struct List {
    /// table or json
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    format: Format,
    /// Ids alone
    #[arg(short, long)]
    quiet: bool,
}

#[derive(clap::Args)]
pub struct Ps {
    /// table or json
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    format: Format,
    /// The container
    id: String,
    /// Without a meaning here: options of ps
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    options: Vec<String>,
}

pub fn list(engine: &Engine<'_>, words: &List) -> Result<u8, Failure> {
    // One that goes, or is not quite there, meanwhile is left out.
    let ids = Room::all(engine.root())?;
    let made = ids.iter().filter_map(|id| engine.made(id).ok());
    if words.quiet {
        made.for_each(|(room, _)| println!("{}", room.id));
        return Ok(0);
    }
    let states = wait_for(async {
        let mut states = Vec::new();
        for (room, record) in made {
            states.push(document(&record, status(&room).await?));
        }
        Ok(states)
    })?;
    if words.format == Format::Json {
        return print_json(&states);
    }
    println!(
        "{:<20} {:<8} {:<9} {:<32} BUNDLE",
        "ID", "PID", "STATUS", "CREATED"
    );
    for state in states {
        let text = |name: &str| state[name].as_str().unwrap_or_default().to_owned();
        println!(
            "{:<20} {:<8} {:<9} {:<32} {}",
            text("id"),
            state["pid"],
            text("status"),
            text("created"),
            text("bundle")
        );
    }
    Ok(0)
}

pub fn ps(engine: &Engine<'_>, words: &Ps) -> Result<u8, Failure> {
    let (room, record) = engine.made(&words.id)?;
    let pids = match wait_for(status(&room))? {
        "stopped" => Vec::new(),
        _ => vec![record.keeper.pid],
    };
    if words.format == Format::Json {
        return print_json(&json!(pids));
    }
    println!("{:<8} CMD", "PID");
    for pid in pids {
        println!("{pid:<8} container {} in its virtual machine", room.id);
    }
    Ok(0)
}
