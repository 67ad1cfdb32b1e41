//! Log lines to the `log` FIFO that containerd has made in the bundle. Nobody waits for containerd: what does not fit is dropped.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::Arc,
};

use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// Begins to log; without a FIFO, or without a reader, to nowhere.
pub fn begin(debug: bool) {
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log");
    let Ok(fifo) = opened else { return };
    let fifo = Arc::new(fifo);
    let (own, others) = match debug {
        true => (LevelFilter::DEBUG, LevelFilter::WARN),
        // ttrpc logs what it also returns: the error is told once, by us.
        false => (LevelFilter::INFO, LevelFilter::OFF),
    };
    // Not an EnvFilter, whose regular expressions cost more memory than the rest of the log.
    let targets = Targets::new()
        .with_default(others)
        .with_target("bulkhead_shim", own)
        .with_target("containerd_shim_bulkhead_v1", own);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || Lines(fifo.clone()))
        .with_target(false)
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .init();
}

/// A line is one write(2): whole, or not at all.
struct Lines(Arc<File>);

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Full because containerd does not read, or broken because it has gone: it may come back.
        let _ = (&*self.0).write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
