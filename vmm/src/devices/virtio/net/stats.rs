//! A device's counters, written by the threads of its queues.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bulkhead_vmm_config::NetStats;

/// See [`NetStats`].
#[derive(Debug, Default)]
pub struct Stats {
    received: AtomicU64,
    received_bytes: AtomicU64,
    receive_dropped: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    send_dropped: AtomicU64,
    throttled: AtomicU64,
}

impl Stats {
    pub fn received(&self, bytes: usize) {
        self.received.fetch_add(1, Relaxed);
        self.received_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub fn receive_dropped(&self) {
        self.receive_dropped.fetch_add(1, Relaxed);
    }

    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(1, Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub fn send_dropped(&self) {
        self.send_dropped.fetch_add(1, Relaxed);
    }

    pub fn throttled(&self) {
        self.throttled.fetch_add(1, Relaxed);
    }

    /// All of them, now.
    pub fn snapshot(&self) -> NetStats {
        NetStats {
            received: self.received.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            receive_dropped: self.receive_dropped.load(Relaxed),
            sent: self.sent.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            send_dropped: self.send_dropped.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
        }
    }
}
