//! `bulkhead template`: machines that were saved, from which pods go on.

use bulkhead_shim::{
    config::Config,
    pod::{
        Size,
        template::{self, Built},
    },
    template::{Key, Listed, Shape, Store},
};

use crate::{failure::Failure, run::check_size};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Boot a machine until its agent is idle and save it, for pods of its size
    Build(Build),
    /// Show the templates: the one that was used last first
    Ls {
        /// Print JSON, with all that each was made from
        #[arg(long)]
        json: bool,
    },
    /// Remove templates; pods that have gone on from them go on
    #[command(arg_required_else_help = true)]
    Drop {
        /// Names, as `ls` prints them
        #[arg(value_name = "KEY", conflicts_with = "all")]
        keys: Vec<String>,
        /// All of them
        #[arg(long)]
        all: bool,
    },
}

#[derive(clap::Args)]
struct Build {
    /// Memory in MiB; default: memory_mib of the configuration, as of a pod without limits
    #[arg(short, long, value_name = "MIB")]
    memory: Option<u64>,
    /// Virtual processors; default: vcpus of the configuration, as of a pod without limits
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// For `bulkhead run`, whose machines cannot grow.
    /// Without this: for pods of engines
    #[arg(long)]
    run: bool,
    /// The whole shape, for a pod that has none; this process leaves the pod then
    #[arg(long, value_name = "JSON", hide = true, conflicts_with_all = ["memory", "vcpus", "run"])]
    shape: Option<String>,
}

pub fn template(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let store = Store::at(&config.state_dir);
    match &arguments.verb {
        Verb::Build(arguments) => build(arguments, config),
        Verb::Ls { json } => list(&store, *json),
        Verb::Drop { keys, all } => drop_all(&store, keys, *all),
    }
}

fn build(arguments: &Build, config: &Config) -> Result<u8, Failure> {
    let shape = match &arguments.shape {
        Some(text) => {
            let shape = serde_json::from_str(text);
            let shape = shape.map_err(|error| Failure::new(format!("--shape: {error}")))?;
            template::detach()?;
            shape
        }
        None => shape(arguments, config)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match runtime.block_on(template::build(config, shape)) {
        Ok(Built::New(key)) => println!("{key}: made"),
        Ok(Built::There(key)) => println!("{key}: it is there"),
        Ok(Built::Busy(key)) => {
            let text = format!("template {key} is being made by another process; wait for it");
            return Err(Failure::new(text));
        }
        Err(error) => {
            let failure = Failure::new(bulkhead_shim::error::line(&error));
            return Err(failure.with_details(error.last_lines()));
        }
    }
    Ok(0)
}

fn shape(arguments: &Build, config: &Config) -> Result<Shape, Failure> {
    check_size(arguments.vcpus, arguments.memory, config)?;
    let size = Size {
        vcpus: arguments.vcpus.unwrap_or(config.vcpus),
        memory_mib: arguments.memory.unwrap_or(config.memory_mib),
    };
    let spare = match arguments.run {
        true => Size::default(),
        false => size.spare(config),
    };
    Ok(template::shape(config, size, spare))
}

fn listed(store: &Store) -> Result<Vec<Listed>, Failure> {
    let cannot = |error| Failure::new(format!("cannot read the templates: {error}; are you root?"));
    store.list().map_err(cannot)
}

fn list(store: &Store, json: bool) -> Result<u8, Failure> {
    let listed = listed(store)?;
    if json {
        let text = serde_json::to_string_pretty(&listed).expect("made of strings and numbers");
        println!("{text}");
        return Ok(0);
    }
    println!(
        "{:32} {:>7} {:>11} {:>8} {:>8}  STATE",
        "KEY", "VCPUS", "MEMORY", "SIZE", "UNUSED"
    );
    for one in &listed {
        println!("{}", row(one));
    }
    Ok(0)
}

fn row(one: &Listed) -> String {
    let [vcpus, memory] = match &one.basis {
        Some(basis) => {
            let shape = &basis.shape;
            [
                format!("{}+{}", shape.vcpus, shape.spare_vcpus),
                format!("{}+{}", shape.memory_mib, shape.spare_memory_mib),
            ]
        }
        None => ["-"; 2].map(String::from),
    };
    format!(
        "{:32} {vcpus:>7} {memory:>11} {:>4} MiB {:>6} s  {}",
        one.key.to_string(),
        one.bytes >> 20,
        one.idle_secs,
        one.refused.as_deref().unwrap_or("ok")
    )
}

fn drop_all(store: &Store, keys: &[String], all: bool) -> Result<u8, Failure> {
    let keys = match all {
        true => listed(store)?.into_iter().map(|one| one.key).collect(),
        false => keys
            .iter()
            .map(|name| known(store, name))
            .collect::<Result<Vec<Key>, _>>()?,
    };
    for key in &keys {
        store
            .drop(key)
            .map_err(|error| Failure::new(format!("cannot remove template {key}: {error}")))?;
        println!("{key}: removed");
    }
    Ok(0)
}

/// All names are looked at before the first template goes.
fn known(store: &Store, name: &str) -> Result<Key, Failure> {
    let found = Key::parse(name).filter(|key| store.has(key));
    found.ok_or_else(|| {
        let text = format!("there is no template {name:?}; `bulkhead template ls` shows all");
        Failure::new(text)
    })
}
