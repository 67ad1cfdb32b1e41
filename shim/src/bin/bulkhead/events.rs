//! `bulkhead events`: the audit log, and what comes.

use std::{
    io::{self, Stdout, Write},
    os::fd::AsFd,
    time::{Duration, SystemTime},
};

use bulkhead_shim::{
    audit::{Event, Follower, Line, Log, time},
    config::Config,
    text::printable,
};
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::failure::Failure;

/// How long a new line may go unseen, in milliseconds.
const LOOK_EVERY: u8 = 200;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only what happened since then: 2026-11-30T12:00:00Z, 2026-11-30, or how long ago: 90s, 10m,
    /// 2h, 3d
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only of pods whose id begins so
    #[arg(long, value_name = "ID")]
    pod: Option<String>,
    /// Print the lines as they are in the log: JSON, one object a line
    #[arg(long)]
    json: bool,
    /// End with the last line that is there
    #[arg(long)]
    no_follow: bool,
    /// runc's: with ID, what a container of an engine uses, once
    #[arg(long, hide = true, requires = "id")]
    stats: bool,
    /// runc's: with ID, how often it is shown
    #[arg(
        long,
        hide = true,
        requires = "id",
        value_name = "5s",
        default_value = "5s"
    )]
    interval: String,
    /// runc's: a container of an engine
    #[arg(hide = true)]
    id: Option<String>,
}

impl Arguments {
    /// The container, if it is its use that is wanted, and how often it is shown.
    pub fn of_container(&self) -> Result<Option<(&str, Option<Duration>)>, Failure> {
        let Some(id) = self.id.as_deref() else {
            return Ok(None);
        };
        let text = self.interval.strip_suffix('s').unwrap_or(&self.interval);
        let interval = text.parse::<u64>().ok().filter(|secs| *secs > 0);
        let wrong = || {
            Failure::new(format!(
                "--interval {:?} is no time: write 5s",
                self.interval
            ))
        };
        let interval = Duration::from_secs(interval.ok_or_else(wrong)?);
        Ok(Some((id, (!self.stats).then_some(interval))))
    }
}

/// What is shown of the log.
struct Wanted<'a> {
    since: Option<String>,
    pod: Option<&'a str>,
    json: bool,
}

pub fn events(arguments: &Arguments, config: &Config) -> Result<u8, Failure> {
    let Some(log) = Log::of(&config.audit) else {
        let text = "no audit log is kept: audit.path is empty in the configuration";
        return Err(Failure::new(text));
    };
    let since = arguments.since.as_deref().map(|text| {
        let moment = time::read(text, SystemTime::now()).ok_or_else(|| {
            Failure::new(format!(
                "--since {text:?} is no time: write 2026-11-30T12:00:00Z, 2026-11-30, or 90s, 10m, 2h, 3d for how long ago"
            ))
        });
        moment.map(time::written)
    });
    let wanted = Wanted {
        since: since.transpose()?,
        pod: arguments.pod.as_deref(),
        json: arguments.json,
    };
    // Before anything is printed: whoever ends us gets whole lines.
    let signals = signals()?;
    let looked = log.path().symlink_metadata();
    if looked.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        eprintln!(
            "bulkhead: there are no events in {} yet{}",
            log.path().display(),
            match arguments.no_follow {
                true => "",
                false => "; waiting for the first",
            }
        );
    }
    let path = log.path().display().to_string();
    let mut follower = Follower::new(log);
    let mut output = io::stdout();
    let mut ended = show_all(&mut follower, &wanted, &mut output, &path)?;
    while !ended && !arguments.no_follow && wait(&signals, &output)? {
        ended = show_all(&mut follower, &wanted, &mut output, &path)?;
    }
    Ok(0)
}

fn signals() -> nix::Result<SignalFd> {
    let mut ends = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        ends.add(signal);
    }
    ends.thread_block()?;
    SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC)
}

/// Prints what has come. `true`: nobody reads it any more.
fn show_all(
    follower: &mut Follower,
    wanted: &Wanted<'_>,
    output: &mut Stdout,
    path: &str,
) -> Result<bool, Failure> {
    let cannot_read = |error| Failure::new(format!("cannot read the audit log {path}: {error}"));
    while let Some(line) = follower.line().map_err(cannot_read)? {
        if follower.missed() {
            eprintln!("bulkhead: events went out of the log before they were read");
        }
        let Some(text) = wanted.shown(&line) else {
            continue;
        };
        match writeln!(output, "{text}") {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(true),
            other => other?,
        }
    }
    Ok(false)
}

/// Waits for new lines. `false`: for nothing, since a signal asks to end, or nobody reads.
fn wait(signals: &SignalFd, output: &Stdout) -> Result<bool, Failure> {
    let mut fds = [
        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        // Asks for nothing: a pipe whose reader has gone says so all the same.
        PollFd::new(output.as_fd(), PollFlags::empty()),
    ];
    match poll(&mut fds, LOOK_EVERY) {
        Ok(count) => Ok(count == 0),
        Err(nix::Error::EINTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// What every line has, also of a later version's kinds.
#[derive(serde::Deserialize)]
struct Head {
    time: String,
    namespace: String,
    pod: String,
    #[serde(default)]
    container: Option<String>,
    kind: String,
}

impl Wanted<'_> {
    /// A line as it is to be shown; `None`: not at all.
    fn shown(&self, line: &[u8]) -> Option<String> {
        let head: Head = serde_json::from_slice(line).ok()?;
        if self.since.as_ref().is_some_and(|since| head.time < *since)
            || self.pod.is_some_and(|pod| !head.pod.starts_with(pod))
        {
            return None;
        }
        if self.json {
            return String::from_utf8(line.to_vec()).ok();
        }
        let whole: Result<Line, _> = serde_json::from_slice(line);
        let words = match whole {
            Ok(line) => words(&line.event),
            // Of a newer version.
            Err(_) => String::from_utf8_lossy(line).into_owned(),
        };
        let container = match &head.container {
            Some(id) if *id != head.pod => format!(" container {id}"),
            _ => String::new(),
        };
        let text = format!(
            "{} {}/{}{container} {}: {words}",
            head.time, head.namespace, head.pod, head.kind
        );
        Some(printable(&text))
    }
}

/// The layers of a jail in words.
fn layers(event: &Event) -> String {
    let Event::Layers {
        process,
        landlock,
        threads,
        filtered,
        user_namespace,
        accepted_missing,
    } = event
    else {
        return String::new();
    };
    let landlock = match (landlock, accepted_missing.is_empty()) {
        (Some(version), _) => format!("Landlock version {version}"),
        (None, true) => "no Landlock".into(),
        (None, false) => "no Landlock, which the configuration accepts".into(),
    };
    let namespace = match user_namespace {
        true => "a user namespace of its own",
        false => "the host's user namespace",
    };
    format!(
        "{process}: {landlock}; filters of system calls for {filtered} of {threads} threads; {namespace}"
    )
}

/// An event in words.
fn words(event: &Event) -> String {
    match event {
        Event::Switch { name, value } => format!("{name} = {value}"),
        Event::Layers { .. } => layers(event),
        Event::Refused { field, reason } => match field {
            Some(field) => format!("{field}: {reason}"),
            None => reason.clone(),
        },
        Event::NeedsReset { device, reason } => {
            format!("the device {device} stands still until the guest resets it: {reason}")
        }
        Event::Blocked { role, call, number } => {
            format!(
                "the {role} thread made the system call {call} ({number}), which its filter does not allow"
            )
        }
        Event::OfferWithdrawn { port } => {
            format!("the guest had not dialled vsock port {port}, which it was offered")
        }
        Event::Limit {
            of,
            limit,
            count,
            detail,
        } => {
            let count = count.map_or(String::new(), |count| format!("{count} "));
            format!("{limit} of the {of}: {count}{detail}")
        }
        Event::GuestEnd {
            how,
            reason,
            faults,
        } => {
            let faults = faults
                .iter()
                .map(|(fault, count)| format!("{fault} {count}"));
            let faults: Vec<String> = faults.collect();
            match faults.is_empty() {
                true => format!("{how}: {reason}"),
                false => format!("{how}: {reason}; the guest's faults: {}", faults.join(", ")),
            }
        }
        Event::LeftOut { lines, why } => match why.as_str() {
            "rate" => format!("{lines} events, more than one pod may cause"),
            _ => format!("{lines} events, which could not be written"),
        },
    }
}
