//! A signal to a container's init, or to all of its processes, by name or number.

use bulkhead_shim::command_line::Client;
use nix::sys::signal::Signal;

use super::{Engine, status, wait_for};
use crate::failure::Failure;

/// The largest signal number of Linux (signal(7)).
const LAST: u32 = 64;

#[derive(clap::Args)]
pub struct Kill {
    /// To every process of the container
    #[arg(short, long)]
    all: bool,
    /// The container
    id: String,
    /// Name or number
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
}

pub fn kill(engine: &Engine<'_>, words: &Kill) -> Result<u8, Failure> {
    let signal = parse(&words.signal)?;
    let (room, _) = engine.made(&words.id)?;
    wait_for(async {
        let gone = || match words.all {
            // There is nobody left who could be sent one.
            true => Ok(0),
            false => Err(Failure::new("container not running")),
        };
        if status(&room).await? == "stopped" {
            return gone();
        }
        match Client::connect(&room)?.kill(signal, words.all).await {
            Ok(()) => Ok(0),
            Err(error) if error.is_missing() => gone(),
            Err(error) => Err(error.into()),
        }
    })
}

fn parse(word: &str) -> Result<u32, Failure> {
    let unknown = || Failure::new(format!("unknown signal {word:?}"));
    if let Ok(number) = word.parse::<u32>() {
        return match number {
            1..=LAST => Ok(number),
            _ => Err(unknown()),
        };
    }
    let name = word.to_ascii_uppercase();
    let name = match name.strip_prefix("SIG") {
        Some(_) => name,
        None => format!("SIG{name}"),
    };
    let signal: Signal = name.parse().map_err(|_| unknown())?;
    Ok((signal as i32).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_and_numbers_are_signals() {
        for (word, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("sigusr1", 10),
            ("34", 34),
        ] {
            assert_eq!(parse(word).unwrap(), number);
        }
        for bad in ["", "0", "65", "-1", "SIG", "NONE", "9x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
