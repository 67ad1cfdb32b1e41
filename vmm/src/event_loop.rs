//! One epoll thread for everything that is not a vCPU.
//!
//! A handler registers descriptors under keys of its own choice and is called with the key. Keys of removed descriptors may
//! still arrive once, from the same batch of events: a handler ignores keys that it no longer knows and does not reuse them
//! at once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Called on the event loop's thread.
pub trait Handler: Send {
    /// The descriptor registered under `key` is ready.
    fn ready(&mut self, key: u32, events: EventSet);
}

/// A handler's access to the loop's interest list; cheap to clone.
#[derive(Clone)]
pub struct Poller {
    epoll: Arc<Epoll>,
    handler: u32,
}

impl Poller {
    /// Watches `fd`; the handler is called with `key`.
    ///
    /// # Errors
    /// epoll_ctl(2)'s, for instance a descriptor that is already watched.
    pub fn add(&self, fd: &impl AsRawFd, key: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), key, events)
    }

    /// Changes what a watched descriptor is watched for; the empty set mutes all but errors and hang-ups.
    ///
    /// # Errors
    /// epoll_ctl(2)'s.
    pub fn modify(&self, fd: &impl AsRawFd, key: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), key, events)
    }

    /// Stops watching a descriptor; call it before closing.
    ///
    /// # Errors
    /// epoll_ctl(2)'s.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            0,
            EventSet::empty(),
        )
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        key: u32,
        events: EventSet,
    ) -> io::Result<()> {
        let data = u64::from(self.handler) << 32 | u64::from(key);
        self.epoll.ctl(operation, fd, EpollEvent::new(events, data))
    }
}

/// The loop itself: handlers, and the thread's `run`.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    handlers: Vec<Arc<Mutex<dyn Handler>>>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// epoll_create1(2)'s.
    pub fn new() -> io::Result<EventLoop> {
        Ok(EventLoop {
            epoll: Arc::new(Epoll::new()?),
            handlers: Vec::new(),
        })
    }

    /// The poller of the handler that [`EventLoop::attach`] is given next: devices need it while they are made.
    pub fn next_poller(&self) -> Poller {
        let handler = u32::try_from(self.handlers.len()).expect("a machine has few handlers");
        Poller {
            epoll: self.epoll.clone(),
            handler,
        }
    }

    /// Adds the handler that uses the last [`EventLoop::next_poller`].
    pub fn attach(&mut self, handler: Arc<Mutex<dyn Handler>>) {
        self.handlers.push(handler);
    }

    /// Serves events until `stop` says so; it is asked after each batch.
    ///
    /// # Errors
    /// epoll_wait(2)'s but EINTR.
    pub fn run(&mut self, mut stop: impl FnMut() -> bool) -> io::Result<()> {
        while !stop() {
            self.turn(-1)?;
        }
        Ok(())
    }

    /// Serves what is ready until nothing is, or until `limit`.
    ///
    /// # Errors
    /// epoll_wait(2)'s but EINTR.
    pub fn drain(&mut self, limit: Instant) -> io::Result<()> {
        while self.turn(0)? > 0 && Instant::now() < limit {}
        Ok(())
    }

    /// Waits for one batch, at most `timeout` milliseconds, and serves it. Returns its size.
    fn turn(&mut self, timeout: i32) -> io::Result<usize> {
        let mut batch = [EpollEvent::default(); 32];
        let count = match self.epoll.wait(timeout, &mut batch) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &batch[..count] {
            let data = event.data();
            let handler = &self.handlers[(data >> 32) as usize];
            handler
                .lock()
                .expect("a handler does not panic")
                .ready(data as u32, event.event_set());
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    struct Counter(EventFd, Arc<Mutex<Vec<u32>>>);

    impl Handler for Counter {
        fn ready(&mut self, key: u32, _events: EventSet) {
            self.0.read().unwrap();
            self.1.lock().unwrap().push(key);
        }
    }

    #[test]
    fn each_handler_is_called_with_its_own_keys() {
        let mut events = EventLoop::new().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let fds: Vec<EventFd> = (0..2)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
            .collect();
        for (key, fd) in (7..).zip(&fds) {
            events.next_poller().add(fd, key, EventSet::IN).unwrap();
            events.attach(Arc::new(Mutex::new(Counter(
                fd.try_clone().unwrap(),
                seen.clone(),
            ))));
        }
        fds[1].write(1).unwrap();
        events.run(|| !seen.lock().unwrap().is_empty()).unwrap();
        assert_eq!(*seen.lock().unwrap(), [8]);
    }
}
