//! One virtqueue and the thread that serves it.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::parts::{Data, OutsideMemory, Parts};
use crate::fs::guard::{self, HEADER, REPLY_HEADER, Rule, WRITE_HEAD};
use crate::fs::tree::identity::Worker;
use crate::fs::tree::{Engine, Outcome};

/// Where interrupts go. It may be changed while the ring is served.
pub type Call = Arc<Mutex<Option<File>>>;

/// A started ring.
pub struct Ring {
    /// The queue, ready.
    pub queue: Queue,
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// An eventfd that the guest's notifications write.
    pub kick: File,
    /// See [`Call`].
    pub call: Call,
    /// Set, then kicked, to end the thread.
    pub stop: Arc<AtomicBool>,
}

/// Why a ring is served no more; the guest's fault, or a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    /// The ring's own indices or addresses are wrong.
    Broken,
}

impl Ring {
    /// Serves requests until it is stopped; the index at which to go on.
    ///
    /// # Errors
    /// The thread cannot become a worker.
    pub fn serve(mut self, engine: &Engine) -> io::Result<u16> {
        let mut worker = Worker::new()?;
        let kicks = self.watch()?;
        let memory = self.memory.clone();
        let mut buffers = Buffers::new(&memory);
        loop {
            match self.drain(engine, &mut worker, &mut buffers) {
                Ok(()) => {}
                Err(End::Stopped) => break,
                Err(End::Broken) => {
                    engine.fault(Rule::Chain);
                    // Until the guest resets the device there is nothing to do.
                    while !self.stop.load(Ordering::Acquire) {
                        wait(&kicks)?;
                    }
                    break;
                }
            }
            wait(&kicks)?;
        }
        Ok(self.queue.next_avail())
    }

    /// Watches the guest's notifications. By edges, so that a wake-up costs one system call: the counter is never read, and
    /// each write to it is an edge, whether the VMM made the eventfd blocking or not.
    fn watch(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let edges = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
        epoll.add(&self.kick, edges)?;
        Ok(epoll)
    }

    /// Serves what is available, then asks to be notified.
    fn drain(
        &mut self,
        engine: &Engine,
        worker: &mut Worker,
        buffers: &mut Buffers<'_>,
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
                self.queue.add_used(&*memory, head, used).map_err(broken)?;
                if self.queue.needs_notification(&*memory).map_err(broken)? {
                    self.interrupt();
                }
                if self.stop.load(Ordering::Acquire) {
                    return Err(End::Stopped);
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return Err(End::Stopped);
            }
            // There was more, and it is nothing that can be served: no driver writes such indices.
            if more && !served {
                return Err(End::Broken);
            }
            // True when something came between the last look and the request to be notified (VIRTIO 1.2 §2.7.10).
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
            // It fails only when 2^64 - 2 interrupts are pending: then one is pending.
            let _ = call.write(&1_u64.to_ne_bytes());
        }
    }
}

fn wait(kicks: &Epoll) -> io::Result<()> {
    let mut event = [EpollEvent::empty()];
    loop {
        match kicks.wait(&mut event, EpollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
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
    fn new(memory: &'m GuestMemoryMmap) -> Buffers<'m> {
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
        chain: DescriptorChain<&GuestMemoryMmap>,
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

    /// Sorts a chain's buffers: all that the guest wrote come before all that it will read (VIRTIO 1.2 §2.7.4.2).
    fn collect(&mut self, chain: DescriptorChain<&GuestMemoryMmap>) -> Result<(), OutsideMemory> {
        self.readable.clear();
        self.writable.clear();
        for descriptor in chain {
            if descriptor.is_write_only() {
                self.writable.push(descriptor.addr(), descriptor.len())?;
            } else if self.writable.total() == 0 {
                self.readable.push(descriptor.addr(), descriptor.len())?;
            } else {
                return Err(OutsideMemory);
            }
        }
        Ok(())
    }
}
