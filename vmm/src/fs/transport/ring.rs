//! One virtqueue and the thread that serves it.
//!
//! The thread is there before the VMM speaks, and keeps a [`Worker`]'s identity and a filter of
//! system calls for good. It serves one [`Ring`] after another: each time that the guest's driver
//! starts the queue.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use bulkhead_vmm_config::Role;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{DescriptorChain, Queue, QueueT};

use super::lent::GuestMemory;
use super::parts::{Data, OutsideMemory, Parts};
use crate::fs::guard::{self, HEADER, REPLY_HEADER, Rule, WRITE_HEAD};
use crate::fs::tree::identity::Worker;
use crate::fs::tree::{Engine, Outcome};
use crate::seccomp::{self, SeccompError};

/// Where interrupts go; a write to it does not wait. It may be changed while the ring is served.
pub type Call = Arc<Mutex<Option<File>>>;

/// A started ring.
pub struct Ring {
    /// The queue, ready.
    pub queue: Queue,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// An eventfd that the guest's notifications write.
    pub kick: File,
    /// See [`Call`].
    pub call: Call,
}

/// What a queue's thread is at.
enum Work {
    Nothing,
    /// A ring to be served.
    Given(Ring),
    Starting,
    /// The ring's kick cannot be watched.
    Refused(io::Error),
    Serving,
    /// A ring was served; the index at which to go on.
    Done(u16),
}

struct Desk {
    work: Mutex<Work>,
    changed: Condvar,
    /// The ring shall be served no more.
    stop: AtomicBool,
    /// Has the thread look at `stop`. It is nobody else's: what the VMM gave may wake nobody, and
    /// a write to it may never end.
    wake: EventFd,
}

/// A queue's thread; copies are the same one.
#[derive(Clone)]
pub struct Server(Arc<Desk>);

impl Server {
    /// Starts the thread of the queue with this index.
    ///
    /// # Errors
    /// The thread cannot be made, become a worker or be confined.
    pub fn start(index: usize, engine: Arc<Engine>) -> Result<Server, SeccompError> {
        let name = format!("fs-queue-{index}");
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_flags(flags).map_err(|error| SeccompError::Prepare {
            name: name.clone(),
            source: error.into(),
        })?;
        let server = Server(Arc::new(Desk {
            work: Mutex::new(Work::Nothing),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            wake,
        }));
        let of_thread = server.clone();
        let prepare = move || {
            let events = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            events.add(&of_thread.0.wake, edges())?;
            Ok((of_thread, Worker::new()?, events))
        };
        let work = move |(server, mut worker, events): (Server, Worker, Epoll)| -> () {
            loop {
                let ring = server.next();
                if let Err(error) = events.add(&ring.kick, edges()) {
                    server.set(Work::Refused(error.into()));
                    continue;
                }
                server.set(Work::Serving);
                let next = ring.serve(&engine, &mut worker, &events, &server.0.stop);
                server.set(Work::Done(next));
            }
        };
        // It runs as long as the process does.
        seccomp::spawn(name, Role::FsQueue, prepare, work)?;
        Ok(server)
    }

    /// Hands over a ring; the one before must have been stopped. When this returns, its kicks are
    /// heard.
    ///
    /// # Errors
    /// The kick is nothing that can be watched.
    pub fn give(&self, ring: Ring) -> io::Result<()> {
        self.0.stop.store(false, Ordering::Release);
        self.set(Work::Given(ring));
        let mut work = self.while_work(|work| matches!(work, Work::Given(_) | Work::Starting));
        // It is served until it is stopped.
        match std::mem::replace(&mut *work, Work::Serving) {
            Work::Refused(error) => {
                *work = Work::Nothing;
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Has the ring served no more after the request that is served now; the index at which to go
    /// on.
    pub fn stop(&self) -> u16 {
        self.0.stop.store(true, Ordering::Release);
        // The counter is never read: it is full after 2^64 stops, and each write is an edge.
        let _ = self.0.wake.write(1);
        let mut work = self.while_work(|work| matches!(work, Work::Serving));
        match std::mem::replace(&mut *work, Work::Nothing) {
            Work::Done(next) => next,
            _ => unreachable!("a ring that was given is served until it is done"),
        }
    }

    fn next(&self) -> Ring {
        let mut work = self.while_work(|work| !matches!(work, Work::Given(_)));
        match std::mem::replace(&mut *work, Work::Starting) {
            Work::Given(ring) => ring,
            _ => unreachable!("it was waited for"),
        }
    }

    fn set(&self, work: Work) {
        *self.0.work.lock().expect(UNLOCKED) = work;
        self.0.changed.notify_all();
    }

    fn while_work(&self, mut is: impl FnMut(&Work) -> bool) -> MutexGuard<'_, Work> {
        let work = self.0.work.lock().expect(UNLOCKED);
        let waited = self.0.changed.wait_while(work, |work| is(work));
        waited.expect(UNLOCKED)
    }
}

const UNLOCKED: &str = "no code panics with it locked";

/// By edges, so that a wake-up costs one system call: a counter is never read, and each write to it
/// is an edge, whether or not it had been zero.
fn edges() -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)
}

/// Why a ring is served no more; the guest's fault, or a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    /// The ring's own indices or addresses are wrong.
    Broken,
}

impl Ring {
    /// Serves requests until `stop` says so; the index at which to go on. `events` has the kick and
    /// what wakes for a stop.
    fn serve(
        mut self,
        engine: &Engine,
        worker: &mut Worker,
        events: &Epoll,
        stop: &AtomicBool,
    ) -> u16 {
        self.until_stopped(engine, worker, events, stop);
        // The VMM has the eventfd too: it would be watched on.
        let unwatched = events.delete(&self.kick);
        unwatched.expect("what is open and was watched can be let go");
        self.queue.next_avail()
    }

    fn until_stopped(
        &mut self,
        engine: &Engine,
        worker: &mut Worker,
        events: &Epoll,
        stop: &AtomicBool,
    ) {
        let memory = self.memory.clone();
        let mut buffers = Buffers::new(&memory);
        loop {
            match self.drain(engine, worker, &mut buffers, stop) {
                Ok(()) => {}
                Err(End::Stopped) => return,
                Err(End::Broken) => {
                    engine.fault(Rule::Chain);
                    // Until the guest resets the device there is nothing to do.
                    while !stop.load(Ordering::Acquire) {
                        wait(events);
                    }
                    return;
                }
            }
            wait(events);
        }
    }

    /// Serves what is available, then asks to be notified.
    fn drain(
        &mut self,
        engine: &Engine,
        worker: &mut Worker,
        buffers: &mut Buffers<'_>,
        stop: &AtomicBool,
    ) -> Result<(), End> {
        let memory = self.memory.clone();
        let broken = |_| End::Broken;
        let mut more = false;
        loop {
            let mut served = false;
            self.queue.disable_notification(&*memory).map_err(broken)?;
            while let Some(chain) = self.queue.pop_descriptor_chain(&*memory) {
                served = true;
                let head = chain.head_index();
                let used = buffers.serve(chain, engine, worker);
                if super::lent::failed(&memory) {
                    return Err(End::Broken);
                }
                self.queue.add_used(&*memory, head, used).map_err(broken)?;
                if self.queue.needs_notification(&*memory).map_err(broken)? {
                    self.interrupt();
                }
                if stop.load(Ordering::Acquire) {
                    return Err(End::Stopped);
                }
            }
            if stop.load(Ordering::Acquire) {
                return Err(End::Stopped);
            }
            // There was more, and it is nothing that can be served: no driver writes such indices.
            if more && !served {
                return Err(End::Broken);
            }
            // True when something came between the last look and the request to be notified (VIRTIO
            // 1.2 §2.7.10).
            more = self.queue.enable_notification(&*memory).map_err(broken)?;
            if !more {
                return Ok(());
            }
            // An index that is ahead of everything and yields nothing is one no driver writes.
        }
    }

    fn interrupt(&self) {
        let call = self.call.lock().expect("no code panics with it locked");
        if let Some(mut call) = call.as_ref() {
            // It does not wait: it fails when 2^64 - 2 interrupts are pending, and then one is.
            let _ = call.write(&1_u64.to_ne_bytes());
        }
    }
}

fn wait(events: &Epoll) {
    let mut event = [EpollEvent::empty()];
    while let Err(error) = events.wait(&mut event, EpollTimeout::NONE) {
        let interrupted = error == Errno::EINTR;
        assert!(
            interrupted,
            "epoll_wait(2) on a descriptor that is open fails: {error}"
        );
    }
}

/// What a worker keeps from request to request.
struct Buffers<'m> {
    readable: Parts<'m>,
    writable: Parts<'m>,
    window: Vec<libc::iovec>,
    head: Vec<u8>,
    reply: Vec<u8>,
}

impl<'m> Buffers<'m> {
    fn new(memory: &'m GuestMemory) -> Buffers<'m> {
        Buffers {
            readable: Parts::new(memory),
            writable: Parts::new(memory),
            window: Vec::new(),
            head: Vec::new(),
            reply: Vec::new(),
        }
    }

    /// Serves a chain; how many bytes of it were written.
    fn serve(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        engine: &Engine,
        worker: &mut Worker,
    ) -> u32 {
        if self.collect(chain).is_err() {
            engine.fault(Rule::Chain);
            return 0;
        }
        let total = self.readable.total();
        let mut first = [0; HEADER];
        let copied = self.readable.copy_out(&mut first);
        let length =
            guard::header(&first[..copied]).and_then(|header| guard::head_length(&header, total));
        // Too short or too long: the guard sees as much as says so.
        let length = length.unwrap_or(total.min(WRITE_HEAD));
        self.head.resize(length, 0);
        self.readable.copy_out(&mut self.head);
        let mut data = Data {
            readable: &self.readable,
            writable: &self.writable,
            head: length,
            reply_head: REPLY_HEADER,
            window: &mut self.window,
        };
        let sizes = (total - length, self.writable.total());
        match engine.serve(worker, &self.head, sizes, &mut data, &mut self.reply) {
            Outcome::Silent => 0,
            Outcome::Reply { data } => {
                self.writable.copy_in(&self.reply);
                (self.reply.len() + data) as u32
            }
        }
    }

    /// Sorts a chain's buffers: all that the guest wrote come before all that it will read (VIRTIO
    /// 1.2 §2.7.4.2).
    fn collect(&mut self, chain: DescriptorChain<&GuestMemory>) -> Result<(), OutsideMemory> {
        self.readable.clear();
        self.writable.clear();
        // A chain that loops, leaves its table or has 4 GiB is cut: what is left of it is no
        // request.
        let mut ends = false;
        for descriptor in chain {
            ends = !descriptor.has_next();
            if descriptor.is_write_only() {
                self.writable.push(descriptor.addr(), descriptor.len())?;
            } else if self.writable.total() == 0 {
                self.readable.push(descriptor.addr(), descriptor.len())?;
            } else {
                return Err(OutsideMemory);
            }
        }
        ends.then_some(()).ok_or(OutsideMemory)
    }
}

#[cfg(test)]
mod fuzz;
