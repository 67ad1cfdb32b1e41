//! `bulkhead gc`.

use bulkhead_shim::{config::Config, ledger, template::Store};
use serde::Serialize;
use serde_json::Value;

use crate::failure::Failure;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only say what would be given back
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn gc(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let Ok(state) = config.state_dir.canonicalize() else {
        // No pod has run since the host started.
        if arguments.json {
            println!("[]");
        }
        return Ok(0);
    };
    let collected = ledger::collect(&state, arguments.dry_run)?;
    // After the sandboxes: a dead builder's machine writes to no template then.
    let swept = Store::at(&state).sweep(arguments.dry_run);
    let swept = swept.map_err(|error| {
        Failure::new(format!(
            "cannot read the templates in {}: {error}",
            state.display()
        ))
    })?;
    if arguments.json {
        let all = [json(&collected)?, json(&swept)?].concat();
        let text = serde_json::to_string_pretty(&all)?;
        println!("{text}");
    } else {
        for one in &swept {
            let done = match (arguments.dry_run, &one.left) {
                (true, _) => "of no use".into(),
                (false, None) => "removed".into(),
                (false, Some(error)) => format!("left, {error}"),
            };
            println!(".templates/{}: {done}: {}", one.name, one.reason);
        }
        for sandbox in &collected {
            let name = format!("{}/{}", sandbox.namespace, sandbox.sandbox);
            match arguments.dry_run {
                true => println!(
                    "{name}: its owner is dead; it holds {} resources",
                    sandbox.held.len()
                ),
                false => println!(
                    "{name}: gave back {} of {} resources",
                    sandbox.held.len().saturating_sub(sandbox.left.len()),
                    sandbox.held.len()
                ),
            }
            if arguments.dry_run {
                sandbox
                    .held
                    .iter()
                    .for_each(|resource| println!("  {resource}"));
            }
            sandbox
                .left
                .iter()
                .for_each(|leftover| println!("  left: {leftover}"));
        }
    }
    let left = collected.iter().any(|sandbox| !sandbox.left.is_empty())
        || swept.iter().any(|one| one.left.is_some());
    Ok(u8::from(left))
}

/// What has a sandbox, and what has a template, in one list.
fn json<T: Serialize>(all: &[T]) -> Result<Vec<Value>, serde_json::Error> {
    all.iter().map(serde_json::to_value).collect()
}
