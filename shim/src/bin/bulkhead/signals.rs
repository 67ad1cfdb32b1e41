//! Signals that are for the container.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Two Ctrl-C within this time mean "now".
const IMPATIENCE: Duration = Duration::from_secs(1);

/// Those that are passed on. The terminal's size is another matter.
const FORWARDED: &[i32] = &[
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

/// What arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A signal for the container.
    Signal(i32),
    /// Ctrl-C again before the first could do anything: kill.
    Impatient,
    /// The terminal has another size.
    Resized,
}

/// The signals of this process, from now on.
pub struct Signals {
    arrivals: mpsc::UnboundedReceiver<i32>,
    interrupted: Option<Instant>,
}

impl Signals {
    /// Starts to catch them. One that the user has told us to ignore (nohup) stays ignored.
    pub fn catch() -> io::Result<Signals> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        for number in FORWARDED.iter().copied().chain([libc::SIGWINCH]) {
            if linux::process::is_ignored(number) {
                continue;
            }
            let mut stream = signal(SignalKind::from_raw(number))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(number).is_ok() {}
            });
        }
        Ok(Signals {
            arrivals,
            interrupted: None,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Arrival {
        let Some(number) = self.arrivals.recv().await else {
            // Only when every task above ended, which the runtime's end does.
            return std::future::pending().await;
        };
        match number {
            libc::SIGWINCH => Arrival::Resized,
            libc::SIGINT => {
                let before = self.interrupted.replace(Instant::now());
                match before.is_some_and(|at| at.elapsed() < IMPATIENCE) {
                    true => Arrival::Impatient,
                    false => Arrival::Signal(number),
                }
            }
            number => Arrival::Signal(number),
        }
    }

    /// Waits for one that asks to end, before there is a container to send it to.
    pub async fn asks_to_end(&mut self) -> i32 {
        loop {
            match self.next().await {
                Arrival::Signal(libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGALRM)
                | Arrival::Resized => {}
                Arrival::Signal(number) => return number,
                Arrival::Impatient => return libc::SIGINT,
            }
        }
    }
}
