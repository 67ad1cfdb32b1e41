//! `bulkhead gc`.

use bulkhead_images as images;
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
    // Without it no pod has run since the host started.
    let state = config.state_dir.canonicalize();
    let state = state.unwrap_or_else(|_| config.state_dir.clone());
    let collected = ledger::collect(&state, arguments.dry_run)?;
    // After the sandboxes: a dead builder's machine writes to no template then.
    let swept = Store::at(&state).sweep(arguments.dry_run);
    let swept = swept.map_err(|error| {
        Failure::new(format!(
            "cannot read the templates in {}: {error}",
            state.display()
        ))
    })?;
    let unpacked = images::Store::at(&config.data_dir).sweep(arguments.dry_run)?;
    if arguments.json {
        let all = [json(&collected)?, json(&swept)?, json(&unpacked)?].concat();
        let text = serde_json::to_string_pretty(&all)?;
        println!("{text}");
    } else {
        let done = |left: &Option<String>| match (arguments.dry_run, left) {
            (true, _) => "of no use".into(),
            (false, None) => "removed".into(),
            (false, Some(error)) => format!("left, {error}"),
        };
        for one in &swept {
            let done = done(&one.left);
            println!(".templates/{}: {done}: {}", one.name, one.reason);
        }
        for one in &unpacked {
            println!("{}: {}: {}", one.name, done(&one.left), one.reason);
        }
        collected
            .iter()
            .for_each(|sandbox| print(sandbox, arguments.dry_run));
    }
    let left = collected.iter().any(|sandbox| !sandbox.left.is_empty())
        || swept.iter().any(|one| one.left.is_some())
        || unpacked.iter().any(|one| one.left.is_some());
    Ok(u8::from(left))
}

fn print(sandbox: &ledger::Collected, dry_run: bool) {
    let name = format!("{}/{}", sandbox.namespace, sandbox.sandbox);
    let held = sandbox.held.len();
    match dry_run {
        true => println!("{name}: its owner is dead; it holds {held} resources"),
        false => println!(
            "{name}: gave back {} of {held} resources",
            held.saturating_sub(sandbox.left.len())
        ),
    }
    if dry_run {
        let resources = sandbox.held.iter();
        resources.for_each(|resource| println!("  {resource}"));
    }
    let left = sandbox.left.iter();
    left.for_each(|leftover| println!("  left: {leftover}"));
}

/// What has a sandbox, what has a template and what has an image, in one list.
fn json<T: Serialize>(all: &[T]) -> Result<Vec<Value>, serde_json::Error> {
    all.iter().map(serde_json::to_value).collect()
}
